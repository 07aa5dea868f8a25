"""What counts as the answer of a response, its normal form, and what counts as the same answer."""

from __future__ import annotations

import time

import numpy as np
import pytest

from gcpo.rewards import boxed_answer, normalize, same_answer

HANG = 120
"""Seconds that tell a bounded answer from one that hangs, on however busy a machine."""


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so \boxed{42}.", "42"),
        (r"first \boxed{1}, no: \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {7}", "7"),
        (r"\fbox{7}", "7"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\begin{pmatrix} 1 \\{} 2 \end{pmatrix}}", r"\begin{pmatrix} 1 \\{} 2 \end{pmatrix}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{x = \boxed{5} + 1}", "5"),
        (r"\boxed{1} and then \boxed{2", "1"),
        (r"\boxed{1} and then \boxed{2 \boxed{3", "1"),
        (r"} { \boxed{1} }", "1"),
        (r"\boxed{1} \boxed{}", "1"),
        (r"\boxed{7}, no, " + r"\boxed{" + "8" * 5000 + "}", "8" * 5000),
        ("no box, 42", None),
        (r"\boxed 42", None),
        (r"\boxed{", None),
        (r"\boxed}{", None),
        ("", None),
        (r"<think>\boxed{1}</think> \boxed{2}", "2"),
        (r"\boxed{1}</think> so it is 1", None),
        (r"\boxed{1}</think>\boxed{2}</think>\boxed{3}", "3"),
        (r"<think> it is \boxed{1}", None),
        (r"\boxed{1} <think> hm", None),
    ],
)
def test_boxed_answer(response, answer):
    assert boxed_answer(response) == answer


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("027", "27"),
        ("27.0", "27"),
        (".350", "0.35"),
        ("+2", "2"),
        ("-0", "0"),
        ("5.", "5"),
        (" 12 ", "12"),
        ("1,234", "1234"),
        ("1,234.50", "1234.5"),
        ("1 234", "1234"),
        (r"10,\!080", "10080"),
        (r"11,\! 111,\! 111,\! 100", "11111111100"),
        ("10{,}000", "10000"),
        (r"10\,000", "10000"),
        ("1, 234", "1, 234"),  # with a space it is a list
        ("1,00", "1,00"),
        ("(1,000)", "(1,000)"),
        ("3, 5, 7", "3, 5, 7"),
        (r"\$32,\!348", "32348"),
        ("$5$", "5"),
        (r"\boxed{204}", "204"),
        (r"90^\circ", "90"),
        (r"41.8^{\circ}", "41.8"),
        (r"1950^\circ \text{C}", "1950"),
        ("25\N{DEGREE SIGN}", "25"),
        (r"0.003^{\prime \prime}", "0.003"),
        (r"y^{\prime}+y=0", "y'+y=0"),
        (r"5.4 \text{ cents}", "5.4"),
        (r"864 \mbox{ inches}^2", "864"),
        (r"15000 \text{ kcal m}^{-2} \text{yr}^{-1}", "15000"),
        (r"120\ \text{km/h}", "120"),
        (r"\frac{270}7\text{ degrees}", r"\frac{270}{7}"),
        (r"5 \text{ million}", "5 million"),
        (r"25\%", "25%"),
        (r"1,250 \text{ percent}", "1250%"),
        (r"\text{(C)}", "(C)"),
        (r"\text{no solution}", "no solution"),
        (r"4:30 \text{ p.m.}", "4:30 p.m."),
        (r"\text{4:30 PM}", "4:30 p.m."),
        (r"4:00\text{ a.m.}", "4 a.m."),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
        (r"\dfrac12", r"\frac{1}{2}"),
        (r"\frac 59", r"\frac{5}{9}"),
        (r"\frac9{19}", r"\frac{9}{19}"),
        (r"\sqrt 3", r"\sqrt{3}"),
        (r"2 \pi r", r"2\pi r"),
        (r"1 \text{ or } 2", "1 or 2"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
        ("\N{MINUS SIGN}3\N{MULTIPLICATION SIGN}10", r"-3\times 10"),
        ("4.5e33", "4.5e33"),
        ("", ""),
    ],
)
def test_normalize(answer, normal):
    assert normalize(answer) == normal
    assert normalize(normal) == normal


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("080", "80"),
        ("27", 27.0),
        ("27", np.float64(27)),
        ("1,000", 1000),
        (r"10,\!080", "10080"),
        (r"\text{(C)}", "(C)"),
        ("C", r"\text{(C)}"),
        ("Even", r"\text{even}"),
        (r"\frac{1}{2}", "0.5"),
        (r"\frac{2}{4}", r"\frac{1}{2}"),
        (r"1\frac{4}{5}", "9/5"),
        ("-1./3", r"-\frac{1}{3}"),
        (r"4.5 \times 10^{33}", "4.5e33"),
        ("0.001", "10^{-3}"),
        ("0.333333", r"\frac13"),
        (r"2\sqrt{8}", r"4\sqrt{2}"),
        ("x^2+2x+1", "1+2x+x^2"),
        (r"2^{10}", "1024"),
        ("5!", "120"),
        ("x=5", "5"),
        ("5", "x=5"),
        ("-2 \\le x \\le 7", r"x \in [-2,7]"),
        ("x>2", r"(2,\infty)"),
        ("-2,1", "1,-2"),
        (r"\{7, 5\}", r"5 \text{ or } 7"),
        (r"1-\sqrt{19}, 1+\sqrt{19}", r"1 \pm \sqrt{19}"),
        (r"\frac{1}{m}t", r"\frac{t}{m}"),
        (r"\begin{bmatrix}-1/3\\2/3\end{bmatrix}", r"\begin{pmatrix} -\frac13 \\ \frac23 \end{pmatrix}"),
        ("120 miles", "120"),
        ("20", r"20\%"),
        (r"20\%", "20"),
        ("0.2", r"20\%"),
        (r"25\%", r"\frac14"),
        ("5 million", "5{,}000{,}000"),
        (r"4:30 \text{ p.m.}", r"\text{4:30 p.m.}"),
        ("52", "52_8"),
        ("E_1,E_2", "E_{1},E_{2}"),
        ("3r^2", "3R^2"),
        (r"\pi(R+r)(R-r)", r"\pi (R^2-r^2)"),
        ("4", ["3", "4"]),
        ("4", np.array(["3", "4"])),
        ("0.02", '["0.01", "0.02"]'),
        ("204", r"\boxed{204}"),
        ("81", "080 or 081 (both were accepted)"),
    ],
)
def test_same_answer(answer, truth):
    assert same_answer(answer, truth) is True


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("81", "80"),
        ("-5", "5"),
        ("", ""),
        (".", "."),
        ("(1,2)", "(2,1)"),
        ("(3,4)", "(3,4]"),
        ("0.33", r"\frac{1}{3}"),
        ("0.666666", r"\frac{2}{3}"),
        ("0.000000", r"\frac{1}{3000000}"),
        ("0.5000001", "0.5"),
        (r"4.6 \times 10^{-33}", r"4.5 \times 10^{-33}"),
        (r"\frac45", r"1\frac45"),
        (r"1 \text{ or } 2", "2"),
        (r"\{1,2\}", "2"),
        ("2", "1,2"),
        ("1, 234", "1,234"),
        ("52_9", "52_8"),
        (r"2500\%", r"25\%"),
        (r"4:30 \text{ a.m.}", r"\text{4:30 p.m.}"),
        ("4:30", r"\text{4:30 p.m.}"),
        ("vanin", r"\text{Navin}"),
        ("D", r"\text{(C)}"),
        ("x+2", "x+1"),
        ("0", r"\pi (R^2-r^2)"),
        ("R+r", "2R"),
        (r"\frac{GM^2}{r}", r"\frac{GMm}{r}"),
        ("2^{1001}", "2^{1000}"),
        ("80081", "080 or 081 (both were accepted)"),
        ("0.03", '["0.01", "0.02"]'),
        (r"1\div 0", "1"),
        (r"\frac{1}{0}", r"\frac{2}{0}"),
    ],
)
def test_other_answer(answer, truth):
    assert same_answer(answer, truth) is False


@pytest.mark.parametrize(
    "truth", [None, True, float("nan"), float("inf"), {}, object(), [], [None], b"1", "", "x" * 5000]
)
def test_truth_of_a_wrong_type(truth):
    assert same_answer("1", truth) is False


def test_a_million_characters_are_fast():
    for response in (r"\boxed{" * 100_000, "{" * 1_000_000, r"\boxed{3}" + "{" * 1_000_000, r"\boxed" * 200_000):
        started = time.monotonic()
        assert boxed_answer(response) in (None, "3")
        assert time.monotonic() - started < HANG


@pytest.mark.parametrize(
    "answer",
    [r"\text{ " * 140, "$" * 990, " " * 990, "%" * 990, "{}" * 490, "5" + " " * 980 + "%", r"\frac" * 190, "1," * 490]
    + [
        r"\text{a}" * 140,
        "x " * 490,
        "^" * 990,
        "9" * 990,
        "1 million " * 99,
        "\\" * 990,
        "\x00" * 9,
        "\ud800",
        "\u0663",
    ],
)
def test_normalize_takes_anything(answer):
    started = time.monotonic()
    assert not same_answer("7", answer)
    assert normalize(normalize(answer)) == normalize(answer)
    assert time.monotonic() - started < HANG
