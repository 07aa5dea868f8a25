"""One start of a training command: its output, its signals, and what is left when it has ended."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import signal
import subprocess
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

import psutil

from gcpo.tools import report
from gcpo.tools.launch import leftovers
from gcpo.tools.launch.display import Display
from gcpo.tools.launch.errors import error_summary
from gcpo.tools.launch.leftovers import LAUNCH_VARIABLE, LaunchRecord
from gcpo.tools.launch.log import LOG_FILE, Log, split_lines
from gcpo.tools.launch.metrics import MetricsTail, step_line
from gcpo.tools.launch.progress import Progress
from gcpo.tools.launch.state import LaunchError

GRACE_SECONDS = 30.0
"""How long a stopped run may take to end by itself before it is told again, more firmly."""
RECORD_SECONDS = 10.0
"""How often the launcher looks which shared memory its processes use."""
_PR_SET_PDEATHSIG = 1


class Launcher:
    """One start of a training command."""

    def __init__(
        self,
        command: Sequence[str],
        directory: Path,
        display: Display,
        save: Callable[[LaunchRecord], None] = lambda record: None,
    ) -> None:
        """
        Args:
            command: the program and its arguments.
            directory: of the run.
            display: shows progress.
            save: keeps the record of this start whenever it has changed.
        """
        self.command = list(command)
        self.directory = directory
        self.display = display
        self.progress = Progress()
        self.record = LaunchRecord(uuid.uuid4().hex)
        self.stopped_by: int | None = None
        self._save = save
        self._process: subprocess.Popen[bytes] | None = None
        self._stop_times: list[float] = []
        self._pressure = 0
        self._output: deque[str] = deque(maxlen=20_000)
        self._said = 0
        self._recorded = time.monotonic()

    @property
    def launch_id(self) -> str:
        """Marks the processes of this start."""
        return self.record.id

    def run(self) -> int:
        """Run the command to its end; returns its exit code.

        Raises:
            LaunchError: it cannot be started.
            OSError: the log cannot be opened.
        """
        tail = MetricsTail(self.directory / report.METRICS_FILE)
        # The handlers stand before the command starts: it must not inherit that a signal is ignored.
        with contextlib.closing(Log(self.directory / LOG_FILE)) as log, self._forwarding_signals():
            log.write(f"### {time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(self.command)}")
            process = self._process = self._start()
            reader = threading.Thread(target=self._read_output, args=(process, log), daemon=True)
            reader.start()
            while process.poll() is None:
                self._show(tail, log)
                self._press_on()
                self._record()
                time.sleep(0.25)
            # Workers that outlive the command keep its output open: don't wait for them, end them.
            reader.join(timeout=2)
            self.end_leftovers()
            reader.join(timeout=5)
            self._show(tail, log)
        return process.returncode

    def _start(self) -> subprocess.Popen[bytes]:
        try:
            process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=self._environment(),
                start_new_session=True,
                preexec_fn=_end_with_parent(),
            )
        except OSError as error:
            raise LaunchError(f"can't start {self.command[0]}: {error.strerror}") from error
        self.record.pid = process.pid
        with contextlib.suppress(psutil.Error):
            self.record.created = psutil.Process(process.pid).create_time()
        self._save(self.record)
        return process

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

    def _read_output(self, process: subprocess.Popen[bytes], log: Log) -> None:
        assert process.stdout is not None
        descriptor = process.stdout.fileno()
        for line in split_lines(iter(lambda: os.read(descriptor, 65536), b"")):
            log.write(line)
            self._output.append(line)
            self.progress.read(line)

    def _show(self, tail: MetricsTail, log: Log) -> None:
        sentences = [*self.progress.notices, *([log.problem] if log.problem else [])]
        for sentence in sentences[self._said :]:
            self.display.note(sentence)
        self._said = len(sentences)
        for step, metrics in tail.read():
            self.progress.finished_step(step, metrics)
            self.display.note(step_line(step, metrics, self.progress.total))
        self.display.refresh(self.progress)

    def _record(self) -> None:
        if time.monotonic() - self._recorded > RECORD_SECONDS:
            self._recorded = time.monotonic()
            if self.record.update():
                self._save(self.record)

    @contextlib.contextmanager
    def _forwarding_signals(self) -> Iterator[None]:
        def forward(number: int, _frame: FrameType | None) -> None:
            self.stopped_by = number
            self._stop_times.append(time.monotonic())

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handled = [signal.SIGINT, signal.SIGTERM]
        # `nohup` lets a run go on without its terminal by ignoring this signal; without it a closed terminal stops it.
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            handled.append(signal.SIGHUP)
        before = {number: signal.signal(number, forward) for number in handled}
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
            # The command has no terminal of its own, so a closed one is an ordinary stop for it.
            first = signal.SIGINT if self.stopped_by == signal.SIGINT else signal.SIGTERM
            self._signal_group({1: first, 2: signal.SIGTERM, 3: signal.SIGKILL}[pressure])

    def end_leftovers(self) -> int:
        """End the processes of this start that are still there (Ray's, if the command was killed); their number.

        Raises:
            LeftoverError: one cannot be ended.
        """
        self.record.update()
        count = leftovers.end(self.launch_id)
        leftovers.remove_segments(self.record.segments)
        return count


def _end_with_parent() -> Callable[[], None]:
    """For the command's process: the kernel sends it SIGTERM when the launcher is gone, even if that was killed.

    Nobody would read its output or keep its metrics then.
    """
    prctl = ctypes.CDLL(None, use_errno=True).prctl  # loaded before the fork, in which no lock may be taken
    launcher = os.getpid()

    def set_signal() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != launcher:  # it was killed before the line above
            os._exit(1)

    return set_signal
