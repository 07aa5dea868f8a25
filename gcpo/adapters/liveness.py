"""Watches the processes of a run, so that a dead one ends the run in a sentence instead of a wait without end.

verl waits for its Ray actors without a limit, and some of these waits cannot fail: the replay buffer polls for groups
that a dead agent loop never finishes, and the actor sends weights to an engine core that is gone. Here a thread of the
trainer's process asks Ray for the states of the run's actors, and every vLLM server whether its engine still lives.
Nothing is measured in time: a step may take as long as it likes while all processes live.
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
"""Between two looks."""
SERVER_ANSWER_SECONDS = 5.0
"""A server that has not answered by then is busy, which is no fault; Ray says when its process is dead."""
DEATH_NOTICE_SECONDS = 5.0
"""Ray may notice a death later than the call that fails because of it."""
LAST_RESORT_SECONDS = 15.0
"""After a death: time for the trainer to leave what it waits for, before its process is ended."""
WAKE_SIGNAL = signal.SIGUSR2
"""Takes the trainer's main thread out of a wait."""

_FAULT_KEY = b"gcpo_fault:"


# ---- the trainer -----------------------------------------------------------------------------------------------------


class Watchdog:
    """A thread that looks again and again, and takes the main thread out of its wait when a process has died.

    Args:
        watch: what looks.
        last_resort: called in the thread where the main thread has not come out in time.
        interval: seconds between looks.
        patience: seconds that the main thread has.
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
        """Within, a death raises KeyboardInterrupt in the main thread, whatever it waits for."""
        in_main = threading.current_thread() is threading.main_thread()
        before = signal.signal(WAKE_SIGNAL, self._wake) if in_main else None
        self._inside = in_main
        # Of its own for every block: the thread of the block before may still be looking.
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
        # Ray's waits let no other exception of a signal handler out.
        if self._inside:
            raise KeyboardInterrupt

    def _run(self, over: threading.Event) -> None:
        told = False
        while not over.wait(self.interval):
            try:
                death = self.watch.look()
            except Exception as error:  # Ray's control store does not answer: this is no verdict about an actor.
                if not told:
                    logger.warning("gcpo: Ray cannot be asked for the states of the run's processes: %s", error)
                told = True
                continue
            if death is not None and not over.is_set():
                self.end(death)
                return

    def end(self, death: str) -> None:
        """End the run because of ``death``: wake the main thread, and bound the time that it has to leave."""
        self.death = death
        logger.error("gcpo: %s", death)
        self.arm(death)
        if self._inside and (main := threading.main_thread().ident):
            signal.pthread_kill(main, WAKE_SIGNAL)

    def arm(self, death: str) -> None:
        """Call ``last_resort`` in ``patience`` seconds, once.

        It is not called off when the main thread leaves: what the trainer does last may wait for the dead process too.
        """
        if self._timer is None:
            self._timer = threading.Timer(self.patience, self.last_resort, [death])
            self._timer.daemon = True
            self._timer.start()

    def verdict(self, error: BaseException | None = None) -> str | None:
        """The death that is known by now; after an error of Ray's it may take Ray some seconds to know."""
        patience = DEATH_NOTICE_SECONDS if error is not None and is_death(error) else 0.0
        deadline = time.monotonic() + patience
        while self.death is None:
            try:
                self.death = self.watch.look(SERVER_ANSWER_SECONDS)
            except Exception as unreachable:  # Ray itself is gone: this is no verdict about an actor.
                logger.warning("gcpo: Ray cannot be asked for the states of the run's processes: %s", unreachable)
                return None
            if time.monotonic() >= deadline:
                break
            time.sleep(0.2)
        return self.death


class WatchedTrainer(PPOTrainerSync):
    """verl's synchronous trainer, ended by a sentence when one of the run's processes dies."""

    watchdog: Watchdog

    def __init__(self, config: Any) -> None:
        own = ray.get_runtime_context().get_actor_id() if ray.is_initialized() else None
        self.watchdog = Watchdog(Watch(ignore=frozenset([own] if own else [])), self._last_resort)
        super().__init__(config)

    def init(self) -> None:
        """verl's start-up, watched."""
        with self._in_a_sentence("the start-up"):
            super().init()

    def fit(self, agent_loop_manager: Any) -> None:
        """verl's training, watched."""
        with self._in_a_sentence(None):
            super().fit(agent_loop_manager)

    def on_sample_end(self) -> None:
        """A batch whose groups failed because a server died is not trained on."""
        self.check_processes()
        super().on_sample_end()

    def on_validate_end(self) -> None:
        """An accuracy that lacks the answers of a dead server is not reported."""
        self.check_processes()
        super().on_validate_end()

    def check_processes(self) -> None:
        """Look now.

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
            raise  # its sentence is whole
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
        """End this process, with the sentence where the driver finds it."""
        sentence = self._sentence(death, self._now())
        leave_sentence(sentence)
        print(f"gcpo: {sentence}", file=sys.stderr, flush=True)
        os._exit(1)


def stop_of(error: BaseException) -> str | None:
    """The sentence of a ``RunStoppedError`` that was raised here or in an actor, ``None`` for any other error."""
    if isinstance(error, RayTaskError):
        error = error.cause
    return str(error) if isinstance(error, RunStoppedError) else None


# ---- the driver ------------------------------------------------------------------------------------------------------


def _fault_key() -> bytes:
    return _FAULT_KEY + ray.get_runtime_context().get_job_id().encode()


def leave_sentence(sentence: str) -> None:
    """Keep a sentence in Ray's control store, since this process ends without a result."""
    from ray.experimental.internal_kv import _internal_kv_put

    _internal_kv_put(_fault_key(), sentence.encode(), overwrite=True)


def left_sentence() -> str | None:
    """The sentence that a process of this job left."""
    from ray.experimental.internal_kv import _internal_kv_get

    found = _internal_kv_get(_fault_key())
    return found.decode() if found else None


def driver_sentence(error: BaseException, config: Any) -> str | None:
    """Why the run ended, if ``error`` says that it was stopped or that the trainer's process died."""
    sentence = stop_of(error)
    if sentence is not None:
        return sentence
    if not is_death(error):
        return None
    try:
        sentence = left_sentence()
    except Exception as unreachable:  # Ray's control store died with the trainer.
        logger.debug("gcpo: Ray's control store does not answer: %s", unreachable)
    why = f" ({OUT_OF_MEMORY})" if isinstance(error, OutOfMemoryError) else ""
    return sentence or f"the run ended: the trainer's process died{why}; {way_on(config.trainer)}"


@contextmanager
def faults_in_a_sentence(config: Any) -> Iterator[None]:
    """Within the driver: a run that was stopped ends the process with one sentence, exit code 1.

    Args:
        config: the run's whole configuration.
    """
    try:
        yield
    except Exception as error:
        sentence = driver_sentence(error, config)
        if sentence is None:
            raise
        # Ray's log of the workers comes first: the sentence is the last line.
        ray.shutdown()
        sys.exit(f"gcpo: {sentence}")
