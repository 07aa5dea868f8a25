"""The causal weight: targets in feature space, and the similarity of a response to its target."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gcpo.algorithms._checks import as_float, as_mask, check_option, check_shape, or_one

PROJECTIONS = ("inclusive", "exclusive")
SIMILARITIES = ("cosine", "euclidean", "gaussian")


class _Samples(NamedTuple):
    """Checked features and masks: the conditioned samples of Zbar_i and the samples of the average Phi."""

    conditioned: Tensor
    conditioned_valid: Tensor
    projected: Tensor
    projected_valid: Tensor


@torch.no_grad()
def causal_target(
    z: Tensor,
    z_conditioned: Tensor,
    valid: Tensor | None = None,
    *,
    projection: str = "inclusive",
    z_marginal: Tensor | None = None,
    valid_marginal: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the target of every response of a group, t_i = Zbar_i - Zbar'_i + zbar.

    See "Group Causal Policy Optimization for Post-Training Large Language Models" (arXiv 2508.05428), Steps 1
    to 4. zbar is the mean of z. Without ``z_marginal`` (shared draws) Zbar_i is the mean over the generations
    of draw l = 0 and Zbar'_i the mean over all draws and generations. With it (leave-one-out draws) Zbar_i is
    the mean over all of ``z_conditioned`` and Zbar'_i over all of ``z_marginal``. Means run over the valid
    samples only.

    Args:
        z: [n, d], the features z_i of the responses.
        z_conditioned: [n, L, M, d], the features of the generations O_{i,l,m}; L or M may be 0.
        valid: [n, L, M], True for those that count; all when None. Other values are never read, NaN
            included.
        projection: Draws that Zbar'_i averages over when they are shared: "inclusive" (all, as printed) or
            "exclusive" (l >= 1). Has no effect with ``z_marginal``.
        z_marginal: [n, K, M, d], features from contexts whose collider draw did not see response i.
        valid_marginal: [n, K, M], True for those that count; all when None.

    Returns:
        target: [n, d]; rows without a target are zeros. float64 if an input is, else float32. No gradient.
        has_target: [n] bool, whether both means have a valid sample. With a single shared draw the inclusive
            target is zbar itself, and the exclusive one does not exist.

    Raises:
        ValueError: Shapes that do not fit, an unknown projection, or only ``valid_marginal`` is given.
    """
    z, samples = _samples(z, z_conditioned, valid, projection, z_marginal, valid_marginal)
    part, has_target = _causal_part(samples)
    target = torch.where(has_target.unsqueeze(-1), part + z.mean(0), 0)
    return target, has_target


