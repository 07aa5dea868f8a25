"""The reward function: its options, its results on anything, and a wrapper for those of others."""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import sys

import pytest

from gcpo.rewards import code, compute_score, grade_many, guarded

THOUGHT = "<think>It is 2.</think>"


def score(response: object, truth: object, **options: object) -> tuple[float, float, float]:
    result = compute_score("source", response, truth, extra_info={"index": 1}, unknown=2, **options)
    assert set(result) == {"score", "acc", "format"} and all(type(value) is float for value in result.values())
    return result["score"], result["acc"], result["format"]


@pytest.mark.parametrize(
    ("response", "right", "formatted"),
    [
        (r"so \boxed{2}", 1, 1),
        (r"so \boxed{3}", 0, 1),
        ("so 2", 0, 0),
        (r"\boxed{2}</think> it is 2", 0, 0),
        (r"<think>\boxed{2}", 0, 0),
        (r"<think>\boxed{2}</think>\boxed{3}", 0, 1),
        (r"<think>\boxed{3}</think>\boxed{2}", 1, 1),
        (r"\boxed{", 0, 0),
        ("", 0, 0),
        (None, 0, 0),
        (3, 0, 0),
        (b"\\boxed{2}", 0, 0),
        (["\\boxed{2}"], 0, 0),
        ("\x00\\boxed{2}\x00", 1, 1),
    ],
)
def test_score(response, right, formatted):
    assert score(response, "2") == (right, right, formatted)
    assert score(response, "2", format_weight=0.25) == (0.75 * right + 0.25 * formatted, right, formatted)
    assert score(response, "2", format_weight=1) == (formatted, right, formatted)


@pytest.mark.parametrize(
    ("thought", "formatted"),
    [
        (THOUGHT, 1),
        ("  " + THOUGHT, 1),
        ("It is 2.</think>", 1),  # the prompt has opened it
        ("", 0),
        ("</think>", 0),
        ("<think> </think>", 0),
        ("It is 2. <think>Yes.</think>", 0),
        ("<think>" + THOUGHT, 0),
        (THOUGHT + THOUGHT, 0),
        ("It is 2.</think> No.</think>", 0),
        ("<think>It is 2.", 0),
    ],
)
def test_format_with_thinking(thought, formatted):
    assert score(thought + r"\boxed{3}", "2", require_think=True) == (0, 0, formatted)
    assert score(thought, "2", require_think=True) == (0, 0, 0)


def test_box_may_be_missing():
    for text in ("The final answer is $\\frac{1}{2}$.", "Answer: 0.5", "the answer is 1/2"):
        assert score(text, "0.5") == (0, 0, 0)
        assert score(text, "0.5", require_boxed=False) == (1, 1, 0)
    for text in ("so 0.5", "<think>the answer is 0.5", "the answer is 0.5</think> 0.5", "the answer is 0.6", ""):
        assert score(text, "0.5", require_boxed=False) == (0, 0, 0)
    assert score(r"the answer is 0.5, \boxed{3}", "0.5", require_boxed=False) == (0, 0, 1)
    assert score("the answer is 0.5 " + "or not " * 1000, "0.5", require_boxed=False) == (0, 0, 0)


@pytest.mark.parametrize(
    "option",
    [{"format_weight": 2}, {"format_weight": "1"}, {"format_weight": True}, {"format_weight": float("nan")}]
    + [{"require_think": "yes"}, {"require_boxed": 0}],
)
def test_wrong_options_are_refused(option):
    (name,) = option
    with pytest.raises(ValueError, match=f"reward option {name} is "):
        score(r"\boxed{2}", "2", **option)


@pytest.mark.parametrize("truth", [None, True, float("nan"), {}, object(), [], [None], b"2"])
def test_truth_of_a_wrong_type(truth):
    assert score(r"\boxed{2}", truth) == (0, 0, 1)


def test_programs_go_to_their_own_grader(monkeypatch):
    def grade(solution_str, ground_truth, extra_info, **kwargs):
        assert (ground_truth, extra_info, kwargs) == ("tests", {"index": 4}, {"time_limit": 3})
        return {"score": 1.0, "acc": 1.0, "format": 1.0}

    monkeypatch.setattr(code, "compute_score", grade)
    result = compute_score("gcpo/mbpp", "x", "tests", {"index": 4}, time_limit=3, require_think=True, format_weight=0.5)
    assert result == {"score": 0.5, "acc": 1.0, "format": 0.0}


def test_grade_many():
    responses = [r"\boxed{1}", r"\boxed{x+1}", None, "none", r"\boxed{\frac{2}{4}}"]
    results = grade_many(responses, ["1", "1+x", "1", "1", 0.5])
    assert [result["acc"] for result in results] == [1, 1, 0, 0, 1]
    assert [result["format"] for result in results] == [1, 1, 0, 0, 1]
    assert grade_many([], []) == []
    assert grade_many([THOUGHT], ["2"], ["gsm8k"], [{}], format_weight=1, require_think=True)[0]["score"] == 0
    with pytest.raises(ValueError, match="argument 3"):
        grade_many(["a"], [])


def test_import_is_fast():
    code = "import sys, gcpo.rewards; print(sorted(m for m in ('math_verify', 'sympy', 'torch') if m in sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_guarded_passes_results_on():
    reward = guarded(lambda data_source, solution_str, **kwargs: {"score": 1, "acc": 0.5})
    assert reward(data_source="x", solution_str="y") == {"score": 1.0, "acc": 0.5, "reward_error": 0.0}
    assert guarded(lambda: 0.25)() == {"score": 0.25, "reward_error": 0.0}


@pytest.mark.parametrize("result", [float("nan"), float("inf"), None, "no", {}, {"score": None}, [1]])
def test_guarded_replaces_what_is_no_score(result, caplog):
    reward = guarded(lambda: result)
    assert reward() == {"score": 0.0, "reward_error": 1.0}
    assert reward() == {"score": 0.0, "reward_error": 1.0}
    assert len(caplog.records) == 1


def test_guarded_keeps_the_keys_together(caplog):
    def reward(right):
        if right is None:
            raise KeyError("answer")
        return {"score": right, "acc": right}

    safe = guarded(reward)
    assert safe.__name__ == "reward"
    assert safe(right=1.0) == {"score": 1.0, "acc": 1.0, "reward_error": 0.0}
    assert safe(right=None) == {"score": 0.0, "acc": 0.0, "reward_error": 1.0}
    assert "KeyError('answer')" in caplog.text


def test_guarded_coroutine():
    async def reward(value):
        return 1.0 / value

    safe = guarded(reward)
    assert inspect.iscoroutinefunction(safe)
    assert asyncio.run(safe(value=2.0)) == {"score": 0.5, "reward_error": 0.0}
    assert asyncio.run(safe(value=0.0)) == {"score": 0.0, "reward_error": 1.0}
