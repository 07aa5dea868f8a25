"""The numbers of an evaluation, from what was found for every question; pure functions.

A question has n samples, of which c are right. Questions are what is drawn from a population, so the spread of the
values of the questions makes an interval, not the spread of the samples: samples of one question are alike.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Sample:
    """What the metrics need of a sample.

    Attributes:
        right: whether the grader gives it full marks.
        truncated: whether it was cut at the token limit.
        tokens: its length.
        answer: its final answer, ``None`` where it gives none (or the task has none, as code).
        formatted: whether it has the format that training rewards; ``None`` where the grader doesn't say.
    """

    right: bool
    truncated: bool
    tokens: int
    answer: str | None = None
    formatted: float | None = None


@dataclass(frozen=True)
class Question:
    """What was found for one question.

    Attributes:
        id: the same for the same question in every run.
        samples: n, how many samples there are.
        right: c, how many of them are right.
        majority: maj@n, between 0 and 1; ``None`` where the task has no answers to count.
        truncated: samples that were cut at the token limit.
        tokens: tokens of all its samples.
        formatted: samples in the format that training rewards; ``None`` where the grader doesn't say.
    """

    id: str
    samples: int
    right: int
    majority: float | None
    truncated: int
    tokens: int
    formatted: float | None

    @property
    def accuracy(self) -> float:
        """c / n."""
        return self.right / self.samples


@dataclass(frozen=True)
class Interval:
    """A mean over questions and its 95 % interval; ``low`` and ``high`` are NaN where nothing is known of them."""

    mean: float
    low: float
    high: float

    @property
    def reach(self) -> float:
        """From the mean to the farther end."""
        return max(self.high - self.mean, self.mean - self.low)


@dataclass(frozen=True)
class Summary:
    """The metrics of a run on one set; fractions and accuracies are between 0 and 1.

    Attributes:
        questions: how many there are.
        samples: n, the smallest number of samples that a question has.
        pass_at_1: mean of c / n.
        pass_at: unbiased pass@k for k = 1, 2, 4, ... and n.
        majority: mean of maj@n.
        truncated: fraction of the samples that were cut.
        tokens: mean length of a sample.
        formatted: fraction of the samples in the format of training.
    """

    questions: int
    samples: int
    pass_at_1: Interval
    pass_at: dict[int, float]
    majority: float | None
    truncated: float
    tokens: float
    formatted: float | None


@dataclass(frozen=True)
class Aggregate:
    """Results of the aggregated answers to one question: means over its groups of K samples.

    Attributes:
        id: identifies the question, as in `Question`.
        groups: G, the number of groups.
        single: fraction of the G K samples that are right.
        aggregated: fraction of the G answers that are right; each answer is sampled after one group.
        majority: maj@K; ``None`` where the task has no answers to count.
        oracle: fraction of the groups with at least one right sample.
    """

    id: str
    groups: int
    single: float
    aggregated: float
    majority: float | None
    oracle: float


@dataclass(frozen=True)
class AggregateSummary:
    """Means over questions, each with its 95 % interval.

    Attributes:
        questions: number of questions.
        groups: smallest number of groups of a question.
        over_single: paired difference: aggregated minus single.
        over_majority: paired difference: aggregated minus majority.
    """

    questions: int
    groups: int
    single: Interval
    aggregated: Interval
    majority: Interval | None
    oracle: Interval
    over_single: Interval
    over_majority: Interval | None


# ---- of one question -----------------------------------------------------------------------------------------------


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Chance that at least one of k samples, drawn from ``samples`` without replacement, is right (Chen et al. 2021).

    Raises:
        ValueError: unless 1 <= k <= samples and 0 <= right <= samples.
    """
    if not (1 <= k <= samples and 0 <= right <= samples):
        raise ValueError(f"pass@{k} of {right} right samples among {samples} is not defined")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def majority(samples: Sequence[Sample], same: Callable[[str, str], bool]) -> float | None:
    """maj@n: whether the answer that most samples give is right.

    Answers that ``same`` calls equal are one; samples without an answer don't vote. Where several answers have the most
    votes, the value is the fraction of them that are right, which is the mean of drawing one of them by lot. It is 0
    where some samples should have an answer and none has.

    Args:
        samples: of one question.
        same: whether two answers mean the same.
    """
    right = {sample.answer: sample.right for sample in reversed(samples)}  # of the first sample with this text
    votes: Counter[str] = Counter()
    for text, count in Counter(sample.answer for sample in samples if sample.answer is not None).items():
        votes[next((known for known in votes if same(text, known)), text)] += count
    if not votes:
        return 0.0 if samples else None
    return float(np.mean([right[text] for text, count in votes.items() if count == max(votes.values())]))


def of_question(id: str, samples: Sequence[Sample], same: Callable[[str, str], bool] | None) -> Question:
    """Sum up the samples of a question; ``same`` is ``None`` where the task has no answers to count."""
    formatted = [sample.formatted for sample in samples if sample.formatted is not None]
    return Question(
        id=id,
        samples=len(samples),
        right=sum(sample.right for sample in samples),
        majority=majority(samples, same) if same else None,
        truncated=sum(sample.truncated for sample in samples),
        tokens=sum(sample.tokens for sample in samples),
        formatted=float(sum(formatted)) if len(formatted) == len(samples) else None,
    )


