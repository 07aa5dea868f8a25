"""Collider draws and leave-one-out generations, issued as soon as a group is complete.

``GCPOAgentLoopManager`` is named by ``actor_rollout_ref.rollout.agent.agent_loop_manager_class``.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
import torch
import transfer_queue as tq
from tensordict import TensorDict
from verl.experimental.agent_loop import AgentLoopOutput
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from gcpo.adapters.fields import dump_fields, flat_field
from gcpo.adapters.group_client import GroupClient
from gcpo.adapters.processes import is_death
from gcpo.adapters.questions import OCCURRENCE, QuestionCounter, question_key
from gcpo.adapters.scores import checked_info, number, score_problem
from gcpo.collider.admission import Admission
from gcpo.collider.draws import KINDS, ColliderStage, Draw, GroupResult
from gcpo.collider.prompts import BlockBudget, CandidatePrompts, PromptTemplate
from gcpo.faults import ServerLostError
from gcpo.methods.gcpo.settings import GCPOConfig
from gcpo.seeding import request_seed, seeded

logger = logging.getLogger(__name__)


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
    occurrence: int = 0
    """How many earlier rows of the step ask the same question."""
    sessions: dict[int, Session] = field(default_factory=dict)
    failed: set[int] = field(default_factory=set)

    @property
    def complete(self) -> bool:
        return len(self.sessions) + len(self.failed) >= self.size


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
        self.questions = QuestionCounter()
        self.admit = Admission(cache_share(self.gcpo.collider.cache_tokens, self.config))
        self.prompts = make_prompts(self.gcpo, self.tokenizer, self.config)
        generation = self.model_config.generation_config
        eos = getattr(generation, "eos_token_id", None) if generation is not None else None
        extra = eos if isinstance(eos, list | tuple) else [eos]
        self.end_ids = self.prompts.end_ids | {int(i) for i in extra if i is not None}

    async def generate_sequences(self, batch: TensorDict) -> None:
        """verl's dispatch; rows that are alike are numbered here where the manager did not do it."""
        self.questions.number(batch)
        await super().generate_sequences(batch)

    async def _run_agent_loop(self, sampling_params: dict[str, Any], trajectory: dict[str, Any], **kwargs: Any) -> Any:
        """One session, with a seed of its own unless ``gcpo.seed`` is ``null``; a failure releases the group."""
        uid, session = kwargs["uid"], int(kwargs["session_id"])
        step = "val" if trajectory["validate"] else trajectory["step"]
        question = question_key(kwargs, trajectory.get(OCCURRENCE, 0))
        params = seeded(sampling_params, self.gcpo.seed, "plain", step, question, session)
        try:
            return await super()._run_agent_loop(params, trajectory, **kwargs)
        finally:
            # A session that stored nothing, because it failed or gave no output, arrives here.
            group = self.groups.get(uid)
            if group is not None and session not in group.sessions:
                await self._arrive(group, uid, session, None, kwargs)

    async def _run_prompt(self, prompt: dict, sampling_params: dict, trajectory: dict, trace: bool = False) -> None:
        """verl runs the sessions of one question; this opens their group."""
        occurrence = prompt.pop(OCCURRENCE, 0)
        trajectory = {**trajectory, OCCURRENCE: occurrence}
        if trajectory["validate"] or not self.gcpo.needs_rollout:
            await super()._run_prompt(prompt, sampling_params, trajectory, trace)
            return
        uid = prompt["uid"]
        size = int(prompt.get("__rollout_n__", self.config.actor_rollout_ref.rollout.n))
        self.groups[uid] = Group(size, occurrence)
        try:
            await super()._run_prompt(prompt, sampling_params, trajectory, trace)
        finally:
            self.groups.pop(uid, None)

    async def _compute_score(self, outputs: list[AgentLoopOutput], kwargs: dict) -> None:
        """verl's grading; a reward function that raises or returns no finite number scores 0 and is counted.

        verl passes on what the function returned as it is. It becomes a float here, before the response is stored.
        """
        final, problem = outputs[-1], None
        try:
            await super()._compute_score(outputs, kwargs=kwargs)
        except Exception as error:
            if is_death(error):
                raise  # of the reward worker; the reward function has said nothing about this response
            problem = f"raised {error!r}"
        # Without handles verl grades later, in the trainer.
        graded_here = getattr(self, "reward_loop_worker_handles", ()) is not None
        if problem is None and (graded_here or final.reward_score is not None):
            problem = score_problem(final.reward_score)
        if problem is not None:
            logger.warning("gcpo: the reward function %s on question %s; scored 0", problem, kwargs.get("index"))
        score = 0.0 if problem is not None else final.reward_score
        final.reward_score = None if score is None else number(score)
        info = checked_info(final.extra_fields.get("reward_extra_info"))
        # A reward function that catches its own errors counts them under the same name.
        info["reward_error"] = max(float(problem is not None), number(info.get("reward_error")) or 0.0)
        final.extra_fields["reward_extra_info"] = info

    async def _agent_loop_postprocess(self, output: Any, validate: bool, **kwargs: Any) -> None:
        """verl stores and grades the session; then it arrives at its group."""
        await super()._agent_loop_postprocess(output, validate, **kwargs)
        uid, session_id = kwargs["uid"], int(kwargs["session_id"])
        group = self.groups.get(uid)
        if validate or group is None or not output:
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
        and every draw that it needed counts as failed.
        """
        ids = sorted(group.sessions)
        sessions = [group.sessions[i] for i in ids]
        rewards = [session.reward for session in sessions]
        key = (kwargs["global_steps"], question_key(kwargs, group.occurrence))
        result = self._empty_result(len(ids))
        if len(ids) > 1:
            rollout, client = self.config.actor_rollout_ref.rollout, GroupClient(self.llm_client, f"{uid}-gcpo")
            stage = ColliderStage(
                self.gcpo,
                self.prompts,
                client.ask,
                {"temperature": rollout.temperature, "top_p": rollout.top_p, "top_k": rollout.top_k},
                rollout.get("max_model_len") or self.model_config.hf_config.max_position_embeddings,
                self.end_ids,
                self.admit,
            )
            equal = None not in rewards and len(set(rewards)) == 1
            try:
                result = await stage.run(
                    list(kwargs["raw_prompt"]),
                    [session.response_ids for session in sessions],
                    seed_parts=key,
                    equal_rewards=equal,
                )
            except ServerLostError:
                raise
            except Exception as error:
                logger.exception("gcpo: the collider stage of question %s failed and is left out", key[1])
                result = stage.failed(len(ids), error, seed_parts=key, equal_rewards=equal)
            finally:
                await client.close()
            await self._grade(result, sessions[0], key, kwargs)
        await self._store(uid, ids, sessions, result, key)

    def _empty_result(self, count: int) -> GroupResult:
        slots = self.gcpo.collider.num_draws + self.gcpo.marginal_draws
        generations = slots * self.gcpo.collider.num_generations
        nothing = [[[]] * slots] * count, [[[]] * generations] * count
        return GroupResult(*nothing, draws=[], stats={"skipped": 1.0}, kl_weight=[0.0] * count)

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
        entry = {"stats": stats, "layout": result.plan, "causes": result.causes}
        dumping = bool(self.config.trainer.get("rollout_data_dir")) and self.gcpo.metrics.dump_fraction > 0
        chosen = request_seed(self.gcpo.seed, "dump", *seed_parts) / 0x7FFFFFFF < self.gcpo.metrics.dump_fraction
        fields = []
        for row, _ in enumerate(ids):
            first = row == 0
            fields.append(
                {
                    **flat_field("gcpo_contexts", "gcpo_context_lengths", result.contexts[row]),
                    **flat_field("gcpo_outputs", "gcpo_output_lengths", result.outputs[row]),
                    "gcpo_kl_weight": torch.tensor([result.kl_weight[row]]),
                    "gcpo_group": entry if first else {},
                    # TransferQueue leaves out a field that a row lacks: where one group is dumped, every row has it.
                    **(dump_fields(result.draws if first and chosen else []) if dumping else {}),
                }
            )
        await tq.async_kv_batch_put(
            keys=[f"{uid}_{session_id}_0" for session_id in ids],
            fields=list_of_dict_to_tensordict(fields),
            partition_id="train",
        )


def cache_share(tokens: int | None, config: Any) -> float | None:
    """What one of the agent-loop workers may have of ``tokens`` with every server; ``None`` without a limit."""
    if tokens is None:
        return None
    rollout, trainer = config.actor_rollout_ref.rollout, config.trainer
    of_a_server = rollout.tensor_model_parallel_size * rollout.data_parallel_size * rollout.pipeline_model_parallel_size
    servers = max(1, trainer.n_gpus_per_node * trainer.nnodes // of_a_server)
    return tokens * servers / rollout.agent.num_workers


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
    """verl's manager over our workers; it numbers the rows of a step that are alike before they go to the workers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.agent_loop_workers_class = GCPOAgentLoopWorker
        self.questions = QuestionCounter()

    def generate_sequences(self, prompts: TensorDict) -> None:
        """verl's dispatch."""
        self.questions.number(prompts)
        super().generate_sequences(prompts)
