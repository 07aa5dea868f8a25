r"""The quick start's task with longer operands and errors at more places.

::

    What is 4821 + 3190?
    1+0=1 2+9=11 8+1+1=10 4+3+1=8 \boxed{8011}

Carries and borrows are forgotten as in `examples.arithmetic`, though less often, and the result of a column may be off
by one: at random for most pairs of digits, and by the same amount in most responses for a few of them.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from examples.arithmetic.task import OPERATIONS, Question, draw_question, work_out
from examples.tasks.base import Errors, Facts, Slips, Task, Worked

FORGET = {"+": 0.15, "-": 0.25}
"""Probability that a carry or a borrow is forgotten."""
REMINDED = 0.05
"""The same where a solution in the prompt applies it."""
FACTS = Facts(
    keys=tuple((operation, a, b) for operation in OPERATIONS for a in range(10) for b in range(10)),
    errors=(
        (0.84, Errors(slip=0.02)),
        (0.1, Errors(slip=0.05, shared=0.6)),
        (0.03, Errors(slip=0.02, shared=0.9)),
        (0.03, Errors(slip=0.0, shared=0.995)),
    ),
    wrong=(-1, 1),
    seed=2,
)
DIGITS = {False: (3, 5), True: (6, 7)}
"""Digits of an operand, in distribution and out of it."""


@dataclass(frozen=True)
class LongQuestion:
    """A question of the quick start with more digits; ``ood`` chooses the wording."""

    exercise: Question
    ood: bool = False

    @property
    def text(self) -> str:
        if self.ood:
            return f"Please work out {self.exercise.left} {self.exercise.operation} {self.exercise.right} now."
        return self.exercise.text

    @property
    def key(self) -> Hashable:
        return self.exercise.key


class ArithmeticHard(Task[LongQuestion]):
    """See the module."""

    name = "arithmetic_hard"

    def __init__(self) -> None:
        self.slips = Slips(FACTS)

    def draw(self, rng: random.Random, *, ood: bool) -> LongQuestion:
        return LongQuestion(draw_question(rng, rng.randint(*DIGITS[ood]) - 1, rng.choice(OPERATIONS)), ood)

    def truth(self, question: LongQuestion) -> str:
        return str(question.exercise.answer)

    def right(self, question: LongQuestion) -> Worked:
        return work(question, frozenset(), {})

    def candidate(self, question: LongQuestion, rng: random.Random, skill: float) -> Worked:
        return self._solve(question, rng, skill, frozenset())

    def joint(self, question: LongQuestion, rng: random.Random, seen: Sequence[Worked]) -> Worked:
        reminded = frozenset(column for one in seen for column, kept in enumerate(one.parts) if kept)
        return self._solve(question, rng, 1.0, reminded)

    def _solve(self, question: LongQuestion, rng: random.Random, skill: float, reminded: frozenset[int]) -> Worked:
        exercise = question.exercise
        columns, forget = range(len(exercise.columns)), FORGET[exercise.operation] * min(skill, 1.0)
        forgotten = frozenset(c for c in columns if rng.random() < (REMINDED if c in reminded else forget))
        slips = {c: self.slips.draw((exercise.operation, *exercise.columns[c]), rng, skill) for c in columns}
        return work(question, forgotten, slips)


def work(question: LongQuestion, forgotten: frozenset[int], slips: dict[int, int]) -> Worked:
    """Return the response that forgets the carry into these columns, with errors in the results of columns."""
    solution = work_out(question.exercise, lambda c: c not in forgotten, lambda c: slips.get(c, 0))
    return Worked(solution.text, tuple(int(bool(kept)) for kept in solution.carries))
