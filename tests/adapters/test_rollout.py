"""The group in the agent-loop worker: who triggers the collider stage, and what a failure costs."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from verl.experimental.agent_loop import agent_loop as verls_agent_loop
from verl.experimental.agent_loop import single_turn_agent_loop
from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, AgentLoopOutput
from verl.trainer.ppo.v1 import agent_loop_tq
from verl.workers.rollout.llm_server import LLMServerClient

from gcpo.adapters import agent_loop, rollout
from gcpo.adapters.rollout import GCPOAgentLoopWorkerPlain
from gcpo.faults import RunStoppedError
from gcpo.methods.base import Run, Sampling
from gcpo.methods.fields import flat, lengths, split
from gcpo.methods.gcpo.draws import ColliderSampler, Draw, GroupResult
from gcpo.methods.gcpo.method import GCPO
from gcpo.methods.gcpo.settings import GCPOConfig

PARENT = rollout._PlainWorker
PROMPT = {"uid": "u", "raw_prompt": [{"role": "user", "content": "?"}], "index": 3, "global_steps": 1}


class Worker(GCPOAgentLoopWorkerPlain):
    """Ours without verl's set-up."""

    def __init__(self, **config: Any) -> None:
        self.config = OmegaConf.create(
            {
                "actor_rollout_ref": {"rollout": {"n": 3, "temperature": 1.0, "top_p": 1.0, "top_k": -1}},
                "trainer": {"rollout_data_dir": None},
            }
        )
        settings = GCPOConfig.from_config({"preset": "light", **config}, n=3, response_length=8)
        self.method = GCPO(settings, Run(n=3, response_length=8))
        self.method.prompts, self.method.end_ids = None, frozenset({2})
        boxes = SimpleNamespace(decode=lambda ids, skip_special_tokens: "\\boxed{3}" if ids[0] == 10 else "3")
        self.method.sampling = Sampling(boxes, {}, 128, frozenset({2}))
        self.groups, self.llm_client = {}, LLMServerClient(self.config)


def keep_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names that `agent_loop.install` replaces are verl's again after the test."""
    for module, name in (
        (agent_loop_tq, "tq"),
        (agent_loop_tq, "list_of_dict_to_tensordict"),
        (verls_agent_loop, "hydra"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name))


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """verl's methods reduced to what the group sees, and a record of what was stored."""
    seen = SimpleNamespace(stages=[], stored=[], fails=set(), stage_error=None, params=[], reward=float)

    async def run_prompt(self, prompt, sampling_params, trajectory, trace=False):
        n = prompt.pop("__rollout_n__", 3)
        jobs = [
            self._run_agent_loop(sampling_params, trajectory=trajectory, trace=trace, session_id=i, **prompt)
            for i in range(n)
        ]
        return await asyncio.gather(*jobs, return_exceptions=True)

    async def run_agent_loop(self, sampling_params, trajectory, *, session_id, **kwargs):
        seen.params.append(sampling_params)
        await asyncio.sleep(0)
        if session_id in seen.fails:
            raise RuntimeError("session failed")
        kwargs.pop("trace", None)
        output = SimpleNamespace(
            prompt_ids=[5], response_ids=[10 + session_id, 2], reward_score=seen.reward(session_id)
        )
        return await self._agent_loop_postprocess(output, trajectory["validate"], session_id=session_id, **kwargs)

    async def postprocess(self, output, validate, **kwargs):
        rows = [{"responses": torch.tensor(output.response_ids)}]
        await agent_loop_tq.tq.async_kv_batch_put(
            keys=[f"{kwargs['uid']}_{kwargs['session_id']}_0"],
            fields=agent_loop_tq.list_of_dict_to_tensordict(rows),
            tags=[{"session": kwargs["session_id"]}],
            partition_id="val" if validate else "train",
        )

    async def run_stage(self, messages, responses, *, seed_parts, equal_rewards):
        seen.stages.append((responses, equal_rewards))
        if seen.stage_error:
            raise seen.stage_error
        return GroupResult(
            [[[1], [1, 1]]] * len(responses), [[[]] * 2] * len(responses), [], {"skipped": 0.0}, [1.0] * len(responses)
        )

    async def put(keys, fields, tags, partition_id):
        assert [tag["session"] for tag in tags] == [int(key.split("_")[1]) for key in keys]
        assert [row.tolist()[0] for row in fields["responses"]] == [10 + tag["session"] for tag in tags]
        seen.stored.append((keys, fields, partition_id))

    monkeypatch.setattr(PARENT, "_run_prompt", run_prompt)
    monkeypatch.setattr(PARENT, "_run_agent_loop", run_agent_loop)
    monkeypatch.setattr(PARENT, "_agent_loop_postprocess", postprocess)
    monkeypatch.setattr(ColliderSampler, "run", run_stage)
    keep_names(monkeypatch)
    agent_loop.install()
    monkeypatch.setattr(agent_loop.tq, "async_kv_batch_put", put)
    return seen


