"""Upsilon and the causal reference of a batch, from the fields that the rollout and the actor wrote."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gcpo.algorithms import causal_advantage, group_relative_advantage
from gcpo.methods.base import Batch, Credit, Outcome, Run
from gcpo.methods.fields import OLD_LOG_PROBS, RESPONSE_MASK, REWARDS, Field
from gcpo.methods.gcpo.fields import (
    CONTEXT_LENGTHS,
    KL_MASK,
    KL_WEIGHT,
    LOG_P,
    LOG_REF,
    LOG_RHO,
    OUTPUT_LENGTHS,
    SCORED_TOKENS,
    Z_REGENERATED,
    Z,
)
from gcpo.methods.gcpo.missing import Missing
from gcpo.methods.gcpo.reference import ReferenceStage
from gcpo.methods.gcpo.rollout_metrics import rollout_metrics
from gcpo.methods.gcpo.scoring import SCORED_KINDS
from gcpo.methods.gcpo.settings import GCPOConfig
from gcpo.methods.gcpo.upsilon import BatchWeights, GroupFeatures, batch_weights, noise_warning
from gcpo.seeding import request_seed

logger = logging.getLogger(__name__)


class CausalCredit(Credit):
    """B_i = A_i * Upsilon_i for every token of response i (Eq. 8, 10, 11).

    Attributes:
        weight: Upsilon [B]; 1 in padding rows.
        has_target: bool [B]. The weight of a row without a target is a placeholder, which is excluded from the mean of
            ``signed``.
        form: ``advantage.form``.
    """

    def __init__(self, weight: Tensor, has_target: Tensor, form: str) -> None:
        self.weight, self.has_target, self.form = weight, has_target, form

    def advantages(self, outcome: Outcome) -> Tensor:
        """Return the advantages [B, T]. With Upsilon = 1 they are exactly those of verl's ``grpo``."""
        # Every token of a response has the advantage A_i; rows of one group are weighted together.
        mask = outcome.mask.bool()
        first = mask.int().argmax(dim=-1, keepdim=True)
        scalar = outcome.grpo.gather(1, first).squeeze(1)
        weighted = torch.where(mask.any(dim=-1), scalar, torch.zeros_like(scalar))
        for group in dict.fromkeys(outcome.groups.tolist()):
            rows = torch.from_numpy(np.flatnonzero(outcome.groups == group))
            weighted[rows] = causal_advantage(
                weighted[rows],
                self.weight[rows].to(weighted),
                form=self.form,
                has_target=self.has_target[rows].to(weighted.device),
            )
        return weighted.unsqueeze(-1) * outcome.mask


