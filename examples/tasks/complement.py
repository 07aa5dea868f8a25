r"""Many small sums in one question, whose answers have independent slips.

::

    Add modulo ten: a four seven b three nine c two two
    \boxed{a four seven one b three nine two c two two four}

A response is right only if all of its sums are, so few are, and the wrong ones are all different: a vote over whole
answers finds little. The sums slip independently, so a reading of the other answers sum by sum finds much.
Each sum has a letter, so that a small model finds its place; words are graded as text, which takes no time.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from string import ascii_lowercase

from examples.tasks.base import Errors, Facts, Slips, Task, Worked, plurality

DIGITS = range(10)
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FACTS = Facts(
    keys=tuple((a, b) for a in DIGITS for b in DIGITS),
    errors=(
        (0.45, Errors(slip=0.01)),
        (0.5, Errors(slip=0.35)),
        (0.03, Errors(slip=0.05, shared=0.55)),
        (0.02, Errors(slip=0.02, shared=0.93)),
    ),
    wrong=tuple(range(1, 10)),
    seed=1,
)


@dataclass(frozen=True)
class Sum:
    """Columns of two digits; ``ood`` chooses the wording."""

    columns: tuple[tuple[int, int], ...]
    ood: bool = False

    @property
    def text(self) -> str:
        sums = " ".join(
            f"{name} {WORDS[a]} {WORDS[b]}" for name, (a, b) in zip(ascii_lowercase, self.columns, strict=False)
        )
        return f"What are the last digits of these sums? {sums}" if self.ood else f"Add modulo ten: {sums}"

    @property
    def key(self) -> Hashable:
        return self.columns


def written(question: Sum, slips: Sequence[int]) -> str:
    """Return the answer with these errors, one a column; 0 is none."""
    return " ".join(
        f"{name} {WORDS[a]} {WORDS[b]} {WORDS[(a + b + slip) % 10]}"
        for name, (a, b), slip in zip(ascii_lowercase, question.columns, slips, strict=False)
    )


def work(question: Sum, slips: Sequence[int]) -> Worked:
    """Return the response with these errors."""
    return Worked(f"\\boxed{{{written(question, slips)}}}", tuple(slips))


class Complement(Task[Sum]):
    """See the module."""

    name = "complement"

    def __init__(self) -> None:
        self.slips = Slips(FACTS)

    def draw(self, rng: random.Random, *, ood: bool) -> Sum:
        length = rng.randint(10, 12) if ood else rng.randint(6, 9)
        columns = [(rng.choice(DIGITS), rng.choice(DIGITS)) for _ in range(length)]
        return Sum(tuple(columns), ood)

    def warm_question(self, rng: random.Random) -> Sum:
        """Return a question that may be short, from which the model learns faster to find a sum by its letter."""
        question = super().warm_question(rng)
        return replace(question, columns=question.columns[: rng.randint(1, 12)])

    def truth(self, question: Sum) -> str:
        return written(question, [0] * len(question.columns))

    def right(self, question: Sum) -> Worked:
        return work(question, [0] * len(question.columns))

    def candidate(self, question: Sum, rng: random.Random, skill: float) -> Worked:
        return work(question, [self.slips.draw(column, rng, skill) for column in question.columns])

    def joint(self, question: Sum, rng: random.Random, seen: Sequence[Worked]) -> Worked:
        return work(question, [plurality(column, rng) for column in zip(*(one.parts for one in seen), strict=True)])