def run(worker: Worker, validate: bool = False, **prompt: Any) -> None:
    trajectory = {"validate": validate, "step": 1, "sample_index": 3}
    asyncio.run(worker._run_prompt({**PROMPT, **prompt}, {"temperature": 1.0}, trajectory))


def test_the_last_session_triggers_the_stage_once(world: SimpleNamespace) -> None:
    """One stage for the group, over all its responses in order, and one field row for each of verl's rows."""
    worker = Worker()
    run(worker)
    assert world.stages == [([[10, 2], [11, 2], [12, 2]], False)]
    ((keys, fields, partition),) = world.stored
    assert keys == ["u_0_0", "u_1_0", "u_2_0"] and partition == "train"
    assert [row.tolist() for row in fields["gcpo_context_lengths"]] == [[1, 2]] * 3
    assert [bool(entry) for entry in list(fields["gcpo_group"])] == [True, False, False]
    assert worker.groups == {}


def test_every_session_has_a_seed_of_its_own(world: SimpleNamespace) -> None:
    """Seeds differ inside a group, and are the same when the question is asked again at the same step."""
    run(Worker())
    run(Worker())
    seeds = [params["seed"] for params in world.params]
    assert len(set(seeds)) == 3 and seeds[:3] == seeds[3:]


def test_a_failed_session_releases_the_group(world: SimpleNamespace) -> None:
    """The others go on without it; with a single survivor there is nothing to compare."""
    world.fails = {1}
    run(Worker())
    assert world.stages == [([[10, 2], [12, 2]], False)]
    assert world.stored[0][0] == ["u_0_0", "u_2_0"]
    world.fails, world.stages, world.stored = {0, 1}, [], []
    run(Worker())
    assert world.stages == [] and world.stored[0][0] == ["u_2_0"]
    assert world.stored[0][1]["gcpo_context_lengths"][0].tolist() == [0, 0]
    world.fails, world.stored = {0, 1, 2}, []
    run(Worker())
    assert world.stored == []


def test_a_hook_that_ends_the_run_leaves_verls_rows(world: SimpleNamespace) -> None:
    """The rows are there without the method's fields, so that verl can report and clear the group."""
    world.stage_error = RunStoppedError("no draw is valid")
    run(Worker())
    ((keys, fields, _),) = world.stored
    assert keys == ["u_0_0", "u_1_0", "u_2_0"] and list(fields.keys()) == ["responses"]


