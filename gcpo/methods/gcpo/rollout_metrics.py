"""Metrics of a step from the rollout's counts of every group."""

from __future__ import annotations

import math
from collections.abc import Sequence


def rollout_metrics(stats: Sequence[dict[str, float]], response_tokens: int) -> dict[str, float]:
    """Return sums and fractions of the rollout's counts, with one entry of ``stats`` per group."""
    total: dict[str, float] = {}
    for entry in stats:
        for name, value in entry.items():
            total[name] = total.get(name, 0.0) + value
    groups = max(len(stats), 1)
    metrics = {
        "gcpo/rollout/skipped_groups_frac": total.get("skipped", 0.0) / groups,
        "gcpo/rollout/failed_groups": total.get("stage_failed", 0.0),
        "gcpo/rollout/seconds_per_group": total.get("seconds", 0.0) / groups,
        "gcpo/tokens/generated/response": float(response_tokens),
    }
    metrics |= _sizes([entry for entry in stats if "response_tokens" in entry])  # all except groups whose stage failed
    prompt = cached = 0.0
    for kind in ("collider", "leave_one_out", "regenerated"):
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
        metrics["gcpo/tokens/prefix_cache_hit_frac"] = cached / prompt
    metrics |= _graded([entry for entry in stats if entry.get("collider/graded") and "graded/response" in entry])
    if "gcpo/reward/response" in metrics:
        metrics["gcpo/reward/collider_gain"] = metrics["gcpo/reward/collider"] - metrics["gcpo/reward/response"]
    return metrics


def _graded(stats: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return means over the groups whose responses and collider draws are graded.

    The majority vote of a group without any answer counts 0, unless no group has an answer.
    """
    return {
        f"gcpo/reward/{name}": sum(entry.get(f"graded/{name}", 0.0) for entry in stats) / len(stats)
        for name in ("response", "majority", "oracle")
        if any(f"graded/{name}" in entry for entry in stats)
    }


def _sizes(stats: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the tokens of frames and blocks, the number of groups with equal rewards, and the spreads of lengths.

    A spread is a standard deviation over the total mean: of the responses around their group's mean, and of the
    groups' means, corrected for the small number of responses in a group.
    """
    if not stats:
        return {}
    values = {name: [entry[name] for entry in stats if name in entry] for name in _SIZES}
    mean = {name: sum(known) / len(known) for name, known in values.items() if known}
    tokens, inside = mean["response_tokens"], mean["response_variance"]
    scatter = sum((entry["response_tokens"] - tokens) ** 2 for entry in stats) / max(len(stats) - 1, 1)
    size = sum(entry["responses"] for entry in stats) / len(stats)
    metrics = {
        "gcpo/rollout/equal_rewards_frac": mean["equal_rewards"],
        "gcpo/prompts/frame_tokens": mean["frame_tokens"],
        "gcpo/prompts/block_tokens": mean["block_tokens"],
        "gcpo/rollout/common_prefix_tokens": mean["common_prefix_tokens"],
        "gcpo/rollout/spread_in_groups": math.sqrt(inside) / tokens,
        "gcpo/rollout/spread_of_groups": math.sqrt(max(0.0, scatter - inside / size)) / tokens,
    }
    if "common_prefix_draw_tokens" in mean:
        metrics["gcpo/rollout/common_prefix_draw_tokens"] = mean["common_prefix_draw_tokens"]
    return metrics


_SIZES = (
    "equal_rewards",
    "frame_tokens",
    "block_tokens",
    "response_tokens",
    "response_variance",
    "common_prefix_tokens",
    "common_prefix_draw_tokens",
)
"""A group with fewer than two draws lacks the last one."""
