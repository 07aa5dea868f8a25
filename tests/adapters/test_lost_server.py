"""A server or a reward worker that dies is no failed draw and no failed reward: its error goes up to the trainer."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from verl.workers.rollout.llm_server import LLMServerClient

from gcpo.adapters.group_client import GroupClient
from gcpo.faults import ServerLostError
from gcpo.methods.gcpo.draws import ColliderSampler
from gcpo.methods.gcpo.settings import GCPOConfig
from tests.adapters.test_rollout import PARENT, Worker, run, world  # noqa: F401  (world is a fixture)


class EngineDeadError(Exception):
    """Like vLLM's."""


DEATHS = [
    ActorDiedError(),
    RayTaskError("generate", "traceback", EngineDeadError("EngineCore encountered an issue")).as_instanceof_cause(),
]
FAILURES = [
    ActorUnavailableError("the network was away", None),
    RayTaskError("generate", "traceback", ValueError("the prompt is too long")).as_instanceof_cause(),
    TimeoutError("slow"),
]


def stage(generate: Any) -> ColliderSampler:
    config = GCPOConfig.from_config({"preset": "light"}, n=3, response_length=8)
    return ColliderSampler(config, None, generate, {}, 128, frozenset({2}))


def client(error: Exception, monkeypatch: pytest.MonkeyPatch) -> GroupClient:
    async def generate(self: Any, request_id: str, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(LLMServerClient, "generate", generate)
    return GroupClient(LLMServerClient(None), "r")


@pytest.mark.parametrize("error", DEATHS, ids=repr)
def test_a_dead_server_fails_no_draw(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    draws = stage(client(error, monkeypatch).ask)
    with pytest.raises(ServerLostError) as lost:
        asyncio.run(draws.draw("collider", [5], (1, "question")))
    assert lost.value.__cause__ is error


@pytest.mark.parametrize("error", FAILURES, ids=repr)
def test_a_request_that_fails_by_itself_is_a_failed_draw(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    draws = stage(client(error, monkeypatch).ask)
    assert asyncio.run(draws.draw("collider", [5], (1, "question"))).outcome == "failed"


def test_a_group_whose_server_died_trains_as_nothing(world: SimpleNamespace) -> None:  # noqa: F811
    """Not even as GRPO: verl marks the group as failed, and its rows lack the fields that the update needs."""
    world.stage_error = ServerLostError("the generation server is dead")
    run(Worker())
    ((_, fields, _),) = world.stored
    assert world.stages and list(fields.keys()) == ["responses"]


@pytest.mark.parametrize("error", [ActorDiedError(), RayTaskError("score", "traceback", ActorDiedError())], ids=repr)
def test_a_dead_reward_worker_scores_nothing(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker itself, and a reward model behind it; the response gets neither a score nor an error that counts."""

    async def compute(self: Any, outputs: Any, kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(PARENT, "_compute_score", compute)
    output = SimpleNamespace(reward_score=None, extra_fields={})
    with pytest.raises(type(error)):
        asyncio.run(Worker()._compute_score([output], {"index": 0}))
    assert output.reward_score is None and output.extra_fields == {}
