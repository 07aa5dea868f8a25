"""Runs a training command so that a person can follow it.

``python -m gcpo.launch --output DIR -- COMMAND...`` writes everything that the command prints to ``DIR/train.log``,
its metrics to ``DIR/metrics.jsonl``, and shows what it is doing now, a bar, and one line per step. Started again it
goes on: verl resumes from its checkpoint, the log and the metrics are continued; a run that is complete is left alone.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from gcpo import report, stability

LOG_FILE = "train.log"
STATE_FILE = "run.json"
LAUNCH_VARIABLE = "GCPO_LAUNCH_ID"
"""Set in the command's environment; every process that it starts carries it, and nothing else does."""

GRACE_SECONDS = 30.0
"""How long a stopped run may take to end by itself before it is told again, more firmly."""
HEARTBEAT_SECONDS = 60.0
"""Without a terminal, a line at least this often."""

MAY_CHANGE = (
    "trainer.total_training_steps",
    "trainer.total_epochs",
    "trainer.save_freq",
    "trainer.test_freq",
    "trainer.logger",
    "trainer.resume_mode",
    "trainer.resume_from_path",
    "ray_kwargs.",
)
"""Settings that a run may have other values of when it goes on."""

_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07")
_RAY_PREFIX = re.compile(r"^\((?P<actor>[\w.:-]+) pid=(?P<pid>\d+)(?:, ip=[^)]*)?\) ?")


class LaunchError(Exception):
    """A command that can't be started; the message is one sentence for the user."""


