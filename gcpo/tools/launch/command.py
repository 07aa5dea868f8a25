"""The command line ``python -m gcpo.tools.launch``, which keeps the run's state in its folder."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from gcpo.files import is_disk_full, sole_user, why
from gcpo.tools import report
from gcpo.tools.display import Display, duration, say
from gcpo.tools.launch import leftovers
from gcpo.tools.launch.leftovers import LaunchError
from gcpo.tools.launch.log import LOG_FILE, error_summary
from gcpo.tools.launch.metrics import join_metrics, keep_earlier_metrics
from gcpo.tools.launch.run import Launcher
from gcpo.tools.launch.state import STATE_FILE, RunState, settings_that_differ, wanted_steps
from gcpo.tools.metrics import METRICS_FILE, read_metrics


def launch(command: Sequence[str], directory: Path, *, resume_changed: bool = False) -> int:
    """Start or resume the run in ``directory``; return the command's exit code.

    Raises:
        LaunchError: the command cannot be started, or ``directory`` cannot be written.
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
    except OSError as error:
        advice = "; make room and start the same command again" if is_disk_full(error) else ""
        raise LaunchError(f"can't write into {directory}: {why(error)}{advice}") from error


def _launch(command: Sequence[str], directory: Path, *, resume_changed: bool) -> int:
    before = RunState.load(directory)
    if before and before.launch:
        if sentence := leftovers.clear(before.launch, before.status == "running"):
            say(sentence)
    if before and before.status != "new" and _is_complete(before, command, directory, resume_changed):
        return 0
    keep_earlier_metrics(directory)
    starts, seconds = (before.starts, before.seconds) if before else (0, 0.0)
    return _run(RunState(list(command), "running", starts + 1, seconds), directory)


def _is_complete(before: RunState, command: Sequence[str], directory: Path, resume_changed: bool) -> bool:
    """Return whether the run is already complete.

    Raises:
        LaunchError: the settings have changed.
    """
    differing = settings_that_differ(before.command, command)
    if differing and not resume_changed:
        raise LaunchError(
            f"{directory} holds a run with other settings ({', '.join(differing[:6])}); "
            "give another --output, remove it, or go on from its checkpoint with --resume-changed"
        )
    last, wanted = max(read_metrics(directory), default=0), wanted_steps(command)
    enough = wanted == wanted_steps(before.command) or (wanted is not None and last >= wanted)
    if before.status == "complete" and enough and not differing:
        say(f"{directory} holds the complete run ({last} steps): nothing to train")
        return True
    return False


def _run(state: RunState, directory: Path) -> int:
    display = Display()
    launcher = Launcher(state, directory, display)
    state.save(directory)
    started, before = time.monotonic(), state.seconds
    say(f"full log: {directory / LOG_FILE}")
    try:
        state.exit_code = launcher.run()
        state.status = "complete" if state.exit_code == 0 else "stopped" if launcher.stopped_by else "failed"
    except BaseException:
        launcher.end_leftovers()
        state.status = "failed"
        raise
    finally:
        display.close()
        state.seconds = before + time.monotonic() - started
        with _warning(directory / METRICS_FILE, "its lines are in two files until the next start"):
            join_metrics(directory)
        with _warning(directory / STATE_FILE, "the next start will take this run for one that was killed"):
            state.save(directory)
    return _conclude(launcher, duration(time.monotonic() - started))


@contextlib.contextmanager
def _warning(path: Path, consequence: str) -> Iterator[None]:
    """Warn if a file cannot be written at the end of a run, so that the error does not hide the run's result."""
    try:
        yield
    except OSError as error:
        say(f"warning: {path} cannot be written ({why(error)}); {consequence}", sys.stderr)


def _conclude(launcher: Launcher, took: str) -> int:
    """Print how the run ended; return the launcher's exit code."""
    code = launcher.state.exit_code or 0
    if launcher.state.status == "complete":
        say(f"done after {took}: {launcher.step} steps")
    elif launcher.state.status == "stopped":
        at = f" at step {launcher.step}" if launcher.step else ""
        say(f"stopped after {took}{at}; the same command goes on from the checkpoint")
        code = 128 + (launcher.stopped_by or 0)
    else:
        lines = [f"\nerror: the run failed after {took} with exit code {code}:", *error_summary(list(launcher.output))]
        say("\n  ".join(lines), sys.stderr)
        say(f"full log: {launcher.directory / LOG_FILE}", sys.stderr)
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments and launch the command; see the package's description."""
    own = list(sys.argv[1:] if arguments is None else arguments)
    start = own.index("--") if "--" in own else len(own)
    own, command = own[:start], own[start + 1 :]
    parser = argparse.ArgumentParser(
        prog="python -m gcpo.tools.launch",
        usage="python -m gcpo.tools.launch --output DIR [--resume-changed] [--report] -- COMMAND...",
        description="Runs a training command so that a person can follow it.",
    )
    parser.add_argument("--output", type=Path, required=True, help="directory of the run: log, metrics, curves")
    parser.add_argument(
        "--resume-changed", action="store_true", help="go on from a checkpoint that was made with other settings"
    )
    parser.add_argument("--report", action="store_true", help="then print the report of the run, if it is complete")
    options = parser.parse_args(own)
    if not command:
        parser.error("give the training command after --")
    try:
        code = launch(command, options.output, resume_changed=options.resume_changed)
    except LaunchError as error:
        say(f"error: {error}", sys.stderr)
        return 2
    return report.main([str(options.output)]) if options.report and code == 0 else code
