"""A dead process takes the trainer out of whatever it waits for, in a sentence; no Ray is started."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayTaskError
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from gcpo.adapters import liveness
from gcpo.adapters.liveness import WAKE_SIGNAL, Watchdog, driver_sentence, faults_in_a_sentence
from gcpo.adapters.processes import Watch
from gcpo.adapters.trainer import MethodTrainer
from gcpo.checkpoints import MANIFEST
from gcpo.faults import RunStoppedError

DEATH = "the engine core of vllm_server_0_0 (process 11) died"
LIMIT = 20.0
"""A wait that is not ended fails its test after this many seconds."""


class Looks:
    """A watch that sees a death once it is told of one."""

    def __init__(self, death: str | None = None, error: Exception | None = None) -> None:
        self.death, self.error, self.count = death, error, 0

    def look(self, timeout: float = 0.0) -> str | None:
        self.count += 1
        if self.error is not None:
            raise self.error
        return self.death


def watchdog(looks: Looks, ends: list[str] | None = None, patience: float = 60.0) -> Watchdog:
    return Watchdog(looks, (ends if ends is not None else []).append, interval=0.01, patience=patience)


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    """The wake signal is left as it was."""
    before = signal.getsignal(WAKE_SIGNAL)
    yield
    assert signal.getsignal(WAKE_SIGNAL) == before


def sleep_until_ended() -> None:
    time.sleep(LIMIT)


def wait_for_an_event() -> None:
    threading.Event().wait(LIMIT)


def wait_for_a_lock() -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire(timeout=LIMIT)


def read_a_pipe() -> None:
    # verl's loops wait in the kernel too; the other end stays open.
    reading, writing = os.pipe()
    try:
        os.read(reading, 1)
    finally:
        os.close(reading)
        os.close(writing)


def poll_in_python() -> None:
    """As verl's replay buffer does."""
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        time.sleep(0.05)


def run_a_loop() -> None:
    """As verl's ``auto_await`` does."""
    import asyncio

    asyncio.run(asyncio.sleep(LIMIT))


WAITS = [sleep_until_ended, wait_for_an_event, wait_for_a_lock, read_a_pipe, poll_in_python, run_a_loop]


@pytest.mark.parametrize("wait", WAITS, ids=lambda wait: wait.__name__)
def test_a_death_ends_every_wait(wait: Callable[[], None]) -> None:
    looks = Looks()
    dog = watchdog(looks)
    threading.Timer(0.1, lambda: setattr(looks, "death", DEATH)).start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), dog.watching():
        wait()
    assert time.monotonic() - started < LIMIT / 2 and dog.death == DEATH
    dog._timer.cancel()


def test_a_long_wait_without_a_death_is_left_alone() -> None:
    looks, ends = Looks(), []
    with watchdog(looks, ends, patience=0.0).watching():
        time.sleep(0.5)
    assert looks.count > 5 and not ends


def test_ray_that_does_not_answer_is_no_death(caplog: pytest.LogCaptureFixture) -> None:
    """It is said once."""
    looks = Looks(error=ConnectionError("GCS"))
    with watchdog(looks).watching():
        time.sleep(0.3)
    assert looks.count > 5 and len(caplog.records) == 1 and "GCS" in caplog.text


def test_the_last_resort_where_the_main_thread_does_not_leave() -> None:
    """A wait in a library that swallows the interrupt."""
    ends: list[str] = []
    with watchdog(Looks(DEATH), ends, patience=0.2).watching():
        for _ in range(200):
            try:
                time.sleep(0.02)
            except KeyboardInterrupt:
                continue
            if ends:
                break
    assert ends == [DEATH]


def test_nothing_is_interrupted_outside() -> None:
    """A signal that comes late meets a trainer that has left."""
    dog = watchdog(Looks())
    with dog.watching():
        pass
    before = signal.signal(WAKE_SIGNAL, dog._wake)
    try:
        os.kill(os.getpid(), WAKE_SIGNAL)
        time.sleep(0.05)
    finally:
        signal.signal(WAKE_SIGNAL, before)


# ---- the trainer -----------------------------------------------------------------------------------------------------


class Trainer(MethodTrainer):
    """Ours without verl's set-up; ``work`` is what verl's trainer does."""

    method = SimpleNamespace(name="gcpo")

    def __init__(self, folder: Path, looks: Looks) -> None:
        self.config = OmegaConf.create({"trainer": {"default_local_dir": str(folder), "resume_mode": "auto"}})
        self.global_steps = 3
        self.ends: list[str] = []
        self.watchdog = watchdog(looks, self.ends)
        self.checkpoint_manager = SimpleNamespace(sleep_replicas=lambda: None)
        self.curr_step_profile = False


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "global_step_2").mkdir()
    (tmp_path / "global_step_2" / MANIFEST).write_text("{}")
    return tmp_path


def verl_does(monkeypatch: pytest.MonkeyPatch, work: Callable[..., Any]) -> None:
    monkeypatch.setattr(PPOTrainerSync, "fit", lambda self, manager: work())
    monkeypatch.setattr(PPOTrainerSync, "init", lambda self: work())


