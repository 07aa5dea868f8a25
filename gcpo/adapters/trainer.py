"""verl's synchronous trainer with the two stages of GCPO: causal scoring, and the objective of Eq. 10."""

from __future__ import annotations

import os
from typing import Any

import torch
import transfer_queue as tq
from omegaconf import OmegaConf, open_dict
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.utils.debug import marked_timer

from gcpo.adapters.base import GroupTrainer
from gcpo.adapters.causal_stage import CausalStage
from gcpo.adapters.dump import fetch_dump
from gcpo.adapters.fields import dump_fields, flat_field, nested
from gcpo.adapters.losses import CONDITIONED_TOKENS
from gcpo.adapters.registry import causal_weights
from gcpo.adapters.workers import GCPOActorRolloutRefWorker
from gcpo.checks import check_run
from gcpo.collider.plan import LeaveOneOutPlan
from gcpo.faults import RunStoppedError

_CAUSAL_FIELDS = ("gcpo_contexts", "gcpo_context_lengths", "gcpo_outputs", "gcpo_output_lengths", "gcpo_kl_weight")


@register_trainer("gcpo")
class GCPOTrainer(GroupTrainer):
    """Trainer mode ``gcpo``.

    Between verl's old log-probabilities and its advantages the actor scores the contexts of every group; the weights
    Upsilon then go to the advantage estimator and the reference to the update.
    """

    mode = "gcpo"
    worker_class = GCPOActorRolloutRefWorker

    def __init__(self, config: Any) -> None:
        self.gcpo = check_run(config)
        self._weight: torch.Tensor | None = None
        self._has_target: torch.Tensor | None = None
        super().__init__(config)

    # ---- set-up ---------------------------------------------------------------------------------------------------

    def _setup(self) -> None:
        # Workers are given actor_rollout_ref alone.
        with open_dict(self.config):
            self.config.actor_rollout_ref.gcpo = OmegaConf.create(self.gcpo.to_dict())
        super()._setup()

    # ---- stages of a step -----------------------------------------------------------------------------------------

    def _balance_batch(self, batch: KVBatchMeta, metrics: dict, *args: Any, **kwargs: Any) -> KVBatchMeta:
        """Whole groups meet in a mini-batch; padding rows have no contexts."""
        batch = super()._balance_batch(batch, metrics, *args, **kwargs)
        if self.gcpo.needs_rollout:
            self._keep_groups_together(batch, metrics)
            self._clear_padding(batch)
        return batch

    def _clear_padding(self, batch: KVBatchMeta) -> None:
        """Padding rows are copies of a real row; they get no contexts, so that nothing is scored for them.

        Nor do they keep the draws that the dump is to show once.
        """
        keys = [key for key, tag in zip(batch.keys, batch.tags, strict=True) if tag.get("is_padding", False)]
        if not keys:
            return
        slots = self.gcpo.collider.num_draws + self.gcpo.marginal_draws
        empty = {
            **flat_field("gcpo_contexts", "gcpo_context_lengths", [[]] * slots),
            **flat_field("gcpo_outputs", "gcpo_output_lengths", [[]] * slots * self.gcpo.collider.num_generations),
        }
        fields = {name: nested([value] * len(keys)) for name, value in empty.items()}
        if self._dumps:
            fields |= {name: nested([value] * len(keys)) for name, value in dump_fields([]).items()}
        tq.kv_batch_put(keys=keys, partition_id=batch.partition_id, fields=TensorDict(fields, batch_size=len(keys)))

    @property
    def _dumps(self) -> bool:
        """Whether the rollout stores draws for the dump."""
        folder = self.config.trainer.get("rollout_data_dir")
        return self.gcpo.needs_rollout and bool(folder) and self.gcpo.metrics.dump_fraction > 0

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """verl's old log-probabilities, then the causal stage, which needs them as pi_old(y | q)."""
        self._count_reward_errors(batch, metrics)
        batch = super()._compute_old_log_prob(batch, metrics)
        self._weight = self._has_target = None
        if self.gcpo.is_grpo:
            return batch
        groups = self._groups(batch)
        with marked_timer("gcpo_score", self.timing_raw, color="blue"):
            entries = self._check_rollout(batch, groups) if self.gcpo.needs_rollout else {}
            self._score(batch)
        with marked_timer("gcpo_stage", self.timing_raw, color="brown"):
            norm_by_std = self.config.algorithm.get("norm_adv_by_std_in_grpo", True)
            stage = CausalStage(self.gcpo, batch, groups, entries, step=self.global_steps, norm_by_std=norm_by_std)
            self._weight, self._has_target = stage.run(metrics)
        return batch

    def _check_rollout(self, batch: KVBatchMeta, groups: dict[str, list[int]]) -> dict[str, dict[str, Any]]:
        """The rollout's report about every group, by uid.

        TransferQueue leaves out a field that a row lacks.

        Raises:
            RuntimeError: another agent-loop manager made the rows.
            ValueError: the contexts of a group are not those of its plan.
        """
        names = ["index", "gcpo_context_lengths", "gcpo_group"]
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=names)
        if "gcpo_context_lengths" not in data.keys():
            raise RunStoppedError(
                "the batch lacks collider draws: is actor_rollout_ref.rollout.agent.agent_loop_manager_class set to "
                "gcpo.adapters.rollout.GCPOAgentLoopManager?"
            )
        lengths, known = list(data["gcpo_context_lengths"]), list(data["gcpo_group"])
        entries = {}
        for uid, rows in groups.items():
            entry = next((known[row] for row in rows if known[row]), {})
            entries[uid] = entry
            layout = entry.get("layout")
            if layout:
                rows = sorted(rows, key=lambda row: int(batch.keys[row].rsplit("_", 2)[1]))
                plan = LeaveOneOutPlan.from_dict(layout["plan"])
                plan.check_lengths([lengths[row].tolist() for row in rows], layout["frame"], layout["blocks"])
        return entries

    def _score(self, batch: KVBatchMeta) -> None:
        config = self.gcpo
        fields = ["prompts", "responses"]
        if config.needs_rollout:
            fields.extend(_CAUSAL_FIELDS)
        request = KVBatchMeta(
            partition_id=batch.partition_id,
            keys=list(batch.keys),
            tags=list(batch.tags),
            fields=fields,
            extra_info={
                "temperature": self.config.actor_rollout_ref.rollout.temperature,
                "gcpo_scoring": {
                    "states": config.weighting_on,
                    "contexts": config.needs_rollout,
                    "conditioned": config.causal_target_on,
                    "log_probs": config.reference_on,
                    "source": config.features.source,
                    "context": config.features.context,
                    "token": config.features.token,
                    "layer": config.features.layer,
                },
            },
        )
        self.actor_rollout_wg.score_contexts(request)

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """verl's advantage stage; the estimator ``gcpo`` finds the weights of this batch."""
        with causal_weights(self._weight, self.gcpo.advantage.form, self._has_target):
            return super()._compute_advantage(batch, metrics)

    @property
    def update_fields(self) -> tuple[str, ...]:
        """The kappa term's, and the contexts where the policy is conditioned on them."""
        if not self.gcpo.reference_on:
            return ()
        names = ("gcpo_log_ref", "gcpo_kl_mask", "gcpo_kl_weight")
        if self.gcpo.reference.policy_context == "query":
            return names
        return (*names, "gcpo_contexts", "gcpo_context_lengths")

    def _update_actor(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """verl's update with the settings of the kappa term; see ``GCPOFSDPEngine``."""
        if self.gcpo.is_grpo:
            return super()._update_actor(batch, metrics)
        batch.extra_info["gcpo"] = self._update_settings()
        try:
            batch = super()._update_actor(batch, metrics)
        finally:
            batch.extra_info.pop("gcpo", None)
        for name in [name for name in metrics if name.startswith("actor/gcpo/")]:
            metrics[name.removeprefix("actor/")] = metrics.pop(name)
        # verl's metrics are means over the updates of a step.
        actor = self.config.actor_rollout_ref.actor
        rows = actor.ppo_mini_batch_size * self.config.actor_rollout_ref.rollout.n
        updates = len(batch) // rows * actor.ppo_epochs
        metrics[CONDITIONED_TOKENS] = metrics.get(CONDITIONED_TOKENS, 0.0) * updates
        lengths = [tag["seq_len"] for tag in batch.tags if not tag.get("is_padding", False)]
        metrics["gcpo/tokens/trained/plain"] = float(sum(lengths) * actor.ppo_epochs)
        return batch

    def _update_settings(self) -> dict[str, Any]:
        actor, reference = self.config.actor_rollout_ref.actor, self.gcpo.reference
        every = self.gcpo.metrics.grad_norm_every
        parts = []
        if every and self.global_steps % every == 0:
            parts = ["policy"]
            parts += ["beta"] if actor.use_kl_loss else []
            parts += ["kappa"] if self.gcpo.reference_on else []
        return {
            "kappa": self.gcpo.kappa,
            "max_kl": reference.max_kl,
            "policy_context": reference.policy_context,
            "num_shared": self.gcpo.collider.num_draws,
            "loss_agg_mode": actor.loss_agg_mode,
            "loss_scale_factor": actor.loss_scale_factor,
            "max_token_len_per_gpu": int(self.gcpo.scoring.max_token_len_per_gpu or actor.ppo_max_token_len_per_gpu),
            "packing": self.gcpo.scoring.packing,
            "min_shared_tokens": self.gcpo.scoring.min_shared_tokens,
            "micro_batch_size": None if actor.use_dynamic_bsz else actor.ppo_micro_batch_size_per_gpu,
            "measure_parts": parts,
        }

    # ---- the rollout dump -----------------------------------------------------------------------------------------

    def _log_rollout_data(self, batch: KVBatchMeta, timing_raw: dict, rollout_data_dir: str) -> None:
        """verl's dump of the plain responses, and one of the auxiliary generations in ``auxiliary/``."""
        super()._log_rollout_data(batch, timing_raw, rollout_data_dir)
        draws = fetch_dump(batch) if self._dumps else []
        if not draws:
            return
        decode = self.tokenizer.decode
        self._dump_generations(
            inputs=[decode(prompt, skip_special_tokens=True) for _, prompt, _ in draws],
            outputs=[decode(draw["token_ids"], skip_special_tokens=True) for _, _, draw in draws],
            gts=[None] * len(draws),
            scores=[draw["reward"] for _, _, draw in draws],
            reward_extra_infos_dict={
                "uid": [uid for uid, _, _ in draws],
                "kind": [draw["kind"] for _, _, draw in draws],
                "outcome": [draw["outcome"] for _, _, draw in draws],
            },
            dump_path=os.path.join(rollout_data_dir, "auxiliary"),
        )
