"""From answer distributions and states to rewards, token advantages and the metrics about them; needs only torch.

The trainer fetches the fields of the batch, this module works group by group.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gcpo.algorithms import episode_reward, token_advantage
from gcpo.methods.gc2po.settings import GC2POConfig
from gcpo.rewards import boxed_answer, normalize

# ---- perturbations and what they change ------------------------------------------------------------------------------


def gaussian_noise(seed: int, episodes: int, draws: int, size: int, sigma: float) -> Tensor:
    """sigma * eps / sqrt(d), to be multiplied by |h|: [episodes, draws, size]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(episodes, draws, size, generator=generator) * (sigma / math.sqrt(size))


def group_noise(states: Tensor, others: Sequence[Tensor], eta: float) -> Tensor:
    """eta * (another candidate's h_k - h_k).

    Args:
        states: [K, d], of the episodes of a response.
        others: states [K_j, d] of M other responses, K_j >= 1; one with fewer episodes gives its last one's.
        eta: share of the way.

    Returns:
        [K, M, d].
    """
    rows = torch.arange(len(states))
    targets = [other[rows.clamp(max=len(other) - 1)] for other in others]
    return eta * (torch.stack(targets, dim=1) - states.unsqueeze(1))


def effectiveness(states: Tensor) -> Tensor:
    """min(1, |h_k - h_{k-1}| / |h_{k-1}|).

    Args:
        states: [1 + K, d], the state at the end of the prompt first.

    Returns:
        [K], in [0, 1]; after a state of norm 0: 1 if the next one differs, else 0.
    """
    states = states.double()
    change, before = (states[1:] - states[:-1]).norm(dim=-1), states[:-1].norm(dim=-1)
    ratio = torch.where(before > 0, change / torch.where(before > 0, before, 1), (change > 0).double())
    return ratio.clamp(max=1)


# ---- answers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GroupAnswers:
    """Final answers of a group.

    Attributes:
        candidates: distinct answers to score, the gold one first, then by frequency.
        counts: how often each distinct answer was given, whether or not it is a candidate.
        distinct: number of distinct answers, the gold one included.
    """

    candidates: tuple[str, ...]
    counts: tuple[int, ...]
    distinct: int

    @property
    def parsable(self) -> bool:
        """Whether any response gave an answer."""
        return bool(self.counts)


def group_answers(responses: Sequence[str], gold: Any, max_answers: int) -> GroupAnswers:
    """The distinct final answers of a group, in an order that does not depend on that of the responses.

    Answers are the same where `gcpo.rewards.normalize` makes the same of them; of several ways to write one the most
    frequent is scored.

    Args:
        responses: texts.
        gold: the right answer; of a list the first. Anything but text and numbers counts as none.
        max_answers: number of candidates, the gold one included.
    """
    found = [answer.strip() for answer in map(boxed_answer, responses) if answer is not None]
    named = [(normalize(answer), answer) for answer in found]
    counts = Counter(name for name, _ in named if name)
    written = Counter((name, answer) for name, answer in named if name)
    if isinstance(gold, Sequence) and not isinstance(gold, str):
        gold = gold[0] if len(gold) else None
    texts = {}
    if isinstance(gold, str | int | float) and not isinstance(gold, bool) and normalize(str(gold)):
        texts[normalize(str(gold))] = str(gold).strip()
    for name in sorted(counts, key=lambda name: (-counts[name], name)):
        ways = [(-number, len(way), way) for (of, way), number in written.items() if of == name]
        texts.setdefault(name, min(ways)[2])
    return GroupAnswers(tuple(texts.values())[:max_answers], tuple(sorted(counts.values(), reverse=True)), len(texts))


def empirical_terms(counts: Sequence[int]) -> tuple[float, float]:
    """What ``counterfactual=off`` has in the place of robustness and effectiveness.

    Args:
        counts: how often each distinct answer was given.

    Returns:
        The sum of q(a)^2, and the entropy of q over the logarithm of the number of answers (0 for a single one).
    """
    total = sum(counts)
    shares = [count / total for count in counts if count]
    entropy = -sum(share * math.log(share) for share in shares)
    return sum(share * share for share in shares), entropy / math.log(len(shares)) if len(shares) > 1 else 0.0


# ---- a group ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GroupEpisodes:
    """What is known of the episodes of a group of n responses, at most K each.

    Attributes:
        divergence: [n, K], the mean over m of KL(q || q_m); NaN where there is no episode or none was asked for.
        effectiveness: [n, K]; NaN where there is no episode.
        index: int64 [n, T], the episode of every token, -1 outside.
        old_log_prob: [n, T].
        answers: final answers of the group.
    """

    divergence: Tensor
    effectiveness: Tensor
    index: Tensor
    old_log_prob: Tensor
    answers: GroupAnswers

    @property
    def exists(self) -> Tensor:
        """bool [n, K], which episodes there are."""
        numbers = torch.arange(self.divergence.shape[1])
        return numbers < self.index.amax(1, keepdim=True) + 1


