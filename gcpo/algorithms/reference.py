"""The causal reference distribution and the divergence of the policy from it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gcpo.algorithms._checks import as_float, as_mask, check_at_least, check_option, check_shape
from gcpo.algorithms.weighting import PROJECTIONS

REDUCTIONS = ("mean", "sum")
MAX_LOG_RATIO = 20.0
"""Bound on |log rho|, as verl's: its exponential is finite in float32 and far above any cap on KL'."""


@torch.no_grad()
def causal_reference(
    log_p_collider: Tensor,
    log_p_query: Tensor,
    valid: Tensor | None = None,
    *,
    projection: str = "inclusive",
    reduction: str = "mean",
    floor: float = 1e-6,
    relative_floor: float = 0.01,
    log_p_marginal: Tensor | None = None,
    valid_marginal: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the log of the causal reference, pi'_ref = p_c - mean_l p_l + p_q, floored.

    See "Group Causal Policy Optimization for Post-Training Large Language Models" (arXiv 2508.05428), Eq. 13,
    which prints a sum over l. Without ``log_p_marginal`` (shared draws) p_c is the draw l = 0 and the
    subtracted mean runs over the shared draws; with it (leave-one-out draws) p_c is the mean over the shared
    draws and the subtracted mean runs over the leave-one-out ones. Means and sums run over the valid draws only.

    Args:
        log_p_collider: [n, L, T], log pi_old(y_ij | x_il, y_i<j); L may be 0.
        log_p_query: [n, T], log pi_old(y_ij | q, y_i<j).
        valid: [n, L], True for the draws that count; all when None. Other values are never read, NaN included.
        projection: Shared draws that are subtracted: "inclusive" (all, as printed) or "exclusive" (l >= 1).
            Has no effect with ``log_p_marginal``.
        reduction: "mean", or "sum" as printed, only for the subtracted term.
        floor: Least probability of the reference.
        relative_floor: Least probability of the reference as a fraction of p_q.
        log_p_marginal: [n, K, T], log-probabilities in contexts whose collider draw did not see response i.
        valid_marginal: [n, K], True for those that count; all when None.

    Returns:
        log_ref: [n, T], log max(pi'_ref, delta), delta = max(floor, relative_floor * p_q); float64 if an
            input is, else float32. Rows without a reference hold ``log_p_query``. No gradient.
        floored: [n, T] bool, where pi'_ref < delta; False in rows without a reference.
        has_reference: [n] bool, whether both p_c and the subtracted term have a valid draw. With a single
            shared draw the inclusive reference is p_q (floored), and the exclusive one does not exist.

    Raises:
        ValueError: Shapes that do not fit, an unknown option, a negative floor, or only ``valid_marginal`` is given.
    """
    check_option("projection", projection, PROJECTIONS)
    check_option("reduction", reduction, REDUCTIONS)
    check_at_least("floor", floor, 0)
    check_at_least("relative_floor", relative_floor, 0)
    dtype, log_p_query, draws = _draws(log_p_collider, log_p_query, valid, projection, log_p_marginal, valid_marginal)
    has_reference = draws.conditioned_valid.any(1) & draws.projected_valid.any(1)
    raw, log_scale = _mixture(draws, log_p_query, reduction)
    log_delta = (log_p_query + _log(relative_floor)).clamp(min=_log(floor))
    floored = (raw < torch.exp(log_delta - log_scale)) & has_reference.unsqueeze(-1)
    log_ref = torch.where(floored, log_delta, log_scale + torch.log(raw))
    log_ref = torch.where(has_reference.unsqueeze(-1), log_ref, log_p_query)
    return log_ref.to(dtype), floored, has_reference


