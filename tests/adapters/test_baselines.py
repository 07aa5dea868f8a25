"""Dr.GRPO and GSPO: numbers by hand through verl's advantage, loss and aggregation with the settings of our yaml."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import open_dict
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.utils.losses import ppo_loss

from gcpo.adapters.registry import credited, method_advantage
from gcpo.checks import check_run
from tests.adapters.ranks import pack
from tests.run_inputs import config_of

REWARDS, LENGTHS, LONGEST = (1.0, 0.0, 0.0, 1.0), (2, 4, 1, 5), 10
EVEN = [[0.0] * length for length in LENGTHS]
SPLITS = [[4], [2, 2], [1, 3], [1, 1, 1, 1]]


def update(
    config: Any, log_ratio: Sequence[Sequence[float]] = EVEN, split: Sequence[int] = (4,)
) -> tuple[float, list[list[float]]]:
    """The loss of a group of four responses, and its gradient with respect to every log-probability.

    Args:
        config: of a run.
        log_ratio: log(pi_theta / pi_old) of every token.
        split: sizes of the micro-batches.
    """
    actor, width = omega_conf_to_dataclass(config.actor_rollout_ref.actor), max(LENGTHS)
    mask = torch.tensor([[float(t < length) for t in range(width)] for length in LENGTHS])
    rewards = torch.zeros(4, width)
    for row, (reward, length) in enumerate(zip(REWARDS, LENGTHS, strict=True)):
        rewards[row, length - 1] = reward
    with credited(None):
        advantages, _ = method_advantage(rewards, mask, np.array(["x"] * 4, dtype=object), config.algorithm)
    rows, new = [], []
    for row, length in enumerate(LENGTHS):
        new.append(torch.full((length,), -1.0, requires_grad=True))
        rows.append(
            {
                "prompts": torch.ones(1, dtype=torch.long),
                "responses": torch.ones(length, dtype=torch.long),
                "response_mask": torch.ones(length, dtype=torch.long),
                "old_log_probs": -1.0 - torch.tensor(log_ratio[row]),
                "advantages": advantages[row, :length],
            }
        )
    losses, start = [], 0
    for size in split:
        data = pack(rows[start:][:size], dp_size=1, batch_num_tokens=sum(LENGTHS), global_batch_size=4)
        tu.assign_non_tensor(data, temperature=1.0)
        # verl reads the log-probability of a token at the place before it; that of the last place is unused.
        whole = [torch.cat([values, torch.zeros(1)]) for values in new[start:][:size]]
        output = {"log_probs": torch.nested.as_nested_tensor(whole, layout=torch.jagged)}
        losses.append(ppo_loss(config=actor, model_output=output, data=data)[0])
        start += size
    torch.stack(losses).sum().backward()
    return sum(loss.item() for loss in losses), [values.grad.tolist() for values in new if values.grad is not None]


@pytest.fixture
def config(recipe_config: Callable) -> Callable:
    return lambda method, *more: recipe_config(
        "device=cpu", f"method={method}", f"data.max_response_length={LONGEST}", *more
    )


def constant(gradient: Sequence[float]) -> list[list[float]]:
    return [[value] * length for value, length in zip(gradient, LENGTHS, strict=True)]


def assert_found(
    found: tuple[float, list[list[float]]], loss: float, gradient: Sequence[Sequence[float]], size: float = 1e-7
) -> None:
    assert found[0] == pytest.approx(loss, abs=size)
    for ours, wanted in zip(found[1], gradient, strict=True):
        assert ours == pytest.approx(wanted, abs=size)


# ---- Dr.GRPO ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_dr_grpo(config: Callable, split: list[int]) -> None:
    """A token's gradient is -A / (n * L_max), whatever the length of its response and the micro-batches."""
    found = update(config("dr_grpo"), split=split)
    assert_found(found, -0.025, constant([-0.0125, 0.0125, 0.0125, -0.0125]))


def test_dr_grpo_without_its_constant(config: Callable) -> None:
    """Null test: without the factor, the longest response of each micro-batch stands in its place."""
    changed = config("dr_grpo")
    with open_dict(changed):
        changed.actor_rollout_ref.actor.loss_scale_factor = None
    assert update(changed)[0] == pytest.approx(-0.05)
    assert update(changed, split=[1, 1, 1, 1])[0] != pytest.approx(-0.05, abs=1e-3)


def test_grpo_divides_by_the_length_of_the_response(config: Callable) -> None:
    """The bias that Dr.GRPO removes, on the same group."""
    found = update(config("grpo", "actor_rollout_ref.actor.use_kl_loss=False"))
    assert_found(found, 0.0, constant([-0.1082530, 0.0541265, 0.2165060, -0.0433012]), size=1e-6)


def test_dr_grpo_has_no_second_clip(config: Callable) -> None:
    """A wrong response whose token is 20 times as likely has a gradient; with verl's default it has none."""
    far = [[0.0] * length for length in LENGTHS]
    far[2] = [math.log(20)]
    assert_found(
        update(config("dr_grpo"), far), -0.025 + 0.0125 * 19, constant([-0.0125, 0.0125, 0.25, -0.0125]), size=1e-6
    )
    assert update(config("dr_grpo", "actor_rollout_ref.actor.clip_ratio_c=3.0"), far)[1][2] == [0.0]


# ---- GSPO ------------------------------------------------------------------------------------------------------------

A = 0.8660239
WANDERS = [[0.5, -0.5], [-0.7, 0.7, 0.2, -0.2], [0.0], [1.0, -1.0, 0.3, -0.3, 0.0]]
"""Tokens far from the old policy, in responses that are as likely as before."""


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("log_ratio", [EVEN, WANDERS], ids=["on policy", "tokens differ"])
def test_gspo_reads_the_ratio_of_the_response(config: Callable, log_ratio: list, split: list[int]) -> None:
    """With s_i = 1 the gradient of a token is -A / (n * T_i), however far the tokens are from the old policy."""
    found = update(config("gspo"), log_ratio, split)
    assert_found(found, 0.0, constant([-A / 8, A / 16, A / 4, -A / 20]), size=1e-6)


def test_gspo_clips_the_ratio_of_the_response(config: Callable) -> None:
    """s = 1.001 of a right response and s = 0.999 of a wrong one are clipped, and have no gradient; the others not."""
    up, down = math.log(1.001), math.log(0.999)
    log_ratio = [[up + 0.4, up - 0.4], [down] * 4, [up], [down] * 5]
    loss = A / 4 * (-1.0004 + 0.9997 + 1.001 - 0.999)
    assert_found(update(config("gspo"), log_ratio), loss, constant([0, 0, A / 4 * 1.001, -A / 20 * 0.999]), size=1e-6)


def test_gspo_s_aggregation_is_set(config: Callable) -> None:
    """verl takes the mean over all tokens by default, which weights the responses by their length."""
    found = update(config("gspo", "actor_rollout_ref.actor.loss_agg_mode=token-mean"))
    assert found[1][0] != pytest.approx([-A / 8] * 2, abs=1e-3)


# ---- the checks of a run ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dr_grpo", "gspo"])
def test_the_quick_start_passes(run_inputs: Path, method: str) -> None:
    """Nothing refuses the settings, and the parts of GCPO are off."""
    config = config_of(run_inputs, method=method)
    assert check_run(config).is_grpo
    assert not config.actor_rollout_ref.actor.use_kl_loss and not config.algorithm.use_kl_in_reward
    assert config.trainer.experiment_name == method