@dataclass(frozen=True)
class GroupResult:
    """Of one group: token ``advantage`` [n, T], and per episode [n, K] ``reward``, ``robustness``, ``effectiveness``
    and ``exists``; ``shifted``: outcomes below 0 were lifted."""

    advantage: Tensor
    reward: Tensor
    robustness: Tensor
    effectiveness: Tensor
    exists: Tensor
    outcome: Tensor
    shifted: bool


def group_advantage(group: GroupEpisodes, outcome: Tensor, mask: Tensor, config: GC2POConfig) -> GroupResult:
    """Episode rewards and token advantages of a group.

    Outcomes below 0 are lifted by the group's lowest one: `token_advantage` divides by a response's reward, and what
    is compared inside a group is the difference alone.

    Args:
        group: of n responses.
        outcome: [n], outcome rewards.
        mask: [n, T], response mask.
        config: the checked configuration.
    """
    exists = group.exists
    lowest = float(outcome.min())
    if lowest < 0:
        outcome = outcome - lowest
    if config.counterfactual:
        robustness = _filled((-group.divergence).exp(), exists)
        effect = torch.where(exists, group.effectiveness, 0)
    else:
        robustness, effect = (torch.where(exists, value, 0.0) for value in empirical_terms(group.answers.counts))
    weights = config.reward
    reward = episode_reward(
        outcome,
        robustness,
        effect,
        exists,
        robustness_weight=weights.robustness_weight,
        effectiveness_weight=weights.effectiveness_weight,
    )
    advantage = token_advantage(
        reward,
        group.index,
        group.old_log_prob,
        mask,
        trim=weights.trim,
        length_correction=weights.length_correction,
        max_ratio=weights.max_ratio,
    )
    return GroupResult(advantage.float(), reward, robustness, effect, exists, outcome, lowest < 0)


def _filled(robustness: Tensor, exists: Tensor) -> Tensor:
    """Episodes that were not asked for get the mean of their response's others, or 1; [n, K], 0 where none exists."""
    known = exists & ~robustness.isnan()
    number = known.sum(1, keepdim=True)
    mean = torch.where(known, robustness, 0).sum(1, keepdim=True) / number.clamp(min=1)
    mean = torch.where(number > 0, mean, 1)
    return torch.where(exists, torch.where(known, robustness, mean), 0)


# ---- a batch ---------------------------------------------------------------------------------------------------------


def batch_metrics(
    results: Sequence[GroupResult], masks: Sequence[Tensor], groups: Sequence[GroupEpisodes], fallbacks: int
) -> dict[str, float]:
    """Metrics under ``gc2po/`` of the groups that have episode rewards.

    Args:
        results: of every such group.
        masks: their response masks [n, T].
        groups: the same groups.
        fallbacks: number of the other groups, which train with GRPO's advantage.
    """
    count = len(results) + fallbacks
    metrics = {"gc2po/fallback/groups_frac": fallbacks / count if count else 0.0}
    if not results:
        return metrics
    exists = [result.exists for result in results]
    number = torch.cat([e.sum(1) for e in exists]).double()
    for name in ("robustness", "effectiveness"):
        values = torch.cat([getattr(r, name)[e] for r, e in zip(results, exists, strict=True)]).double()
        metrics |= {f"gc2po/{name}/{kind}": float(getattr(values, kind)()) for kind in ("mean", "min", "max")}
    spreads = [
        float(row[inside.bool()].std())
        for result, mask in zip(results, masks, strict=True)
        for row, inside in zip(result.advantage, mask, strict=True)
        if inside.sum() > 1
    ]
    outcome = torch.cat([r.outcome for r in results]).double()
    process = torch.cat([(r.reward.sum(1) - r.outcome * r.exists.any(1)) for r in results]).double()
    distinct = [group.answers.distinct for group in groups]
    metrics |= {
        "gc2po/episodes/mean": float(number.mean()),
        "gc2po/episodes/max": float(number.max()),
        "gc2po/answers/per_group": sum(distinct) / len(distinct),
        "gc2po/answers/single_frac": sum(len(g.answers.candidates) < 2 for g in groups) / len(groups),
        "gc2po/advantage/spread_in_response": sum(spreads) / len(spreads) if spreads else 0.0,
        "gc2po/reward/process": float(process.mean()),
        "gc2po/reward/correctness_correlation": _correlation(process + outcome, outcome),
        "gc2po/reward/process_correctness_correlation": _correlation(process, outcome),
        "gc2po/reward/shifted_groups_frac": sum(r.shifted for r in results) / count,
    }
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _correlation(x: Tensor, y: Tensor) -> float:
    if len(x) < 2 or x.std() == 0 or y.std() == 0:
        return math.nan
    return float(torch.corrcoef(torch.stack([x, y]))[0, 1])
