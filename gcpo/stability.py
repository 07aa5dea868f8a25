"""Signs of a failing training run, detected in the metrics of its steps.

The trainer logs each sign as a metric under ``stability/``, and the launcher shows it in the line of the step. This
module does not import torch or verl.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Literal

from gcpo.settings import NotNegative, Positive, PositiveFraction, Settings

WEIGHT_CHANGE = "stability/weight_change/max"
"""Largest ||w_after - w_before|| / ||w_before|| of the optimizer steps of one training step."""
SKIPPED_UPDATES = "stability/skipped_updates_frac"
"""Fraction of the optimizer steps that changed no weight because the loss or the gradient norm was not finite."""
ENTROPY = "stability/entropy"
"""Mean entropy of the policy per response token, in nats."""
_COLLAPSE = "stability/collapse/{}"
REWARD_COLLAPSE, HELD_OUT_COLLAPSE, ENTROPY_COLLAPSE, WEIGHT_COLLAPSE = (
    _COLLAPSE.format(name) for name in ("reward", "held_out", "entropy", "weights")
)
"""Metrics that are present only in steps with the sign."""

HISTORY = 10
"""Number of steps over which the usual fraction of rewarded responses is averaged."""
CHANCE = 0.01
"""Consecutive steps without reward are a collapse if their probability was below this."""
LEAST_HELD_OUT = 0.05
"""A fall of the held-out accuracy to 0 from below this value may be chance."""


class StabilityConfig(Settings):
    """Bounds for the report of a collapse, and the reaction to values that are not finite."""

    non_finite: Literal["stop", "skip"] = "stop"
    """If a loss, gradient norm or weight is not finite, ``stop`` ends the run before weights are saved or sent to
    the server; ``skip`` lets verl handle the gradient norm, which skips that update and continues."""
    max_weight_change: Positive = 0.5
    """An optimizer step that changes the weights by more than this fraction of their norm is reported."""
    min_entropy: NotNegative = 1e-4
    """A mean entropy per token below this (nats) is reported: the policy is nearly deterministic."""
    max_entropy_frac: PositiveFraction = 0.9
    """A mean entropy per token above this fraction of ln(vocabulary size), that of random tokens, is reported."""


def token_entropy(
    entropy: float, loss_agg_mode: str, mean_length: float, scale: float | None, rows: int
) -> float | None:
    """Return the entropy per response token from verl's ``actor/entropy``, which is aggregated like the loss.

    Args:
        entropy: ``actor/entropy``.
        loss_agg_mode: ``actor.loss_agg_mode``.
        mean_length: mean response tokens of a row.
        scale: ``actor.loss_scale_factor``.
        rows: responses of the batch.

    Returns:
        The entropy in nats, or ``None`` if the aggregation cannot be inverted.
    """
    if loss_agg_mode in ("token-mean", "seq-mean-token-mean"):
        return entropy
    if mean_length <= 0:
        return None
    if loss_agg_mode == "seq-mean-token-sum":
        return entropy / mean_length
    if loss_agg_mode == "seq-mean-token-sum-norm" and scale:
        return entropy * scale / mean_length
    if loss_agg_mode == "token-sum" and rows:
        return entropy / (mean_length * rows)
    return None


class StabilityMonitor:
    """Detector of a collapse in the metrics of successive steps.

    Args:
        config: the bounds.
        groups: number of questions of a step.
        vocabulary: number of tokens of the vocabulary.
        rows: number of responses of a step.
        loss_agg_mode: ``actor.loss_agg_mode``.
        loss_scale_factor: ``actor.loss_scale_factor``.
    """

    def __init__(
        self,
        config: StabilityConfig,
        *,
        groups: int,
        vocabulary: int,
        rows: int,
        loss_agg_mode: str = "token-mean",
        loss_scale_factor: float | None = None,
    ) -> None:
        self.config = config
        self.groups = groups
        self.rows = rows
        self.max_entropy = config.max_entropy_frac * math.log(max(vocabulary, 2))
        self.loss_agg_mode = loss_agg_mode
        self.loss_scale_factor = loss_scale_factor
        self._rewarded: deque[float] = deque(maxlen=HISTORY)
        self._steps_without_reward = 0
        self._low, self._high = 0.0, 0.0
        self._best_held_out: dict[str, float] = {}

    def step(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return the signs of this step, as metrics, without absent signs."""
        found = {**self._reward(metrics), **self.held_out(metrics), **self._entropy(metrics)}
        change = metrics.get(WEIGHT_CHANGE)
        if change is not None and not change <= self.config.max_weight_change:
            found[WEIGHT_COLLAPSE] = change
        return found

    def _reward(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Report a step in which no response had a reward above 0, after steps in which responses had.

        With small batches such a step can be chance. Its probability follows from the usual fraction p of rewarded
        responses: (1 - p) ^ groups, over all consecutive steps without reward.
        """
        highest, mean = metrics.get("critic/score/max"), metrics.get("critic/score/mean")
        if highest is None or mean is None:
            return {}
        self._low = min(self._low, metrics.get("critic/score/min", 0.0))
        self._high = max(self._high, highest)
        if highest > 0:
            self._steps_without_reward = 0
            self._rewarded.append((mean - self._low) / (self._high - self._low))
            return {}
        if not self._rewarded:
            return {}
        self._steps_without_reward += 1
        usual = sum(self._rewarded) / len(self._rewarded)
        chance = (1.0 - min(usual, 1.0)) ** (self.groups * self._steps_without_reward)
        return {REWARD_COLLAPSE: float(self._steps_without_reward)} if chance < CHANCE else {}

    def held_out(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Report a held-out accuracy of 0 after one that was clearly above 0; the value is the best accuracy so far."""
        lost = []
        for name, value in metrics.items():
            if not name.startswith("val-core/") or "/mean@" not in name:
                continue
            best = self._best_held_out[name] = max(value, self._best_held_out.get(name, value))
            if value <= 0 and best >= LEAST_HELD_OUT:
                lost.append(best)
        return {HELD_OUT_COLLAPSE: max(lost)} if lost else {}

    def _entropy(self, metrics: Mapping[str, float]) -> dict[str, float]:
        value, length = metrics.get("actor/entropy"), metrics.get("response_length/mean", 0.0)
        if value is None:
            return {}
        entropy = token_entropy(value, self.loss_agg_mode, length, self.loss_scale_factor, self.rows)
        if entropy is None:
            return {}
        within = self.config.min_entropy <= entropy <= self.max_entropy
        return {ENTROPY: entropy} if within else {ENTROPY: entropy, ENTROPY_COLLAPSE: entropy}


def describe(metrics: Mapping[str, float]) -> list[str]:
    """Return a short text about each sign in the metrics of a step, for the line of the step."""
    texts = []
    if metrics.get(SKIPPED_UPDATES):
        texts.append(f"{100 * metrics[SKIPPED_UPDATES]:.0f} % of the updates skipped (not finite)")
    if REWARD_COLLAPSE in metrics:
        steps = int(metrics[REWARD_COLLAPSE])
        texts.append("collapse: no response has a reward" + (f", {steps} steps in a row" if steps > 1 else ""))
    if HELD_OUT_COLLAPSE in metrics:
        texts.append(f"collapse: held-out accuracy 0 after {100 * metrics[HELD_OUT_COLLAPSE]:.1f} %")
    if ENTROPY_COLLAPSE in metrics:
        texts.append(f"collapse: entropy {metrics[ENTROPY_COLLAPSE]:.2g} per token")
    if WEIGHT_COLLAPSE in metrics:
        texts.append(f"collapse: weights changed by {metrics[WEIGHT_COLLAPSE]:.3g} × their norm")
    return texts
