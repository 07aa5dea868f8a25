"""The hooks of GCPO in a step: collider draws, states and log-probabilities, Upsilon and pi'_ref, the kappa term."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from gcpo.collider.prompts import BlockBudget, CandidatePrompts, PromptTemplate
from gcpo.faults import RunStoppedError
from gcpo.methods.base import Batch, Dump, Engine, Generate, Method, RowFields, SampledGroup, Sampling
from gcpo.methods.fields import PROMPTS, RESPONSES, Field, FieldError
from gcpo.methods.gcpo import fields as own
from gcpo.methods.gcpo.credit import CausalCredit, CausalStage
from gcpo.methods.gcpo.draws import ColliderSampler, GroupResult
from gcpo.methods.gcpo.dump import dump_batch
from gcpo.methods.gcpo.rollout import empty_result, grade_draws, is_chosen, row_fields
from gcpo.methods.gcpo.scoring import score_rows
from gcpo.methods.gcpo.settings import BlocksConfig, GCPOConfig
from gcpo.methods.gcpo.term import KappaTerm
from gcpo.tokens import control_ids


class GCPO(Method):
    """Group Causal Policy Optimization (Eq. 10)."""

    name = "gcpo"
    settings_class = GCPOConfig
    fields = own.ALL
    settings: GCPOConfig

    # ---- sample -----------------------------------------------------------------------------------------------------

    @property
    def samples(self) -> bool:
        """Whether Upsilon or the reference needs collider draws."""
        return self.settings.needs_rollout

    def start_rollout(self, sampling: Sampling) -> None:
        """Create the prompt builder of the worker."""
        self.prompts = make_prompts(self.settings.blocks, sampling.tokenizer, self.run.chat_template_kwargs)
        self.sampling = sampling
        self.end_ids = self.prompts.end_ids | sampling.end_ids

    def _sampler(self, generate: Generate) -> ColliderSampler:
        return ColliderSampler(
            self.settings,
            self.prompts,
            generate,
            self.sampling.params,
            self.sampling.max_model_len,
            self.end_ids,
        )

    async def on_group(self, group: SampledGroup, generate: Generate) -> list[RowFields]:
        """Make the collider draws and the generations from them."""
        result = await self._sampler(generate).run(
            group.messages, group.responses, seed_parts=group.key, equal_rewards=group.equal_rewards
        )
        graded = is_chosen(self.settings, "graded", group.key, self.settings.metrics.graded_fraction)
        if graded and group.ability != "code":
            await grade_draws(group, result, partial(self.sampling.tokenizer.decode, skip_special_tokens=True))
        return self._row_fields(result, group)

    def on_group_failed(self, group: SampledGroup, error: Exception) -> list[RowFields]:
        """Let the group train without its causal part; each of its draws counts as failed.

        If all groups of a step fail, the run stops (`gcpo.methods.gcpo.missing`).
        """

        async def no_server(*_: Any) -> Any:
            raise AssertionError("nothing is generated for a group that failed")

        result = self._sampler(no_server).failed(
            len(group.responses), error, seed_parts=group.key, equal_rewards=group.equal_rewards
        )
        return self._row_fields(result, group)

    def _row_fields(self, result: GroupResult, group: SampledGroup) -> list[RowFields]:
        chosen = is_chosen(self.settings, "dump", group.key, self.settings.metrics.dump_fraction)
        return row_fields(result, dumps=self._dumps, dump_this=chosen)

    def empty_fields(self, count: int) -> list[RowFields]:
        """Return fields without contexts, so that nothing is scored for these rows and no draw is dumped twice."""
        return row_fields(empty_result(self.settings, count), dumps=self._dumps, dump_this=False)

    @property
    def _dumps(self) -> bool:
        return self.run.dumps and self.settings.needs_rollout and self.settings.metrics.dump_fraction > 0

    # ---- score ------------------------------------------------------------------------------------------------------

    @property
    def score_inputs(self) -> tuple[Field, ...]:
        """Return the responses and their contexts, or nothing for plain GRPO."""
        if self.settings.is_grpo:
            return ()
        if not self.settings.needs_rollout:
            return (PROMPTS, RESPONSES)
        sampled = (own.CONTEXTS, own.CONTEXT_LENGTHS, own.OUTPUTS, own.OUTPUT_LENGTHS, own.KL_WEIGHT)
        return (PROMPTS, RESPONSES, *sampled)

    def start_actor(self, engine: Engine) -> None:
        """Probe the model on packed trees before training starts, if packed trees are used for scoring."""
        if self.settings.scoring.packing == "tree":
            engine.tree_problem()

    def before_score(self, batch: Batch, tokenizer: Any, metrics: dict[str, float]) -> None:
        """Check that the rows have draws, and that the contexts of every group have the lengths of its blocks.

        Raises:
            RunStoppedError: the rows come from another agent-loop manager.
            ValueError: the contexts of a group do not match its plan.
        """
        self._entries: dict[str, dict[str, Any]] = {}
        if not self.settings.needs_rollout:
            return
        try:
            for uid, data in zip(batch.groups, batch.by_group(own.CONTEXT_LENGTHS, own.GROUP), strict=True):
                self._entries[uid] = next((entry for entry in data[own.GROUP] if entry), {})
                check_layout(self._entries[uid].get("layout"), data[own.CONTEXT_LENGTHS])
        except FieldError as error:
            raise RunStoppedError(
                f"the batch lacks collider draws ({error}): is "
                "actor_rollout_ref.rollout.agent.agent_loop_manager_class set to "
                "gcpo.adapters.rollout.GCPOAgentLoopManager?"
            ) from error

    def score(self, rows: Mapping[Field, Sequence[Tensor]], engine: Engine) -> Mapping[Field, Sequence[Tensor]]:
        """Return hidden states and log-probabilities under the contexts."""
        config = self.settings
        scorer = engine.scorer(
            config.features.layer,
            packing=config.scoring.packing,
            min_shared=config.scoring.min_shared_tokens,
            max_tokens=self.max_tokens,
        )
        return score_rows(rows, config, scorer, control_ids(engine.tokenizer))

    @property
    def max_tokens(self) -> int:
        """Largest number of tokens of a micro-batch of scoring and of the kappa term."""
        return int(self.settings.scoring.max_token_len_per_gpu or self.run.max_tokens)

    # ---- credit -----------------------------------------------------------------------------------------------------

    def credit(self, batch: Batch, metrics: dict[str, float]) -> CausalCredit | None:
        """Return Upsilon, and write the reference into the batch."""
        if self.settings.is_grpo:
            return None
        return CausalStage(self.settings, self.run, batch, self._entries).credit(metrics)

    # ---- update -----------------------------------------------------------------------------------------------------

    def term(self) -> KappaTerm | None:
        """Return the kappa term."""
        return KappaTerm(self.settings, self.max_tokens) if self.settings.reference_on else None

    def measures_gradients(self, step: int) -> bool:
        """Return every ``metrics.grad_norm_every`` steps."""
        every = self.settings.metrics.grad_norm_every
        return not self.settings.is_grpo and every > 0 and step % every == 0

    # ---- layout and report ------------------------------------------------------------------------------------------

    @property
    def whole_groups(self) -> bool:
        """Whether the groups stay together, since their contexts share prefixes."""
        return self.settings.needs_rollout

    def dump(self, batch: Batch, credit: CausalCredit | None, tokenizer: Any) -> Dump:
        """Return Upsilon, the kappa term and the draws; see `gcpo.methods.gcpo.dump`."""
        prompts = make_prompts(self.settings.blocks, tokenizer, self.run.chat_template_kwargs) if self._dumps else None
        return dump_batch(self.settings, batch, credit, prompts)


def make_prompts(
    blocks: BlocksConfig, tokenizer: Any, chat_template_kwargs: Mapping[str, Any] | None = None
) -> CandidatePrompts:
    """Return the prompt builder of the settings."""
    return CandidatePrompts(
        tokenizer,
        BlockBudget(blocks.max_tokens, blocks.truncation, blocks.drop_think),
        PromptTemplate(blocks.intro, blocks.candidate, blocks.collider, blocks.outro),
        chat_template_kwargs,
    )


def check_layout(layout: Mapping[str, Any] | None, lengths: Sequence[Tensor]) -> None:
    """Refuse a group whose contexts cannot be those of its prompts.

    Args:
        layout: ``frame``, the number of tokens around the blocks, and ``blocks``, that of every candidate's block.
        lengths: tokens of the contexts of every response, in the order of its sessions.

    Raises:
        ValueError: the number of responses or tokens differs.
    """
    if not layout:
        return
    frame, blocks = layout["frame"], layout["blocks"]
    if len(lengths) != len(blocks):
        raise ValueError(f"a group has {len(lengths)} responses, and its contexts were made for {len(blocks)}.")
    for i, row in enumerate(lengths):
        least = frame + sum(blocks) - blocks[i]
        if bool(((row > 0) & (row <= least)).any()):
            raise ValueError(
                f"the contexts of a group do not belong to it: response {i} has one of {int(row[row > 0].min())} "
                f"tokens, and the blocks of the other candidates take {least}."
            )


METHOD = GCPO
