"""Right answers of the kinds in ``test_math_wrong_answers.py``: strict rules must not refuse them.

Every row is an answer and the right answer. The rows of a kind belong together: a failure names all that are wrong.
"""

from __future__ import annotations

import pytest

from gcpo.rewards import same_answer

RIGHT = {
    "numbers that are close": [
        (r"\frac{2}{2^{61}}", r"\frac{1}{2^{60}}"),
        ("1.414214", r"\sqrt2"),
        ("3.141593", r"\pi"),
        ("(0.333333,1)", r"(\frac13,1)"),
        (r"\frac{1024}{2^{20}}", "2^{-10}"),
        ("2-2^{-2004}", r"2-\frac{1}{2^{2004}}"),
        (r"\sqrt{3+2\sqrt2}", r"1+\sqrt2"),
        ("e^{-60}", r"\frac{1}{e^{60}}"),
        ("0.5x", "x/2"),
        ("1.0e-20", "10^{-20}"),
    ],
    "imaginary numbers": [
        ("(1+i)(1-i)", "2"),
        ("|3+4i|", "5"),
        ("i^2", "-1"),
        (r"e^{i\pi}", "-1"),
        (r"\sqrt{-4}", "2i"),
        ("3+4i", "4i+3"),
    ],
    "an angle in degrees": [
        (r"\sin 30^\circ", r"\frac12"),
        ("\\sin 30\u00b0", "0.5"),
        (r"\sin\left(30^\circ\right)", "0.5"),
        (r"\sin{30^{\circ}}", "0.5"),
        (r"2\cos 60^\circ+1", "2"),
        (r"\tan^2 45^\circ", "1"),
        (r"\csc^{2}30^{\circ}", "4"),
        (r"\tan 22.5\degree", r"\sqrt2-1"),
        (r"4\cos(36^\circ)-1", r"\sqrt5"),
        (r"\frac{\sin 80^\circ}{\sin 40^\circ}", r"2\cos 40^\circ"),
        (r"\sin(x+30^\circ)", r"\sin(x+\frac{\pi}{6})"),
    ],
    "a name and its value": [
        ("x=5", "5"),
        ("5", "x=5"),
        ("2+3=5", "5"),
        ("AB=5", "5"),
        ("f(x)=x^2", "x^2"),
        ("S_{10}=55", "55"),
        (r"\angle ABC=30^\circ", "30"),
        ("P(A)=1/2", "0.5"),
        (r"\text{Area}=5", "5"),
        ("Area = 5", "5"),
        ("x=2+3=5", "5"),
        (r"A=\pi r^2=25\pi", r"25\pi"),
        (r"x=\frac{1}{3}\approx 0.33", "1/3"),
        ("y=2x+1", "2x+1"),
        ("2x-y+1=0", "y=2x+1"),
        ("x+y=5", "2x+2y=10"),
        ("x=3,y=5", "(3,5)"),
        ("y=5,x=3", "x=3,y=5"),
        ("x=3 or x=5", "3,5"),
        (r"\sin A=\frac{3}{5}", "3/5"),
        (r"\frac{dy}{dx}=2x", "2x"),
        ("|AB|=5", "5"),
        ("(x,y)=(1,2)", "(1,2)"),
        ("x_1=2,x_2=3", "2,3"),
        ("5=x", "x=5"),
    ],
    "a unit": [
        ("6m", "$6m$"),
        ("12", r"12 \text{ m}"),
        ("12 m", "12"),
        ("5 centimeters", "5 cm"),
        ("5", r"5\text{ hours}"),
        ("5 square meters", r"5\text{ m}^2"),
        ("12 apples", "12"),
        ("5m", "5"),
        (r"5\mathrm{~m}", "5"),
        (r"2\pi cm", r"2\pi"),
        ("5 miles per hour", "5"),
        ("9.8 m/s^2", "9.8"),
        ("12 kg", "12"),
        ("12 sq cm", "12 cm^2"),
        (r"x=5\text{ cm}", "5"),
        ("5 dollars", "5"),
    ],
    "the sign of a root": [
        ("√16", "4"),
        ("√12", r"2\sqrt{3}"),
        ("2√10", r"2\sqrt{10}"),
        ("3+√17", r"3+\sqrt{17}"),
        ("√144", "12"),
        ("(1+√17)/2", r"\frac{1+\sqrt{17}}{2}"),
        ("√(12)", r"2\sqrt{3}"),
        ("√9", "3"),
        ("√3/2", r"\frac{\sqrt3}{2}"),
        ("√(x+1)", r"\sqrt{x+1}"),
        ("√(1+√2)", r"\sqrt{1+\sqrt2}"),
        ("2√3/3", r"\frac{2}{\sqrt3}"),
        ("√½", r"\sqrt{\frac12}"),
        ("√x", r"\sqrt{x}"),
        (r"\sqrt12", r"2\sqrt3"),
        ("∛8", "2"),
    ],
    "ordinals and short forms": [
        ("4th", "4"),
        ("1_000", "1000"),
        (r"\arcsin\frac12", r"\frac\pi6"),
        (r"\frac{x}\pi", r"\frac{x}{\pi}"),
        ("2^{nd}", "2"),
    ],
    "residues and scales": [
        (r"3\pmod 7", "3"),
        ("x≡3 (mod 7)", r"x\equiv 3\pmod 7"),
        (r"25\%", "0.25"),
        ("25", r"25\%"),
        ("5 million", "5000000"),
    ],
}


@pytest.mark.parametrize("kind", RIGHT)
def test_right_answers(kind):
    assert [row for row in RIGHT[kind] if not same_answer(*row)] == []


@pytest.mark.parametrize(
    "answer",
    [r"2\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}+\begin{pmatrix}1\\2\end{pmatrix}"],
)
def test_matrices_that_have_to_be_computed(answer):
    assert same_answer(answer, r"\begin{pmatrix}2\\4\end{pmatrix}")
    assert not same_answer(answer, r"\begin{pmatrix}2\\5\end{pmatrix}")
