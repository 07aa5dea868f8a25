"""Signs of a collapse in the metrics of a run's steps, and how they stand in the line of a step."""

from __future__ import annotations

import math
from typing import Any

import pytest

from gcpo.methods.gcpo.settings import GCPOConfig
from gcpo.settings import ConfigError
from gcpo.stability import (
    ENTROPY,
    ENTROPY_COLLAPSE,
    HELD_OUT_COLLAPSE,
    REWARD_COLLAPSE,
    SKIPPED_UPDATES,
    WEIGHT_CHANGE,
    WEIGHT_COLLAPSE,
    StabilityConfig,
    StabilityMonitor,
    describe,
    token_entropy,
)
from gcpo.tools.metrics import step_line

ACCURACY = "val-core/gcpo/arithmetic/acc/mean@1"
VOCABULARY = 326


def monitor(groups: int = 16, config: StabilityConfig | None = None, **options: Any) -> StabilityMonitor:
    options = {"vocabulary": VOCABULARY, "rows": groups * 8, **options}
    return StabilityMonitor(config or StabilityConfig(), groups=groups, **options)


def rewards(mean: float, highest: float | None = None, lowest: float = 0.0) -> dict[str, float]:
    return {
        "critic/score/mean": mean,
        "critic/score/max": float(mean > lowest) if highest is None else highest,
        "critic/score/min": lowest,
    }


def signs(watch: StabilityMonitor, *steps: dict[str, float]) -> list[set[str]]:
    return [set(watch.step(step)) - {ENTROPY} for step in steps]


# ---- reward ----------------------------------------------------------------------------------------------------------


def test_a_step_without_reward_after_steps_with() -> None:
    """The quick start at learning rate 1e6: 0.43, then nothing."""
    assert signs(monitor(), rewards(0.43), rewards(0.0), rewards(0.0)) == [set(), {REWARD_COLLAPSE}, {REWARD_COLLAPSE}]


def test_rewards_that_come_back_are_no_collapse_any_more() -> None:
    assert signs(monitor(), rewards(0.4), rewards(0.0), rewards(0.4)) == [set(), {REWARD_COLLAPSE}, set()]


def test_a_run_that_starts_without_reward_has_lost_nothing() -> None:
    assert signs(monitor(), *[rewards(0.0)] * 5, rewards(0.1)) == [set()] * 6


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_small_batch_without_reward_may_be_chance(groups: int) -> None:
    """At 40 % a step of few questions is without reward now and then; a row of such steps is not chance."""
    watch = monitor(groups)
    assert watch.step(rewards(0.4)) == {}
    found = [REWARD_COLLAPSE in watch.step(rewards(0.0)) for _ in range(12)]
    first = found.index(True)
    assert all(found[first:]) and not any(found[:first])
    assert 0.6 ** (groups * (first + 1)) < 0.01 <= 0.6 ** (groups * first)


def test_a_hard_data_set_is_no_collapse() -> None:
    """One response of a hundred is right, in batches of 4 questions."""
    assert signs(monitor(4), rewards(0.01), *[rewards(0.0)] * 10) == [set()] * 11


def test_rewards_from_minus_one_to_one() -> None:
    """DAPO's rewards: -1 for all responses is no reward, although it is not 0."""
    before = rewards(-0.2, highest=1.0, lowest=-1.0)
    assert signs(monitor(), before, rewards(-1.0, highest=-1.0, lowest=-1.0)) == [set(), {REWARD_COLLAPSE}]
    hard = rewards(-0.98, highest=1.0, lowest=-1.0)
    assert signs(monitor(4), hard, rewards(-1.0, highest=-1.0, lowest=-1.0)) == [set(), set()]


def test_a_slow_decline_ends_in_the_sign() -> None:
    steps = [rewards(mean) for mean in (0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.02)]
    assert signs(monitor(), *steps, *[rewards(0.0)] * 3)[-1] == {REWARD_COLLAPSE}


# ---- held-out accuracy -----------------------------------------------------------------------------------------------


def test_held_out_accuracy_that_falls_to_zero() -> None:
    """The validation before the first step counts as a step before; another data set does not."""
    watch = monitor()
    assert watch.held_out({ACCURACY: 0.547}) == {}
    assert watch.step({ACCURACY: 0.0, "val-core/other/acc/mean@1": 0.0}) == {HELD_OUT_COLLAPSE: 0.547}
    assert watch.step({ACCURACY: 0.1}) == {}