# ---- what the log says ---------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """What the run is doing, as far as its log and its metrics tell."""

    phase: str = "importing verl, Ray and torch"
    step: int = 0
    """Last finished step."""
    start_step: int = 0
    """The step of the checkpoint that the run went on from."""
    total: int | None = None
    checkpoint: str | None = None
    validates_first: bool = True
    training: bool = False

    def read(self, line: str) -> None:
        """Take in one line of the log."""
        if match := re.search(r"'val_before_train': (True|False)", line):
            self.validates_first = match[1] == "True"
        elif match := re.search(r"Total training steps: (\d+)", line):
            self.total = int(match[1])
            self.phase = "starting the workers"
        elif match := re.search(r"Resuming from (\S+), setting global step to (\d+)", line):
            self.start_step = self.step = int(match[2])
        elif match := re.search(r"Training Progress:.*?(\d+)/(\d+)", line):
            self.training = True
            self.step = max(self.step, int(match[1]))
            self.total = int(match[2])
        elif match := re.search(r"Saving checkpoint to (\S+)", line):
            self.checkpoint = match[1]
        elif "Initial validation metrics" in line:
            self.training = True
        elif "Final validation metrics" in line:
            self.training = False
            self.phase = "finishing"
        elif "Creating file logger at" in line:
            self.training = not self.validates_first
            self.phase = "validating before the first step"
        else:
            for marker, phase in _MARKERS:
                if marker in line:
                    self.phase = phase
                    break

    def finished_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take in the metrics of one step."""
        self.step = max(self.step, step)
        if "training/global_step" in metrics:
            self.training = True

    @property
    def label(self) -> str:
        """What to show."""
        if self.training:
            return f"step {self.step + 1}" if self.total is None or self.step < self.total else "finishing"
        return self.phase


_MARKERS = (
    ("ray init kwargs", "starting Ray"),
    ("Started a local Ray instance", "importing again in the trainer's process"),
    ("train and validate dataloader initialized", "starting the workers"),
    ("worker group kwargs", "starting the workers"),
    ("create worker group", "loading the model"),
    ("actor and ref model engine initialized", "starting vLLM"),
    ("reward loop manager initialized", "starting vLLM"),
    ("checkpoint engine manager initialized", "vLLM is up"),
    ("all initialize finished, ready to fit", "syncing weights to vLLM"),
)
"""What verl 0.9.1 logs, and what it does from then on."""


def clean(line: str) -> str:
    """The line without terminal control codes."""
    return _ANSI.sub("", line).rstrip("\r\n")


def split_lines(chunks: Iterable[bytes]) -> Iterator[str]:
    """Lines of a byte stream; a carriage return ends a line too, since progress bars use nothing else."""
    rest = b""
    for chunk in chunks:
        *lines, rest = re.split(rb"\r\n|\n|\r(?!\n)", rest + chunk)
        for line in lines:
            yield clean(line.decode("utf-8", errors="replace"))
    if rest:
        yield clean(rest.decode("utf-8", errors="replace"))


_EXCEPTION = re.compile(
    r"^(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Exit|Timeout|Died)\w*(?:\([\w.]+\))?(?::|$)"
)
_RAY_WRAPPER = re.compile(r"^ray\.exceptions\.RayTaskError")
_WORKER_DIED = re.compile(r"^ray\.exceptions\.\w*(?:Died|Crashed|Actor|OutOfMemory)")
_FRAME = re.compile(r'^\s*File "([^"]+)", line \d+')


def error_summary(lines: Sequence[str], limit: int = 12) -> list[str]:
    """The lines of a failed run's output that say why.

    That is a refusal of our own; else the last exception of the main process and where it was raised; with it the last
    one of a worker where the main process only says that a worker died; else the last lines.
    """
    own = [line for line in lines if line.strip() and not _RAY_PREFIX.match(line)]
    if own and own[-1].startswith(("gcpo: ", "error: ")):
        return [own[-1]]
    found = _last_exception(own, limit)
    if found and not any(_WORKER_DIED.match(line) for line in found):
        return found
    workers = _last_exception([_RAY_PREFIX.sub("", line) for line in lines if _RAY_PREFIX.match(line)], limit)
    return (found or []) + (workers or []) or own[-6:]


def _last_exception(lines: Sequence[str], limit: int) -> list[str] | None:
    indexes = [i for i, line in enumerate(lines) if _EXCEPTION.match(line) and not _RAY_WRAPPER.match(line)]
    if not indexes:
        return None
    index = indexes[-1]
    message = [lines[index]]
    for line in lines[index + 1 : index + limit]:
        if not line.strip() or line.startswith(("Traceback", "(", "[", "The above", "During handling", "Set the env")):
            break
        message.append(line)
    frame = next((line.strip() for line in reversed(lines[:index]) if _FRAME.match(line)), None)
    return ([f"in {frame}"] if frame else []) + message


# ---- what the metrics say ------------------------------------------------------------------------------------------


class MetricsTail:
    """Reads the lines that are added to a metrics file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0
        self._rest = b""

    def read(self) -> list[tuple[int, dict[str, float]]]:
        """Steps that were written since the last call."""
        try:
            with self.path.open("rb") as file:
                if file.seek(0, os.SEEK_END) < self._offset:
                    self._offset, self._rest = 0, b""
                file.seek(self._offset)
                data = file.read()
        except OSError:
            return []
        self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        parsed = (report.parse_line(line.decode("utf-8", errors="replace")) for line in lines)
        return [record for record in parsed if record]


def keep_earlier_metrics(directory: Path) -> None:
    """Put what the metrics file holds aside, since verl's logger empties the file when it starts."""
    current, earlier = directory / report.METRICS_FILE, directory / report.EARLIER_METRICS_FILE
    if current.is_file() and current.stat().st_size:
        with earlier.open("ab") as file:
            data = current.read_bytes()
            file.write(data if data.endswith(b"\n") else data + b"\n")
        current.unlink()


def join_metrics(directory: Path) -> None:
    """Make the metrics file whole again: every step of every start, once, in order."""
    current, earlier = directory / report.METRICS_FILE, directory / report.EARLIER_METRICS_FILE
    if not earlier.is_file():
        return
    steps = report.read_metrics(directory)
    whole = directory / f"{report.METRICS_FILE}.tmp"
    whole.write_text("".join(json.dumps({"step": step, "data": data}) + "\n" for step, data in steps.items()))
    whole.replace(current)
    earlier.unlink()


