"""The metrics, on numbers that can be worked out by hand."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest

from gcpo.tools.evaluate import metrics
from gcpo.tools.evaluate.metrics import Interval, Question, Sample


def question(right: int, samples: int = 4, **changes) -> Question:
    values = {"majority": None, "truncated": 0, "tokens": 10 * samples, "formatted": None, **changes}
    return Question(id=f"q{right}", samples=samples, right=right, **values)


def answers(*pairs: tuple[str | None, bool]) -> list[Sample]:
    return [Sample(right=right, truncated=False, tokens=1, answer=answer) for answer, right in pairs]


def equal_numbers(a: str, b: str) -> bool:
    return Fraction(a) == Fraction(b)


# ---- pass@k ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_the_subsets_with_a_right_sample(samples):
    for right in range(samples + 1):
        graded = [True] * right + [False] * (samples - right)
        for k in range(1, samples + 1):
            subsets = list(combinations(graded, k))
            assert metrics.pass_at_k(samples, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_stays_exact_for_many_samples():
    # 1 - (199 * 198) / (200 * 199): the naive product of floats loses it for large numbers
    assert metrics.pass_at_k(200, 1, 2) == pytest.approx(0.01, abs=1e-15)
    assert metrics.pass_at_k(1000, 1, 1000) == 1.0


@pytest.mark.parametrize(("samples", "right", "k"), [(4, 2, 0), (4, 2, 5), (4, 5, 1), (0, 0, 1), (4, -1, 1)])
def test_pass_at_k_refuses_what_is_not_defined(samples, right, k):
    with pytest.raises(ValueError, match="not defined"):
        metrics.pass_at_k(samples, right, k)


# ---- maj@n -----------------------------------------------------------------------------------------------------------


def test_equal_answers_vote_together():
    # 1/2 is written in three ways and has 3 votes, 0.7 has 2
    samples = answers(("1/2", True), ("0.7", False), ("0.5", True), ("0.7", False), ("2/4", True))
    assert metrics.majority(samples, equal_numbers) == 1.0
    assert metrics.majority(samples, str.__eq__) == 0.0  # as text 0.7 wins


def test_samples_without_an_answer_do_not_vote():
    samples = answers((None, False), (None, False), (None, False), ("3", True))
    assert metrics.majority(samples, equal_numbers) == 1.0


def test_a_tie_is_worth_the_share_of_the_right_answers_whatever_the_order():
    samples = answers(("1", False), ("2", True), ("3", False), ("2", True), ("3", False))
    assert metrics.majority(samples, equal_numbers) == 0.5
    assert metrics.majority(samples[::-1], equal_numbers) == 0.5


def test_no_answer_at_all_is_wrong():
    assert metrics.majority(answers((None, False), (None, False)), equal_numbers) == 0.0


def test_equivalence_is_asked_once_per_text():
    asked = []

    def same(a: str, b: str) -> bool:
        asked.append((a, b))
        return a == b

    metrics.majority(answers(*[("1", True), ("2", False)] * 20), same)
    assert asked == [("2", "1")]


# ---- intervals -------------------------------------------------------------------------------------------------------


def test_interval_of_one_set_is_student_s_t():
    # mean 0.5, s² = 1/3, s²/4 = 1/12, t(3 degrees, 97.5 %) = 3.18245
    found = metrics.interval([0.0, 1.0, 0.0, 1.0])
    assert found.mean == 0.5
    assert found.reach == pytest.approx(3.18245 * math.sqrt(1 / 12), rel=1e-5)


def test_interval_of_an_average_is_welch_s():
    # Variances of the means: 1/12 and 0.02/2 = 0.01; average (0.5 + 0.2)/2.
    # Welch-Satterthwaite: (1/12 + 0.01)² / ((1/12)²/3 + 0.01²/1) = 3.60736 degrees, where t is 2.89979
    found = metrics.interval([0.0, 1.0, 0.0, 1.0], [0.1, 0.3])
    assert found.mean == pytest.approx(0.35)
    assert found.reach == pytest.approx(2.89979 * math.sqrt(1 / 12 + 0.01) / 2, rel=1e-5)


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    difficulty = rng.beta(0.7, 0.7, size=(1500, 30))
    accuracy = rng.binomial(8, difficulty) / 8
    hits = [interval.low <= 0.5 <= interval.high for interval in map(metrics.fraction_interval, accuracy)]
    assert 0.93 <= np.mean(hits) <= 0.97


def test_interval_of_one_question_is_unknown():
    found = metrics.interval([0.5])
    assert found.mean == 0.5 and math.isnan(found.low) and math.isnan(found.high)
    with pytest.raises(ValueError):
        metrics.interval([])
    with pytest.raises(ValueError):
        metrics.interval([0.1, 0.2], [])


def test_shares_stay_between_0_and_1():
    assert metrics.fraction_interval([1.0, 1.0, 1.0, 0.0]).high == 1.0
    assert metrics.fraction_interval([0.0, 0.0, 0.0, 1.0]).low == 0.0


def test_all_right_is_no_certainty():
    # Clopper-Pearson: 0.025 ** (1/30) = 0.88430
    found = metrics.fraction_interval([1.0] * 30)
    assert (found.mean, found.high) == (1.0, 1.0) and found.low == pytest.approx(0.88430, abs=1e-5)
    assert metrics.fraction_interval([0.0] * 30).high == pytest.approx(1 - 0.88430, abs=1e-5)


@pytest.mark.parametrize(
    ("difference", "count", "outside"),
    [
        (Interval(0.1, 0.01, 0.19), 30, True),
        (Interval(-0.1, -0.19, -0.01), 30, True),
        (Interval(0.1, -0.01, 0.21), 30, False),
        (Interval(0.1, math.nan, math.nan), 1, False),
        (Interval(0.0, 0.0, 0.0), 30, False),
        # Every question 1 better: the chance of one sign for all is 2/2^5 = 0.0625, 2/2^6 = 0.03125
        (Interval(1.0, 1.0, 1.0), 5, False),
        (Interval(1.0, 1.0, 1.0), 6, True),
    ],
)
def test_outside_noise(difference, count, outside):
    assert metrics.outside_noise(difference, count) is outside


# ---- summaries -------------------------------------------------------------------------------------------------------


def test_summary():
    samples = [Sample(True, False, 10, "1", 1.0), Sample(True, False, 20, "1", 1.0), Sample(False, True, 60, None, 0.0)]
    first = metrics.of_question("a", samples, equal_numbers)
    second = metrics.of_question("b", [Sample(False, True, 30, "2", 1.0)] * 3, equal_numbers)
    assert first == Question("a", 3, 2, 1.0, 1, 90, 2.0)
    found = metrics.summarize([first, second])
    assert (found.questions, found.samples) == (2, 3)
    assert found.pass_at_1.mean == pytest.approx(1 / 3)  # (2/3 + 0) / 2
    assert found.pass_at == {1: pytest.approx(1 / 3), 2: 0.5, 3: 0.5}
    assert found.majority == 0.5
    assert found.truncated == pytest.approx(4 / 6)
    assert found.tokens == 30.0  # 180 tokens, 6 samples
    assert found.formatted == pytest.approx(5 / 6)


def test_code_has_no_majority():
    assert metrics.of_question("a", [Sample(True, False, 1)], None).majority is None
    assert metrics.summarize([question(1), question(2)]).majority is None


def test_pass_at_k_uses_as_many_samples_as_every_question_has():
    found = metrics.summarize([question(1, samples=5), question(4, samples=8)])
    assert list(found.pass_at) == [1, 2, 4, 5]


def test_nothing_can_not_be_summed_up():
    with pytest.raises(ValueError):
        metrics.summarize([])
    with pytest.raises(ValueError):
        metrics.summarize([question(0, samples=0)])
