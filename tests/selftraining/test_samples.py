"""Training data from trees and from samples."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from gcpo.selftraining.samples import (
    Solution,
    choose_solutions,
    first_labels,
    grade_results,
    labels_of,
    sample_solutions,
    solutions_of,
)
from gcpo.selftraining.search import Proposal, Request, TreeSearch, search_together
from gcpo.selftraining.settings import FilterSettings, FirstValueSettings
from tests.selftraining.toy import STEPS, Script, grade, proposal, settings, text_of, tokens


def test_solutions_and_labels_of_a_tree() -> None:
    """`abc` is right, `xy` wrong, and `a` was ended by the gate and finished by the policy."""
    script = Script({"": ["a", "x"], "a": ["b"], "ab": ["c."], "x": ["y."]}, {"a": 0.9, "x": 0.1, "ab": 0.8, "xy": 0.2})
    results = search_together(
        [TreeSearch(5, "q", settings(iterations=6, branch=2), STEPS, 8, 0)], script.propose, script.value
    )
    grade_results(results, [5], grade)
    solutions = {one.text: one for one in solutions_of(results[0], 5)}
    assert set(solutions) == {"abc", "xy"}
    assert solutions["abc"].right and not solutions["xy"].right
    assert solutions["abc"].tokens == tokens("abc.") and solutions["abc"].question == 5
    assert solutions["abc"].value == results[0].answer.value
    labels = {text_of(label.tokens): label.value for label in labels_of(results[0], 5, "full")}
    assert labels == {"a": 1.0, "x": 0.0, "xy": 0.0}


def test_a_response_without_an_end_is_never_right() -> None:
    """Even if its text is the right answer."""
    script = Script({"": ["a"], "a": ["b"], "ab": ["c"]}, {"abc": 0.1})
    results = search_together(
        [TreeSearch(0, "q", settings(iterations=9, branch=1), STEPS, 3, 0)], script.propose, script.value
    )
    grade_results(results, [0], grade)
    assert [(end.text, end.right) for end in results[0].ends] == [("abc", False)]
    assert solutions_of(results[0], 0) == []


def test_the_filter() -> None:
    def solution(text: str, value: float = 1.0, right: bool = True, question: int = 0) -> Solution:
        return Solution(question, tokens(text), text, value, right)

    given = [
        solution("aaaa"),
        solution("aaaa"),
        solution("aaaa", question=1),
        solution("bbbb", right=False),
        solution("cccc", value=0.19),
        solution("dddd", value=0.2),
        solution("eee"),
    ]
    chosen, dropped = choose_solutions(given, FilterSettings(min_value=0.2, min_characters=4))
    assert [(one.question, one.text) for one in chosen] == [(0, "aaaa"), (1, "aaaa"), (0, "dddd")]
    assert dropped == {"wrong": 1, "same": 1, "low_value": 1, "short": 1}
    chosen, dropped = choose_solutions(given, FilterSettings(min_value=0.0, min_characters=0))
    assert len(chosen) == 5 and dropped == {"wrong": 1, "same": 1, "low_value": 0, "short": 0}


def test_samples_have_seeds_of_their_own() -> None:
    """They follow from the question's name and the number of the sample, not from the place of the question."""
    seen: list[Request] = []

    def propose(requests: Sequence[Request]) -> list[Proposal]:
        seen.extend(requests)
        return [proposal("abc." if request.seed % 2 else "abc") for request in requests]

    first = sample_solutions([(0, "p"), (1, "q")], 3, 1.0, (0, "s"), propose, grade)
    assert len({request.seed for request in seen}) == 6 and all(request.whole for request in seen)
    again = sample_solutions([(0, "q")], 3, 1.0, (0, "s"), propose, grade)
    assert [one.right for one in first[3:]] == [one.right for one in again]
    assert [one.right for one in first] == [bool(request.seed % 2) for request in seen[:6]]  # an end is needed


def test_the_first_labels() -> None:
    """Each letter is a step and the end belongs to the last one.

    `abc.` is right: 1/3, 2/3, 1. `azbx.` is wrong. From `a` a rollout reaches the answer in 2 steps, so the first step
    is right with m = 2; from `az` none does, so z is wrong with m = 1: v = 1/3 - (2/3)/2 = 0. The steps after it are
    wrong too, although a rollout from `azb` is graded right: 0.
    """
    whole = {"": ["abc.", "azbx."], "a": ["xx.", "bc."], "az": ["xx.", "."], "azb": ["c.", "x."]}

    def grade(texts: Sequence[tuple[int, str]]) -> list[bool]:
        return [text in ("abc", "azbc") for _, text in texts]

    def propose(requests: Sequence[Request]) -> list[Proposal]:
        counts: dict[str, int] = {}
        found = []
        for request in requests:
            before = text_of(request.prefix)
            counts[before] = counts.get(before, -1) + 1
            found.append(proposal(whole[before][counts[before] % 2]))
        return found

    def split(given: tuple[int, ...]) -> list[int]:
        ends = list(range(1, len(given) + 1))
        return ends[:-2] + ends[-1:] if given and given[-1] == 0 and len(given) > 1 else ends

    settings = FirstValueSettings(questions=1, samples=2, rollouts=2)
    labels = first_labels([(0, "q")], settings, 0, propose=propose, grade=grade, split=split, decode=text_of)
    found = {text_of(label.tokens): label.value for label in labels}
    assert found == pytest.approx({"a": 1 / 3, "ab": 2 / 3, "abc": 1, "az": 0, "azb": 0, "azbx": 0})
    assert next(label.tokens for label in labels if text_of(label.tokens) == "abc") == tokens("abc.")