class CausalStage:
    """The causal part of one step.

    Args:
        config: the resolved settings.
        run: the settings of verl.
        batch: the rows, after the actor has scored them.
        entries: the rollout's report about every group by its id; empty without collider draws.
    """

    def __init__(self, config: GCPOConfig, run: Run, batch: Batch, entries: Mapping[str, Mapping[str, Any]]) -> None:
        self.config, self.run, self.batch = config, run, batch
        self.groups = list(batch.groups.values())
        self.entries = [entries.get(uid) or {} for uid in batch.groups]
        self.missing = Missing()

    def credit(self, metrics: dict[str, float]) -> CausalCredit | None:
        """Return Upsilon of the batch, ``None`` if weighting is off, and store every row's reference for the update.

        Raises:
            NothingValidError: no requested draw, target or reference is valid.
        """
        self._count(metrics)
        credit = self._weights(metrics) if self.config.weighting_on else None
        if self.config.reference_on:
            self._reference(metrics)
        metrics.update(self.missing.metrics())
        self.missing.check(self.batch.step)
        warning = self.missing.warning(self.batch.step, self.config.metrics.max_missing)
        if warning:
            logger.warning(warning)
        return credit

    def _count(self, metrics: dict[str, float]) -> None:
        """Count the tokens of the rollout and the scoring, and the missing draws."""
        tokens = self.batch.fetch(range(self.batch.size), [SCORED_TOKENS])[SCORED_TOKENS]
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
        responses = sum(self.batch.response_lengths[row] for rows in self.groups for row in rows)
        metrics.update(rollout_metrics(stats, responses))
        metrics["gcpo/timing/rollout_tail_s"] = max((entry.get("seconds", 0.0) for entry in stats), default=0.0)

    def _weights(self, metrics: dict[str, float]) -> CausalCredit:
        advantages = []
        for data in self.batch.by_group(REWARDS):
            scores = torch.stack([row.sum() for row in data[REWARDS]])
            label = torch.zeros(len(scores), dtype=torch.long)
            advantages.append(group_relative_advantage(scores, label, norm_by_std=self.run.norm_by_std))
        found = batch_weights(
            self._features(),
            advantages,
            self.config,
            mean=self._mean_state() if self.config.features.center == "batch" else None,
            seed=request_seed(self.config.seed, "control", self.batch.step),
        )
        metrics.update(found.metrics)
        warning = noise_warning(found.metrics)
        if warning:
            logger.warning(warning)
        self._count_targets(found)
        weight, has_target = torch.ones(self.batch.size), torch.zeros(self.batch.size, dtype=torch.bool)
        for rows, values, has in zip(self.groups, found.weights, found.has_target, strict=True):
            weight[rows], has_target[rows] = values, has
        return CausalCredit(weight, has_target, self.config.advantage.form)

    def _count_targets(self, found: BatchWeights) -> None:
        """Count the missing targets; groups with equal rewards or a single response need none."""
        if not self.config.causal_target_on:
            return
        for entry, has_target in zip(self.entries, found.has_target, strict=True):
            if entry.get("stats", {}).get("equal_rewards") == 0.0:
                self.missing.targets.add(len(has_target), int((~has_target).sum()))

    def _mean_state(self) -> Tensor:
        """Return the mean state [d] of the batch's responses."""
        return torch.stack([z for data in self.batch.by_group(Z) for z in data[Z]]).mean(0)

    def _features(self) -> Iterator[GroupFeatures]:
        """Yield the features of one group after another."""
        if not self.config.causal_target_on:
            yield from (GroupFeatures(torch.stack(data[Z])) for data in self.batch.by_group(Z))
            return
        from_prompt = self.config.features.source == "prompt"
        slots = self.config.collider.num_draws + self.config.leave_one_out_draws
        generations = 1 if from_prompt else self.config.collider.num_generations
        lengths: Field = CONTEXT_LENGTHS if from_prompt else OUTPUT_LENGTHS
        for data in self.batch.by_group(Z, Z_REGENERATED, lengths):
            z, conditioned = torch.stack(data[Z]), torch.stack(data[Z_REGENERATED])
            valid = torch.stack(data[lengths]) > 0
            yield GroupFeatures(
                z, conditioned.view(len(z), slots, generations, -1), valid.view(len(z), slots, generations)
            )

    def _reference(self, metrics: dict[str, float]) -> None:
        """Store log pi'_ref and the mask of the kappa term for the update."""
        stage = ReferenceStage(self.config)
        names = (RESPONSE_MASK, OLD_LOG_PROBS, CONTEXT_LENGTHS, LOG_P, KL_WEIGHT)
        for rows in self.batch.row_pieces():
            data = self.batch.fetch(rows, names)
            columns: dict[Field, list[Tensor]] = {name: [] for name in (LOG_REF, KL_MASK, LOG_RHO)}
            for mask, old, lengths, log_p, weight in zip(*(data[name] for name in names), strict=True):
                log_p = log_p.view(len(lengths), len(mask))
                log_ref, kl_mask = stage.add(log_p, lengths > 0, old, mask, chosen=bool(weight > 0))
                columns[LOG_REF].append(log_ref)
                columns[KL_MASK].append(kl_mask.long())
                if self.run.dumps:
                    columns[LOG_RHO].append(stage.log_rho(log_ref, log_p, lengths > 0, old).float())
            self.batch.put(rows, {name: values for name, values in columns.items() if values})
        self.missing.references = stage.count
        metrics.update(stage.metrics())