def step_line(step: int, metrics: Mapping[str, float], total: int | None = None) -> str:
    """One readable line about a step."""
    parts = [f"step {step:>{len(str(total or step))}}" + (f"/{total}" if total else "")]

    def add(text: str, *keys: str, scale: float = 1.0) -> None:
        value = report.first(metrics, *keys)
        if value is not None:
            parts.append(text.format(scale * value))

    held_out = report.held_out_key([metrics])
    add("reward {:.3f}", *report.REWARD_KEYS)
    if held_out:
        add("held-out {:.1f} %", held_out, scale=100)
    upsilon = metrics.get(f"{report.UPSILON}/mean")
    if upsilon is not None:
        spread = metrics.get(f"{report.UPSILON}/spread_in_group")
        parts.append(f"Υ {upsilon:.3f}" + (f"±{spread:.3f}" if spread is not None else ""))
    add("κ-KL {:.4f}", report.CAUSAL_KL)
    missing = report.missing_shares(metrics)
    if missing:
        parts.append(
            "missing "
            + ", ".join(f"{100 * share:.{0 if share >= 0.1 else 1}f} % of {part}" for part, share in missing.items())
        )
    add("length {:.0f}", report.LENGTH)
    seconds = report.stage_seconds(metrics)
    whole = metrics.get("timing_s/step")
    if whole is not None:
        split = ", ".join(
            f"{stage} {seconds[stage]:.1f}" for stage in ("generate", "score", "update") if stage in seconds
        )
        parts.append(f"{whole:.1f} s" + (f" ({split})" if split else ""))
    return "  ".join([*parts, *stability.describe(metrics)])


# ---- what a person sees --------------------------------------------------------------------------------------------


class Display(Protocol):
    """Shows progress: on a terminal, or as plain lines."""

    def note(self, text: str) -> None:
        """Print a line that stays."""

    def refresh(self, progress: Progress) -> None:
        """Show what is going on now."""

    def close(self) -> None:
        """Stop showing."""


class PlainDisplay:
    """Plain lines: every change of phase, every step, and a sign of life in between."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started = self._last = clock()
        self._shown = ""

    def note(self, text: str) -> None:
        self._last = self._clock()
        print(f"[{duration(self._last - self._started):>9}] {text}", flush=True)

    def refresh(self, progress: Progress) -> None:
        label = "training" if progress.training else progress.label
        if label != self._shown:
            self._shown = label
            self.note(label)
        elif self._clock() - self._last > HEARTBEAT_SECONDS:
            self.note(f"still at it: {progress.label}")

    def close(self) -> None:
        pass


class TerminalDisplay:
    """A spinner, what is going on, a bar and the time left under the lines that stay."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
        )
        from rich.progress import Progress as Bar

        self._bar = Bar(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=Console(highlight=False),
            transient=True,
        )
        self._task = self._bar.add_task("", total=None, left="")
        self._eta = Eta()
        self._bar.start()

    def note(self, text: str) -> None:
        self._bar.console.print(text, markup=False, soft_wrap=True)

    def refresh(self, progress: Progress) -> None:
        left = self._eta.left(progress)
        self._bar.update(
            self._task,
            description=progress.label,
            completed=progress.step,
            total=progress.total,
            left=f"about {duration(left)} left" if left is not None else "",
        )

    def close(self) -> None:
        self._bar.stop()


class Eta:
    """Time left, from the steps of this start: the time of the first, which warms up, counts only while it is alone."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._finished: list[tuple[int, float]] = []

    def left(self, progress: Progress) -> float | None:
        """Seconds, None while nothing is known."""
        if progress.training and (not self._finished or progress.step > self._finished[-1][0]):
            self._finished.append((progress.step, self._clock()))
        if progress.total is None or len(self._finished) < 2:
            return None
        first, last = self._finished[1 if len(self._finished) > 2 else 0], self._finished[-1]
        pace = (last[1] - first[1]) / (last[0] - first[0])
        return max(0.0, pace * (progress.total - progress.step) - (self._clock() - last[1]))


def duration(seconds: float) -> str:
    """Seconds for people: ``48 s``, ``3 min 20 s``, ``2 h 05 min``."""
    seconds = int(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


# ---- the state of a run --------------------------------------------------------------------------------------------


@dataclass
class RunState:
    """What is known about a run when it is started again; kept in ``run.json``."""

    command: list[str]
    status: str = "new"
    """``running``, ``complete``, ``failed`` or ``stopped``."""
    starts: int = 0
    seconds: float = 0.0
    exit_code: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, directory: Path) -> RunState | None:
        """The state in ``directory``, None where there is none or it can't be read."""
        try:
            data = json.loads((directory / STATE_FILE).read_text())
            return cls(**{key: data[key] for key in ("command", "status", "starts", "seconds", "exit_code")})
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def save(self, directory: Path) -> None:
        """Write the state."""
        data = {key: getattr(self, key) for key in ("command", "status", "starts", "seconds", "exit_code")}
        temporary = directory / f"{STATE_FILE}.tmp"
        temporary.write_text(json.dumps(data, indent=1) + "\n")
        temporary.replace(directory / STATE_FILE)