@pytest.mark.parametrize("opened", [True, False])
def test_verl_writes_through_the_names_that_are_replaced(monkeypatch: pytest.MonkeyPatch, opened: bool) -> None:
    """verl's own method keeps the row of a session while its group is open, and else writes it as before."""
    written = []

    async def put(**call):
        written.append(call)

    async def nothing(self, *args, **kwargs):
        pass

    keep_names(monkeypatch)
    monkeypatch.setattr(agent_loop.tq, "async_kv_batch_put", put)
    monkeypatch.setattr(PARENT, "_compute_score", nothing)
    monkeypatch.setattr(PARENT, "_compute_teacher_logprobs", nothing)
    monkeypatch.setattr(PARENT, "_compute_multi_modal_inputs", lambda *args: {})
    monkeypatch.setattr(PARENT, "_compute_position_ids", lambda self, ids, mask, images: mask.cumsum(-1) - 1)
    agent_loop.install()
    worker, answers = Worker(kappa=0.0, weighting="off"), [[10, 2], [11, 4, 2]]
    if opened:
        worker.groups["u"] = rollout.Group(2)

    async def sessions() -> None:
        for number, answer in enumerate(answers):
            output = AgentLoopOutput(
                prompt_ids=[5], response_ids=answer, response_mask=[1] * len(answer), metrics=AgentLoopMetrics()
            )
            await worker._agent_loop_postprocess(output, False, session_id=number, **PROMPT)

    asyncio.run(sessions())
    assert [call["keys"] for call in written] == ([["u_0_0", "u_1_0"]] if opened else [["u_0_0"], ["u_1_0"]])
    rows = [row.tolist() for call in written for row in call["fields"]["responses"].unbind()]
    assert rows == answers
    assert [tag["response_len"] for call in written for tag in call["tags"]] == [2, 3]
    assert {call["partition_id"] for call in written} == {"train"}


@pytest.mark.parametrize(("name", "made"), [("single_turn_agent", 1), ("other_agent", 2)])
def test_the_loop_of_a_single_turn_is_made_once(monkeypatch: pytest.MonkeyPatch, name: str, made: int) -> None:
    """verl's own method asks for a loop for each session; one of another class may have a state and is made anew."""
    loops = []

    class Loop:
        def __init__(self, **arguments: Any) -> None:
            loops.append(arguments["tokenizer"])

        async def run(self, sampling_params: dict, **kwargs: Any) -> list:
            return []

    keep_names(monkeypatch)
    monkeypatch.setattr(single_turn_agent_loop, "SingleTurnAgentLoop", Loop)
    monkeypatch.setattr(single_turn_agent_loop, "Other", Loop, raising=False)
    target = f"{single_turn_agent_loop.__name__}.Other"
    monkeypatch.setitem(verls_agent_loop._agent_loop_registry, "other_agent", {"_target_": target})
    agent_loop.install()
    worker = Worker(kappa=0.0, weighting="off")
    worker.tokenizer = worker.processor = worker.hf_model_type = worker.dataset_cls = None
    worker.config.data, worker.tools, worker.tokenizer = {}, [], "the tokenizer"
    trajectory = {"validate": True, "step": 1, "sample_index": 3, "rollout_n": 0}

    async def sessions() -> None:
        for number in range(2):
            await worker._run_agent_loop({}, trajectory, session_id=number, agent_name=name, **PROMPT)

    asyncio.run(sessions())
    assert loops == ["the tokenizer"] * made


def test_an_error_in_the_stage_costs_the_causal_part_alone(world: SimpleNamespace) -> None:
    """The rows are stored without contexts and the failure is counted."""
    world.stage_error = ValueError("the chat template drops the user's text")
    run(Worker())
    fields = world.stored[0][1]
    assert all(row.tolist() == [0, 0] for row in fields["gcpo_context_lengths"])
    assert list(fields["gcpo_group"])[0]["stats"]["stage_failed"] == 1.0


def test_validation_and_plain_grpo_draw_nothing(world: SimpleNamespace) -> None:
    """Neither validation nor a run without both parts draws or adds fields; validation writes as verl does."""
    run(Worker(), validate=True)
    assert [(keys, partition) for keys, _, partition in world.stored] == [([f"u_{i}_0"], "val") for i in range(3)]
    world.stored = []
    run(Worker(kappa=0.0, weighting="off"))
    ((keys, fields, partition),) = world.stored
    assert keys == ["u_0_0", "u_1_0", "u_2_0"] and partition == "train" and list(fields.keys()) == ["responses"]
    assert world.stages == []
    assert all("seed" in params for params in world.params)