def aggregate_of(
    id: str,
    groups: Sequence[Sequence[Sample]],
    answers: Sequence[Sample],
    same: Callable[[str, str], bool] | None,
) -> Aggregate:
    """Return the results of the groups of one question.

    Args:
        id: identifies the question.
        groups: the samples of every group, at least one each.
        answers: the aggregated answer to every group.
        same: whether two answers are equal; ``None`` if the task has no answers to count.
    """
    votes = [majority(group, same) for group in groups] if same else []
    return Aggregate(
        id=id,
        groups=len(groups),
        single=float(np.mean([np.mean([sample.right for sample in group]) for group in groups])),
        aggregated=float(np.mean([answer.right for answer in answers])),
        majority=float(np.mean([vote for vote in votes if vote is not None])) if votes else None,
        oracle=float(np.mean([any(sample.right for sample in group) for group in groups])),
    )


# ---- over questions ------------------------------------------------------------------------------------------------


def interval(*sets: Sequence[float]) -> Interval:
    """The unweighted mean of the means of one or more sets, with its 95 % interval over questions.

    The interval is Student's t: the variance of the mean of a set of Q values is s²/Q with the sample variance s²; the
    variances of J sets add up over J², and the degrees of freedom are those of Welch and Satterthwaite (Q - 1 for one
    set). It is NaN where a set has fewer than two values.

    Args:
        sets: per set a value for every question.

    Raises:
        ValueError: no set, or a set without values.
    """
    if not sets or any(len(values) == 0 for values in sets):
        raise ValueError("a mean needs at least one value")
    mean = float(np.mean([np.mean(values) for values in sets]))
    if any(len(values) < 2 for values in sets):
        return Interval(mean, math.nan, math.nan)
    variances = [float(stats.sem(values)) ** 2 for values in sets]
    total = sum(variances)
    if total == 0:
        return Interval(mean, mean, mean)
    freedom = total**2 / sum(v**2 / (len(values) - 1) for v, values in zip(variances, sets, strict=True))
    low, high = stats.t.interval(CONFIDENCE, freedom, loc=mean, scale=math.sqrt(total) / len(sets))
    return Interval(mean, float(low), float(high))


def fraction_interval(values: Sequence[float]) -> Interval:
    """`interval` of one set of values between 0 and 1, which stays between 0 and 1.

    Where every value is 0 or every value is 1 there is no spread to tell from; the interval is then that of Clopper and
    Pearson for as many right or wrong questions.
    """
    found = interval(values)
    if found.mean in (0.0, 1.0):
        exact = stats.binomtest(round(found.mean * len(values)), len(values)).proportion_ci(CONFIDENCE, method="exact")
        return Interval(found.mean, float(exact.low), float(exact.high))
    return Interval(found.mean, float(np.clip(found.low, 0, 1)), float(np.clip(found.high, 0, 1)))


def outside_noise(difference: Interval, count: int) -> bool:
    """Whether the 95 % interval of a paired difference leaves out 0.

    Where all ``count`` differences are the same there is no spread to tell from: the sign test decides.
    """
    if difference.low == difference.high:
        return difference.mean != 0 and bool(stats.binomtest(count, count).pvalue < 1 - CONFIDENCE)
    return difference.low > 0 or difference.high < 0


def summarize(questions: Sequence[Question]) -> Summary:
    """The metrics of a set.

    Raises:
        ValueError: there is no question, or one without samples.
    """
    fewest = min((question.samples for question in questions), default=0)
    if fewest < 1:
        raise ValueError("every set needs a question and every question a sample")
    ks = [2**power for power in range(fewest.bit_length())]
    total = sum(question.samples for question in questions)
    votes = [question.majority for question in questions if question.majority is not None]
    formatted = [question.formatted for question in questions if question.formatted is not None]
    return Summary(
        questions=len(questions),
        samples=fewest,
        pass_at_1=fraction_interval([question.accuracy for question in questions]),
        pass_at={
            k: float(np.mean([pass_at_k(question.samples, question.right, k) for question in questions]))
            for k in dict.fromkeys([*ks, fewest])
        },
        majority=float(np.mean(votes)) if len(votes) == len(questions) else None,
        truncated=sum(question.truncated for question in questions) / total,
        tokens=sum(question.tokens for question in questions) / total,
        formatted=sum(formatted) / total if len(formatted) == len(questions) else None,
    )


def summarize_aggregates(found: Sequence[Aggregate]) -> AggregateSummary:
    """Return means and paired differences over questions.

    Raises:
        ValueError: there is no question.
    """
    aggregated = [one.aggregated for one in found]
    votes = [one.majority for one in found if one.majority is not None]
    counted = len(votes) == len(found)
    return AggregateSummary(
        questions=len(found),
        groups=min(one.groups for one in found),
        single=fraction_interval([one.single for one in found]),
        aggregated=fraction_interval(aggregated),
        majority=fraction_interval(votes) if counted else None,
        oracle=fraction_interval([one.oracle for one in found]),
        over_single=interval([one.aggregated - one.single for one in found]),
        over_majority=interval(np.subtract(aggregated, votes).tolist()) if counted else None,
    )