def causal_kl(log_prob: Tensor, log_ref: Tensor, *, max_kl: float = 10.0) -> Tensor:
    """Compute the divergence of the policy from the causal reference, rho - log rho - 1, of every token.

    See "Group Causal Policy Optimization for Post-Training Large Language Models" (arXiv 2508.05428), Eq. 12,
    without its sum over i, which repeats the one of Eq. 10. rho = pi'_ref / pi_theta; log rho is clamped to
    +-20 and the result to ``max_kl``, and there is no gradient beyond either bound.

    Args:
        log_prob: [n, T], log pi_theta(y_ij | x_i, y_i<j); the only argument that receives a gradient.
        log_ref: [n, T], the log of the reference.
        max_kl: Bound on the divergence of one token.

    Returns:
        [n, T], in [0, max_kl]; float64 if an input is, else float32.

    Raises:
        ValueError: Shapes that differ, or a negative ``max_kl``.
    """
    sizes: dict[str, int] = {}
    check_shape("log_prob", log_prob, "n T", sizes)
    check_shape("log_ref", log_ref, "n T", sizes)
    check_at_least("max_kl", max_kl, 0)
    log_prob, log_ref = as_float(log_prob, log_ref.detach())
    log_rho = (log_ref - log_prob).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    # expm1 keeps the digits that exp(x) - 1 loses if the policy is close to the reference.
    return (torch.expm1(log_rho) - log_rho).clamp(0, max_kl)


class _Draws(NamedTuple):
    """Checked float64 log-probabilities and masks: the draws of p_c and the subtracted draws."""

    conditioned: Tensor
    conditioned_valid: Tensor
    projected: Tensor
    projected_valid: Tensor


def _draws(
    log_p_collider: Tensor,
    log_p_query: Tensor,
    valid: Tensor | None,
    projection: str,
    log_p_marginal: Tensor | None,
    valid_marginal: Tensor | None,
) -> tuple[torch.dtype, Tensor, _Draws]:
    """Check the tensors of `causal_reference` and select the draws of p_c and of the subtracted term."""
    sizes: dict[str, int] = {}
    check_shape("log_p_collider", log_p_collider, "n L T", sizes)
    check_shape("log_p_query", log_p_query, "n T", sizes)
    valid = as_mask("valid", valid, log_p_collider, "n L", sizes)
    # Differences of probabilities need float64, whatever the input dtype.
    collider, query = log_p_collider.double(), log_p_query.double()
    if log_p_marginal is not None:
        check_shape("log_p_marginal", log_p_marginal, "n K T", sizes)
        valid_marginal = as_mask("valid_marginal", valid_marginal, log_p_marginal, "n K", sizes)
        dtype = as_float(log_p_collider, log_p_query, log_p_marginal)[0].dtype
        return dtype, query, _Draws(collider, valid, log_p_marginal.double(), valid_marginal)
    if valid_marginal is not None:
        raise ValueError("valid_marginal is given without log_p_marginal, the tensor that it belongs to.")
    dtype = as_float(log_p_collider, log_p_query)[0].dtype
    start = 0 if projection == "inclusive" else 1
    return dtype, query, _Draws(collider[:, :1], valid[:, :1], collider[:, start:], valid[:, start:])


def _mixture(draws: _Draws, log_p_query: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """Compute Eq. 13 as pi'_ref / scale and log scale, [n, T] each; scale is each token's largest probability.

    The division preserves probabilities that exp would round to zero, such as exp(-800).
    """
    conditioned = torch.where(draws.conditioned_valid.unsqueeze(-1), draws.conditioned, -math.inf)
    projected = torch.where(draws.projected_valid.unsqueeze(-1), draws.projected, -math.inf)
    log_scale = torch.cat([conditioned, projected, log_p_query.unsqueeze(1)], 1).amax(1)
    log_scale = torch.where(log_scale == -math.inf, 0, log_scale)

    def total(log_p: Tensor) -> Tensor:
        return torch.exp(log_p - log_scale.unsqueeze(1)).sum(1)

    p_c = total(conditioned) / draws.conditioned_valid.sum(1, keepdim=True).clamp(min=1)
    subtracted = total(projected)
    if reduction == "mean":
        subtracted = subtracted / draws.projected_valid.sum(1, keepdim=True).clamp(min=1)
    return (p_c - subtracted) + torch.exp(log_p_query - log_scale), log_scale


def _log(x: float) -> float:
    """Return log x, or minus infinity for 0."""
    return math.log(x) if x > 0 else -math.inf
