"""Upsilon and the causal reference of a batch, from the fields that the rollout and the actor wrote.

The driver holds the long fields of a few groups at a time: for 256 groups of 8 with 8 contexts and 16,384 tokens the
conditioned log-probabilities of the batch are 1.1 GB, and its states with 8 generations to a context as much again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transfer_queue as tq
from tensordict import TensorDict
from transfer_queue import KVBatchMeta

from gcpo.adapters.fields import nested
from gcpo.adapters.workers import SCORED_KINDS
from gcpo.algorithms import group_relative_advantage
from gcpo.methods.gcpo.credit import BatchWeights, GroupFeatures, batch_weights, noise_warning
from gcpo.methods.gcpo.missing import Missing
from gcpo.methods.gcpo.reference import ReferenceStage
from gcpo.methods.gcpo.rollout_metrics import rollout_metrics
from gcpo.methods.gcpo.settings import GCPOConfig
from gcpo.seeding import request_seed

logger = logging.getLogger(__name__)

GROUPS_AT_ONCE = 16
"""Groups whose long fields are fetched together."""


class CausalStage:
    """The causal part of one step.

    Args:
        config: the resolved configuration.
        batch: the batch, after ``score_contexts``.
        groups: rows of every group by uid; padding rows are in none.
        entries: the rollout's report about every group (``gcpo_group``), by uid; empty without collider draws.
        step: number of the step.
        norm_by_std: whether advantages are divided by the standard deviation of their group.
    """

    def __init__(
        self,
        config: GCPOConfig,
        batch: KVBatchMeta,
        groups: Mapping[str, list[int]],
        entries: Mapping[str, Mapping[str, Any]],
        *,
        step: int,
        norm_by_std: bool,
    ) -> None:
        self.config = config
        self.batch = batch
        self.groups = list(groups.values())
        self.entries = [entries.get(uid) or {} for uid in groups]
        self.step = step
        self.norm_by_std = norm_by_std
        self.missing = Missing()

    def run(self, metrics: dict) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Store the reference of every row beside its other fields.

        Returns:
            Upsilon [B] and has_target, bool [B]; 1 and False in padding rows; ``None`` where weighting is off.

        Raises:
            NothingValidError: no draw, no target or no reference that was asked for is valid.
        """
        self._count(metrics)
        weight = has_target = None
        if self.config.weighting_on:
            weight, has_target = self._weights(metrics)
        if self.config.reference_on:
            self._reference(metrics)
        metrics.update(self.missing.metrics())
        self.missing.check(self.step)
        warning = self.missing.warning(self.step, self.config.metrics.max_missing)
        if warning:
            logger.warning(warning)
        return weight, has_target

    # ---- rows -----------------------------------------------------------------------------------------------------

    def _fetch(self, rows: list[int], names: list[str]) -> dict[str, list[Any]]:
        """Some fields of some rows, as a list with an entry for each row."""
        keys = [self.batch.keys[row] for row in rows]
        data = tq.kv_batch_get(keys=keys, partition_id=self.batch.partition_id, select_fields=names)
        return {
            name: list(data[name].unbind()) if isinstance(data[name], torch.Tensor) else list(data[name])
            for name in names
        }

    def _by_group(self, names: list[str]) -> Iterator[dict[str, list[Any]]]:
        """The fields of one group after another."""
        for start in range(0, len(self.groups), GROUPS_AT_ONCE):
            groups = self.groups[start : start + GROUPS_AT_ONCE]
            data = self._fetch([row for rows in groups for row in rows], names)
            at = 0
            for rows in groups:
                yield {name: values[at : at + len(rows)] for name, values in data.items()}
                at += len(rows)

    def _pieces(self) -> Iterator[list[int]]:
        """All rows, those of a few whole groups at a time; padding rows come last."""
        for start in range(0, len(self.groups), GROUPS_AT_ONCE):
            yield [row for rows in self.groups[start : start + GROUPS_AT_ONCE] for row in rows]
        known = {row for rows in self.groups for row in rows}
        padding = [row for row in range(len(self.batch)) if row not in known]
        if padding:
            yield padding

    # ---- the parts ------------------------------------------------------------------------------------------------

    def _count(self, metrics: dict) -> None:
        """Count the tokens of the rollout and the scoring, and the draws that are missing."""
        everything = list(range(len(self.batch)))
        tokens = self._fetch(everything, ["gcpo_scored_tokens"])["gcpo_scored_tokens"]
        scored, *by_kind = torch.stack(tokens).sum(0).tolist()
        metrics["gcpo/tokens/scored"] = scored
        metrics["gcpo/tokens/scored_unshared"] = sum(by_kind)
        for kind, count in zip(SCORED_KINDS, by_kind, strict=True):
            metrics[f"gcpo/tokens/scored_unshared/{kind}"] = count
        if not self.config.needs_rollout:
            return
        known = [entry for entry in self.entries if entry]
        for entry in known:
            self.missing.add_draws(entry)
        stats = [entry["stats"] for entry in known]
        responses = sum(self.batch.tags[row]["response_len"] for rows in self.groups for row in rows)
        metrics.update(rollout_metrics(stats, responses))
        metrics["gcpo/timing/rollout_tail_s"] = max((entry.get("seconds", 0.0) for entry in stats), default=0.0)

    def _weights(self, metrics: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """Upsilon [B] and has_target [B]."""
        advantages = []
        for data in self._by_group(["rm_scores"]):
            scores = torch.stack([row.sum() for row in data["rm_scores"]])
            label = torch.zeros(len(scores), dtype=torch.long)
            advantages.append(group_relative_advantage(scores, label, norm_by_std=self.norm_by_std))
        found = batch_weights(
            self._features(),
            advantages,
            self.config,
            mean=self._mean_state() if self.config.features.center == "batch" else None,
            seed=request_seed(self.config.seed, "control", self.step),
        )
        metrics.update(found.metrics)
        warning = noise_warning(found.metrics)
        if warning:
            logger.warning(warning)
        self._count_targets(found)
        weight, has_target = torch.ones(len(self.batch)), torch.zeros(len(self.batch), dtype=torch.bool)
        for rows, values, has in zip(self.groups, found.weights, found.has_target, strict=True):
            weight[rows], has_target[rows] = values, has
        return weight, has_target

    def _count_targets(self, found: BatchWeights) -> None:
        """Targets that are missing; groups whose rewards are equal, and those of one response, ask for none."""
        if not self.config.causal_target_on:
            return
        for entry, has_target in zip(self.entries, found.has_target, strict=True):
            if entry.get("stats", {}).get("equal_rewards") == 0.0:
                self.missing.targets.add(len(has_target), int((~has_target).sum()))

    def _mean_state(self) -> torch.Tensor:
        """The mean state [d] of the batch's responses."""
        return torch.stack([z for data in self._by_group(["gcpo_z"]) for z in data["gcpo_z"]]).mean(0)

    def _features(self) -> Iterator[GroupFeatures]:
        """Features of one group after another."""
        if not self.config.causal_target_on:
            yield from (GroupFeatures(torch.stack(data["gcpo_z"])) for data in self._by_group(["gcpo_z"]))
            return
        from_prompt = self.config.features.source == "prompt"
        slots = self.config.collider.num_draws + self.config.marginal_draws
        generations = 1 if from_prompt else self.config.collider.num_generations
        lengths = "gcpo_context_lengths" if from_prompt else "gcpo_output_lengths"
        for data in self._by_group(["gcpo_z", "gcpo_z_conditioned", lengths]):
            z, conditioned = torch.stack(data["gcpo_z"]), torch.stack(data["gcpo_z_conditioned"])
            valid = torch.stack(data[lengths]) > 0
            yield GroupFeatures(
                z, conditioned.view(len(z), slots, generations, -1), valid.view(len(z), slots, generations)
            )

    def _reference(self, metrics: dict) -> None:
        """Store log pi'_ref and the mask of the kappa term for the update."""
        stage = ReferenceStage(self.config)
        names = ["response_mask", "old_log_probs", "gcpo_context_lengths", "gcpo_log_p", "gcpo_kl_weight"]
        for rows in self._pieces():
            data = self._fetch(rows, names)
            references = []
            for mask, old, lengths, log_p, weight in zip(*(data[name] for name in names), strict=True):
                log_p = log_p.view(len(lengths), len(mask))
                references.append(stage.add(log_p, lengths > 0, old, mask, chosen=bool(weight > 0)))
            fields = {
                "gcpo_log_ref": nested([log_ref for log_ref, _ in references]),
                "gcpo_kl_mask": nested([kl_mask.long() for _, kl_mask in references]),
            }
            tq.kv_batch_put(
                keys=[self.batch.keys[row] for row in rows],
                partition_id=self.batch.partition_id,
                fields=TensorDict(fields, batch_size=len(rows)),
            )
        self.missing.references = stage.count
        metrics.update(stage.metrics())
