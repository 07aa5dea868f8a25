"""Executes the runs of a comparison, each in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from gcpo.files import write_atomically
from gcpo.settings import ConfigError
from gcpo.tools.compare.metrics import final_evaluation
from gcpo.tools.compare.runs import (
    MAKE,
    MODULES,
    RECORD_FILE,
    ResultsError,
    Run,
    folders,
    is_missing,
    profile,
    provenance,
)
from gcpo.tools.display import duration, say
from gcpo.tools.launch.log import error_summary
from gcpo.tools.launch.run import end_with_parent
from gcpo.tools.metrics import METRICS_FILE, read_metrics

LOG_FILE = "output.log"
ON_THE_CPU = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
GRACE_SECONDS = 75.0
"""How long a stopped run may take to end; the launcher of verl's runs takes up to 60."""


def execute(runs: Sequence[Run], jobs: int, *, retry: bool = False) -> None:
    """Run what has no record, at most ``jobs`` at a time; a run that fails gets a record that says so.

    Args:
        runs: all of a comparison.
        jobs: runs that go on at the same time.
        retry: also run again what failed.

    Raises:
        ResultsError: a record of another configuration or version, or the trainer is not here.
        KeyboardInterrupt: Ctrl-C or a signal to end; the runs that were going on have been ended then.
    """
    records = {run: run.record() for run in runs}
    waiting = [run for run, record in records.items() if record is None or (retry and record["state"] == "failed")]
    if waiting:
        _require(MODULES[waiting[0].configuration["trainer"]])
    ended = len(runs) - len(waiting)
    if ended:
        say(f"{ended} of {len(runs)} runs are there already")
    going_on: list[_Started] = []
    with _signals_interrupt():
        try:
            while waiting or going_on:
                while waiting and len(going_on) < jobs:
                    going_on.append(_Started(waiting.pop(0)))
                for one in [one for one in going_on if one.child.poll() is not None]:
                    going_on.remove(one)
                    ended += 1
                    say(f"{ended}/{len(runs)}  {one.run}: {one.conclude()}")
                time.sleep(0.1)
        finally:
            _stop([one.child for one in going_on])


def make_missing(tasks: Iterable[str]) -> None:
    """Make the tasks whose data or model is missing, which takes minutes; their maker prints its progress.

    Raises:
        ConfigError: a task cannot be made.
        ResultsError: their maker is not here.
    """
    for task in filter(is_missing, tasks):
        _require(MODULES["tasks"])
        command = [sys.executable, "-m", MODULES["tasks"], task]
        data, model = folders(task)
        say(f"{data} or {model} is missing: making the task (minutes)")
        if code := subprocess.run(command, env={**ON_THE_CPU, **os.environ}).returncode:
            raise ConfigError(f"{data} and {model} can't be made: `{MAKE} {task}` ended with exit code {code}")


def _require(module: str) -> None:
    here = Path(*module.split(".")).with_suffix(".py").is_file()
    if not here and importlib.util.find_spec(module.partition(".")[0]) is None:
        raise ResultsError(f"{module} can't be imported; start in the root of the repository")


class _Started:
    """A run that goes on."""

    def __init__(self, run: Run) -> None:
        self.run, self.provenance, self.started = run, provenance(), time.monotonic()
        trainer = run.configuration["trainer"]
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / RECORD_FILE).unlink(missing_ok=True)
        if trainer == "one_file":  # verl's runs go on where they stopped: their launcher sees to it
            (run.folder / METRICS_FILE).unlink(missing_ok=True)
        with (run.folder / LOG_FILE).open("wb") as log:
            self.child = subprocess.Popen(
                run.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**(ON_THE_CPU if trainer == "one_file" or profile() == "cpu" else {}), **os.environ},
                start_new_session=True,
                preexec_fn=end_with_parent(),
            )

    def conclude(self) -> str:
        """Write the record of the run, which has ended; returns a line about it."""
        run, code, seconds = self.run, self.child.returncode, time.monotonic() - self.started
        steps = read_metrics(run.folder)
        final, last, wanted = final_evaluation(steps), max(steps, default=0), run.configuration["steps"]
        error: list[str] = []
        if code:
            error = error_summary((run.folder / LOG_FILE).read_text(errors="replace").splitlines())
            error.append(f"it was ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}")
        elif last != wanted or "held_out" not in final:
            error = [f"its metrics end at step {last} of {wanted}, or lack the held-out accuracy there"]
        record = {
            **self.provenance,
            "state": "failed" if error else "ok",
            "configuration": run.configuration,
            "command": run.command(),
            "seconds": round(seconds, 1),
            "exit_code": code,
            "final": final,
            "error": error,
        }
        write_atomically(run.folder / RECORD_FILE, json.dumps(record, indent=1) + "\n")
        if error:
            return f"failed: {'; '.join(line.strip() for line in error[-2:])} ({run.folder / LOG_FILE})"
        return f"{100 * final['held_out']:.1f} % held-out after {duration(seconds)}"


def _stop(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """Send SIGTERM to the process groups, and SIGKILL after `GRACE_SECONDS` or a second Ctrl-C."""
    try:
        for child in children:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGTERM)
        end = time.monotonic() + GRACE_SECONDS
        for child in children:
            child.wait(max(0.0, end - time.monotonic()))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        pass
    finally:
        for child in children:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Let SIGTERM and a closed terminal act as Ctrl-C. `nohup` ignores the latter.

    A shell script starts its background commands with SIGINT ignored; the handler is set for it too, so that
    ``kill -INT`` works and the runs do not inherit the ignored signal.
    """
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
