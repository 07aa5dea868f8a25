"""Group variance policy optimization (GVPO): the loss of a group and the advantages with its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from gcpo.algorithms._checks import as_float, check_at_least, check_shape


@torch.no_grad()
def gvpo_advantage(rewards: Tensor, log_ratio: Tensor, *, beta: float = 0.1) -> Tensor:
    """Computes the advantages (R_i - Rbar) - beta * (D_i - Dbar) of one group.

    See "GVPO: Group Variance Policy Optimization for Large Language Model Post-Training" (arXiv 2504.19599). The
    gradient of `gvpo_loss` is that of -beta / (n - 1) * sum_i advantage_i * D_i with constant advantages.

    Args:
        rewards: [n], the outcome rewards R of a group.
        log_ratio: [n], D_i = sum_t log(pi_theta / pi_old) over the tokens of response i, in nats.
        beta: The weight of the log-ratio.

    Returns:
        [n], with sum 0; zeros for n = 1; float64 if an input is, else float32. No gradient.

    Raises:
        ValueError: Shapes that do not fit, or a negative ``beta``.
    """
    rewards, log_ratio = _checked(rewards, log_ratio, beta)
    return _centred(rewards) - beta * _centred(log_ratio)


def gvpo_loss(rewards: Tensor, log_ratio: Tensor, *, beta: float = 0.1) -> Tensor:
    """Computes 1/2 * sum_i d_i^2 / (n - 1) with d_i = beta * (D_i - Dbar) - (R_i - Rbar), for one group.

    See "GVPO: Group Variance Policy Optimization for Large Language Model Post-Training" (arXiv 2504.19599); the
    factor 1/2 is that of the official code.

    Args:
        rewards: [n], the outcome rewards R of a group.
        log_ratio: [n], D_i, see `gvpo_advantage`.
        beta: The weight of the log-ratio.

    Returns:
        [], at least 0; 0 for n = 1; float64 if an input is, else float32. The gradient runs through ``log_ratio``;
        with respect to D_i it is beta * d_i / (n - 1).

    Raises:
        ValueError: Shapes that do not fit, or a negative ``beta``.
    """
    rewards, log_ratio = _checked(rewards, log_ratio, beta)
    difference = beta * _centred(log_ratio) - _centred(rewards.detach())
    return difference.square().sum() / (2 * max(len(rewards) - 1, 1))


def _centred(x: Tensor) -> Tensor:
    """``x`` minus its mean; zeros for an empty group."""
    return x - x.mean() if len(x) else x


def _checked(rewards: Tensor, log_ratio: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    sizes: dict[str, int] = {}
    check_shape("rewards", rewards, "n", sizes)
    check_shape("log_ratio", log_ratio, "n", sizes)
    check_at_least("beta", beta, 0)
    rewards, log_ratio = as_float(rewards, log_ratio)
    return rewards, log_ratio