def test_rollout_n_of_the_data(world: SimpleNamespace) -> None:
    """A question may ask for another number of responses; its group is complete at that number."""
    run(Worker(), __rollout_n__=2)
    assert world.stages == [([[10, 2], [11, 2]], False)]


@pytest.mark.parametrize("ability", ["math", "code", None])
def test_grading_of_draws(monkeypatch: pytest.MonkeyPatch, ability: str | None) -> None:
    """Valid draws are graded as responses are, programs are not run again; the response stays as it is."""

    async def compute(self, outputs, kwargs):
        outputs[-1].reward_score = float(outputs[-1].response_ids[0])
        outputs[-1].extra_fields["reward_extra_info"] = {"acc": 1.0}

    monkeypatch.setattr(PARENT, "_compute_score", compute)
    output = AgentLoopOutput(
        prompt_ids=[5], response_ids=[10, 2], response_mask=[1, 1], reward_score=0.5, metrics=AgentLoopMetrics()
    )
    before = output.model_copy(deep=True)
    draws = [Draw([7, 2], "collider", "ok"), Draw([8, 8], "collider", "cut")]
    result = GroupResult([[]] * 2, [[]] * 2, draws, {}, [1.0] * 2)

    async def sampled(*args, **kwargs):
        return result

    monkeypatch.setattr(ColliderSampler, "run", sampled)
    worker = Worker(metrics={"graded_fraction": 1.0})
    sessions = [rollout.Session([5], [10 + i, 2], 0.5 * i, output, agent_loop.Rows()) for i in range(2)]
    asyncio.run(worker._sample_more("u", rollout.Group(2), sessions, {**PROMPT, "ability": ability}))
    stats = {"graded/response": 0.25, "graded/oracle": 0.5, "graded/majority": 0.0}
    assert result.stats == ({} if ability == "code" else stats)
    assert [draw.reward for draw in draws] == [None if ability == "code" else 7.0, None]
    assert output == before


def test_only_known_rewards_are_equal(world: SimpleNamespace) -> None:
    """Responses that are graded later may differ, so nothing is left out for them."""
    for reward, equal in ((lambda session: 1.0, True), (lambda session: None, False), (float, False)):
        world.reward, world.stages = reward, []
        run(Worker())
        assert world.stages[0][1] is equal


@pytest.mark.parametrize(
    "score", [float("nan"), float("inf"), RuntimeError("broken reward"), None, "1.0", [1.0], torch.tensor([1.0, 2.0])]
)
def test_a_reward_that_fails_scores_zero_and_is_counted(monkeypatch: pytest.MonkeyPatch, score: Any) -> None:
    """A reward function that raises or returns no finite number costs its response, not the run."""

    async def compute(self, outputs, kwargs):
        if isinstance(score, Exception):
            raise score
        outputs[-1].reward_score = score
        outputs[-1].extra_fields["reward_extra_info"] = {"acc": 0.0}

    monkeypatch.setattr(PARENT, "_compute_score", compute)
    output = SimpleNamespace(reward_score=None, extra_fields={})
    asyncio.run(Worker()._compute_score([output], {"index": 0}))
    assert output.reward_score == 0.0 and output.extra_fields["reward_extra_info"]["reward_error"] == 1.0


def test_flat_fields() -> None:
    """An empty row is one token that no length counts."""
    pieces = [[1, 2], [], [3]]
    assert [piece.tolist() for piece in split(flat(pieces), lengths(pieces))] == pieces
    assert len(flat([[], []])) == 1 and torch.equal(lengths([[], []]), torch.tensor([0, 0]))
