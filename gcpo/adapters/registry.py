"""The advantage estimator and the policy loss ``gcpo``, in verl's registries.

Both call verl's own functions: A_i is verl's GRPO advantage and the surrogate is verl's ``vanilla`` policy loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from verl.trainer.ppo.core_algos import (
    compute_grpo_outcome_advantage,
    get_policy_loss_fn,
    register_adv_est,
    register_policy_loss,
)

from gcpo.algorithms import causal_advantage

_weights: ContextVar[tuple[torch.Tensor | None, str, torch.Tensor | None] | None] = ContextVar(
    "gcpo_weights", default=None
)


@contextmanager
def causal_weights(
    weight: torch.Tensor | None, form: str = "product", has_target: torch.Tensor | None = None
) -> Iterator[None]:
    """Give the estimator ``gcpo`` the causal weights of the batch that verl is about to compute advantages for.

    Args:
        weight: Upsilon of every row, shape [B], in the order of the batch; ``None`` where weighting is off.
        form: ``advantage.form``.
        has_target: bool [B], which rows have a target; ``None``: all. The weight of the others is a placeholder, which
            must not enter the mean of ``signed``.
    """
    token = _weights.set((weight, form, has_target))
    try:
        yield
    finally:
        _weights.reset(token)


@register_adv_est("gcpo")
def compute_gcpo_advantage(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: np.ndarray,
    config: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """B_i = A_i * Upsilon_i for every token of response i (Eq. 8, 10, 11).

    Args:
        token_level_rewards: [B, T], the outcome reward on one token of each response.
        response_mask: [B, T].
        index: [B], the group of every row.
        config: verl's algorithm configuration; ``norm_adv_by_std_in_grpo`` is honoured.

    Returns:
        (advantages, returns), both [B, T]. With Upsilon = 1 exactly what verl's ``grpo`` gives.

    Raises:
        RuntimeError: outside the trainer mode ``gcpo``, where nothing computes Upsilon.
    """
    weights = _weights.get()
    if weights is None:
        raise RuntimeError(
            "algorithm.adv_estimator=gcpo works in the trainer mode gcpo alone: set trainer.v1.trainer_mode=gcpo"
        )
    weight, form, has_target = weights
    norm_by_std = True if config is None else config.get("norm_adv_by_std_in_grpo", True)
    advantages, returns = compute_grpo_outcome_advantage(
        token_level_rewards, response_mask, index, norm_adv_by_std_in_grpo=norm_by_std
    )
    if weight is None:
        return advantages, returns
    # A_i stands on every token of the response; rows of one group are weighted together.
    has_token = response_mask.bool().any(dim=-1)
    first = response_mask.bool().int().argmax(dim=-1, keepdim=True)
    scalar = advantages.gather(1, first).squeeze(1)
    weighted = torch.where(has_token, scalar, torch.zeros_like(scalar))
    for group in dict.fromkeys(index.tolist()):
        rows = torch.from_numpy(np.flatnonzero(index == group))
        weighted[rows] = causal_advantage(
            weighted[rows],
            weight[rows].to(weighted),
            form=form,
            has_target=None if has_target is None else has_target[rows].to(weighted.device),
        )
    advantages = weighted.unsqueeze(-1) * response_mask
    return advantages, advantages


@register_policy_loss("gcpo")
def compute_policy_loss_gcpo(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """The surrogate of Eq. 10 on B_i: verl's ``vanilla`` loss. The KL terms are added by verl and by the engine."""
    return get_policy_loss_fn("vanilla")(*args, **kwargs)