def settings_that_differ(before: Sequence[str], now: Sequence[str]) -> list[str]:
    """The arguments that are in one command and not in the other, those in `MAY_CHANGE` left out."""

    def matters(argument: str) -> bool:
        return not argument.lstrip("+~").startswith(MAY_CHANGE)

    # The interpreter's path is no setting.
    old, new = ([argument for argument in command[1:] if matters(argument)] for command in (before, now))
    return [argument for argument in [*old, *new] if (argument in old) != (argument in new)]


def wanted_steps(command: Sequence[str]) -> int | None:
    """The number of steps that the command asks for, None where it leaves that to the configuration."""
    values = [a.split("=", 1)[1] for a in command if a.lstrip("+").startswith("trainer.total_training_steps=")]
    return int(values[-1]) if values and values[-1].isdigit() else None


# ---- running -------------------------------------------------------------------------------------------------------


class Launcher:
    """One start of a training command."""

    def __init__(self, command: Sequence[str], directory: Path, display: Display) -> None:
        self.command = list(command)
        self.directory = directory
        self.display = display
        self.progress = Progress()
        self.launch_id = uuid.uuid4().hex
        self.stopped_by: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._stop_times: list[float] = []
        self._pressure = 0
        self._output: deque[str] = deque(maxlen=20_000)

    def run(self) -> int:
        """Run the command to its end; returns its exit code."""
        tail = MetricsTail(self.directory / report.METRICS_FILE)
        # The handlers stand before the command starts: it must not inherit that a signal is ignored.
        with (self.directory / LOG_FILE).open("a", encoding="utf-8", buffering=1) as log, self._forwarding_signals():
            log.write(f"### {time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(self.command)}\n")
            process = self._process = self._start()
            reader = threading.Thread(target=self._read_output, args=(process, log), daemon=True)
            reader.start()
            while process.poll() is None:
                self._show(tail)
                self._press_on()
                time.sleep(0.25)
            # Workers that outlive the command keep its output open: don't wait for them, end them.
            reader.join(timeout=2)
            self.end_leftovers()
            reader.join(timeout=5)
            self._show(tail)
        return process.returncode

    def _start(self) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=self._environment(),
                start_new_session=True,
            )
        except OSError as error:
            raise LaunchError(f"can't start {self.command[0]}: {error.strerror}") from error

    def errors(self) -> list[str]:
        """Why the command failed."""
        return error_summary(list(self._output))

    def _environment(self) -> dict[str, str]:
        environment = dict(os.environ)
        environment |= {
            LAUNCH_VARIABLE: self.launch_id,
            "VERL_FILE_LOGGER_PATH": str((self.directory / report.METRICS_FILE).resolve()),
            "PYTHONUNBUFFERED": "1",
            "HYDRA_FULL_ERROR": "1",
            "RAY_COLOR_PREFIX": "0",
        }
        environment.setdefault("TENSORBOARD_DIR", str((self.directory / "tensorboard").resolve()))
        return environment

    def _read_output(self, process: subprocess.Popen[bytes], log: Any) -> None:
        assert process.stdout is not None
        descriptor = process.stdout.fileno()
        for line in split_lines(iter(lambda: os.read(descriptor, 65536), b"")):
            with contextlib.suppress(ValueError):  # the log is closed when the command has ended
                log.write(line + "\n")
            self._output.append(line)
            self.progress.read(line)

    def _show(self, tail: MetricsTail) -> None:
        for step, metrics in tail.read():
            self.progress.finished_step(step, metrics)
            self.display.note(step_line(step, metrics, self.progress.total))
        self.display.refresh(self.progress)

    @contextlib.contextmanager
    def _forwarding_signals(self) -> Iterator[None]:
        def forward(number: int, _frame: FrameType | None) -> None:
            self.stopped_by = number
            self._stop_times.append(time.monotonic())

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _signal_group(self, number: int) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)

    def _press_on(self) -> None:
        """Pass a signal on; a run that doesn't stop, or is told again, gets SIGTERM, then SIGKILL."""
        if not self._stop_times:
            return
        if self._pressure == 0:
            self.progress.training = False
            self.progress.phase = "stopping (Ctrl-C again: at once)"
        waited = time.monotonic() - self._stop_times[0]
        pressure = max(min(len(self._stop_times), 3), 1 + (waited > GRACE_SECONDS) + (waited > 2 * GRACE_SECONDS))
        if pressure > self._pressure:
            self._pressure = pressure
            self._signal_group({1: self.stopped_by or signal.SIGTERM, 2: signal.SIGTERM, 3: signal.SIGKILL}[pressure])

    def end_leftovers(self, patience: float = 10.0) -> int:
        """End the processes of this start that are still there (Ray's, if the command was killed); their number."""
        remaining = processes_of(self.launch_id)
        count = len(remaining)
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in remaining:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, number)
            deadline = time.monotonic() + patience
            while remaining and time.monotonic() < deadline:
                time.sleep(0.1)
                remaining = processes_of(self.launch_id)
        return count


