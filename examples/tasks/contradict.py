r"""Expressions in which most candidates make the same error, behind numbers that the question does not need.

::

    There are 8 pens and 3 cups. What is 4 + 7 * 2?
    7*2=14 4+14=18 \boxed{18}

Where the product stands second, most candidates work from left to right (``4+7=11 11*2=22``), and for many products
most candidates have the same wrong value. So a vote over the group, or a joint answer that follows it, confirms the
error. Sometimes a number of the first sentence is taken for the summand.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from examples.tasks.base import Errors, Facts, Slips, Task, Worked, plurality

DIGITS = range(2, 10)
PRODUCTS = Facts(
    keys=tuple((a, b) for a in DIGITS for b in DIGITS),
    errors=(
        (0.4, Errors(slip=0.02)),
        (0.35, Errors(slip=0.02, shared=0.65)),
        (0.15, Errors(slip=0.02, shared=0.85)),
        (0.1, Errors(slip=0.0, shared=0.995)),
    ),
    wrong=(-2, -1, 1, 2),
    seed=3,
)
RULES = Facts(
    keys=tuple((x, y) for x in DIGITS for y in DIGITS),
    errors=((0.3, Errors(0.0, 0.3)), (0.5, Errors(0.0, 0.7)), (0.2, Errors(0.0, 0.9))),
    wrong=(1,),
    seed=4,
)
"""How often an expression is worked from left to right, by the summand and the first factor."""
DISTRACTED = 0.05
"""Probability that a number of the first sentence is taken for the summand."""
THINGS = (("pens", "cups"), ("keys", "maps"))
"""In distribution and out of it."""


@dataclass(frozen=True)
class Expression:
    """``x + y * z`` (``late``: the product stands second) or ``y * z + x``.

    Attributes:
        distractors: the numbers of the first sentence.
        x: the summand.
        y: the first factor.
        z: the second factor.
        late: whether the product stands second; only there the order of working matters.
        ood: chooses the wording.
    """

    distractors: tuple[int, int]
    x: int
    y: int
    z: int
    late: bool
    ood: bool = False

    @property
    def text(self) -> str:
        (first, second), (a, b) = self.distractors, THINGS[self.ood]
        expression = f"{self.x} + {self.y} * {self.z}" if self.late else f"{self.y} * {self.z} + {self.x}"
        if self.ood:
            return f"Of {first} {a} and {second} {b} none is left. Work out {expression}?"
        return f"There are {first} {a} and {second} {b}. What is {expression}?"

    @property
    def key(self) -> Hashable:
        return self.distractors, self.x, self.y, self.z, self.late


class Contradict(Task[Expression]):
    """See the module."""

    name = "contradict"

    def __init__(self) -> None:
        self.products, self.rules = Slips(PRODUCTS), Slips(RULES)

    def draw(self, rng: random.Random, *, ood: bool) -> Expression:
        first, second, x, y, z = (rng.choice(DIGITS) for _ in range(5))
        return Expression((first, second), x + 10 * ood, y, z, rng.random() < 0.6, ood)

    def truth(self, question: Expression) -> str:
        return str(question.x + question.y * question.z)

    def right(self, question: Expression) -> Worked:
        return work(question, question.x, 0, 0)

    def candidate(self, question: Expression, rng: random.Random, skill: float) -> Worked:
        x = rng.choice(question.distractors) if rng.random() < DISTRACTED * skill else question.x
        from_left = self.rules.draw((question.x % 10, question.y), rng, skill) if question.late else 0
        slip = 0 if from_left else self.products.draw((question.y, question.z), rng, skill)
        return work(question, x, from_left, slip)

    def joint(self, question: Expression, rng: random.Random, seen: Sequence[Worked]) -> Worked:
        return plurality(seen, rng)


def work(question: Expression, x: int, from_left: int, slip: int) -> Worked:
    """Return the response with this summand and this error of the product, or worked from left to right."""
    y, z = question.y, question.z
    product = y * z + slip
    steps, result = f"{y}*{z}={product} {product}+{x}={x + product}", x + product
    if from_left:
        steps, result = f"{x}+{y}={x + y} {x + y}*{z}={(x + y) * z}", (x + y) * z
    elif question.late:
        steps = f"{y}*{z}={product} {x}+{product}={result}"
    return Worked(f"{steps} \\boxed{{{result}}}", (x, from_left, slip))
