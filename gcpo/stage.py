"""From the scores of a batch to Upsilon, the causal reference and the metrics about them; torch alone.

The trainer fetches the fields of the batch, this module applies ``gcpo.algorithms`` group by group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gcpo.algorithms import (
    causal_diagnostics,
    causal_kl,
    causal_reference,
    causal_target,
    causal_weight,
    conditioned_target,
    group_mean_target,
)
from gcpo.config import GCPOConfig


@dataclass
class GroupFeatures:
    """Features of one group of n responses.

    Attributes:
        z: [n, d].
        conditioned: [n, L + L', M, d], shared draws first; ``None`` where no context is needed.
        valid: [n, L + L', M].
    """

    z: Tensor
    conditioned: Tensor | None = None
    valid: Tensor | None = None

    def split(self, num_shared: int) -> dict[str, Tensor | None]:
        """Arguments of ``causal_target`` for the shared and the leave-one-out draws."""
        marginal = self.conditioned.shape[1] > num_shared
        return {
            "z_conditioned": self.conditioned[:, :num_shared],
            "valid": self.valid[:, :num_shared],
            "z_marginal": self.conditioned[:, num_shared:] if marginal else None,
            "valid_marginal": self.valid[:, num_shared:] if marginal else None,
        }


def center(groups: Sequence[GroupFeatures]) -> list[GroupFeatures]:
    """Subtract the mean state of the batch's responses from every state (``features.center: batch``)."""
    mean = torch.cat([group.z for group in groups]).mean(0)
    return [GroupFeatures(g.z - mean, None if g.conditioned is None else g.conditioned - mean, g.valid) for g in groups]


def group_weight(group: GroupFeatures, config: GCPOConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Upsilon of one group.

    Returns:
        weight [n], similarity before alpha [n], has_target [n].
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


def controlled(weights: Sequence[Tensor], advantages: Sequence[Tensor], control: str, seed: int) -> list[Tensor]:
    """Upsilon [n] of every group as ``weighting.control`` wants it; a response without a target counts like others.

    The mean is that of the responses whose advantage is not 0: it scales a step as Upsilon does.
    """
    if control == "mean":
        everything, matters = torch.cat(list(weights)), torch.cat(list(advantages)) != 0
        mean = everything[matters].mean() if matters.any() else everything.mean()
        return [torch.full_like(weight, float(mean)) for weight in weights]
    if control == "shuffled":
        generator = torch.Generator().manual_seed(seed)
        return [weight[torch.randperm(len(weight), generator=generator)] for weight in weights]
    return list(weights)


def batch_weights(
    groups: Sequence[GroupFeatures], advantages: Sequence[Tensor], config: GCPOConfig, *, seed: int = 0
) -> tuple[list[Tensor], dict[str, float]]:
    """Upsilon of every group, and the metrics that tell whether it says anything.

    Args:
        groups: features of every group.
        advantages: A_i [n] of every group.
        config: the resolved configuration.
        seed: of the permutation where ``weighting.control`` is ``shuffled``.

    Returns:
        Upsilon [n] of every group, and metrics under ``gcpo/upsilon/``, ``gcpo/causal/`` and ``gcpo/advantage/``.
    """
    if config.features.center == "batch":
        groups = center(groups)
    weights, similarities, targets, spreads, to_mean, shifts, halves = [], [], [], [], [], [], []
    for group in groups:
        weight, similarity, has_target = group_weight(group, config)
        weights.append(weight)
        similarities.append(similarity[has_target])
        targets.append(has_target)
        if has_target.sum() > 1:
            spreads.append(float(weight[has_target].std()))
        mean = group.z.mean(0, keepdim=True)
        to_mean.append(torch.cosine_similarity(group.z, mean, dim=-1)[has_target])
        if config.causal_target_on and has_target.any():
            found = causal_diagnostics(
                group.z, **group.split(config.collider.num_draws), projection=config.collider.projection
            )
            shifts.append(float(found["shift"]))
            halves.append(float(found["split_half"]))
    upsilon, has_target = torch.cat(weights), torch.cat(targets)
    with_target = upsilon[has_target]
    metrics = {
        "gcpo/upsilon/without_target_share": float((~has_target).float().mean()),
        **_distribution("gcpo/upsilon", with_target),
        **_distribution("gcpo/similarity", torch.cat(similarities)),
    }
    if len(with_target):
        metrics["gcpo/upsilon/negative_share"] = float((with_target < 0).float().mean())
        metrics["gcpo/upsilon/cos_to_mean_correlation"] = _correlation(with_target, torch.cat(to_mean))
    metrics["gcpo/upsilon/spread_in_group"] = _mean(spreads)
    metrics["gcpo/causal/shift"] = _mean(shifts)
    metrics["gcpo/causal/split_half"] = _mean(halves)
    finite = [value for value in halves if math.isfinite(value)]
    if len(finite) > 1:
        metrics["gcpo/causal/split_half_standard_error"] = float(torch.tensor(finite).std()) / math.sqrt(len(finite))
    weights = controlled(weights, advantages, config.weighting.control, seed)
    before = torch.cat(list(advantages)).float()
    after = before * torch.cat(weights)
    if before.abs().sum() > 0 and after.abs().sum() > 0:
        metrics["gcpo/advantage/cosine_to_grpo"] = float(torch.cosine_similarity(before, after, dim=0))
        metrics["gcpo/advantage/norm_ratio"] = float(after.norm() / before.norm())
    return weights, {name: value for name, value in metrics.items() if math.isfinite(value)}


def noise_warning(metrics: dict[str, float]) -> str | None:
    """A sentence where the causal part cannot be told from noise: its split-half reliability is within 2 SE of 0."""
    reliability = metrics.get("gcpo/causal/split_half")
    error = metrics.get("gcpo/causal/split_half_standard_error")
    if reliability is None or error is None or reliability > 2 * error:
        return None
    return (
        f"gcpo: the causal part of the target cannot be told from noise (split-half reliability {reliability:.2f} "
        f"+- {error:.2f}); Upsilon is then close to the cosine to the group's mean"
    )


def batch_reference(
    log_p: Tensor,
    valid: Tensor,
    log_p_query: Tensor,
    mask: Tensor,
    config: GCPOConfig,
    chosen: Tensor | None = None,
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """The causal reference of every row (Eq. 13), and what KL' is before the first update.

    Args:
        log_p: [B, L + L', T], conditioned log-probabilities, shared draws first.
        valid: [B, L + L'], which contexts are there.
        log_p_query: [B, T], verl's old log-probabilities.
        mask: [B, T], response mask.
        config: the resolved configuration.
        chosen: bool [B], the rows that are to have a kappa term (``reference.fraction``); all where ``None``.

    Returns:
        log_ref [B, T]; mask of the kappa term [B, T], False in rows without a reference; metrics.
    """
    num_shared = config.collider.num_draws
    marginal = log_p.shape[1] > num_shared
    reference = config.reference
    log_ref, floored, has_reference = causal_reference(
        log_p[:, :num_shared],
        log_p_query,
        valid[:, :num_shared],
        projection=config.collider.projection,
        reduction=reference.reduction,
        floor=reference.floor,
        relative_floor=reference.relative_floor,
        log_p_marginal=log_p[:, num_shared:] if marginal else None,
        valid_marginal=valid[:, num_shared:] if marginal else None,
    )
    kl_mask = mask.bool() & has_reference.unsqueeze(-1)
    rows = mask.bool().any(-1)
    rows = rows if chosen is None else rows & chosen
    metrics = {"gcpo/reference/without_share": float((~has_reference[rows]).float().mean()) if rows.any() else 0.0}
    if kl_mask.any():
        # The slot that the policy is conditioned on: x_{i,0}, or the first that is there.
        slot = valid[:, :num_shared].float().argmax(1)
        on_context = log_p[torch.arange(len(log_p)), slot]
        log_policy = log_p_query if reference.policy_context == "query" else on_context
        log_ratio = (log_ref - log_policy)[kl_mask].clamp(-20, 20)
        kl = causal_kl(log_policy, log_ref, max_kl=reference.max_kl)[kl_mask]
        top = kl.topk(max(1, math.ceil(0.01 * len(kl)))).values
        metrics |= {
            "gcpo/reference/floored_share": float(floored[kl_mask].float().mean()),
            "gcpo/reference/kl_mean": float(kl.mean()),
            "gcpo/reference/capped_share": float((kl >= reference.max_kl).float().mean()),
            "gcpo/reference/log_ratio_max": float(log_ratio.max()),
            "gcpo/reference/top_percent_share": float(top.sum() / kl.sum()) if kl.sum() > 0 else 0.0,
            "gcpo/reference/collider_gain": float((on_context - log_p_query)[kl_mask].mean()),
        }
    return log_ref, kl_mask, metrics


def rollout_metrics(stats: Sequence[dict[str, float]], response_tokens: int) -> dict[str, float]:
    """Sums and shares of what the rollout counted, one entry of ``stats`` for every group."""
    total: dict[str, float] = {}
    for entry in stats:
        for name, value in entry.items():
            total[name] = total.get(name, 0.0) + value
    groups = max(len(stats), 1)
    metrics = {
        "gcpo/rollout/skipped_groups_share": total.get("skipped", 0.0) / groups,
        "gcpo/rollout/failed_groups": total.get("stage_failed", 0.0),
        "gcpo/rollout/seconds_per_group": total.get("seconds", 0.0) / groups,
        "gcpo/rollout/waited_seconds_per_group": total.get("waited_seconds", 0.0) / groups,
        "gcpo/tokens/generated/response": float(response_tokens),
    }
    metrics |= _sizes([entry for entry in stats if "response_tokens" in entry])  # all but groups whose stage failed
    prompt = cached = 0.0
    for kind in ("collider", "marginal", "conditioned"):
        draws = total.get(f"{kind}/draws", 0.0)
        metrics[f"gcpo/tokens/generated/{kind}"] = total.get(f"{kind}/generated_tokens", 0.0)
        metrics[f"gcpo/tokens/prefilled/{kind}"] = total.get(f"{kind}/prompt_tokens", 0.0)
        metrics[f"gcpo/tokens/cached/{kind}"] = total.get(f"{kind}/cached_tokens", 0.0)
        prompt += total.get(f"{kind}/prompt_tokens", 0.0)
        cached += total.get(f"{kind}/cached_tokens", 0.0)
        if draws:
            for outcome in ("failed", "empty", "cut"):
                metrics[f"gcpo/rollout/{kind}/{outcome}"] = total.get(f"{kind}/{outcome}", 0.0)
            metrics[f"gcpo/rollout/{kind}/tokens_mean"] = total.get(f"{kind}/generated_tokens", 0.0) / draws
        if total.get(f"{kind}/graded"):
            metrics[f"gcpo/reward/{kind}"] = total[f"{kind}/reward"] / total[f"{kind}/graded"]
    if prompt:
        metrics["gcpo/tokens/prefix_cache_hit_share"] = cached / prompt
    graded = [entry["graded_response_reward"] for entry in stats if entry.get("collider/graded")]
    if graded:
        metrics["gcpo/reward/response"] = sum(graded) / len(graded)
        metrics["gcpo/reward/collider_gain"] = metrics["gcpo/reward/collider"] - metrics["gcpo/reward/response"]
    return metrics


def _sizes(stats: Sequence[dict[str, float]]) -> dict[str, float]:
    """Tokens of frames and blocks, how many groups had equal rewards, and how ragged the responses are.

    A spread is a standard deviation over the mean of all: of the responses around the mean of their group, and of the
    groups' means, without what they owe to the few responses of a group.
    """
    if not stats:
        return {}
    values = {name: [entry[name] for entry in stats if name in entry] for name in _SIZES}
    mean = {name: sum(known) / len(known) for name, known in values.items() if known}
    tokens, inside = mean["response_tokens"], mean["response_variance"]
    scatter = sum((entry["response_tokens"] - tokens) ** 2 for entry in stats) / max(len(stats) - 1, 1)
    size = sum(entry["responses"] for entry in stats) / len(stats)
    metrics = {
        "gcpo/rollout/equal_rewards_share": mean["equal_rewards"],
        "gcpo/prompts/frame_tokens": mean["frame_tokens"],
        "gcpo/prompts/block_tokens": mean["block_tokens"],
        "gcpo/rollout/alike_tokens": mean["alike_tokens"],
        "gcpo/rollout/spread_in_groups": math.sqrt(inside) / tokens,
        "gcpo/rollout/spread_of_groups": math.sqrt(max(0.0, scatter - inside / size)) / tokens,
    }
    if "alike_draw_tokens" in mean:
        metrics["gcpo/rollout/alike_draw_tokens"] = mean["alike_draw_tokens"]
    return metrics


_SIZES = (
    "equal_rewards",
    "frame_tokens",
    "block_tokens",
    "response_tokens",
    "response_variance",
    "alike_tokens",
    "alike_draw_tokens",
)
"""A group with fewer than two draws lacks the last."""


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
