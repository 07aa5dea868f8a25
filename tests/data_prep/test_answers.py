"""Answers as they stand in the files, and what becomes of them."""

from __future__ import annotations

import pytest

from data_prep.answers import NO_ANSWER, answers_of, boxed, canonical, encode, text_of
from data_prep.schema import Drop
from gcpo.rewards import same_answer


@pytest.mark.parametrize(
    ("value", "answer"),
    [
        (60.0, "60"),
        (-1.0, "-1"),
        (0.5, "0.5"),
        (7, "7"),
        ("060", "60"),
        ("000", "0"),
        ("27.0", "27"),
        ("-4.0", "-4"),
        ("1,000", "1000"),
        (r"10,\!080", "10080"),
        (r"\$32,\!348", "32348"),
        (r"90^\circ", "90"),
        ("9.6\n", "9.6"),
        ("24.310", "24.31"),
        (r"15000 \text{ kcal m}^{-2} \text{yr}^{-1}", "15000"),
        ("1,2,3", "1,2,3"),
        ("(1,000)", "(1,000)"),
        (r"\frac{1}{2}", r"\frac{1}{2}"),
        (r"\text{(C)}", r"\text{(C)}"),
        ("4.5e33", "4.5e33"),
        ("  p  -\n q ", "p - q"),
        ("", ""),
        (None, ""),
        (True, ""),
        (float("nan"), ""),
        (float("inf"), ""),
    ],
)
def test_one_form(value, answer):
    assert canonical(value) == answer
    assert canonical(answer) == answer


@pytest.mark.parametrize(
    "value", [r"10,\!080", r"\$32,\!348", r"90^\circ", "060", r"15000 \text{ kcal m}^{-2}", "1,000"]
)
def test_the_grader_takes_both_forms(value):
    assert same_answer(value, canonical(value))


def test_several_forms():
    assert answers_of(["0.01\n", "0.02\n"]) == ["0.01", "0.02"]
    assert answers_of([r"\frac{c}{2}", r"\frac{c}{2}" + "\n", ""]) == [r"\frac{c}{2}"]
    assert answers_of([r"15000 \text{ kcal}", "15000"]) == ["15000"]
    assert answers_of("080 or 081 (both were accepted)") == ["80", "81"]
    assert answers_of("x or y") == ["x or y"]


@pytest.mark.parametrize(
    "value", ["4 or 5 (both were accepted)", "4 or 5", "004 or 005 (either)", "4 or 5 or 6", "\u0664 or 5 (x)"]
)
def test_alternatives_are_those_of_the_grader(value):
    """Each number is accepted for itself after preparation exactly if the grader accepts it for the raw text."""
    truth = encode(answers_of(value))
    for response in ("4", "5", "6", "4 or 5", "5, 4", "4, 5, 6"):
        assert same_answer(response, truth) == same_answer(response, value), response
    assert same_answer("4", truth) == ("(" in value and value.isascii())


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("", "no answer"),
        (" \n", "no answer"),
        (None, "no answer"),
        ([], "no answer"),
        ([None, ""], "no answer"),
        (float("nan"), "no answer"),
        ("proof", "a word for none"),
        ("Proof.", "a word for none"),
        ("notfound", "a word for none"),
        *((word, "a word for none") for word in NO_ANSWER),
        *((word, "a word for none") for word in ("see the proof", "null", "None", "-", "unknown", "QED", "Q.E.D.")),
        *((word, "a word for none") for word in (r"\text{proof}", r"\textbf{Proof.}", r"$\blacksquare$", "?", "...")),
        *((word, "a word for none") for word in ("N/A", "--", "  See   Solution. ", r"\mathrm{None}", r"\mbox{n/a}")),
        (["7", "None"], "a word for none"),
        ({"a": 1}, "neither a text nor a number"),
        ([["7"]], "neither a text nor a number"),
        (b"7", "neither a text nor a number"),
    ],
)
def test_no_usable_answer(value, reason):
    with pytest.raises(Drop, match=reason):
        answers_of(value)


@pytest.mark.parametrize(
    "value",
    [*("no solution", "No", "yes", "0", "-1", "does not exist", r"\text{DNE}", r"\emptyset", r"\infty", "na", "x", "+"),
     *("A", r"\text{none of these}", "undefined", "-x", "*", "unknown x = 3", r"\square ABC", "proof by 3")],
)  # fmt: skip
def test_answers_that_only_look_like_none(value):
    assert answers_of(value) == [value]


def test_several_answers_are_a_json_list():
    assert encode(["80"]) == "80"
    assert encode([r"\frac{1}{2}", "é"]) == '["\\\\frac{1}{2}", "é"]'


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{0.5}, which is \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{7}. Again: \fbox{7}", "7"),
        (r"\boxed {7}", "7"),
        (r"\boxed{} \boxed{7}", "7"),
        (r"\boxed{7} and \boxed{8", "7"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\boxed{7}}", r"\boxed{7}"),
    ],
)
def test_the_box(solution, answer):
    assert boxed(solution) == answer


@pytest.mark.parametrize(
    "solution",
    [
        r"(1) $a=\boxed{3}$. (2) $b=\boxed{5}$.",
        r"so \boxed{x=1} or \boxed{x=2}",
        r"\boxed{1} so \boxed{\frac{1}{2}}.",
        r"\boxed{1}\boxed{2}\boxed{1}",
        r"\fbox{A} or \boxed{B}",
        r"\boxed{3} and \boxed{5}, together \boxed{3, 5}",
    ],
)
def test_several_boxes_with_different_answers_are_no_answer(solution):
    with pytest.raises(Drop, match="several boxes with different answers"):
        boxed(solution)


def test_no_box():
    for solution in ("no box", r"\boxed{}", r"\boxed{1", None, 3):
        with pytest.raises(Drop, match="no boxed answer"):
            boxed(solution)


def test_texts():
    assert text_of(" a \n") == "a"
    for value in ("", "  ", None, 3, ["a"]):
        with pytest.raises(Drop, match="empty question"):
            text_of(value)