@torch.no_grad()
def conditioned_target(
    z_conditioned: Tensor,
    valid: Tensor | None = None,
    *,
    projection: str = "inclusive",
    z_marginal: Tensor | None = None,
    valid_marginal: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the target of option ``weighting.target=conditioned``: only Zbar'_i.

    See "Group Causal Policy Optimization for Post-Training Large Language Models" (arXiv 2508.05428), Step 3.

    Args:
        z_conditioned: [n, L, M, d], as for `causal_target`.
        valid: [n, L, M], as for `causal_target`.
        projection: As for `causal_target`.
        z_marginal: [n, K, M, d], as for `causal_target`; if given, Zbar'_i is the mean over it.
        valid_marginal: [n, K, M], as for `causal_target`.

    Returns:
        target: [n, d]; rows without a target are zeros. No gradient.
        has_target: [n] bool, whether Zbar'_i has a valid sample; the draw l = 0 need not be one.

    Raises:
        ValueError: As for `causal_target`.
    """
    z = z_conditioned.new_zeros(z_conditioned.shape[0], z_conditioned.shape[-1])
    _, samples = _samples(z, z_conditioned, valid, projection, z_marginal, valid_marginal)
    return _masked_mean(samples.projected, samples.projected_valid)


@torch.no_grad()
def group_mean_target(z: Tensor) -> Tensor:
    """Compute the target of option ``weighting.target=group_mean``: zbar for every response.

    See "Group Causal Policy Optimization for Post-Training Large Language Models" (arXiv 2508.05428), Step 1.

    Args:
        z: [n, d], the features of the responses of a group.

    Returns:
        [n, d], every row the mean of z. No gradient.

    Raises:
        ValueError: Another rank than two.
    """
    check_shape("z", z, "n d", {})
    (z,) = as_float(z)
    return z.mean(0).expand_as(z).clone()


@torch.no_grad()
def causal_weight(
    z: Tensor,
    target: Tensor,
    has_target: Tensor | None = None,
    *,
    alpha: float = 2.0,
    similarity: str = "cosine",
    clamp_at_zero: bool = False,
) -> Tensor:
    """Compute the causal weight Upsilon_i = alpha * sim(z_i, t_i) of the responses of one group.

    See "Group Causal Policy Optimization for Post-Training Large Language Models" (arXiv 2508.05428), Eq. 11,
    and its ablation of the similarity: "cosine" (0 for a zero vector), "euclidean" 1 / (1 + |z - t|), or
    "gaussian" exp(-|z - t|^2 / 2 sigma^2), sigma the median distance of the rows with a target (the mean of
    the two middle ones; a sigma of 0 gives similarity 1).

    Args:
        z: [n, d], the features of the responses.
        target: [n, d], their targets.
        has_target: [n], True for rows with a target; all when None. Other targets are never read, NaN
            included.
        alpha: The scale.
        similarity: "cosine", "euclidean" or "gaussian".
        clamp_at_zero: Whether negative weights become 0; for centred features, whose cosine takes either
            sign.

    Returns:
        [n], the weights; exactly 1 (not alpha) in rows without a target. No gradient.

    Raises:
        ValueError: Shapes that do not fit, or an unknown similarity.
    """
    sizes: dict[str, int] = {}
    check_shape("z", z, "n d", sizes)
    check_shape("target", target, "n d", sizes)
    check_option("similarity", similarity, SIMILARITIES)
    has_target = as_mask("has_target", has_target, z, "n", sizes)
    z, target = as_float(z, target)
    if similarity == "cosine":
        sim = _cosine(z, target)
    else:
        distance = _length(z - target)
        sim = 1 / (1 + distance) if similarity == "euclidean" else _gaussian(distance, has_target)
    weight = alpha * sim
    if clamp_at_zero:
        weight = weight.clamp(min=0)
    return torch.where(has_target, weight, 1)


@torch.no_grad()
def causal_diagnostics(
    z: Tensor,
    z_conditioned: Tensor,
    valid: Tensor | None = None,
    *,
    projection: str = "inclusive",
    z_marginal: Tensor | None = None,
    valid_marginal: Tensor | None = None,
) -> dict[str, Tensor]:
    """Measure the size and the reliability of the causal part D_i = Zbar_i - Zbar'_i of one group.

    The split-half reliability estimates D_i twice, from disjoint samples on both sides (the even and the odd
    ones among the valid), and is the cosine between the two, averaged over the responses; no Spearman-Brown
    correction. Around 0 the causal part is noise. Halves are only independent when they share no collider
    draw:

    - leave-one-out draws: the draws of ``z_conditioned`` and those of ``z_marginal`` are split, each with all
      its generations; this needs two valid draws on each side.
    - shared draws: Zbar_i belongs to the one draw l = 0, so its generations are split, and for Zbar'_i the
      draws l >= 1; this needs two valid generations at l = 0 and two valid draws at l >= 1. l = 0 as a part of
      Zbar'_i only scales D_i, so that both projections have the same reliability. A high value means that the
      generations depend on which y_{n,0} was drawn; averaged over which draw that is, the causal part of
      shared draws vanishes anyway.

    Args:
        z: [n, d], as for `causal_target`, as are all other arguments.
        z_conditioned: [n, L, M, d].
        valid: [n, L, M].
        projection: "inclusive" or "exclusive".
        z_marginal: [n, K, M, d].
        valid_marginal: [n, K, M].

    Returns:
        shift: [], the mean of |D_i| over the responses with a target, over |zbar|; NaN without one.
        cos_to_mean: [n], cos(z_i, zbar).
        split_half: [], the reliability over the responses that have two halves; NaN without one.

    Raises:
        ValueError: As for `causal_target`.
    """
    z, samples = _samples(z, z_conditioned, valid, projection, z_marginal, valid_marginal)
    part, has_target = _causal_part(samples)
    z_bar = z.mean(0)
    length = torch.linalg.vector_norm(part, dim=-1)[has_target]

    _, split = _samples(z, z_conditioned, valid, "exclusive", z_marginal, valid_marginal)
    if z_marginal is None:
        # [n, 1, M, d] to [n, M, 1, d]: the generations of l = 0 stand where the draws do otherwise.
        split = split._replace(
            conditioned=split.conditioned.transpose(1, 2),
            conditioned_valid=split.conditioned_valid.transpose(1, 2),
        )
    even, has_even = _causal_part(_half(split, 0))
    odd, has_odd = _causal_part(_half(split, 1))
    return {
        "shift": length.mean() / torch.linalg.vector_norm(z_bar),
        "cos_to_mean": _cosine(z, z_bar.expand_as(z)),
        "split_half": _cosine(even, odd)[has_even & has_odd].mean(),
    }


def _samples(
    z: Tensor,
    z_conditioned: Tensor,
    valid: Tensor | None,
    projection: str,
    z_marginal: Tensor | None,
    valid_marginal: Tensor | None,
) -> tuple[Tensor, _Samples]:
    """Check the arguments of `causal_target` and select the samples of Zbar_i and Zbar'_i."""
    sizes: dict[str, int] = {}
    check_shape("z", z, "n d", sizes)
    check_shape("z_conditioned", z_conditioned, "n L M d", sizes)
    check_option("projection", projection, PROJECTIONS)
    valid = as_mask("valid", valid, z_conditioned, "n L M", sizes)
    if z_marginal is not None:
        check_shape("z_marginal", z_marginal, "n K M d", sizes)
        valid_marginal = as_mask("valid_marginal", valid_marginal, z_marginal, "n K M", sizes)
        z, z_conditioned, z_marginal = as_float(z, z_conditioned, z_marginal)
        return z, _Samples(z_conditioned, valid, z_marginal, valid_marginal)
    if valid_marginal is not None:
        raise ValueError("valid_marginal is given without z_marginal, the tensor that it belongs to.")
    z, z_conditioned = as_float(z, z_conditioned)
    start = 0 if projection == "inclusive" else 1
    return z, _Samples(z_conditioned[:, :1], valid[:, :1], z_conditioned[:, start:], valid[:, start:])


def _masked_mean(x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean of [n, L, M, d] over the valid (l, m), zeros if there is none, and whether there is one."""
    total = torch.where(valid.unsqueeze(-1), x, 0).flatten(1, 2).sum(1)
    count = valid.flatten(1, 2).sum(1)
    return total / count.clamp(min=1).unsqueeze(-1), count > 0


def _causal_part(samples: _Samples) -> tuple[Tensor, Tensor]:
    """Return Zbar_i - Zbar'_i [n, d], and whether both means exist [n]."""
    conditioned, has_conditioned = _masked_mean(samples.conditioned, samples.conditioned_valid)
    projected, has_projected = _masked_mean(samples.projected, samples.projected_valid)
    return conditioned - projected, has_conditioned & has_projected


def _half(samples: _Samples, parity: int) -> _Samples:
    """Return the samples whose draw is even (0) or odd (1) among the draws of its row with a valid generation."""

    def keep(valid: Tensor) -> Tensor:
        present = valid.any(-1)
        rank = present.cumsum(1) - 1
        return valid & (present & (rank % 2 == parity)).unsqueeze(-1)

    return samples._replace(
        conditioned_valid=keep(samples.conditioned_valid), projected_valid=keep(samples.projected_valid)
    )


def _length(x: Tensor) -> Tensor:
    """Return the row-wise Euclidean norm of [n, d], without under- or overflow of the squares."""
    if x.shape[-1] == 0:
        return x.new_zeros(x.shape[0])
    scale = or_one(x.abs().amax(-1, keepdim=True))
    return torch.linalg.vector_norm(x / scale, dim=-1) * scale.squeeze(-1)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Return the row-wise cosine in [-1, 1] of [n, d] and [n, d]; 0 where a row is zero, without under- or overflow."""
    if a.shape[-1] == 0:
        return a.new_zeros(a.shape[0])
    a, b = (x / or_one(x.abs().amax(-1, keepdim=True)) for x in (a, b))
    norm = torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1)
    return ((a * b).sum(-1) / or_one(norm)).clamp(-1, 1)


def _gaussian(distance: Tensor, has_target: Tensor) -> Tensor:
    """Return exp(-distance^2 / 2 sigma^2), sigma the median of the distances of the rows with a target; [n]."""
    known = distance[has_target].sort().values
    if known.numel() == 0:
        return torch.ones_like(distance)
    middle = (known.numel() - 1) // 2, known.numel() // 2
    sigma = (known[middle[0]] + known[middle[1]]) / 2
    return torch.where(sigma == 0, 1, torch.exp(-((distance / sigma) ** 2) / 2))
