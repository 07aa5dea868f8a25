"""Registration of methods with verl: the advantage estimator and the trainer mode of each method.

A_i is verl's own GRPO advantage.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from verl.trainer.ppo.core_algos import (
    ADV_ESTIMATOR_REGISTRY,
    POLICY_LOSS_REGISTRY,
    compute_grpo_outcome_advantage,
    register_adv_est,
)
from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY, register_trainer
from verl.workers.engine.base import EngineRegistry

from gcpo.methods.base import Credit, Outcome

_NO_TRAINER = object()
_credit: ContextVar[Any] = ContextVar("gcpo_credit", default=_NO_TRAINER)


@contextmanager
def credited(credit: Credit | None) -> Iterator[None]:
    """Make ``credit`` compute the advantages inside the ``with`` block; ``None`` selects GRPO's advantages.

    verl calls an estimator by its name and passes only the batch, so a context variable passes the credit.
    """
    token = _credit.set(credit)
    try:
        yield
    finally:
        _credit.reset(token)


def method_advantage(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: np.ndarray,
    config: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the advantages of any method.

    Args:
        token_level_rewards: [B, T], the outcome reward on one token of each response.
        response_mask: [B, T].
        index: [B], the group of every row.
        config: verl's algorithm configuration; ``norm_adv_by_std_in_grpo`` is honoured.

    Returns:
        (advantages, returns), both [B, T].

    Raises:
        RuntimeError: called outside the trainer mode of a method, where no credit is set.
    """
    credit = _credit.get()
    if credit is _NO_TRAINER:
        name = "gcpo" if config is None else config.get("adv_estimator", "gcpo")
        raise RuntimeError(
            f"algorithm.adv_estimator={name} works only in the trainer mode {name}: set trainer.v1.trainer_mode={name}"
        )
    norm_by_std = True if config is None else config.get("norm_adv_by_std_in_grpo", True)
    grpo, returns = compute_grpo_outcome_advantage(
        token_level_rewards, response_mask, index, norm_adv_by_std_in_grpo=norm_by_std
    )
    if credit is None:
        return grpo, returns
    advantages = credit.advantages(Outcome(grpo, token_level_rewards, response_mask, index))
    return advantages, advantages


def registered(device: str) -> dict[str, bool]:
    """Return for each part of the plug-in whether verl has it registered; ``device`` is ``cpu`` or ``cuda``."""
    engines = EngineRegistry._engines.get("language_model", {}).get("fsdp2", {})
    ours = [key for key, engine in engines.items() if engine.__module__.startswith("gcpo.") and device in (key, key[0])]
    return {
        "advantage estimator": "gcpo" in ADV_ESTIMATOR_REGISTRY,
        "policy loss": "gcpo" in POLICY_LOSS_REGISTRY,
        "trainer mode": "gcpo" in TRAINER_REGISTRY,
        f"FSDP2 engine for {device}": bool(ours),
    }


def plugin_problem() -> str | None:
    """Return why the installed plug-in does not work, or ``None``. verl hides the failed import of a plug-in."""
    names = {entry.name for entry in importlib.metadata.entry_points(group="verl.plugins")}
    if "gcpo" not in names:
        return "gcpo is not installed as a plug-in of verl (entry point group verl.plugins): pip install -e ."
    if "gcpo" not in TRAINER_REGISTRY:
        return "verl could not load the plug-in gcpo; the cause is printed above"
    return None


def register(name: str, trainer: type) -> None:
    """Register a method's estimator and trainer mode under its name."""
    register_adv_est(name)(method_advantage)
    register_trainer(name)(trainer)
