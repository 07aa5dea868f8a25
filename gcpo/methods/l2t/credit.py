"""From probabilities of the right answer to episode rewards, token advantages and the metrics about them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gcpo.algorithms import fitting_gain_reward, signed_cases, token_advantage
from gcpo.methods.base import Credit, Outcome
from gcpo.methods.l2t.settings import L2TConfig


@dataclass
class FittingCredit(Credit):
    """Token advantages from the fitting gain of every episode.

    Attributes:
        config: the resolved settings.
        groups: rows of every group, in the order of its responses.
        probability: float64 [B, 1 + K], J after the prompt and after every episode; NaN where there is none.
        index: int64 [B, T], the episode of every token, -1 outside.
        old_log_prob: [B, T].
        penalty: float64 [B, K], C of every episode, NaN where there is none; ``None``: no penalty.
    """

    config: L2TConfig
    groups: list[list[int]]
    probability: Tensor
    index: Tensor
    old_log_prob: Tensor
    penalty: Tensor | None = None
    _metrics: dict[str, float] = field(default_factory=dict)

    @property
    def exists(self) -> Tensor:
        """bool [B, K], which episodes there are."""
        return torch.arange(self.probability.shape[1] - 1) < self.index.amax(1, keepdim=True) + 1

    @property
    def gain(self) -> Tensor:
        """[B, K], J_k - J_{k-1}; 0 where the question has no right answer that can be scored."""
        return (self.probability[:, 1:] - self.probability[:, :-1]).nan_to_num(0.0)

    def advantages(self, outcome: Outcome) -> Tensor:
        """[B, T]; zeros in padding rows."""
        config, exists = self.config, self.exists
        total = outcome.rewards.sum(-1)
        advantages = torch.zeros_like(outcome.grpo)
        even, clamped = torch.zeros(len(exists), dtype=torch.bool), torch.zeros_like(self.index, dtype=torch.bool)
        for rows in self.groups:
            reward = fitting_gain_reward(
                total[rows],
                self.gain[rows],
                exists[rows],
                alpha=config.alpha,
                penalty=None if self.penalty is None else self.penalty[rows].nan_to_num(0.0),
                beta=config.beta,
            )
            tokens = (reward, self.index[rows], self.old_log_prob[rows], outcome.mask[rows])
            options = {"trim": config.trim, "max_ratio": config.max_ratio}
            advantage = token_advantage(*tokens, **options, length_correction=False, signed=True)
            advantages[rows] = advantage.to(advantages)
            even[rows], clamped[rows] = signed_cases(*tokens, **options)
        self._metrics = self._measure(total, even, clamped)
        return advantages

    def metrics(self) -> dict[str, float]:
        """Metrics of the whole batch under ``l2t/``."""
        return self._metrics

    def _measure(self, outcome: Tensor, even: Tensor, clamped: Tensor) -> dict[str, float]:
        rows = [row for group in self.groups for row in group]
        exists, number = self.exists[rows], self.exists[rows].sum(1)
        probability, known = self.probability[rows], ~self.probability[rows, 0].isnan()
        gains = self.gain[rows][exists & known[:, None]]
        last = probability.gather(1, number[:, None])[:, 0]
        fitted = (last - probability[:, 0])[known]
        inside = (self.index[rows] >= 0).sum()
        penalties = gains[:0] if self.penalty is None else self.penalty[rows][exists & known[:, None]]
        metrics = {
            "l2t/episodes/mean": float(number.double().mean()),
            "l2t/episodes/max": float(number.max()),
            **{f"l2t/gain/{kind}": float(getattr(gains, kind)()) for kind in ("mean", "min", "max") if len(gains)},
            **{f"l2t/penalty/{kind}": float(getattr(penalties, kind)()) for kind in ("mean", "max") if len(penalties)},
            "l2t/gain/correctness_correlation": _correlation(fitted, outcome[rows][known].double()),
            "l2t/probability/first": float(probability[known, 0].mean()),
            "l2t/probability/last": float(last[known].mean()),
            "l2t/negative_frac": float(even[rows].double().mean()),
            "l2t/clamped_frac": float(clamped[rows].sum() / inside.clamp(min=1)),
        }
        return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _correlation(x: Tensor, y: Tensor) -> float:
    if len(x) < 2 or x.std() == 0 or y.std() == 0:
        return math.nan
    return float(torch.corrcoef(torch.stack([x, y]))[0, 1])
