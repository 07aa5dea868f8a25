"""MCTS* on toy trees that were worked out by hand, and many questions beside one at a time."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from gcpo.selftraining.search import Judged, Proposal, Request, Result, TreeSearch, search_together
from gcpo.selftraining.settings import SearchSettings, StepSettings
from tests.selftraining.toy import STEPS, Script, grade, proposal, settings, test_settings, text_of


def search(script: Script, given: SearchSettings, steps: StepSettings = STEPS, max_tokens: int = 8) -> Result:
    (found,) = search_together([TreeSearch(0, "q", given, steps, max_tokens, 0)], script.propose, script.value)
    return found


def shape(result: Result) -> dict[str, tuple[float, int]]:
    """Value and visits of each node by its text."""
    return {node.text: (round(node.value, 6), node.visits) for node in result.root.walk()}


def test_three_rounds_by_hand() -> None:
    """c = .5, alpha = .5, one step of simulation.

    Round 1 expands the root: a (.6), x (.1). a is simulated: ab (.7), so V(a) = .65, N(a) = 1; root V = .65, N = 1.
    Round 2: a scores .65 + .5 sqrt(2 ln 1 / 1) = .65, x .1 + .9 = 1.0: x is expanded: xy (.05). It is an end, so its
    value stays: N(xy) = 1. Back-up: V(x) = .05, N(x) = 1; V(root) = (.65 + .05) / 2 = .35, N = 2.
    Round 3: a scores .65 + .5 sqrt(2 ln 2) = 1.239, x .05 + .589: a is expanded: ab (.7), simulated: abc (.75), so
    V(ab) = .725, N = 1. Back-up: V(a) = .725, N = 2; V(root) = (.725 * 2 + .05) / 3 = .5, N = 3.
    """
    script = Script(
        {"": ["a", "x"], "a": ["b"], "ab": ["c."], "x": ["y."]},
        {"a": 0.6, "x": 0.1, "ab": 0.7, "abc": 0.75, "xy": 0.05},
    )
    found = search(script, settings(iterations=3, branch=2, end_gate=0.99))
    assert shape(found) == {
        "": (0.5, 3),
        "a": (0.725, 2),
        "ab": (0.725, 1),
        "x": (0.05, 1),
        "xy": (0.05, 1),
    }
    # `ab` was judged in the simulation and is not judged again when it becomes a node.
    assert [[text_of(one.tokens) for one in call] for call in script.judged] == [["a", "x"], ["ab"], ["xy"], ["abc"]]


def test_the_gate_makes_an_end_and_the_search_goes_on() -> None:
    """V(a) = .85 reaches the gate of .8: it is not expanded; the policy finishes it greedily for the grading."""
    script = Script({"": ["a", "x"], "a": ["b"], "ab": ["c."], "x": ["y."]}, {"a": 0.9, "x": 0.1, "ab": 0.8, "xy": 0.2})
    found = search(script, settings(iterations=6, branch=2, end_gate=0.8))
    a, x = found.root.children
    assert a.ended and not a.finished and not a.children and a.completed
    assert (a.completion, a.completion_text) == (proposal("bc.").tokens, "bc")
    assert x.children[0].finished and {end.text for end in found.ends} == {"a", "xy"}
    assert found.root.visits == 6 and found.answer is a


def test_the_gate_stops_a_search_at_test_time() -> None:
    script = Script({"": ["a", "x"], "a": ["b"], "ab": ["c."]}, {"a": 0.9, "x": 0.1, "ab": 0.95})
    found = search(script, test_settings(iterations=50, branch=2, roll_forward_steps=1))
    assert found.root.visits == 1 and found.answer.text == "a" and found.answer.completed
    assert grade([(0, found.answer.text + found.answer.completion_text)]) == [True]


def test_a_gate_above_one_is_off() -> None:
    script = Script({"": ["a"], "a": ["b"], "ab": ["c."]}, {"a": 1.0, "ab": 1.0, "abc": 1.0})
    found = search(script, settings(iterations=5, branch=1, end_gate=1.5))
    assert [node.text for node in found.root.walk()] == ["", "a", "ab", "abc"]


def test_values_are_clamped() -> None:
    script = Script({"": ["a.", "b."]}, {"a": 3.0, "b": -2.0})
    found = search(script, settings(iterations=1, branch=2, end_gate=2.0))
    assert {child.text: child.value for child in found.root.children} == {"a": 1.0, "b": 0.0}


def test_the_simulation_takes_the_best_of_its_proposals() -> None:
    """Two steps of two proposals: `ab` (.3) before `ac` (.2), then `abd` (.5): V(a) = (.4 + .5) / 2."""
    script = Script({"": ["a"], "a": ["c", "b"], "ab": ["d", "e"]}, {"a": 0.4, "ab": 0.3, "ac": 0.2, "abd": 0.5})
    given = settings(iterations=1, branch=1, roll_forward_steps=2, roll_branch=2)
    assert shape(search(script, given))["a"] == (0.45, 1)


def test_a_simulation_without_a_step_counts_as_zero() -> None:
    """As in the released code: the best value starts at 0."""
    script = Script({"": ["a"]}, {"a": 0.4})
    assert shape(search(script, settings(iterations=1, branch=1)))["a"] == (0.2, 1)
    assert shape(search(script, settings(iterations=1, branch=1, roll_forward_steps=0)))["a"] == (0.2, 1)


def test_rejected_steps_are_asked_for_again() -> None:
    """Too short, then repeated, then accepted; a fourth one is not asked for."""
    script = Script({"": ["abc"], "abc": ["d", "abc", "efg"]}, {"abc": 0.5, "abcefg": 0.6})
    found = search(script, settings(iterations=1, branch=1, alpha=1.0), StepSettings())
    assert shape(found)["abc"] == (0.6, 1)
    assert [len(call) for call in script.asked] == [1, 1, 1, 1, 1]  # the last one finishes the answer
    script = Script({"": ["d", "e", "f", "abc"]}, {})
    found = search(script, settings(iterations=3, branch=1), StepSettings())
    assert found.root.ended and not found.root.children and found.root.visits == 3


def test_equal_proposals_are_one_child() -> None:
    script = Script({"": ["a", "a", "b"]}, {})
    found = search(script, settings(iterations=1))
    assert [child.text for child in found.root.children] == ["a", "b"]


def test_a_response_of_the_full_length_is_an_end() -> None:
    """It cannot be finished, so it never counts as right."""
    script = Script({"": ["a"], "a": ["b"], "ab": ["c"], "abc": ["d"]}, {"abc": 0.1})
    found = search(script, settings(iterations=9, branch=1), max_tokens=3)
    (end,) = found.ends
    assert end.text == "abc" and end.ended and not end.completed and end.completion == ()


def random_script(requests: Sequence[Request]) -> list[Proposal]:
    """Letters that depend on the seed of the request alone; after four of them the response ends."""
    found = []
    for request in requests:
        rng = random.Random(request.seed)
        letter = rng.choice("abc") if not request.whole else "z."
        found.append(proposal(letter + ("." if len(request.prefix) >= 3 else "")))
    return found


def random_value(judged: Sequence[Judged]) -> list[float]:
    return [random.Random(str(one.tokens)).random() for one in judged]


@pytest.mark.parametrize("given", [settings(iterations=20), test_settings(iterations=20, end_gate=0.98)])
def test_questions_together_have_the_trees_of_one_at_a_time(given: SearchSettings) -> None:
    """In any order; and another seed gives another tree."""

    def searches(names: Sequence[str], seed: int = 0) -> list[Result]:
        started = [TreeSearch(index, name, given, STEPS, 8, seed) for index, name in enumerate(names)]
        return search_together(started, random_script, random_value)

    names = ["p", "q", "r", "s"]
    together = dict(zip(names, map(shape, searches(names)), strict=True))
    reordered = dict(zip(names[::-1], map(shape, searches(names[::-1])), strict=True))
    alone = {name: shape(*searches([name])) for name in names}
    assert together == alone == reordered
    assert len({str(tree) for tree in together.values()}) == 4
    assert shape(*searches(["p"], seed=1)) != alone["p"]


def test_one_call_serves_all_questions() -> None:
    """Eight questions in step need as many calls as one."""
    script = Script({"": ["a", "x"], "a": ["b"], "ab": ["c."], "x": ["y."]}, {"a": 0.6, "x": 0.1, "ab": 0.7, "xy": 0.2})
    given = settings(iterations=3, branch=2)
    search(script, given)
    alone = len(script.asked), len(script.judged)
    script.asked.clear()
    script.judged.clear()
    search_together([TreeSearch(i, str(i), given, STEPS, 8, 0) for i in range(8)], script.propose, script.value)
    assert (len(script.asked), len(script.judged)) == alone
    assert len(script.asked[0]) == 16


def test_no_questions() -> None:
    assert search_together([], random_script, random_value) == []
