"""Which process of a run is dead, as Ray's control store and the vLLM servers say it; no Ray is started."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.core.generated import gcs_pb2
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

from gcpo.adapters import processes
from gcpo.adapters.processes import ActorState, ServerProbe, Watch, engine_state, is_death

KILLED = (
    "The actor died unexpectedly before finishing this task. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker "
    "unexpectedly exits with a connection error code 2. End of file. There are some potential root causes. (1) The "
    "process is killed by SIGKILL by OOM killer due to high memory usage."
)


def actor(class_name: str, state: str = "ALIVE", **fields: Any) -> ActorState:
    return ActorState(class_name, class_name, fields.pop("name", ""), 7, state, **fields)


def no_probe(actors: Any, timeout: float) -> None:
    return None


# ---- states ----------------------------------------------------------------------------------------------------------


def entry(state: str, **cause: Any) -> dict[str, Any]:
    """An actor as ``ray._private.state.actors`` gives it."""
    table = gcs_pb2.ActorTableData()
    if cause:
        kind, fields = next(iter(cause.items()))
        context = getattr(table.death_cause, kind)
        context.SetInParent()
        for name, value in fields.items():
            setattr(context, name, value)
    return {
        "ActorID": "a",
        "ActorClassName": "WorkerDict",
        "Name": "w",
        "Pid": 7,
        "State": state,
        "JobID": "1",
        "DeathCause": table.death_cause,
    }


def reason(name: str) -> int:
    return gcs_pb2.ActorTableData().death_cause.actor_died_error_context.Reason.Value(name)


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("WORKER_DIED", True),
        ("NODE_DIED", True),
        ("OWNER_DIED", True),
        ("UNSPECIFIED", True),
        ("RAY_KILL", False),
        ("OUT_OF_SCOPE", False),
        ("REF_DELETED", False),
    ],
)
def test_an_actor_that_was_told_to_end_is_not_lost(name: str, lost: bool) -> None:
    cause = {"actor_died_error_context": {"reason": reason(name), "error_message": "Because. More."}}
    state = processes._actor_state(entry("DEAD", **cause))
    assert state.lost == lost and state.detail == "Because"


def test_what_is_said_about_a_kill_and_about_memory() -> None:
    cause = {"actor_died_error_context": {"reason": reason("WORKER_DIED"), "error_message": KILLED}}
    assert "killed or crashed" in processes._actor_state(entry("DEAD", **cause)).detail
    state = processes._actor_state(entry("DEAD", oom_context={"error_message": "x"}))
    assert state.lost and "memory monitor" in state.detail
    cause = {"creation_task_failure_context": {"formatted_exception_string": "ValueError: no model. More"}}
    state = processes._actor_state(entry("DEAD", **cause))
    assert state.lost and state.reason == "CREATION_TASK_FAILURE" and state.detail == "ValueError: no model"


def test_an_actor_that_leaves_by_itself() -> None:
    """``exit_actor()`` is meant; an exit code 0 by another way is not, whatever Ray calls it (texts of Ray 2.60)."""
    died = "The actor is dead because its worker process has died. Worker exit type: INTENDED_USER_EXIT "
    died += "Worker exit detail: Worker exits by an user request. Worker exits with an exit code 0."

    def state(message: str) -> ActorState:
        cause = {"reason": reason("WORKER_DIED"), "error_message": message}
        return processes._actor_state(entry("DEAD", actor_died_error_context=cause))

    assert not state(f"{died} exit_actor() is called.").lost
    assert state(died).lost and state(died).detail == "Worker exits by an user request"


@pytest.mark.parametrize("state", ["ALIVE", "PENDING_CREATION", "DEPENDENCIES_UNREADY", "RESTARTING"])
def test_other_states_are_no_death(state: str) -> None:
    assert not processes._actor_state(entry(state)).lost


@pytest.mark.parametrize(
    ("class_name", "words"),
    [
        ("WorkerDict", "the FSDP worker (process 7)"),
        ("GCPOAgentLoopWorkerPlain", "the agent-loop worker (process 7)"),
        ("RewardLoopWorker", "the reward worker (process 7)"),
        ("TransferQueueController", "the TransferQueue controller (process 7)"),
        ("MyTool", "the Ray actor MyTool (process 7)"),
    ],
)
def test_every_actor_has_a_name_in_words(class_name: str, words: str) -> None:
    assert str(actor(class_name)) == words


# ---- looking ---------------------------------------------------------------------------------------------------------


def test_a_look_says_who_died_and_why() -> None:
    actors = [actor("WorkerDict"), actor("RewardLoopWorker", "DEAD", reason="WORKER_DIED", detail="it was killed")]
    watch = Watch(lambda: actors, no_probe)
    assert watch.look() == "the reward worker (process 7) died (it was killed)"
    assert Watch(lambda: actors, no_probe, ignore=frozenset(["RewardLoopWorker"])).look() is None
    assert Watch(lambda: actors[:1], no_probe).look() is None


def test_the_owner_is_named_before_what_it_owned() -> None:
    actors = [actor("RewardLoopWorker", "DEAD", reason="OWNER_DIED"), actor("WorkerDict", "DEAD", reason="WORKER_DIED")]
    assert Watch(lambda: actors, no_probe).look() == "the FSDP worker (process 7) died"
    assert Watch(lambda: actors[:1], no_probe).look() == "the reward worker (process 7) died"


def test_actors_that_live_are_probed() -> None:
    seen = []

    def probe(actors: Any, timeout: float) -> str:
        seen.append(([a.class_name for a in actors], timeout))
        return "the engine core of vllm_server_0_0"

    actors = [actor("WorkerDict"), actor("vLLMHttpServer", "PENDING_CREATION")]
    assert Watch(lambda: actors, probe).look(3.0) == "the engine core of vllm_server_0_0 died"
    assert seen == [(["WorkerDict"], 3.0)]


# ---- engines ---------------------------------------------------------------------------------------------------------


def engine(errored: bool, pids: tuple[int, ...] = (11, 12)) -> SimpleNamespace:
    manager = SimpleNamespace(processes=[SimpleNamespace(pid=pid) for pid in pids])
    core = SimpleNamespace(resources=SimpleNamespace(engine_manager=manager))
    return SimpleNamespace(engine=SimpleNamespace(errored=errored, engine_core=core))


def test_state_of_an_engine() -> None:
    """A server that is starting, and one without an engine of its own, have no dead engine."""
    assert engine_state(engine(False)) == (False, [11, 12]) and engine_state(engine(True)) == (True, [11, 12])
    assert engine_state(SimpleNamespace()) == (False, []) and engine_state(SimpleNamespace(engine=None)) == (False, [])


def test_vllm_has_what_is_asked() -> None:
    """The names that ``engine_state`` reads of vLLM; where one is missing it would see no death."""
    import dataclasses
    import inspect

    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core_client import BackgroundResources, MPClient

    assert isinstance(AsyncLLM.errored, property)
    assert {"engine_manager", "engine_dead"} <= {field.name for field in dataclasses.fields(BackgroundResources)}
    assert "self.resources" in inspect.getsource(MPClient.__init__)


class FakeRay:
    """``ray`` with servers whose answers are given; a busy one never answers."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}
        self.asked: list[str] = []

    def get_actor(self, name: str) -> Any:
        if name not in self.answers:
            raise ValueError(f"no actor {name}")

        def remote(function: Any) -> tuple[int, str]:
            assert function is engine_state
            self.asked.append(name)
            return (len(self.asked), name)

        return SimpleNamespace(__ray_call__=SimpleNamespace(remote=remote))

    def wait(self, questions: list, num_returns: int, timeout: float) -> tuple[list, list]:
        ready = [question for question in questions if self.answers[question[1]] != "busy"]
        return ready, [question for question in questions if question not in ready]

    def get(self, question: tuple[int, str]) -> Any:
        if isinstance(self.answers[question[1]], Exception):
            raise self.answers[question[1]]
        return self.answers[question[1]]


