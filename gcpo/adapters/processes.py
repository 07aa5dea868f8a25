"""The processes of a run according to Ray and the vLLM servers, and the detection of a dead one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray._private import state
from ray.exceptions import (
    ActorUnavailableError,
    LocalRayletDiedError,
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    WorkerCrashedError,
)

ROLES = {
    "WorkerDict": "the FSDP worker",
    "vLLMHttpServer": "the vLLM server",
    "GCPOAgentLoopWorkerPlain": "the agent-loop worker",
    "AgentLoopWorkerTQ": "the agent-loop worker",
    "RewardLoopWorker": "the reward worker",
    "GlobalRequestLoadBalancer": "the router of generation requests",
    "TransferQueueController": "the TransferQueue controller",
    "SimpleStorageUnit": "the TransferQueue storage",
    "TaskRunnerV1": "the trainer",
}
"""Ray's class names of the actors of a run, with their names for the user."""

_DEATHS = (RayActorError, OutOfMemoryError, WorkerCrashedError, NodeDiedError, LocalRayletDiedError)
"""Ray's errors for calls to a dead process; Ray raises some of them instead of an actor's error."""
OUT_OF_MEMORY = "Ray's memory monitor ended it, since the machine was out of memory"

_EXIT_ACTOR = "EXIT_ACTOR"
_MEANT = ("RAY_KILL", "OUT_OF_SCOPE", "REF_DELETED", _EXIT_ACTOR)
"""Ray's reasons for the end of an actor that was ended on purpose."""


@dataclass(frozen=True)
class ActorState:
    """The state of one actor of this run in Ray's control store."""

    actor_id: str
    class_name: str
    name: str
    pid: int
    state: str
    reason: str = ""
    """Reason of the death: Ray's constant, ``OOM`` for its memory monitor, ``EXIT_ACTOR`` after ``exit_actor()``."""
    detail: str = ""
    """Ray's message about the death."""

    @property
    def lost(self) -> bool:
        """Whether the actor died unintentionally."""
        return self.state == "DEAD" and self.reason not in _MEANT

    def __str__(self) -> str:
        # Ray names a colocated worker group's class WorkerDict, with or without a prefix.
        role = next((words for name, words in ROLES.items() if self.class_name.endswith(name)), None)
        words = role or f"the Ray actor {self.class_name}"
        return f"{words} (process {self.pid})" if self.pid else words


def run_actors() -> list[ActorState]:
    """Return all actors of this Ray job, including dead ones.

    They are read from Ray's control store, which knows unnamed actors and those of other processes of the job.
    """
    context = ray.get_runtime_context()
    job = context.get_job_id()
    table = state.actors(job_id=ray.JobID.from_hex(job)) or {}
    return [_actor_state(entry) for entry in table.values() if entry["JobID"] == job]


def _actor_state(entry: dict[str, Any]) -> ActorState:
    reason, detail = _death(entry["DeathCause"]) if entry["State"] == "DEAD" else ("", "")
    return ActorState(
        entry["ActorID"], entry["ActorClassName"], entry["Name"], entry["Pid"], entry["State"], reason, detail
    )


def _death(cause: Any) -> tuple[str, str]:
    """Return the reason and first sentence of Ray's ``ActorDeathCause``."""
    kind = cause.WhichOneof("context")
    if kind is None:
        return "UNSPECIFIED", ""
    context = getattr(cause, kind)
    message = getattr(context, "error_message", "") or getattr(context, "formatted_exception_string", "")
    if kind == "oom_context":
        return "OOM", OUT_OF_MEMORY
    if kind == "actor_died_error_context":
        if "exit_actor() is called" in message:  # Ray reports this as WORKER_DIED too
            return _EXIT_ACTOR, ""
        return type(context).Reason.Name(context.reason), _first_sentence(message)
    return kind.removesuffix("_context").upper(), _first_sentence(message)


def _first_sentence(message: str) -> str:
    text = " ".join(message.split())
    if "SIGKILL" in text or "connection error code 2" in text:
        return "it was killed or crashed; the kernel's out-of-memory killer does this too"
    text = text.rpartition("Worker exit detail: ")[2]
    return text.split(". ")[0][:200].rstrip(".")


