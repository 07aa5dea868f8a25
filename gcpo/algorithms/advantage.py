"""Group-relative advantages and their causal weighting."""

from __future__ import annotations

import torch
from torch import Tensor

from gcpo.algorithms._checks import as_float, as_mask, check_integer, check_option, check_shape

FORMS = ("product", "signed")


@torch.no_grad()
def group_relative_advantage(rewards: Tensor, group: Tensor, *, norm_by_std: bool = True, eps: float = 1e-6) -> Tensor:
    """Compute the group-relative advantage of GRPO, bit for bit as verl does.

    See "Group Causal Policy Optimization for Post-Training Large Language Models" (arXiv 2508.05428), Eq. 8.
    The standard deviation is unbiased and ``eps`` is added to it; a group of one has mean 0 and deviation 1,
    so that its advantage is its reward over ``1 + eps``.

    Args:
        rewards: [B], one scalar reward per response; any real dtype.
        group: [B], integer labels; rows with the same label form a group, in any order.
        norm_by_std: Whether to divide by the standard deviation; False gives the advantage of Dr. GRPO.
        eps: Added to the standard deviation.

    Returns:
        [B], the advantages; float64 for float64 rewards, else float32. No gradient.

    Raises:
        ValueError: Shapes that differ, or labels that are not integers.
    """
    sizes: dict[str, int] = {}
    check_shape("rewards", rewards, "B", sizes)
    check_shape("group", group, "B", sizes)
    check_integer("group", group)
    (rewards,) = as_float(rewards)
    advantage = torch.zeros_like(rewards)
    for label in torch.unique(group):
        member = (group == label).to(rewards.device)
        scores = rewards[member]
        if scores.numel() == 1:
            # verl's own float32 constants: 1 + eps is rounded to float32 for float64 rewards too.
            mean = torch.tensor(0.0, device=rewards.device)
            std = torch.tensor(1.0, device=rewards.device)
        else:
            mean, std = scores.mean(), scores.std()
        advantage[member] = (scores - mean) / (std + eps) if norm_by_std else scores - mean
    return advantage


@torch.no_grad()
def causal_advantage(
    advantage: Tensor, weight: Tensor, *, form: str = "product", has_target: Tensor | None = None
) -> Tensor:
    """Weight the advantages of one group causally: B = A * Upsilon.

    See "Group Causal Policy Optimization for Post-Training Large Language Models" (arXiv 2508.05428), the
    text above Eq. 11. ``form="signed"`` is ours: B = A * (1 + sign(A) * (Upsilon - mean Upsilon)), because
    with the product a bad response that agrees with the target is pushed down harder. Its mean runs over the
    responses that have a target; the weight of the others is a placeholder, and they keep B = A. Weights that
    are all 1 leave A unchanged.

    Args:
        advantage: [n], the group-relative advantages of one group.
        weight: [n], the causal weights Upsilon of the same responses.
        form: "product" or "signed".
        has_target: [n], True for responses with a target; all when None. "product" multiplies every row by its
            weight and does not need it; "signed" never reads the weight of the other rows, NaN included.

    Returns:
        [n], the weighted advantages; float64 if an input is, else float32. No gradient.

    Raises:
        ValueError: Shapes that differ, or an unknown form.
    """
    sizes: dict[str, int] = {}
    check_shape("advantage", advantage, "n", sizes)
    check_shape("weight", weight, "n", sizes)
    check_option("form", form, FORMS)
    has_target = as_mask("has_target", has_target, weight, "n", sizes)
    advantage, weight = as_float(advantage, weight)
    if form == "product":
        return advantage * weight
    # Zeros instead of a selection: with a target in every row the sum is that of `weight.mean()`, bit for bit.
    mean = torch.where(has_target, weight, 0).sum() / has_target.sum().clamp(min=1)
    signed = advantage * (1 + torch.sign(advantage) * (weight - mean))
    return torch.where(has_target, signed, advantage)
