"""The answer of a response: several boxes, empty boxes, boxes in boxes, and no box at all."""

from __future__ import annotations

import pytest

from gcpo.rewards import boxed_answer, compute_score, grade_many


def right(response: str, truth: str, **options: object) -> bool:
    return compute_score("", response, truth, **options)["acc"] == 1


@pytest.mark.parametrize(
    ("response", "truth"),
    [
        (r"x = \boxed{3} or x = \boxed{5}", "3, 5"),
        (r"(a) \boxed{3} (b) \boxed{4}", "3, 4"),
        (r"The solutions are $\boxed{3}$, $\boxed{5}$ and $\boxed{7}$.", "3,5,7"),
        (r"$x = \boxed{3}$, $y = \boxed{4}$", "(3,4)"),
        (r"\[x_1 = \boxed{3}, \quad x_2 = \boxed{5}\]", "5,3"),
        (r"\boxed{3} \text{ and } \boxed{5}", "3,5"),
        (r"\boxed{3}; \boxed{5}", "3,5"),
        ("So it is \\boxed{4}.\nI put the final answer within \\boxed{}.", "4"),
        ("So it is \\boxed{4}.\nThe answer stands in \\boxed{...}.", "4"),
        (r"\boxed{4} \boxed{\text{}}", "4"),
        (r"\boxed{3}, no, \boxed{5}", "5"),
        (r"\boxed{3}. So the sum is \boxed{5}", "5"),
        ("\\boxed{3}\n\n\\boxed{5}", "5"),
        (r"$a = \boxed{3}$, so $a + 2 = \boxed{5}$", "5"),
        (r"\boxed{\frac{2}{4}} = \boxed{\frac12}", "0.5"),
        (r"$\boxed{15\frac{39}{40}},$ or $\boxed{\frac{639}{40}}$", r"\frac{639}{40}"),
        (r"$\boxed{2\sqrt3}$ or $\boxed{\sqrt{12}}$", r"\sqrt{12}"),
        (r"\boxed{5}, \boxed{5}", "5"),
        (r"\boxed{80} or \boxed{81}", "080 or 081 (both were accepted)"),
        (r"\boxed{\boxed{3} \text{ or } \boxed{5}}", "3,5"),
    ],
)
def test_right_boxes(response, truth):
    assert right(response, truth)


@pytest.mark.parametrize(
    ("response", "truth"),
    [
        (r"\boxed{3} or \boxed{5}", "5"),
        (r"\boxed{5} or \boxed{3}", "5"),
        (r"\boxed{3}, \boxed{5}", "5"),
        (r"\boxed{3} \boxed{5}", "5"),
        (r"\boxed{3} and \boxed{6}", "3, 5"),
        (r"(a) \boxed{3} (b) \boxed{4}", "4"),
        (r"$x = \boxed{3}$, $y = \boxed{4}$", "(4,3)"),
        (r"\boxed{\boxed{3} \boxed{5}}", "5"),
        (r"\boxed{\boxed{3} \text{ or } \boxed{5}}", "5"),
        (" or ".join(rf"\boxed{{{n}}}" for n in range(1, 21)), "20"),
        (r"\boxed{}", "5"),
        (r"it is 5, see \boxed{}", "5"),
    ],
)
def test_wrong_boxes(response, truth):
    assert not right(response, truth)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"\boxed{3} and \boxed{5}", "3, 5"),
        (r"\boxed{0.5} or \boxed{\frac12}", r"\frac12"),
        (r"\boxed{ }", ""),
        (r"\boxed{2 \boxed{3}", "3"),
        (r"\boxed{\boxed{3} + \boxed{4}}", "{3} + {4}"),
    ],
)
def test_the_text_of_the_boxes(response, answer):
    assert boxed_answer(response) == answer


def test_several_boxes_in_a_batch():
    responses = [r"\boxed{3} or \boxed{5}", r"\boxed{\sqrt{12}} or \boxed{2\sqrt3}"]
    assert [one["acc"] for one in grade_many(responses, ["5", r"\sqrt{12}"])] == [0, 1]


FILLER = "It is consistent with the rest. " * 200


@pytest.mark.parametrize(
    ("response", "truth"),
    [
        ("The final answer is **73**", "73"),
        ("The answer is 42. " + FILLER, "42"),
        ("so 29\n#### 29", "29"),
        ("The total is $29.00. The answer is $29.00.", "29"),
        ("**Answer:** 4.", "4"),
        ("**Final Answer**: $\\frac{1}{2}$", "0.5"),
        ("## Final answer:\n73", "73"),
        ("The answer is 5. No, the answer is 6.", "6"),
        ("the answer is: (B)", "B"),
        ("Answer: x = 5", "5"),
        ("#### 1,234", "1234"),
        ("The answer is 3.5.", "3.5"),
    ],
)
def test_stated_answers(response, truth):
    assert right(response, truth, require_boxed=False)
    assert not right(response, truth)


@pytest.mark.parametrize(
    ("response", "truth"),
    [
        ("The answer is 5 or 6", "5"),
        ("The answer is not 5", "5"),
        ("The answer is 6. The sum is 5.", "5"),
        ("The answer is x+y=5", "5"),
        ("The answer follows from 5", "5"),
        ("an answer that is near 5", "5"),
        ("so it is 5", "5"),
        ("<think>The answer is 5</think> so it is clear", "5"),
        ("<think>The answer is 5", "5"),
        ("The answer is 5 " + "and so on " * 200, "5"),
        (r"The answer is 5, \boxed{6}", "5"),
        ("#### 5 6", "5"),
        ("the answers: 5", "5"),
    ],
)
def test_answers_that_are_not_stated(response, truth):
    assert not right(response, truth, require_boxed=False)


def test_a_million_characters_without_a_box_are_bounded():
    for response in ("answer " * 150_000, "answer is " * 100_000, "#### " * 200_000, r"\boxed{1} or " * 80_000):
        assert not right(response, "7", require_boxed=False)
