"""Computation of Upsilon and its metrics from the hidden states of a batch, with torch only.

The trainer fetches the fields of the batch, this module applies ``gcpo.algorithms`` group by group. The reference is in
``gcpo.methods.gcpo.reference``, the counts of the rollout in ``gcpo.methods.gcpo.rollout_metrics``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gcpo.algorithms import (
    causal_advantage,
    causal_diagnostics,
    causal_target,
    causal_weight,
    conditioned_target,
    group_mean_target,
)
from gcpo.methods.gcpo.settings import GCPOConfig


@dataclass
class GroupFeatures:
    """The features of one group of n responses.

    Attributes:
        z: [n, d].
        conditioned: [n, L + L', M, d], shared draws first; ``None`` if no context is needed.
        valid: [n, L + L', M].
    """

    z: Tensor
    conditioned: Tensor | None = None
    valid: Tensor | None = None

    def split(self, num_shared: int) -> dict[str, Any]:
        """Return the arguments of ``causal_target`` for the shared and the leave-one-out draws.

        Raises:
            ValueError: the group has no states under contexts.
        """
        if self.conditioned is None or self.valid is None:
            raise ValueError("the group has no states under contexts.")
        leave_one_out = self.conditioned.shape[1] > num_shared
        return {
            "z_conditioned": self.conditioned[:, :num_shared],
            "valid": self.valid[:, :num_shared],
            "z_marginal": self.conditioned[:, num_shared:] if leave_one_out else None,
            "valid_marginal": self.valid[:, num_shared:] if leave_one_out else None,
        }

    def centered(self, mean: Tensor) -> GroupFeatures:
        """Return the group with ``mean`` [d] subtracted from every state."""
        return GroupFeatures(self.z - mean, None if self.conditioned is None else self.conditioned - mean, self.valid)


@dataclass(frozen=True)
class BatchWeights:
    """Upsilon of a batch.

    Attributes:
        weights: Upsilon [n] of every group.
        has_target: bool [n] of every group; the other responses have the weight of ``weighting.missing``.
        metrics: under ``gcpo/upsilon/``, ``gcpo/similarity/``, ``gcpo/causal/`` and ``gcpo/advantage/``.
    """

    weights: list[Tensor]
    has_target: list[Tensor]
    metrics: dict[str, float]


@dataclass(frozen=True)
class _GroupWeights:
    """One group's Upsilon, similarity before alpha, has_target and cos(z, zbar), [n] each, and diagnostics."""

    weight: Tensor
    similarity: Tensor
    has_target: Tensor
    cos_to_mean: Tensor
    shift: float
    split_half: float


def group_weight(group: GroupFeatures, config: GCPOConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Compute Upsilon of one group.

    Returns:
        weight [n], 1 without a target; similarity before alpha [n]; has_target [n].
    """
    num_shared = config.collider.num_draws
    if config.weighting.target == "group_mean":
        target, has_target = group_mean_target(group.z), torch.ones(len(group.z), dtype=torch.bool)
    elif config.weighting.target == "conditioned":
        target, has_target = conditioned_target(**group.split(num_shared), projection=config.collider.projection)
    else:
        target, has_target = causal_target(group.z, **group.split(num_shared), projection=config.collider.projection)
    options = {
        "similarity": config.weighting.similarity,
        "clamp_at_zero": config.features.center == "batch",
    }
    weight = causal_weight(group.z, target, has_target, alpha=config.alpha, **options)
    similarity = causal_weight(group.z, target, has_target, alpha=1.0, **options)
    return weight, similarity, has_target


def filled(weights: Sequence[Tensor], has_target: Sequence[Tensor], missing: str) -> list[Tensor]:
    """Return Upsilon with ``weighting.missing`` for responses without a target.

    With alpha = 2 and cosines near 0.9 a weight of 1 would halve the step of those responses whose draws were
    cut, which are the long ones.

    Args:
        weights: [n] of every group; the values of responses without a target are not read.
        has_target: [n] of every group.
        missing: ``mean``: the mean over all responses of the batch that have a target, 1 if none has; ``one``: 1.
    """
    value = 1.0
    if missing == "mean":
        known = torch.cat([weight[has] for weight, has in zip(weights, has_target, strict=True)])
        value = float(known.double().mean()) if len(known) else 1.0
    return [torch.where(has, weight, value) for weight, has in zip(weights, has_target, strict=True)]


def controlled(
    weights: Sequence[Tensor], has_target: Sequence[Tensor], advantages: Sequence[Tensor], control: str, seed: int
) -> list[Tensor]:
    """Return Upsilon [n] of every group under ``weighting.ablation``.

    ``mean`` is the mean of the responses whose advantage is not 0, because it scales a step as Upsilon does; responses
    without a target count with their weight of ``weighting.missing``. ``shuffled`` permutes the
    weights among the responses of a group that have a target; the others keep their weights.
    """
    if control == "mean":
        everything, matters = torch.cat(list(weights)), torch.cat(list(advantages)) != 0
        mean = everything[matters].mean() if matters.any() else everything.mean()
        return [torch.full_like(weight, float(mean)) for weight in weights]
    if control == "shuffled":
        generator = torch.Generator().manual_seed(seed)
        shuffled = []
        for weight, has in zip(weights, has_target, strict=True):
            known = weight[has]
            weight = weight.clone()
            weight[has] = known[torch.randperm(len(known), generator=generator)]
            shuffled.append(weight)
        return shuffled
    return list(weights)


def batch_weights(
    groups: Iterable[GroupFeatures],
    advantages: Sequence[Tensor],
    config: GCPOConfig,
    *,
    mean: Tensor | None = None,
    seed: int = 0,
) -> BatchWeights:
    """Return Upsilon of every group, and metrics about its information.

    Args:
        groups: features of every group; they are read one at a time and not kept.
        advantages: A_i [n] of every group.
        config: the resolved configuration.
        mean: [d], the mean state of the batch's responses; used only with ``features.center: batch``.
        seed: seed of the permutation if ``weighting.ablation`` is ``shuffled``.

    Raises:
        ValueError: ``features.center`` is ``batch`` and ``mean`` is not given.
    """
    if config.features.center != "batch":
        mean = None
    elif mean is None:
        raise ValueError("features.center=batch needs the mean state of the batch.")
    found = [_group_weights(group if mean is None else group.centered(mean), config) for group in groups]
    has_target = [group.has_target for group in found]
    weights = filled([group.weight for group in found], has_target, config.weighting.missing)
    weights = controlled(weights, has_target, advantages, config.weighting.ablation, seed)
    metrics = {
        **_upsilon_metrics(found),
        **_correctness_metrics(found, advantages),
        **_causal_metrics(found),
        **_advantage_metrics(weights, has_target, advantages, config.advantage.form),
    }
    return BatchWeights(weights, has_target, {name: value for name, value in metrics.items() if math.isfinite(value)})


def _group_weights(group: GroupFeatures, config: GCPOConfig) -> _GroupWeights:
    weight, similarity, has_target = group_weight(group, config)
    mean = group.z.mean(0, keepdim=True)
    shift = split_half = math.nan
    if config.causal_target_on and has_target.any():
        found = causal_diagnostics(
            group.z, **group.split(config.collider.num_draws), projection=config.collider.projection
        )
        shift, split_half = float(found["shift"]), float(found["split_half"])
    cos_to_mean = torch.cosine_similarity(group.z, mean, dim=-1)
    return _GroupWeights(weight, similarity, has_target, cos_to_mean, shift, split_half)


def _upsilon_metrics(groups: Sequence[_GroupWeights]) -> dict[str, float]:
    """Return the metrics over the responses with a target."""
    has_target = torch.cat([group.has_target for group in groups])
    upsilon, similarity, cos_to_mean = (
        torch.cat([getattr(group, name) for group in groups])[has_target]
        for name in ("weight", "similarity", "cos_to_mean")
    )
    spreads = [float(group.weight[group.has_target].std()) for group in groups if group.has_target.sum() > 1]
    metrics = {
        **_distribution("gcpo/upsilon", upsilon),
        **_distribution("gcpo/similarity", similarity),
        "gcpo/upsilon/spread_in_group": _mean(spreads),
    }
    if len(upsilon):
        metrics["gcpo/upsilon/negative_frac"] = float((upsilon < 0).float().mean())
        metrics["gcpo/upsilon/cos_to_mean_correlation"] = _correlation(upsilon, cos_to_mean)
    return metrics


def _correctness_metrics(groups: Sequence[_GroupWeights], advantages: Sequence[Tensor]) -> dict[str, float]:
    """Upsilon of the responses whose reward is above and below the mean of their group, those with a target."""
    upsilon, has_target = (torch.cat([getattr(group, name) for group in groups]) for name in ("weight", "has_target"))
    advantage = torch.cat(list(advantages))
    chosen = {"above": (advantage > 0) & has_target, "below": (advantage < 0) & has_target}
    return {f"gcpo/upsilon/mean_{side}": float(upsilon[rows].mean()) for side, rows in chosen.items() if rows.any()}


def _causal_metrics(groups: Sequence[_GroupWeights]) -> dict[str, float]:
    halves = [group.split_half for group in groups if math.isfinite(group.split_half)]
    metrics = {"gcpo/causal/shift": _mean([group.shift for group in groups]), "gcpo/causal/split_half": _mean(halves)}
    if len(halves) > 1:
        metrics["gcpo/causal/split_half_standard_error"] = float(torch.tensor(halves).std()) / math.sqrt(len(halves))
    return metrics


def _advantage_metrics(
    weights: Sequence[Tensor], has_target: Sequence[Tensor], advantages: Sequence[Tensor], form: str
) -> dict[str, float]:
    """Return the distance of B from A, in direction and in length."""
    before = torch.cat(list(advantages)).float()
    after = torch.cat(
        [
            causal_advantage(a, weight, form=form, has_target=has)
            for a, weight, has in zip(advantages, weights, has_target, strict=True)
        ]
    ).float()
    if not (before.abs().sum() > 0 and after.abs().sum() > 0):
        return {}
    return {
        "gcpo/advantage/cosine_to_grpo": float(torch.cosine_similarity(before, after, dim=0)),
        "gcpo/advantage/norm_ratio": float(after.norm() / before.norm()),
    }


def noise_warning(metrics: dict[str, float]) -> str | None:
    """Return a warning if the causal part may be noise: its split-half reliability is within 2 SE of 0."""
    reliability = metrics.get("gcpo/causal/split_half")
    error = metrics.get("gcpo/causal/split_half_standard_error")
    if reliability is None or error is None or reliability > 2 * error:
        return None
    return (
        f"gcpo: the causal part of the target cannot be told from noise (split-half reliability {reliability:.2f} "
        f"+- {error:.2f}); Upsilon is then close to the cosine to the group's mean"
    )


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _distribution(name: str, values: Tensor) -> dict[str, float]:
    if not len(values):
        return {}
    return {f"{name}/{kind}": float(getattr(values, kind)()) for kind in ("mean", "min", "max")}


def _correlation(x: Tensor, y: Tensor) -> float:
    if len(x) < 2 or x.std() == 0 or y.std() == 0:
        return math.nan
    return float(torch.corrcoef(torch.stack([x.double(), y.double()]))[0, 1])
