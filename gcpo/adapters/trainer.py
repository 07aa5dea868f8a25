"""verl's synchronous trainer with the two stages of GCPO: causal scoring, and the objective of Eq. 10."""

from __future__ import annotations

import logging
import os
from contextlib import nullcontext
from typing import Any

import torch
import transfer_queue as tq
from omegaconf import OmegaConf, open_dict
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.utils.debug import marked_timer

from gcpo.adapters.base import GroupTrainer, without_fields
from gcpo.adapters.fields import flat_field, nested
from gcpo.adapters.losses import CONDITIONED_TOKENS
from gcpo.adapters.registry import causal_weights
from gcpo.adapters.workers import SCORED_KINDS, GCPOActorRolloutRefWorker
from gcpo.algorithms import group_relative_advantage
from gcpo.checks import check_run
from gcpo.collider.draws import request_seed
from gcpo.collider.plan import LeaveOneOutPlan
from gcpo.stage import GroupFeatures, batch_reference, batch_weights, noise_warning, rollout_metrics

logger = logging.getLogger(__name__)

_CAUSAL_FIELDS = ("gcpo_contexts", "gcpo_context_lengths", "gcpo_outputs", "gcpo_output_lengths", "gcpo_kl_weight")
_ROLLOUT_FIELDS = (*_CAUSAL_FIELDS, "gcpo_group")
_STAGE_FIELDS = (
    "gcpo_outputs",
    "gcpo_output_lengths",
    "gcpo_group",
    "gcpo_z",
    "gcpo_z_conditioned",
    "gcpo_log_p",
    "gcpo_scored_tokens",
)
"""What the update has no use for."""


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
        """Padding rows are copies of a real row; they get no contexts, so that nothing is scored for them."""
        keys = [key for key, tag in zip(batch.keys, batch.tags, strict=True) if tag.get("is_padding", False)]
        if not keys:
            return
        slots = self.gcpo.collider.num_draws + self.gcpo.marginal_draws
        empty = {
            **flat_field("gcpo_contexts", "gcpo_context_lengths", [[]] * slots),
            **flat_field("gcpo_outputs", "gcpo_output_lengths", [[]] * slots * self.gcpo.collider.num_generations),
        }
        fields = {name: nested([value] * len(keys)) for name, value in empty.items()}
        tq.kv_batch_put(keys=keys, partition_id=batch.partition_id, fields=TensorDict(fields, batch_size=len(keys)))

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """verl's old log-probabilities, then the causal stage, which needs them as pi_old(y | q)."""
        self._count_reward_errors(batch, metrics)
        with without_fields(batch, _ROLLOUT_FIELDS) if self.gcpo.needs_rollout else nullcontext():
            batch = super()._compute_old_log_prob(batch, metrics)
        self._weight = None
        if self.gcpo.is_grpo:
            return batch
        with marked_timer("gcpo_score", self.timing_raw, color="blue"):
            self._score(batch)
        with marked_timer("gcpo_stage", self.timing_raw, color="brown"):
            self._causal_stage(batch, metrics)
        return batch

    def _check_rollout(self, batch: KVBatchMeta) -> None:
        """Refuse rows that another agent-loop manager made, or whose contexts are not those of their group's plan.

        TransferQueue leaves out a field that a row lacks.
        """
        names = ["response_mask", "gcpo_context_lengths", "gcpo_group"]
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=names)
        if "gcpo_context_lengths" not in data.keys():
            raise RuntimeError(
                "the batch lacks collider draws: is actor_rollout_ref.rollout.agent.agent_loop_manager_class set to "
                "gcpo.adapters.rollout.GCPOAgentLoopManager?"
            )
        groups = self._groups(batch)
        lengths, entries = list(data["gcpo_context_lengths"]), list(data["gcpo_group"])
        for rows in groups.values():
            rows.sort(key=lambda row: int(batch.keys[row].rsplit("_", 2)[1]))
            layout = next((entries[row]["layout"] for row in rows if entries[row]), None)
            if layout:
                plan = LeaveOneOutPlan.from_dict(layout["plan"])
                plan.check_lengths([lengths[row].tolist() for row in rows], layout["frame"], layout["blocks"])

    def _score(self, batch: KVBatchMeta) -> None:
        config = self.gcpo
        fields = ["prompts", "responses"]
        if config.needs_rollout:
            self._check_rollout(batch)
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

    def _causal_stage(self, batch: KVBatchMeta, metrics: dict) -> None:
        """Upsilon of every row, and the reference of every row beside its other fields."""
        config = self.gcpo
        names = ["rm_scores", "response_mask", "old_log_probs", "gcpo_scored_tokens"]
        if config.weighting_on:
            names.append("gcpo_z")
        if config.needs_rollout:
            names += ["gcpo_context_lengths", "gcpo_output_lengths", "gcpo_group"]
            names += ["gcpo_z_conditioned"] if config.causal_target_on else []
            names += ["gcpo_log_p", "gcpo_kl_weight"] if config.reference_on else []
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=names)
        padding = torch.tensor([tag.get("is_padding", False) for tag in batch.tags])
        groups = self._groups(batch)
        mask = data["response_mask"].to_padded_tensor(0)
        scored, *by_kind = torch.stack(list(data["gcpo_scored_tokens"])).sum(0).tolist()
        metrics["gcpo/tokens/scored"] = scored
        metrics["gcpo/tokens/scored_unshared"] = sum(by_kind)
        for kind, tokens in zip(SCORED_KINDS, by_kind, strict=True):
            metrics[f"gcpo/tokens/scored_unshared/{kind}"] = tokens
        if config.needs_rollout:
            # A padding row is a copy of a real row, with the counts of that row's group.
            entries = zip(list(data["gcpo_group"]), padding.tolist(), strict=True)
            stats = [entry["stats"] for entry, is_padding in entries if entry and not is_padding]
            metrics.update(rollout_metrics(stats, int(mask[~padding].sum())))
            metrics["gcpo/timing/rollout_tail_s"] = max((entry.get("seconds", 0.0) for entry in stats), default=0.0)
        if config.weighting_on:
            self._weight = self._weights(data, list(groups.values()), metrics)
        if config.reference_on:
            self._reference(batch, data, mask, metrics)

    def _weights(self, data: TensorDict, groups: list[list[int]], metrics: dict) -> torch.Tensor:
        """Upsilon [B]; 1 in padding rows."""
        z = list(data["gcpo_z"])
        scores = data["rm_scores"].to_padded_tensor(0.0).sum(-1)
        conditioned, valid = self._conditioned(data, z[0].shape[-1]) if self.gcpo.causal_target_on else (None, None)
        features, advantages = [], []
        for rows in groups:
            group = GroupFeatures(torch.stack([z[row] for row in rows]))
            if conditioned is not None:
                group.conditioned, group.valid = conditioned[rows], valid[rows]
            features.append(group)
            label = torch.zeros(len(rows), dtype=torch.long)
            norm_by_std = self.config.algorithm.get("norm_adv_by_std_in_grpo", True)
            advantages.append(group_relative_advantage(scores[rows], label, norm_by_std=norm_by_std))
        weights, found = batch_weights(
            features, advantages, self.gcpo, seed=request_seed(self.gcpo.seed, "control", self.global_steps)
        )
        metrics.update(found)
        warning = noise_warning(found)
        if warning:
            logger.warning(warning)
        weight = torch.ones(len(z))
        for rows, values in zip(groups, weights, strict=True):
            weight[rows] = values
        return weight

    def _conditioned(self, data: TensorDict, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Features [B, L + L', M, d] of every row and which of them are there [B, L + L', M]."""
        collider = self.gcpo.collider
        slots = collider.num_draws + self.gcpo.marginal_draws
        from_prompt = self.gcpo.features.source == "prompt"
        lengths = data["gcpo_context_lengths" if from_prompt else "gcpo_output_lengths"]
        generations = 1 if from_prompt else collider.num_generations
        conditioned, valid = torch.stack(list(data["gcpo_z_conditioned"])), torch.stack(list(lengths)) > 0
        return conditioned.view(-1, slots, generations, size), valid.view(-1, slots, generations)

    def _reference(self, batch: KVBatchMeta, data: TensorDict, mask: torch.Tensor, metrics: dict) -> None:
        """Store log pi'_ref and the mask of the kappa term for the update."""
        chosen = torch.stack(list(data["gcpo_kl_weight"])) > 0
        valid = (torch.stack(list(data["gcpo_context_lengths"])) > 0) & chosen
        log_p_query = data["old_log_probs"].to_padded_tensor(0.0)
        rows, length = mask.shape
        lengths = mask_lengths(data["response_mask"])
        log_p = torch.zeros(rows, valid.shape[1], length)
        for row, flat in enumerate(data["gcpo_log_p"]):
            log_p[row, :, : lengths[row]] = flat.view(valid.shape[1], lengths[row])
        log_ref, kl_mask, found = batch_reference(log_p, valid, log_p_query, mask, self.gcpo, chosen.flatten())
        metrics.update(found)
        fields = {
            "gcpo_log_ref": nested([log_ref[row, : lengths[row]] for row in range(rows)]),
            "gcpo_kl_mask": nested([kl_mask[row, : lengths[row]].long() for row in range(rows)]),
        }
        tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=TensorDict(fields, batch_size=rows))

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """verl's advantage stage; the estimator ``gcpo`` finds the weights of this batch."""
        with causal_weights(self._weight, self.gcpo.advantage.form):
            return super()._compute_advantage(batch, metrics)

    def _update_actor(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """verl's update with the settings of the kappa term; see ``GCPOFSDPEngine``."""
        if self.gcpo.is_grpo:
            return super()._update_actor(batch, metrics)
        batch.extra_info["gcpo"] = self._update_settings()
        try:
            with without_fields(batch, _STAGE_FIELDS):
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
        if not self.gcpo.needs_rollout:
            return
        data = tq.kv_batch_get(
            keys=batch.keys, partition_id=batch.partition_id, select_fields=["gcpo_group", "prompts"]
        )
        draws = [
            (key.rsplit("_", 2)[0], prompt, draw)
            for key, tag, prompt, entry in zip(
                batch.keys, batch.tags, data["prompts"], list(data["gcpo_group"]), strict=True
            )
            if not tag.get("is_padding", False)
            for draw in (entry or {}).get("draws", [])
        ]
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


def mask_lengths(response_mask: torch.Tensor) -> list[int]:
    """Length of every row of a nested mask."""
    return [len(row) for row in response_mask.unbind()]
