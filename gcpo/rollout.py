"""Collider draws and leave-one-out generations, issued as soon as a group is complete.

``GCPOAgentLoopManager`` is named by ``actor_rollout_ref.rollout.agent.agent_loop_manager_class``.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
import torch
import transfer_queue as tq
from verl.experimental.agent_loop import AgentLoopOutput
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from gcpo.collider.plan import leave_one_out_plan
from gcpo.collider.prompts import BlockBudget, CandidatePrompts, GroupPrompts, PromptTemplate
from gcpo.config import GCPOConfig

logger = logging.getLogger(__name__)

KINDS = ("collider", "marginal", "conditioned")


def request_seed(*parts: Any) -> int:
    """A seed that depends on ``parts`` alone, so that a request can be repeated in another run."""
    digest = hashlib.blake2b(json.dumps([str(part) for part in parts]).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") & 0x7FFFFFFF


def question_key(kwargs: dict[str, Any]) -> str:
    """Names a question the same way in every run: its index in the data set and its text."""
    text = json.dumps([dict(message) for message in kwargs["raw_prompt"]], default=str, sort_keys=True)
    return f"{kwargs.get('index')}-{hashlib.blake2b(text.encode(), digest_size=6).hexdigest()}"


@dataclass
class Session:
    """One plain response of a group."""

    prompt_ids: list[int]
    response_ids: list[int]
    reward: float | None
    output: AgentLoopOutput


@dataclass
class Group:
    """The sessions of one question; it is complete when every session has arrived, in whatever way."""

    size: int
    sessions: dict[int, Session] = field(default_factory=dict)
    failed: set[int] = field(default_factory=set)

    @property
    def complete(self) -> bool:
        return len(self.sessions) + len(self.failed) >= self.size


@dataclass
class Draw:
    """One auxiliary generation: its tokens, or none where it failed, is empty or was cut."""

    token_ids: list[int]
    kind: str
    outcome: str
    generated: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    reward: float | None = None

    @property
    def valid(self) -> bool:
        return self.outcome == "ok"


@dataclass
class GroupResult:
    """What the collider stage found out about one group: tokens by place, counts, and texts for the dump."""

    contexts: list[list[list[int]]]
    outputs: list[list[list[int]]]
    draws: list[Draw]
    stats: dict[str, float]


class ColliderStage:
    """Draws the colliders and the conditioned generations of one group.

    Args:
        config: the resolved ``gcpo:`` group.
        prompts: builds the prompts.
        generate: ``(prompt_ids, sampling_params) -> TokenOutput``-like, awaitable.
        sampling_params: of the plain rollout (temperature, top-p, top-k); lengths and seeds are set here.
        max_model_len: longest sequence that the server takes.
        end_ids: tokens that end a response.
    """

    def __init__(
        self,
        config: GCPOConfig,
        prompts: CandidatePrompts,
        generate: Callable[[list[int], dict[str, Any]], Awaitable[Any]],
        sampling_params: dict[str, Any],
        max_model_len: int | None,
        end_ids: frozenset[int],
    ) -> None:
        self.config = config
        self.prompts = prompts
        self.generate = generate
        self.sampling_params = sampling_params
        self.max_model_len = max_model_len
        self.end_ids = end_ids

    async def draw(self, kind: str, prompt_ids: list[int], seed: int) -> Draw:
        """One generation; it never raises, and says how it ended."""
        conditioned = kind == "conditioned"
        max_tokens = self.config.conditioned.max_tokens if conditioned else self.config.collider.max_tokens
        if self.max_model_len is not None:
            max_tokens = min(max_tokens, self.max_model_len - len(prompt_ids))
        if max_tokens < 1:
            return Draw([], kind, "failed", prompt_tokens=len(prompt_ids))
        params = {**self.sampling_params, "max_tokens": max_tokens, "seed": seed, "logprobs": False}
        try:
            output = await self.generate(prompt_ids, params)
        except Exception as error:
            logger.warning("gcpo: a %s generation failed and is left out: %s", kind, error)
            return Draw([], kind, "failed", prompt_tokens=len(prompt_ids))
        token_ids = [int(token) for token in output.token_ids]
        cached = output.extra_fields.get("num_cached_tokens") or 0
        if output.stop_reason == "aborted":
            outcome = "failed"
        elif not [token for token in token_ids if token not in self.end_ids]:
            outcome = "empty"
        elif len(token_ids) >= max_tokens and token_ids[-1] not in self.end_ids:
            outcome = "cut"
        else:
            outcome = "ok"
        return Draw(token_ids, kind, outcome, len(token_ids), len(prompt_ids), int(cached))

    async def run(
        self,
        messages: Sequence[dict[str, Any]],
        responses: Sequence[Sequence[int]],
        *,
        seed_parts: tuple[Any, ...],
        equal_rewards: bool,
    ) -> GroupResult:
        """All auxiliary generations of one group.

        Args:
            messages: the question as chat messages.
            responses: token ids of the n responses, by identity.
            seed_parts: what the seeds of this group depend on.
            equal_rewards: whether all advantages are zero, so that Upsilon cannot matter.
        """
        config, n = self.config, len(responses)
        num_shared, num_marginal = config.collider.num_draws, config.marginal_draws
        started = time.monotonic()
        blocks = tuple(tuple(self.prompts.candidate_block(k, ids)) for k, ids in enumerate(responses))
        order = np.random.default_rng(request_seed(config.seed, "order", *seed_parts)).permutation(n).tolist()
        plan = leave_one_out_plan(n, num_shared, lengths=[len(block) for block in blocks], permutation=order)
        group = GroupPrompts(self.prompts.frame(messages), blocks, plan)

        def seed(*parts: Any) -> int:
            return request_seed(config.seed, *seed_parts, *parts)

        def needed() -> bool:
            # A group with A = 0 needs no Upsilon; with kappa = 0 it needs nothing at all.
            return config.reference_on or not equal_rewards

        shared: list[Draw] = []
        marginal: list[list[Draw]] = [[] for _ in range(n)]
        if needed():
            prompt = group.collider_prompt()
            shared_tasks = [self.draw("collider", prompt, seed("collider", l)) for l in range(num_shared)]
            marginal_tasks = [
                self.draw("marginal", group.marginal_prompt(i), seed("marginal", i, l))
                for i in range(n)
                for l in range(num_marginal)
            ]
            draws = await asyncio.gather(*shared_tasks, *marginal_tasks)
            shared, rest = draws[:num_shared], draws[num_shared:]
            marginal = [rest[i * num_marginal : (i + 1) * num_marginal] for i in range(n)]

        contexts = [self._contexts(group, i, shared, marginal[i], num_shared, num_marginal) for i in range(n)]
        generations = config.collider.num_generations
        outputs: list[list[list[int]]] = [[[] for _ in range(len(row) * generations)] for row in contexts]
        conditioned: list[Draw] = []
        if config.needs_generations and not equal_rewards and needed():
            places = [
                (i, slot, m)
                for i, row in enumerate(contexts)
                for slot, context in enumerate(row)
                if context
                for m in range(generations)
            ]
            conditioned = await asyncio.gather(
                *(self.draw("conditioned", contexts[i][slot], seed("conditioned", i, slot, m)) for i, slot, m in places)
            )
            for (i, slot, m), draw in zip(places, conditioned, strict=True):
                if draw.valid:
                    outputs[i][slot * generations + m] = draw.token_ids
        draws = [*shared, *(draw for row in marginal for draw in row), *conditioned]
        stats = _count(draws)
        stats["skipped"] = float(not draws)
        stats["seconds"] = time.monotonic() - started
        stats["unique_block_share"] = plan.unique_blocks() / max(n * (n - 1) * num_shared, 1)
        return GroupResult(contexts, outputs, draws, stats)

    def _contexts(
        self,
        group: GroupPrompts,
        i: int,
        shared: Sequence[Draw],
        marginal: Sequence[Draw],
        num_shared: int,
        num_marginal: int,
    ) -> list[list[int]]:
        """Prompts x_{i,l}, then those over the leave-one-out draws; empty where the draw is not valid."""
        append = self.config.reference.collider_context == "append"
        contexts: list[list[int]] = []
        for slot in range(num_shared + num_marginal):
            own = slot < num_shared
            draws = shared if own else marginal
            at = slot if own else slot - num_shared
            draw = draws[at] if at < len(draws) else None
            if draw is None or not draw.valid:
                contexts.append([])
                continue
            replaced = None
            if append and own and slot > 0 and shared[0].valid:
                replaced = self.prompts.collider_block(shared[0].token_ids)
            block = self.prompts.collider_block(draw.token_ids)
            contexts.append(group.context(i, slot if own else 0, block, replaced))
        return contexts


def _count(draws: Sequence[Draw]) -> dict[str, float]:
    """Counts by kind: draws, how they ended, tokens generated, prefilled and cached."""
    counts: Counter[str] = Counter()
    for draw in draws:
        counts[f"{draw.kind}/draws"] += 1
        counts[f"{draw.kind}/{draw.outcome}"] += 1
        counts[f"{draw.kind}/generated_tokens"] += draw.generated
        counts[f"{draw.kind}/prompt_tokens"] += draw.prompt_tokens
        counts[f"{draw.kind}/cached_tokens"] += draw.cached_tokens
    return {name: float(value) for name, value in counts.items()}


_PlainWorker = AgentLoopWorkerTQ.__ray_metadata__.modified_class


class GCPOAgentLoopWorkerPlain(_PlainWorker):
    """verl's agent-loop worker; the last session of a group to arrive does the collider stage of the group.

    The state of the group is published as finished by verl only when all its sessions have returned, so the stage is
    over before the trainer can take the group. No session waits for another: one that fails counts as arrived.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        rollout = self.config.actor_rollout_ref.rollout
        self.gcpo = GCPOConfig.from_config(
            self.config.get("gcpo"), n=rollout.n, response_length=rollout.response_length
        )
        self.groups: dict[str, Group] = {}
        self.prompts = make_prompts(self.gcpo, self.tokenizer, self.config)
        generation = self.model_config.generation_config
        eos = getattr(generation, "eos_token_id", None) if generation is not None else None
        extra = eos if isinstance(eos, list | tuple) else [eos]
        self.end_ids = self.prompts.end_ids | {int(i) for i in extra if i is not None}

    async def _run_agent_loop(
        self, sampling_params: dict[str, Any], trajectory: dict[str, Any], **kwargs: Any
    ) -> Any:
        """One session, with a seed of its own; a failure releases the group."""
        uid, session = kwargs["uid"], int(kwargs["session_id"])
        step = "val" if trajectory["validate"] else trajectory["step"]
        seed = request_seed(self.gcpo.seed, "plain", step, question_key(kwargs), session)
        try:
            return await super()._run_agent_loop({**sampling_params, "seed": seed}, trajectory, **kwargs)
        finally:
            # A session that stored nothing, because it failed or gave no output, arrives here.
            group = self.groups.get(uid)
            if group is not None and session not in group.sessions:
                await self._arrive(group, uid, session, None, kwargs)

    async def _run_prompt(
        self, prompt: dict, sampling_params: dict, trajectory: dict, trace: bool = False
    ) -> None:
        """verl runs the sessions of one question; this opens their group."""
        if trajectory["validate"] or not self.gcpo.needs_rollout:
            await super()._run_prompt(prompt, sampling_params, trajectory, trace)
            return
        uid = prompt["uid"]
        size = int(prompt.get("__rollout_n__", self.config.actor_rollout_ref.rollout.n))
        self.groups[uid] = Group(size)
        try:
            await super()._run_prompt(prompt, sampling_params, trajectory, trace)
        finally:
            self.groups.pop(uid, None)

    async def _agent_loop_postprocess(self, output: Any, validate: bool, **kwargs: Any) -> None:
        """verl stores and grades the session; then it arrives at its group."""
        await super()._agent_loop_postprocess(output, validate, **kwargs)
        uid, session_id = kwargs["uid"], int(kwargs["session_id"])
        group = self.groups.get(uid)
        if validate or group is None:
            return
        final = output[-1] if isinstance(output, list) else output
        session = Session(list(final.prompt_ids), list(final.response_ids), final.reward_score, final)
        await self._arrive(group, uid, session_id, session, kwargs)

    async def _arrive(
        self, group: Group, uid: str, session_id: int, session: Session | None, kwargs: dict[str, Any]
    ) -> None:
        if session is None:
            group.failed.add(session_id)
        else:
            group.sessions[session_id] = session
        if group.complete and group.sessions:
            await self._finish_group(uid, group, kwargs)

    async def _finish_group(self, uid: str, group: Group, kwargs: dict[str, Any]) -> None:
        """Run the collider stage and store its results beside the rows of the group.

        An error in the stage costs the group its causal part, and nothing else: its rows are stored without contexts,
        so that they train as plain GRPO, and are counted.
        """
        ids = sorted(group.sessions)
        sessions = [group.sessions[i] for i in ids]
        rewards = [session.reward for session in sessions]
        key = (kwargs["global_steps"], question_key(kwargs))
        result = self._empty_result(len(ids))
        if len(ids) > 1:
            rollout = self.config.actor_rollout_ref.rollout
            stage = ColliderStage(
                self.gcpo,
                self.prompts,
                self._generator(f"{uid}-gcpo"),
                {"temperature": rollout.temperature, "top_p": rollout.top_p, "top_k": rollout.top_k},
                rollout.get("max_model_len") or self.model_config.hf_config.max_position_embeddings,
                self.end_ids,
            )
            try:
                result = await stage.run(
                    list(kwargs["raw_prompt"]),
                    [session.response_ids for session in sessions],
                    seed_parts=key,
                    equal_rewards=None not in rewards and len(set(rewards)) == 1,
                )
                await self._grade(result, sessions[0], key, kwargs)
            except Exception:
                logger.exception("gcpo: the collider stage of question %s failed; the group trains as GRPO", key[1])
                result.stats["stage_failed"] = 1.0
        await self._store(uid, ids, sessions, result, key)

    def _generator(self, request_id: str) -> Callable[[list[int], dict[str, Any]], Awaitable[Any]]:
        """Requests of a group under one id go to one server, whose prefix cache they share."""

        async def generate(prompt_ids: list[int], params: dict[str, Any]) -> Any:
            return await self.llm_client.generate(request_id, prompt_ids=prompt_ids, sampling_params=dict(params))

        return generate

    def _empty_result(self, count: int) -> GroupResult:
        slots = self.gcpo.collider.num_draws + self.gcpo.marginal_draws
        generations = slots * self.gcpo.collider.num_generations
        return GroupResult([[[]] * slots] * count, [[[]] * generations] * count, [], {"skipped": 1.0})

    async def _grade(
        self, result: GroupResult, session: Session, seed_parts: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Grade the valid draws of a share of the groups, for our metrics alone."""
        fraction = self.gcpo.metrics.graded_fraction
        chosen = request_seed(self.gcpo.seed, "graded", *seed_parts) / 0x7FFFFFFF < fraction
        if not chosen or kwargs.get("ability") == "code":
            return

        async def grade(draw: Draw) -> None:
            output = session.output.model_copy(deep=False)
            output.response_ids, output.response_mask = draw.token_ids, [1] * len(draw.token_ids)
            output.reward_score, output.response_logprobs = None, None
            output.extra_fields, output.metrics = {}, session.output.metrics.model_copy()
            await self._compute_score([output], kwargs=kwargs)
            draw.reward = output.reward_score

        valid = [draw for draw in result.draws if draw.valid]
        for outcome in await asyncio.gather(*(grade(draw) for draw in valid), return_exceptions=True):
            if isinstance(outcome, BaseException):
                logger.warning("gcpo: an auxiliary generation could not be graded: %s", outcome)

    async def _store(
        self,
        uid: str,
        ids: list[int],
        sessions: list[Session],
        result: GroupResult,
        seed_parts: tuple[Any, ...],
    ) -> None:
        stats = dict(result.stats)
        for kind in KINDS:
            graded = [draw.reward for draw in result.draws if draw.kind == kind and draw.reward is not None]
            stats[f"{kind}/graded"] = float(len(graded))
            stats[f"{kind}/reward"] = float(sum(graded))
        stats["graded_response_reward"] = (
            float(np.mean([s.reward for s in sessions if s.reward is not None] or [0.0]))
            if stats["collider/graded"]
            else 0.0
        )
        dump: list[dict[str, Any]] = []
        if request_seed(self.gcpo.seed, "dump", *seed_parts) / 0x7FFFFFFF < self.gcpo.metrics.dump_fraction:
            dump = [
                {"kind": d.kind, "outcome": d.outcome, "reward": d.reward, "token_ids": d.token_ids}
                for d in result.draws
            ]
        fields = []
        for row, _ in enumerate(ids):
            first = row == 0
            fields.append(
                {
                    **flat_field("gcpo_contexts", "gcpo_context_lengths", result.contexts[row]),
                    **flat_field("gcpo_outputs", "gcpo_output_lengths", result.outputs[row]),
                    "gcpo_group": {"stats": stats, "draws": dump} if first else {},
                }
            )
        await tq.async_kv_batch_put(
            keys=[f"{uid}_{session_id}_0" for session_id in ids],
            fields=list_of_dict_to_tensordict(fields),
            partition_id="train",
        )


def flat_field(name: str, lengths: str, pieces: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """Token lists as one flat row and their lengths; an empty row is one zero, which no length counts."""
    flat = [token for piece in pieces for token in piece] or [0]
    return {
        name: torch.tensor(flat, dtype=torch.int64),
        lengths: torch.tensor([len(piece) for piece in pieces], dtype=torch.int64),
    }


def make_prompts(gcpo: GCPOConfig, tokenizer: Any, config: Any) -> CandidatePrompts:
    """The prompt builder that ``config`` asks for."""
    blocks = gcpo.blocks
    return CandidatePrompts(
        tokenizer,
        BlockBudget(blocks.max_tokens, blocks.truncation, blocks.drop_think),
        PromptTemplate(blocks.intro, blocks.candidate, blocks.collider, blocks.outro),
        config.data.get("apply_chat_template_kwargs") or {},
    )


GCPOAgentLoopWorker = ray.remote(GCPOAgentLoopWorkerPlain)


class GCPOAgentLoopManager(AgentLoopManagerTQ):
    """verl's manager over our workers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.agent_loop_workers_class = GCPOAgentLoopWorker

