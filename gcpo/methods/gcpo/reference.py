"""The causal reference of every response (Eq. 13) and its metrics, computed one response at a time, with torch only.

Responses differ in length, and each has log-probabilities under every context. A table of a whole batch would hold
responses x contexts x the longest response in float64: 17 GB for 256 groups of 8 with 8 contexts and 16,384 tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gcpo.algorithms import causal_kl, causal_reference
from gcpo.algorithms.reference import MAX_LOG_RATIO
from gcpo.methods.gcpo.missing import Count
from gcpo.methods.gcpo.settings import GCPOConfig


class ReferenceStage:
    """The computation of the references of a batch.

    Args:
        config: the resolved configuration.

    Attributes:
        count: number of responses that need a reference, and of those without one.
    """

    def __init__(self, config: GCPOConfig) -> None:
        self.config = config
        self.count = Count()
        self._kl: list[Tensor] = []
        self._sums = {"floored": 0.0, "capped": 0.0, "gain": 0.0}
        self._log_ratio_max = -math.inf

    def add(
        self, log_p: Tensor, valid: Tensor, log_p_query: Tensor, mask: Tensor, *, chosen: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Compute the reference of one response, and measure KL' before the first update.

        Args:
            log_p: [L + L', T], conditioned log-probabilities, shared draws first. The values of a
                context that is not valid are never read, NaN included.
            valid: [L + L'], the valid contexts.
            log_p_query: [T], verl's old log-probabilities.
            mask: [T], response mask.
            chosen: whether the response has a kappa term (``reference.subsample``).

        Returns:
            log_ref [T]; mask of the kappa term, bool [T], False everywhere without a reference.
        """
        reference, num_shared = self.config.reference, self.config.collider.num_draws
        valid, mask = valid.bool() & chosen, mask.bool()
        leave_one_out = len(log_p) > num_shared
        log_ref, floored, has_reference = causal_reference(
            log_p[None, :num_shared],
            log_p_query[None],
            valid[None, :num_shared],
            projection=self.config.collider.projection,
            reduction=reference.reduction,
            floor=reference.floor,
            relative_floor=reference.relative_floor,
            log_p_marginal=log_p[None, num_shared:] if leave_one_out else None,
            valid_marginal=valid[None, num_shared:] if leave_one_out else None,
        )
        log_ref, kl_mask = log_ref[0], mask & has_reference
        if chosen and mask.any():
            self.count.add(1, int(not has_reference))
        if kl_mask.any():
            on_context = self._on_context(log_p, valid)
            self._measure(log_ref[kl_mask], log_p_query[kl_mask], on_context[kl_mask], floored[0][kl_mask])
        return log_ref, kl_mask

    def log_rho(self, log_ref: Tensor, log_p: Tensor, valid: Tensor, log_p_query: Tensor) -> Tensor:
        """Return log rho [T] before the first update, clamped as in the loss; see `add`."""
        log_policy = self._log_policy(log_p_query, self._on_context(log_p, valid.bool()))
        return (log_ref - log_policy).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)

    def _on_context(self, log_p: Tensor, valid: Tensor) -> Tensor:
        """Return the log-probabilities under x_{i,0}, or the first valid context."""
        return log_p[int(valid[: self.config.collider.num_draws].int().argmax())]

    def _log_policy(self, log_p_query: Tensor, on_context: Tensor) -> Tensor:
        """Return the denominator of rho."""
        return log_p_query if self.config.reference.policy_condition == "query" else on_context

    def _measure(self, log_ref: Tensor, log_p_query: Tensor, on_context: Tensor, floored: Tensor) -> None:
        reference = self.config.reference
        log_policy = self._log_policy(log_p_query, on_context)
        log_ratio = (log_ref - log_policy).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        kl = causal_kl(log_policy[None], log_ref[None], max_kl=reference.max_kl)[0]
        self._kl.append(kl.float())
        self._sums["floored"] += float(floored.sum())
        self._sums["capped"] += float((kl >= reference.max_kl).sum())
        self._sums["gain"] += float((on_context - log_p_query).double().sum())
        self._log_ratio_max = max(self._log_ratio_max, float(log_ratio.max()))

    def metrics(self) -> dict[str, float]:
        """Return the metrics of all responses so far under ``gcpo/reference/``."""
        metrics: dict[str, float] = {}
        if self._kl:
            kl = torch.cat(self._kl)
            top, total = kl.topk(max(1, math.ceil(0.01 * len(kl)))).values.double().sum(), kl.double().sum()
            metrics |= {
                "gcpo/reference/floored_frac": self._sums["floored"] / len(kl),
                "gcpo/reference/kl_mean": float(total) / len(kl),
                "gcpo/reference/capped_frac": self._sums["capped"] / len(kl),
                "gcpo/reference/log_ratio_max": self._log_ratio_max,
                "gcpo/reference/top_percent_frac": float(top / total) if total > 0 else 0.0,
                "gcpo/reference/collider_gain": self._sums["gain"] / len(kl),
            }
        return metrics