@pytest.fixture
def fake_ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay()
    for name in ("get_actor", "wait", "get"):
        monkeypatch.setattr(processes.ray, name, getattr(fake, name))
    return fake


SERVERS = [actor("vLLMHttpServer", name="vllm_server_0_0"), actor("WorkerDict", name="w")]


def test_a_dead_engine_is_named_with_its_processes(fake_ray: FakeRay) -> None:
    """Also where vLLM has forgotten them by then."""
    probe = ServerProbe()
    fake_ray.answers["vllm_server_0_0"] = (False, [11])
    assert probe(SERVERS) is None
    fake_ray.answers["vllm_server_0_0"] = (True, [])
    assert probe(SERVERS) == "the engine core of vllm_server_0_0 (process 11)"
    assert fake_ray.asked == ["vllm_server_0_0"] * 2


def test_a_busy_server_is_asked_once_and_is_not_dead(fake_ray: FakeRay) -> None:
    """However long it takes: no time makes it dead."""
    probe = ServerProbe()
    fake_ray.answers["vllm_server_0_0"] = "busy"
    assert [probe(SERVERS) for _ in range(1000)] == [None] * 1000
    assert len(fake_ray.asked) == 1


def test_an_old_answer_is_not_taken_for_one_of_now(fake_ray: FakeRay) -> None:
    """A look before a batch is used asks anew, although an older question is open."""
    probe = ServerProbe()
    fake_ray.answers["vllm_server_0_0"] = "busy"
    assert probe(SERVERS) is None
    fake_ray.answers["vllm_server_0_0"] = (True, [11])
    assert probe(SERVERS, 5.0) == "the engine core of vllm_server_0_0 (process 11)"
    assert len(fake_ray.asked) == 2


def test_a_server_that_ends_meanwhile_is_left_to_its_state(fake_ray: FakeRay) -> None:
    assert ServerProbe()(SERVERS) is None
    for error in (RayActorError(), OutOfMemoryError("killed")):
        fake_ray.answers["vllm_server_0_0"] = error
        assert ServerProbe()(SERVERS) is None


# ---- errors ----------------------------------------------------------------------------------------------------------


class EngineDeadError(Exception):
    """Like vLLM's."""


class Grandchild(EngineDeadError):
    """Like a later vLLM's."""


def chained(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "death"),
    [
        (RayActorError(), True),
        (ActorDiedError(), True),
        (OutOfMemoryError("1 worker(s) were killed due to the node running low on memory"), True),
        (WorkerCrashedError(), True),
        (NodeDiedError("the node died"), True),
        (ActorUnavailableError("busy", None), False),
        (EngineDeadError(), True),
        (Grandchild(), True),
        (RayTaskError("generate", "traceback", EngineDeadError()), True),
        (RayTaskError("generate", "traceback", EngineDeadError()).as_instanceof_cause(), True),
        (RayTaskError("score", "traceback", ActorDiedError()), True),
        (RayTaskError("score", "traceback", ValueError("prompt too long")).as_instanceof_cause(), False),
        (chained(RuntimeError("group failed"), ActorDiedError()), True),
        (ValueError("the prompt is too long"), False),
        (TimeoutError(), False),
        (None, False),
    ],
)
def test_errors_that_say_death(error: Exception | None, death: bool) -> None:
    assert is_death(error) == death
