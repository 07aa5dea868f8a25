"""One start of a training command: its output, its signals, and its remaining processes."""

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
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import psutil

from gcpo.files import why
from gcpo.notices import MARK, TOTAL_STEPS
from gcpo.tools.display import Display
from gcpo.tools.launch import leftovers
from gcpo.tools.launch.leftovers import LAUNCH_VARIABLE, LaunchError, LaunchRecord
from gcpo.tools.launch.log import LOG_FILE, Log, lines_of, without_prefix
from gcpo.tools.launch.metrics import MetricsTail
from gcpo.tools.launch.state import STATE_FILE, RunState, wanted_steps
from gcpo.tools.metrics import METRICS_FILE, step_line

GRACE_SECONDS = 30.0
"""Seconds that a stopped run may take to end before the next, stronger signal."""
RECORD_SECONDS = 10.0
"""Seconds between the launcher's checks of the shared memory of its processes."""
_PR_SET_PDEATHSIG = 1


class Launcher:
    """One start of a training command.

    Attributes:
        output: the last lines of the command's output.
        step: the last step that has metrics.
        stopped_by: the last signal that was passed on, or None.
    """

    def __init__(self, state: RunState, directory: Path, display: Display) -> None:
        """Prepare a start without starting it; its record is put into ``state``, which is saved whenever it changes."""
        self.state, self.directory, self.display = state, directory, display
        self.record = state.launch = LaunchRecord(uuid.uuid4().hex)
        self.step = 0
        self.stopped_by: int | None = None
        self._total = wanted_steps(state.command)
        self._phase = "starting"
        self._tail = MetricsTail(directory / METRICS_FILE)
        self.output: deque[str] = deque(maxlen=20_000)
        self._sentences: dict[str, None] = {}  # for the user, each once
        self._said = 0
        self._stop_times: list[float] = []
        self._pressure = 0
        self._recorded = time.monotonic()

    def run(self) -> int:
        """Run the command to its end and return its exit code.

        Raises:
            LaunchError: the command cannot be started.
            OSError: the log cannot be opened.
        """
        # The handlers are set before the start, so that the command does not inherit an ignored signal.
        with contextlib.closing(Log(self.directory / LOG_FILE)) as log, self._noticing_signals():
            log.write(f"### {time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(self.state.command)}")
            process = self._start()
            reader = threading.Thread(target=self._read_output, args=(process, log), daemon=True)
            reader.start()
            while process.poll() is None:
                self._show()
                self._pass_signals_on(process)
                self._update_record()
                time.sleep(0.25)
            # Workers that outlive the command keep its output open, so end them instead of waiting.
            reader.join(timeout=2)
            self.end_leftovers()
            reader.join(timeout=5)
            self._show()
        return process.returncode

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {
            "TENSORBOARD_DIR": str((self.directory / "tensorboard").resolve()),
            **os.environ,
            LAUNCH_VARIABLE: self.record.id,
            "VERL_FILE_LOGGER_PATH": str((self.directory / METRICS_FILE).resolve()),
            "PYTHONUNBUFFERED": "1",
            "HYDRA_FULL_ERROR": "1",
            "RAY_COLOR_PREFIX": "0",
        }
        try:
            process = subprocess.Popen(
                self.state.command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                preexec_fn=end_with_parent(),
            )
        except OSError as error:
            raise LaunchError(f"can't start {self.state.command[0]}: {error.strerror}") from error
        self.record.pid = process.pid
        with contextlib.suppress(psutil.Error):
            self.record.created = psutil.Process(process.pid).create_time()
        self._save()
        return process

    def _read_output(self, process: subprocess.Popen[bytes], log: Log) -> None:
        assert process.stdout is not None
        for line in lines_of(process.stdout):
            log.write(line)
            self.output.append(line)
            self._sentences |= dict.fromkeys(filter(None, (line.partition(MARK)[2], log.problem)))

    def _show(self) -> None:
        for sentence in list(self._sentences)[self._said :]:
            self.display.note(sentence)
            self._said += 1
        for step, metrics in self._tail.read():
            self.step = max(self.step, step)
            self._total = int(metrics.get(TOTAL_STEPS, self._total or 0)) or None
            if "training/global_step" in metrics and self._phase == "starting":
                self._phase = "training"
                self.display.refresh(self._phase)  # before the line of its first step
            self.display.note(step_line(step, metrics, self._total))
        if self._phase == "training" and self._total is not None and self.step >= self._total:
            self._phase = "finishing"
        if self._phase == "starting":
            self.display.refresh(self._phase, without_prefix(self.output[-1]) if self.output else "")
        else:
            self.display.refresh(self._phase, f"step {self.step}", self.step, self._total)

    def _update_record(self) -> None:
        if time.monotonic() - self._recorded > RECORD_SECONDS:
            self._recorded = time.monotonic()
            if self.record.update():
                self._save()

    def _save(self) -> None:
        try:
            self.state.save(self.directory)
        except OSError as error:
            self._sentences[f"{self.directory / STATE_FILE} cannot be written ({why(error)}); the run goes on"] = None

    # ---- signals -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _noticing_signals(self) -> Iterator[None]:
        def notice(number: int, _frame: FrameType | None) -> None:
            self.stopped_by = number
            self._stop_times.append(time.monotonic())

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handled = [signal.SIGINT, signal.SIGTERM]
        # `nohup` ignores this signal, so that a run survives its terminal; otherwise a closed terminal stops the run.
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            handled.append(signal.SIGHUP)
        before = {number: signal.signal(number, notice) for number in handled}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _pass_signals_on(self, process: subprocess.Popen[bytes]) -> None:
        """Pass signals on; a run that does not stop, or gets a second signal, gets SIGTERM, then SIGKILL."""
        if not self._stop_times:
            return
        self._phase = "stopping (Ctrl-C again: at once)"
        waited = time.monotonic() - self._stop_times[0]
        pressure = max(min(len(self._stop_times), 3), 1 + int(waited / GRACE_SECONDS))
        if pressure > self._pressure:
            self._pressure = pressure
            # The command has no terminal, so a closed terminal is an ordinary stop for it.
            first = signal.SIGINT if self.stopped_by == signal.SIGINT else signal.SIGTERM
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, {1: first, 2: signal.SIGTERM}.get(pressure, signal.SIGKILL))

    def end_leftovers(self) -> None:
        """End the processes of this start that still run (Ray's, if the command was killed).

        Raises:
            LeftoverError: a process cannot be ended.
        """
        self.record.update()
        leftovers.end(self.record.id)
        leftovers.remove_segments(self.record.segments)


def end_with_parent() -> Callable[[], None]:
    """Return a function for the command's process after which the kernel sends it SIGTERM when the launcher ends.

    Without the launcher, its output would not be read and its metrics not be kept.
    """
    prctl = ctypes.CDLL(None, use_errno=True).prctl  # loaded before the fork, after which no lock may be taken
    launcher = os.getpid()

    def set_signal() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != launcher:  # the launcher was killed before the call of prctl
            os._exit(1)

    return set_signal
