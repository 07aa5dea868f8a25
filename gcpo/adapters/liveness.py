"""Monitoring of a run's processes: a dead process ends the run with one sentence instead of an endless wait.

verl waits for its Ray actors without a limit, and some of these waits cannot fail: the replay buffer polls for groups
that a dead agent loop never finishes, and the actor sends weights to a dead engine core. A thread of the
trainer's process therefore asks Ray for the states of the run's actors, and every vLLM server whether its engine runs.
No time limit is used: a step may take any time while all processes run.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayTaskError
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from gcpo.adapters.processes import OUT_OF_MEMORY, Watch, is_death
from gcpo.checkpoints import CheckpointError, way_on
from gcpo.faults import RunStoppedError

logger = logging.getLogger(__name__)

INTERVAL_SECONDS = 2.0
"""Seconds between two checks."""
SERVER_ANSWER_SECONDS = 5.0
"""Seconds to wait for a server. A busy server may not answer in time; Ray reports a dead process."""
DEATH_NOTICE_SECONDS = 5.0
"""Seconds to wait for Ray to notice a death, which may be later than the failing call."""
LAST_RESORT_SECONDS = 15.0
"""Seconds after a death in which the trainer can leave its wait before its process is ended."""
WAKE_SIGNAL = signal.SIGUSR2
"""The signal that interrupts a wait of the trainer's main thread."""

_FAULT_KEY = b"gcpo_fault:"


# ---- the trainer -----------------------------------------------------------------------------------------------------


class Watchdog:
    """A thread that checks regularly, and interrupts the main thread's wait when a process has died.

    Args:
        watch: the check.
        last_resort: called in the thread if the main thread has not reacted in time.
        interval: seconds between checks.
        patience: seconds that the main thread has to react.
    """

    def __init__(
        self,
        watch: Watch,
        last_resort: Callable[[str], None],
        interval: float = INTERVAL_SECONDS,
        patience: float = LAST_RESORT_SECONDS,
    ) -> None:
        self.watch = watch
        self.last_resort = last_resort
        self.interval = interval
        self.patience = patience
        self.death: str | None = None
        self._inside = False
        self._timer: threading.Timer | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Make a death raise KeyboardInterrupt in the main thread inside the ``with`` block, during any wait."""
        in_main = threading.current_thread() is threading.main_thread()
        before = signal.signal(WAKE_SIGNAL, self._wake) if in_main else None
        self._inside = in_main
        # Each block needs a new event, because the thread of the previous block may still run a check.
        over = threading.Event()
        threading.Thread(target=self._run, args=(over,), name="gcpo-watchdog", daemon=True).start()
        try:
            yield
        finally:
            self._inside = False
            over.set()
            if in_main:
                signal.signal(WAKE_SIGNAL, signal.SIG_IGN if before is None else before)

    def _wake(self, number: int, frame: FrameType | None) -> None:
        # Ray's waits propagate no other exception of a signal handler.
        if self._inside:
            raise KeyboardInterrupt

    def _run(self, over: threading.Event) -> None:
        told = False
        while not over.wait(self.interval):
            try:
                death = self.watch.look()
            except Exception as error:  # Ray's control store does not answer, which says nothing about an actor.
                if not told:
                    logger.warning("gcpo: Ray cannot be asked for the states of the run's processes: %s", error)
                told = True
                continue
            if death is not None and not over.is_set():
                self.end(death)
                return

    def end(self, death: str) -> None:
        """End the run because of ``death``: wake the main thread, and limit the time until it stops."""
        self.death = death
        logger.error("gcpo: %s", death)
        self.arm(death)
        if self._inside and (main := threading.main_thread().ident):
            signal.pthread_kill(main, WAKE_SIGNAL)

    def arm(self, death: str) -> None:
        """Call ``last_resort`` in ``patience`` seconds, once.

        The call is not cancelled when the main thread reacts, because its cleanup may also wait for the dead process.
        """
        if self._timer is None:
            self._timer = threading.Timer(self.patience, self.last_resort, [death])
            self._timer.daemon = True
            self._timer.start()

    def verdict(self, error: BaseException | None = None) -> str | None:
        """Return the known death or None; after an error, give Ray some seconds to notice a death."""
        patience = DEATH_NOTICE_SECONDS if error is not None and is_death(error) else 0.0
        deadline = time.monotonic() + patience
        while self.death is None:
            try:
                self.death = self.watch.look(SERVER_ANSWER_SECONDS)
            except Exception as unreachable:  # Ray itself is dead, which says nothing about an actor.
                logger.warning("gcpo: Ray cannot be asked for the states of the run's processes: %s", unreachable)
                return None
            if time.monotonic() >= deadline:
                break
            time.sleep(0.2)
        return self.death


class WatchedTrainer(PPOTrainerSync):
    """verl's synchronous trainer, which ends with one sentence when one of the run's processes dies."""

    watchdog: Watchdog

    def __init__(self, config: Any) -> None:
        own = ray.get_runtime_context().get_actor_id() if ray.is_initialized() else None
        self.watchdog = Watchdog(Watch(ignore=frozenset([own] if own else [])), self._last_resort)
        super().__init__(config)

    def init(self) -> None:
        """Run verl's start-up under the watchdog."""
        with self._in_a_sentence("the start-up"):
            super().init()

    def fit(self, agent_loop_manager: Any) -> None:
        """Run verl's training under the watchdog."""
        with self._in_a_sentence(None):
            super().fit(agent_loop_manager)

    def on_sample_end(self) -> None:
        """Check the processes, so that no batch is trained on whose groups failed because a server died."""
        self.check_processes()
        super().on_sample_end()

    def on_validate_end(self) -> None:
        """Check the processes, so that no accuracy is reported that lacks the answers of a dead server."""
        self.check_processes()
        super().on_validate_end()

    def check_processes(self) -> None:
        """Check the processes now.

        Raises:
            RunStoppedError: a process is dead.
        """
        death = self.watchdog.verdict()
        if death is not None:
            raise RunStoppedError(death)

    @contextmanager
    def _in_a_sentence(self, when: str | None) -> Iterator[None]:
        try:
            with self.watchdog.watching():
                yield
        except CheckpointError:
            raise  # its sentence is complete
        except (Exception, KeyboardInterrupt) as error:
            stopped = stop_of(error)
            interrupted = isinstance(error, KeyboardInterrupt) and self.watchdog.death is None
            death = None if stopped or interrupted else self.watchdog.verdict(error)
            cause = stopped or death
            if cause is None:
                raise
            if self.watchdog.death is not None:
                self.watchdog.arm(self.watchdog.death)
            sentence = self._sentence(cause, when or self._now())
            logger.error("gcpo: %s", sentence, exc_info=error)
            raise RunStoppedError(sentence) from error

    def _now(self) -> str:
        step = getattr(self, "global_steps", 0)
        return f"step {step}" if step else "the time before the first step"

    def _sentence(self, death: str, when: str) -> str:
        return f"the run ended in {when}: {death}; {way_on(self.config.trainer)}"

    def _last_resort(self, death: str) -> None:
        """End this process, and leave the sentence for the driver."""
        sentence = self._sentence(death, self._now())
        leave_sentence(sentence)
        print(f"gcpo: {sentence}", file=sys.stderr, flush=True)
        os._exit(1)


