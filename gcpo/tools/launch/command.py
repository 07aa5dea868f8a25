"""The command line ``python -m gcpo.tools.launch``, and what surrounds one start: the run's state in its folder."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from gcpo.files import is_disk_full, sole_user, why
from gcpo.tools import report
from gcpo.tools.launch import leftovers
from gcpo.tools.launch.display import Display, Guarded, PlainDisplay, TerminalDisplay, duration
from gcpo.tools.launch.leftovers import LaunchRecord
from gcpo.tools.launch.log import LOG_FILE
from gcpo.tools.launch.metrics import join_metrics, keep_earlier_metrics
from gcpo.tools.launch.run import Launcher
from gcpo.tools.launch.state import STATE_FILE, LaunchError, RunState, settings_that_differ, wanted_steps


def launch(command: Sequence[str], directory: Path, *, resume_changed: bool = False) -> int:
    """Start the run in ``directory`` or go on with it; returns the command's exit code.

    Raises:
        LaunchError: it cannot be started, or ``directory`` cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LaunchError(f"can't make {directory}: {error.strerror}") from error
    try:
        with sole_user(directory):
            return _launch(command, directory, resume_changed=resume_changed)
    except BlockingIOError as error:
        raise LaunchError(f"a run is going on in {directory}; wait for it or give another --output") from error
    except leftovers.LeftoverError as error:
        raise LaunchError(str(error)) from error
    except OSError as error:
        raise LaunchError(f"can't write into {directory}: {_write_error(error)}") from error


def _write_error(error: OSError) -> str:
    advice = "; make room and start the same command again" if is_disk_full(error) else ""
    return f"{why(error)}{advice}"


def _launch(command: Sequence[str], directory: Path, *, resume_changed: bool) -> int:
    before = RunState.load(directory)
    if before and before.launch:
        sentence = leftovers.clear(before.launch, before.status == "running")
        if sentence:
            say(sentence)
    if before and before.status != "new" and _is_complete(before, command, directory, resume_changed):
        return 0
    keep_earlier_metrics(directory)
    state = RunState(
        list(command),
        status="running",
        starts=(before.starts if before else 0) + 1,
        seconds=before.seconds if before else 0.0,
    )
    return _run(state, directory)


def _is_complete(before: RunState, command: Sequence[str], directory: Path, resume_changed: bool) -> bool:
    """Whether nothing is left to train.

    Raises:
        LaunchError: the settings are others.
    """
    differing = settings_that_differ(before.command, command)
    if differing and not resume_changed:
        raise LaunchError(
            f"{directory} holds a run with other settings ({', '.join(differing[:6])}); "
            "give another --output, remove it, or go on from its checkpoint with --resume-changed"
        )
    steps = report.read_metrics(directory)
    wanted = wanted_steps(command)
    same_length = wanted == wanted_steps(before.command)
    reached = wanted is not None and bool(steps) and max(steps) >= wanted
    if before.status == "complete" and (same_length or reached) and not differing:
        say(f"{directory} holds the complete run ({max(steps, default=0)} steps): nothing to train")
        return True
    return False


def _run(state: RunState, directory: Path) -> int:
    display = Guarded(_make_display)
    launcher = Launcher(state.command, directory, display, _saver(state, directory, display))
    state.launch = launcher.record
    state.save(directory)
    started, before = time.monotonic(), state.seconds
    say(f"full log: {directory / LOG_FILE}")
    try:
        code = launcher.run()
    except BaseException:
        launcher.end_leftovers()
        state.status = "failed"
        raise
    else:
        state.exit_code = code
        state.status = "complete" if code == 0 else "stopped" if launcher.stopped_by else "failed"
    finally:
        display.close()
        state.seconds = before + time.monotonic() - started
        with _reporting_full_disk(directory / report.METRICS_FILE, "its lines are in two files until the next start"):
            join_metrics(directory)
        with _reporting_full_disk(directory / STATE_FILE, "the next start will take this run for one that was killed"):
            state.save(directory)
    return _conclude(state, launcher, directory, duration(time.monotonic() - started))


def _make_display() -> Display:
    on_terminal = sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    return TerminalDisplay() if on_terminal else PlainDisplay()


def _saver(state: RunState, directory: Path, display: Display) -> Callable[[LaunchRecord], None]:
    """Saves the state while the run goes on; says once that it cannot be saved."""
    said = False

    def save(record: LaunchRecord) -> None:
        nonlocal said
        state.launch = record
        try:
            state.save(directory)
        except OSError as error:
            if not said:
                said = True
                display.note(f"{directory / STATE_FILE} cannot be written ({why(error)}); the run goes on")

    return save


@contextlib.contextmanager
def _reporting_full_disk(path: Path, consequence: str) -> Iterator[None]:
    """At the end of a run an error of a file must not hide how the run ended."""
    try:
        yield
    except OSError as error:
        say(f"warning: {path} cannot be written ({why(error)}); {consequence}", sys.stderr)


def _conclude(state: RunState, launcher: Launcher, directory: Path, took: str) -> int:
    code = state.exit_code or 0
    if state.status == "complete":
        say(f"done after {took}: {launcher.progress.step} steps")
    elif state.status == "stopped":
        at = f" at step {launcher.progress.step}" if launcher.progress.step else ""
        say(f"stopped after {took}{at}; the same command goes on from the checkpoint")
        code = 128 + (launcher.stopped_by or 0)
    else:
        say(f"\nerror: the run failed after {took} with exit code {code}:", sys.stderr)
        for line in launcher.errors():
            say(f"  {line}", sys.stderr)
        say(f"full log: {directory / LOG_FILE}", sys.stderr)
    return code


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line; a terminal that was closed, or a full disk under a redirected output, must not end the run."""
    stream = stream or sys.stdout
    try:
        print(text, file=stream, flush=True)
    except (OSError, ValueError):
        # Python would try again at its end, and then exit with another code.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: see the package's description."""
    from gcpo.tools import launch as package

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    own, separator, command = _split(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m gcpo.tools.launch",
        usage="python -m gcpo.tools.launch --output DIR [--resume-changed] -- COMMAND...",
        description=(package.__doc__ or "").split("\n\n")[0],
    )
    parser.add_argument("--output", type=Path, required=True, help="directory of the run: log, metrics, curves")
    parser.add_argument(
        "--resume-changed", action="store_true", help="go on from a checkpoint that was made with other settings"
    )
    options = parser.parse_args(own)
    if not separator or not command:
        parser.error("give the training command after --")
    try:
        return launch(command, options.output, resume_changed=options.resume_changed)
    except LaunchError as error:
        say(f"error: {error}", sys.stderr)
        return 2


def _split(arguments: list[str]) -> tuple[list[str], bool, list[str]]:
    if "--" not in arguments:
        return arguments, False, []
    index = arguments.index("--")
    return arguments[:index], True, arguments[index + 1 :]