def raises(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


def test_a_wait_ends_in_a_sentence(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """The sentence names the dead process, the step, the saved checkpoint and the way to go on."""
    verl_does(monkeypatch, sleep_until_ended)
    trainer = Trainer(folder, Looks(DEATH))
    with pytest.raises(RunStoppedError) as stopped:
        trainer.fit(None)
    assert str(stopped.value) == (
        f"the run ended in step 3: {DEATH}; the last whole checkpoint is {folder}/global_step_2 (step 2); the same "
        "command goes on from it"
    )
    trainer.watchdog._timer.cancel()


def test_the_start_up_is_watched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    verl_does(monkeypatch, sleep_until_ended)
    trainer = Trainer(tmp_path, Looks(DEATH))
    with pytest.raises(RunStoppedError, match=r"^the run ended in the start-up: .*no checkpoint had been saved"):
        trainer.init()
    trainer.watchdog._timer.cancel()


def test_the_validation_before_the_first_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    verl_does(monkeypatch, raises(ActorDiedError()))
    trainer = Trainer(tmp_path, Looks(DEATH))
    trainer.global_steps = 0
    with pytest.raises(RunStoppedError, match=r"^the run ended in the time before the first step: the engine core"):
        trainer.fit(None)


def test_an_error_of_ray_is_said_as_the_death_behind_it(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """The call to an FSDP worker fails before Ray's control store knows that it is dead."""
    looks = Looks()
    verl_does(monkeypatch, raises(ActorDiedError()))
    threading.Timer(0.5, lambda: setattr(looks, "death", "the FSDP worker (process 9) died")).start()
    with pytest.raises(RunStoppedError, match=r"step 3: the FSDP worker \(process 9\) died; the last whole"):
        Trainer(folder, looks).fit(None)


def test_other_errors_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    for error in (ValueError("a bug"), KeyboardInterrupt()):
        verl_does(monkeypatch, raises(error))
        with pytest.raises(type(error)) as raised:
            Trainer(folder, Looks()).fit(None)
        assert raised.value is error


def test_an_error_that_follows_a_death_is_said_as_the_death(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """verl finds no responses in a batch whose server died."""
    verl_does(monkeypatch, raises(RuntimeError("no materializable trajectories")))
    with pytest.raises(RunStoppedError, match=r"engine core"):
        Trainer(folder, Looks(DEATH)).fit(None)


def test_a_worker_that_stops_the_run_is_quoted(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """A gradient that is not finite, found in an FSDP worker."""
    error = RayTaskError("update", "traceback", RunStoppedError("the gradient norm is nan")).as_instanceof_cause()
    verl_does(monkeypatch, raises(error))
    with pytest.raises(RunStoppedError, match=r"^the run ended in step 3: the gradient norm is nan; the last whole"):
        Trainer(folder, Looks()).fit(None)


@pytest.mark.parametrize("hook", ["on_sample_end", "on_validate_end"])
def test_what_a_dead_server_left_is_not_used(folder: Path, hook: str) -> None:
    """Neither a batch with groups that failed with it, nor an accuracy over the answers that are there."""
    getattr(Trainer(folder, Looks()), hook)()
    with pytest.raises(RunStoppedError, match="engine core"):
        getattr(Trainer(folder, Looks(DEATH)), hook)()


# ---- the driver ------------------------------------------------------------------------------------------------------


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, folder: Path) -> SimpleNamespace:
    """The driver's Ray: whether it was shut down, and the sentence that another process left."""
    world = SimpleNamespace(left=None, shut_down=0, config=OmegaConf.create({}))
    world.config = OmegaConf.create({"trainer": {"default_local_dir": str(folder)}})
    monkeypatch.setattr(liveness, "left_sentence", lambda: world.left)
    monkeypatch.setattr(liveness.ray, "shutdown", lambda: setattr(world, "shut_down", 1))
    return world


def test_the_driver_ends_with_the_sentence(driver: SimpleNamespace) -> None:
    """As its last line, and with an exit code that is not 0."""
    error = RayTaskError("run", "traceback", RunStoppedError("the run ended in step 3: why")).as_instanceof_cause()
    with pytest.raises(SystemExit) as ended, faults_in_a_sentence(driver.config):
        raise error
    assert ended.value.code == "gcpo: the run ended in step 3: why" and driver.shut_down


def test_a_trainer_that_died(driver: SimpleNamespace) -> None:
    """It may have left a sentence: its last resort is to end its process."""
    sentence = driver_sentence(ActorDiedError(), driver.config)
    assert sentence.startswith("the run ended: the trainer's process died; the last whole checkpoint is")
    driver.left = f"the run ended in step 3: {DEATH}; way on"
    assert driver_sentence(ActorDiedError(), driver.config) == driver.left


def test_a_trainer_that_rays_memory_monitor_ended(driver: SimpleNamespace) -> None:
    """Ray raises an error of its own kind then."""
    sentence = driver_sentence(OutOfMemoryError("1 worker(s) were killed"), driver.config)
    assert "the trainer's process died (Ray's memory monitor ended it" in sentence and "goes on from it" in sentence


def test_a_trainer_and_ray_that_died(driver: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "left_sentence", raises(ConnectionError("GCS")))
    assert "trainer's process died" in driver_sentence(ActorDiedError(), driver.config)


def test_other_errors_reach_the_user_whole(driver: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="a bug"), faults_in_a_sentence(driver.config):
        raise ValueError("a bug")
    assert not driver.shut_down


def test_the_default_watch_asks_ray() -> None:
    from gcpo.adapters.processes import ServerProbe, run_actors

    watch = Watch()
    assert watch.actors is run_actors and isinstance(watch.probe, ServerProbe)