def engine_state(server: Any) -> tuple[bool, list[int]]:
    """Return whether the engine is dead and the process ids of its cores; runs in a vLLM server's actor.

    A starting server has no engine yet, and a server on a further node of a replica never has one.
    """
    engine = getattr(server, "engine", None)
    core = getattr(engine, "engine_core", None)
    manager = getattr(getattr(core, "resources", None), "engine_manager", None)
    pids = [process.pid for process in getattr(manager, "processes", [])]
    return bool(getattr(engine, "errored", False)), pids


class ServerProbe:
    """A query of ``engine_state`` on vLLM servers that does not wait for busy ones."""

    def __init__(self) -> None:
        self._handles: dict[str, Any] = {}
        self._asked: dict[str, Any] = {}
        self._pids: dict[str, list[int]] = {}

    def __call__(self, actors: Sequence[ActorState], timeout: float = 0.0) -> str | None:
        """Return a description of a dead engine, or ``None`` if none is known.

        Args:
            actors: the living actors.
            timeout: 0: read the answers to the last call's queries, and query the servers that have answered again;
                otherwise query now, and wait at most this many seconds for the answers.
        """
        questions = {} if timeout else self._asked
        servers = [a for a in actors if a.class_name.endswith("vLLMHttpServer") and a.name]
        for actor in servers:
            if actor.actor_id not in questions:
                question = self._ask(actor)
                if question is not None:
                    questions[actor.actor_id] = question
        if not questions:
            return None
        ready, _ = ray.wait(list(questions.values()), num_returns=len(questions), timeout=timeout)
        dead = None
        for actor in servers:
            if questions.get(actor.actor_id) in ready:
                dead = self._read(actor, questions.pop(actor.actor_id)) or dead
        return dead

    def _ask(self, actor: ActorState) -> Any:
        try:
            if actor.actor_id not in self._handles:
                self._handles[actor.actor_id] = ray.get_actor(actor.name)
            return self._handles[actor.actor_id].__ray_call__.remote(engine_state)
        except ValueError:  # the actor has ended, which the next check detects
            return None

    def _read(self, actor: ActorState, question: Any) -> str | None:
        try:
            dead, pids = ray.get(question)
        except _DEATHS:  # the server itself has died, which the next check detects
            return None
        if not dead:
            self._pids[actor.actor_id] = pids
            return None
        pids = self._pids.get(actor.actor_id) or pids
        return f"the engine core of {actor.name}" + (f" (process {', '.join(map(str, pids))})" if pids else "")


@dataclass
class Watch:
    """A check for a dead process of the run.

    Args:
        actors: returns the run's actors.
        probe: describes a dead engine of a living actor; see ``ServerProbe``.
        ignore: ids of actors that are not watched.
    """

    actors: Callable[[], Iterable[ActorState]] = run_actors
    probe: Callable[[Sequence[ActorState], float], str | None] = field(default_factory=ServerProbe)
    ignore: frozenset[str] = frozenset()

    def look(self, timeout: float = 0.0) -> str | None:
        """Return a description of a dead process with the reason, or ``None`` if all run.

        Args:
            timeout: seconds to wait for the answers of the servers.
        """
        actors = [actor for actor in self.actors() if actor.actor_id not in self.ignore]
        # An actor that died with its owner is not the cause.
        lost = min((a for a in actors if a.lost), key=lambda a: a.reason == "OWNER_DIED", default=None)
        if lost is not None:
            return f"{lost} died" + (f" ({lost.detail})" if lost.detail else "")
        dead = self.probe([actor for actor in actors if actor.state == "ALIVE"], timeout)
        return f"{dead} died" if dead is not None else None


def is_death(error: BaseException | None) -> bool:
    """Return whether ``error`` says that an actor or a vLLM engine is dead, directly or in its chain of causes."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, _DEATHS) and not isinstance(error, ActorUnavailableError):
            return True
        # EngineDeadError is from vLLM, which is not imported here: RayTaskError is a subclass of its cause's class.
        if any(cls.__name__ == "EngineDeadError" for cls in type(error).__mro__):
            return True
        error = getattr(error, "cause", None) or error.__cause__
    return False
