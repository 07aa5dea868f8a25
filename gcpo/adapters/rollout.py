"""verl's agent-loop workers with the sampling hook of a method, which is called as soon as a group is complete.

``actor_rollout_ref.rollout.agent.agent_loop_manager_class`` selects ``GCPOAgentLoopManager``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from tensordict import TensorDict
from verl.experimental.agent_loop import AgentLoopOutput
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ

from gcpo.adapters import hooks
from gcpo.adapters.agent_loop import Rows, install, kept, write
from gcpo.adapters.group_client import GroupClient
from gcpo.adapters.processes import is_death
from gcpo.adapters.questions import OCCURRENCE, QuestionCounter, question_key
from gcpo.adapters.schema import to_batch
from gcpo.faults import RunStoppedError, ServerLostError
from gcpo.methods.base import RowFields, SampledGroup, Sampling
from gcpo.notices import notice
from gcpo.rewards.scores import checked_info, number, score_problem
from gcpo.seeding import seeded

logger = logging.getLogger(__name__)


@dataclass
class Session:
    """One plain response of a group."""

    prompt_ids: list[int]
    response_ids: list[int]
    reward: float | None
    output: AgentLoopOutput
    rows: Rows


@dataclass
class Group:
    """The sessions of one question; the group is complete when every session has ended or failed."""

    size: int
    occurrence: int = 0
    """Number of earlier rows of the step with the same question."""
    sessions: dict[int, Session] = field(default_factory=dict)
    failed: set[int] = field(default_factory=set)

    @property
    def complete(self) -> bool:
        return len(self.sessions) + len(self.failed) >= self.size


_Actor: Any = AgentLoopWorkerTQ
_PlainWorker: Any = _Actor.__ray_metadata__.modified_class


class GCPOAgentLoopWorkerPlain(_PlainWorker):
    """verl's agent-loop worker; when the last session of a group arrives, the method's `on_group` is called.

    verl publishes the state of a group as finished only when all its sessions have returned, so the hook ends before
    the trainer can take the group. No session waits for another; a failed session counts as arrived.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        install()
        rollout = self.config.actor_rollout_ref.rollout
        self.method = hooks.make_method(self.config)
        self.groups: dict[str, Group] = {}
        self.questions = QuestionCounter()
        if not self.method.samples:
            return
        generation = self.model_config.generation_config
        eos = getattr(generation, "eos_token_id", None) if generation is not None else None
        ends = eos if isinstance(eos, list | tuple) else [eos]
        sampling = Sampling(
            self.tokenizer,
            {"temperature": rollout.temperature, "top_p": rollout.top_p, "top_k": rollout.top_k},
            rollout.get("max_model_len") or self.model_config.hf_config.max_position_embeddings,
            frozenset(int(i) for i in ends if i is not None),
        )
        hooks.call(self.method, "start_rollout", sampling)

    async def generate_sequences(self, batch: TensorDict) -> None:
        """Dispatch a batch as verl does; number equal rows first if the manager did not."""
        self.questions.number(batch)
        await super().generate_sequences(batch)

    async def _run_agent_loop(self, sampling_params: dict[str, Any], trajectory: dict[str, Any], **kwargs: Any) -> Any:
        """Run one session, with its own seed unless ``gcpo.seed`` is ``null``; a failure releases the group."""
        uid, session = kwargs["uid"], int(kwargs["session_id"])
        step = "val" if trajectory["validate"] else trajectory["step"]
        question = question_key(kwargs, trajectory.get(OCCURRENCE, 0))
        params = seeded(sampling_params, self.method.run.seed, "plain", step, question, session)
        try:
            return await super()._run_agent_loop(params, trajectory, **kwargs)
        finally:
            # A session that stored nothing, because it failed or gave no output, arrives here.
            group = self.groups.get(uid)
            if group is not None and session not in group.sessions:
                await self._arrive(group, uid, session, None, kwargs)

    async def _run_prompt(self, prompt: dict, sampling_params: dict, trajectory: dict, trace: bool = False) -> None:
        """Open the group of a question, then run its sessions as verl does."""
        occurrence = prompt.pop(OCCURRENCE, 0)
        trajectory = {**trajectory, OCCURRENCE: occurrence}
        if trajectory["validate"]:
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
        """Grade as verl does; a reward function that fails or returns no finite number scores 0 and is counted.

        verl passes on the function's result unchanged. This method converts it to a float before it is stored.
        """
        final, problem = outputs[-1], None
        try:
            await super()._compute_score(outputs, kwargs=kwargs)
        except Exception as error:
            if is_death(error):
                raise  # an error of the reward worker, not of the reward function
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
        """Grade the session and make its row as verl does, then add it to its group, which is stored as a whole."""
        uid, session_id = kwargs["uid"], int(kwargs["session_id"])
        group = self.groups.get(uid)
        if validate or group is None or not output:
            await super()._agent_loop_postprocess(output, validate, **kwargs)
            return
        with kept() as rows:
            await super()._agent_loop_postprocess(output, validate, **kwargs)
        final = output[-1] if isinstance(output, list) else output
        session = Session(list(final.prompt_ids), list(final.response_ids), final.reward_score, final, rows)
        await self._arrive(group, uid, session_id, session, kwargs)

    async def _arrive(
        self, group: Group, uid: str, session_id: int, session: Session | None, kwargs: dict[str, Any]
    ) -> None:
        if session is None:
            group.failed.add(session_id)
        else:
            group.sessions[session_id] = session
        if group.complete and group.sessions:
            sessions = [group.sessions[i] for i in sorted(group.sessions)]
            fields = None
            try:
                if self.method.samples:
                    fields = to_batch(await self._sample_more(uid, group, sessions, kwargs))
            finally:
                await write([session.rows for session in sessions], fields)

    async def _sample_more(
        self, uid: str, group: Group, sessions: list[Session], kwargs: dict[str, Any]
    ) -> list[RowFields]:
        """Let the method sample more for the group; returns its fields, a row for each session."""

        async def grade(token_ids: Sequence[int]) -> float | None:
            output = sessions[0].output.model_copy(deep=False)
            output.response_ids, output.response_mask = list(token_ids), [1] * len(token_ids)
            output.reward_score, output.response_logprobs = None, None
            output.extra_fields, output.metrics = {}, sessions[0].output.metrics.model_copy()
            await self._compute_score([output], kwargs=kwargs)
            return output.reward_score

        sampled = SampledGroup(
            list(kwargs["raw_prompt"]),
            [session.response_ids for session in sessions],
            [session.reward for session in sessions],
            (kwargs["global_steps"], question_key(kwargs, group.occurrence)),
            kwargs.get("ability"),
            grade,
        )
        if len(sessions) == 1:
            return hooks.call(self.method, "empty_fields", 1)
        return await self._ask_method(sampled, GroupClient(self.llm_client, f"{uid}-gcpo"))

    async def _ask_method(self, group: SampledGroup, client: GroupClient) -> list[RowFields]:
        """Return the fields of a group. A hook's error is logged, and the method decides whether the run continues."""
        try:
            return await self.method.on_group(group, client.ask)
        except (RunStoppedError, ServerLostError):
            raise
        except Exception as error:
            logger.exception("%s; question %s", hooks.hook_error(self.method, "on_group", error), group.key[1])
            try:
                return self.method.on_group_failed(group, error)
            except Exception as again:
                # verl continues with a failed group. Its rows lack the method's fields, which ends the step.
                failed = hooks.hook_error(self.method, "on_group", again)
                notice(logger, str(failed))
                raise failed from error
        finally:
            await client.close()


GCPOAgentLoopWorker = ray.remote(GCPOAgentLoopWorkerPlain)


class GCPOAgentLoopManager(AgentLoopManagerTQ):
    """verl's manager over our workers; it numbers the equal rows of a step before they are sent to the workers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.agent_loop_workers_class = GCPOAgentLoopWorker
        self.questions = QuestionCounter()

    def generate_sequences(self, prompts: TensorDict) -> None:
        """Number equal rows, then dispatch them as verl does."""
        self.questions.number(prompts)
        super().generate_sequences(prompts)