def stop_of(error: BaseException) -> str | None:
    """Return the sentence of a ``RunStoppedError`` that was raised here or in an actor, else ``None``."""
    if isinstance(error, RayTaskError):
        error = error.cause
    return str(error) if isinstance(error, RunStoppedError) else None


# ---- the driver ------------------------------------------------------------------------------------------------------


def _fault_key() -> bytes:
    return _FAULT_KEY + ray.get_runtime_context().get_job_id().encode()


def leave_sentence(sentence: str) -> None:
    """Store a sentence in Ray's control store, since this process ends without a result."""
    from ray.experimental.internal_kv import _internal_kv_put

    _internal_kv_put(_fault_key(), sentence.encode(), overwrite=True)


def left_sentence() -> str | None:
    """Return the sentence that a process of this job left."""
    from ray.experimental.internal_kv import _internal_kv_get

    found = _internal_kv_get(_fault_key())
    return found.decode() if found else None


def driver_sentence(error: BaseException, config: Any) -> str | None:
    """Return why the run ended, if ``error`` says that it was stopped or that the trainer's process died."""
    sentence = stop_of(error)
    if sentence is not None:
        return sentence
    if not is_death(error):
        return None
    try:
        sentence = left_sentence()
    except Exception as unreachable:  # Ray's control store may have died with the trainer.
        logger.debug("gcpo: Ray's control store does not answer: %s", unreachable)
    why = f" ({OUT_OF_MEMORY})" if isinstance(error, OutOfMemoryError) else ""
    return sentence or f"the run ended: the trainer's process died{why}; {way_on(config.trainer)}"


@contextmanager
def faults_in_a_sentence(config: Any) -> Iterator[None]:
    """End the driver with one sentence and exit code 1 if the run is stopped inside the ``with`` block.

    Args:
        config: the run's whole configuration.
    """
    try:
        yield
    except Exception as error:
        sentence = driver_sentence(error, config)
        if sentence is None:
            raise
        # The shutdown prints the workers' logs first, so that the sentence is the last line.
        ray.shutdown()
        sys.exit(f"gcpo: {sentence}")