def test_a_held_out_accuracy_near_zero_may_be_chance() -> None:
    watch = monitor()
    assert watch.held_out({ACCURACY: 0.02}) == {} and watch.step({ACCURACY: 0.0}) == {}


# ---- entropy ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entropy", "out"),
    [(0.056, False), (0.0, True), (1e-6, True), (2.0, False), (math.log(VOCABULARY), True), (math.nan, True)],
)
def test_entropy_bounds(entropy: float, out: bool) -> None:
    found = monitor(loss_agg_mode="seq-mean-token-mean").step({"actor/entropy": entropy})
    assert (ENTROPY_COLLAPSE in found) == out and (found[ENTROPY] == entropy or math.isnan(entropy))


@pytest.mark.parametrize(
    ("mode", "scale"),
    [
        ("token-mean", None),
        ("seq-mean-token-mean", None),
        ("seq-mean-token-sum", None),
        ("seq-mean-token-sum-norm", 40),
        ("token-sum", None),
    ],
)
def test_entropy_per_token_from_verls_aggregate(mode: str, scale: int | None) -> None:
    """verl aggregates the entropy like the loss; rows of equal entropy, so that every mean is the same."""
    torch = pytest.importorskip("torch")
    from verl.trainer.ppo.core_algos import agg_loss

    mask = torch.arange(9)[None] < torch.tensor([3, 9, 6])[:, None]
    value = agg_loss(torch.full((3, 9), 0.7), mask.float(), mode, loss_scale_factor=scale)
    assert token_entropy(float(value), mode, 6.0, scale, 3) == pytest.approx(0.7, rel=1e-5)


def test_an_aggregate_that_cannot_be_undone_is_left_out() -> None:
    watch = monitor(loss_agg_mode="seq-mean-token-sum-norm")
    assert watch.step({"actor/entropy": 0.0, "response_length/mean": 30.0}) == {}


# ---- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "out"), [(0.02, False), (0.5, False), (0.51, True), (5e7, True), (math.nan, True)])
def test_weights_that_change_too_much(change: float, out: bool) -> None:
    assert (WEIGHT_COLLAPSE in monitor().step({WEIGHT_CHANGE: change})) == out


def test_a_healthy_run_has_no_sign() -> None:
    """Twelve steps like those of the quick start."""
    watch = monitor(loss_agg_mode="seq-mean-token-mean")
    watch.held_out({ACCURACY: 0.547})
    for step in range(12):
        metrics = {**rewards(0.4 + 0.02 * step), "actor/entropy": 0.056 - 0.003 * step, WEIGHT_CHANGE: 0.01}
        if step % 6 == 5:
            metrics[ACCURACY] = 0.6
        assert set(watch.step(metrics)) == {ENTROPY}


# ---- options and lines -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("non_finite", "ignore"),
        ("max_weight_change", 0),
        ("max_weight_change", math.nan),
        ("min_entropy", -1),
        ("max_entropy_frac", 0),
        ("max_entropy_frac", 1.5),
        ("max_entropie", 1),
    ],
)
def test_options_are_checked(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"gcpo.stability.{name}"):
        GCPOConfig.from_config({"stability": {name: value}}, n=8, response_length=64)


def test_options_reach_the_monitor() -> None:
    config = GCPOConfig.from_config({"stability": {"max_weight_change": 3}}, n=8, response_length=64).stability
    assert monitor(config=config).step({WEIGHT_CHANGE: 2.0}) == {}


def test_the_line_of_a_step_says_every_sign() -> None:
    metrics = {
        "critic/score/mean": 0.0,
        REWARD_COLLAPSE: 2.0,
        HELD_OUT_COLLAPSE: 0.547,
        ENTROPY_COLLAPSE: 5.79,
        WEIGHT_COLLAPSE: 5e7,
        SKIPPED_UPDATES: 0.5,
    }
    texts = describe(metrics)
    assert texts == [
        "50 % of the updates skipped (not finite)",
        "collapse: no response has a reward, 2 steps in a row",
        "collapse: held-out accuracy 0 after 54.7 %",
        "collapse: entropy 5.8 per token",
        "collapse: weights changed by 5e+07 × their norm",
    ]
    line = step_line(3, metrics, 12)
    assert all(text in line for text in texts)
    assert "collapse" not in step_line(3, {"critic/score/mean": 0.4, SKIPPED_UPDATES: 0.0, ENTROPY: 0.05}, 12)