def processes_of(launch_id: str) -> list[int]:
    """The processes that one start of a command started, found by the variable in their environment."""
    mark = f"{LAUNCH_VARIABLE}={launch_id}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def launch(command: Sequence[str], directory: Path, *, resume_changed: bool = False) -> int:
    """Start the run in ``directory`` or go on with it; returns the command's exit code."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LaunchError(f"can't make {directory}: {error.strerror}") from error
    with _sole_launch_in(directory):
        return _launch(command, directory, resume_changed=resume_changed)


@contextlib.contextmanager
def _sole_launch_in(directory: Path) -> Iterator[None]:
    with (directory / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise LaunchError(f"a run is going on in {directory}; wait for it or give another --output") from error
        yield


def _launch(command: Sequence[str], directory: Path, *, resume_changed: bool) -> int:
    before = RunState.load(directory)
    if before and before.status != "new":
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
            print(f"{directory} holds the complete run ({max(steps, default=0)} steps): nothing to train")
            return 0
    keep_earlier_metrics(directory)
    state = RunState(
        list(command),
        status="running",
        starts=(before.starts if before else 0) + 1,
        seconds=before.seconds if before else 0.0,
    )
    state.save(directory)
    on_terminal = sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    started = time.monotonic()
    print(f"full log: {directory / LOG_FILE}", flush=True)
    display: Display = TerminalDisplay() if on_terminal else PlainDisplay()
    launcher = Launcher(command, directory, display)
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
        state.seconds += time.monotonic() - started
        join_metrics(directory)
        state.save(directory)
    took = duration(time.monotonic() - started)
    if state.status == "complete":
        print(f"done after {took}: {launcher.progress.step} steps")
    elif state.status == "stopped":
        at = f" at step {launcher.progress.step}" if launcher.progress.step else ""
        print(f"stopped after {took}{at}; the same command goes on from the checkpoint")
        code = 128 + (launcher.stopped_by or 0)
    else:
        print(f"\nerror: the run failed after {took} with exit code {code}:", file=sys.stderr)
        for line in launcher.errors():
            print(f"  {line}", file=sys.stderr)
        print(f"full log: {directory / LOG_FILE}", file=sys.stderr)
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: see the module's description."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    own, separator, command = _split(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m gcpo.launch",
        usage="python -m gcpo.launch --output DIR [--resume-changed] -- COMMAND...",
        description=(__doc__ or "").split("\n\n")[0],
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
        print(f"error: {error}", file=sys.stderr)
        return 2


def _split(arguments: list[str]) -> tuple[list[str], bool, list[str]]:
    if "--" not in arguments:
        return arguments, False, []
    index = arguments.index("--")
    return arguments[:index], True, arguments[index + 1 :]


if __name__ == "__main__":
    sys.exit(main())
