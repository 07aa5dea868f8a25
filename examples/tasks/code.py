r"""Small functions over integers, graded in the sandbox.

::

    Write f(n): add 7, keep at most 4, take from 9
    ```python
    def f(n):
        n = n + 7
        n = min(n, 4)
        n = 9 - n
        return n
    ```

A step of a candidate may have the opposite operation or a constant that is off by one, with probabilities that depend
on the step. A joint answer takes each step from most candidates.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from examples.tasks.base import Errors, Facts, Slips, Task, Worked, plurality

CONSTANTS = range(2, 10)


@dataclass(frozen=True)
class Operation:
    """One step of a function: its words, its Python, and its value for n and the constant k."""

    words: str
    python: str
    value: Callable[[int, int], int]


OPERATIONS = (
    Operation("add {k}", "n + {k}", lambda n, k: n + k),
    Operation("multiply by {k}", "n * {k}", lambda n, k: n * k),
    Operation("subtract {k}", "n - {k}", lambda n, k: n - k),
    Operation("take from {k}", "{k} - n", lambda n, k: k - n),
    Operation("keep at most {k}", "min(n, {k})", min),
    Operation("keep at least {k}", "max(n, {k})", max),
    Operation("divide by {k}", "n // {k}", lambda n, k: n // k),
    Operation("keep the remainder by {k}", "n % {k}", lambda n, k: n % k),
)
"""Neighbours (0 and 1, 2 and 3, ...) are taken for each other."""
OPPOSITE, MORE, LESS = 1, 2, 3
"""Errors of a step: the other operation of the pair, a constant that is greater by one, one that is less by one."""
FACTS = Facts(
    keys=tuple((operation, k) for operation in range(len(OPERATIONS)) for k in CONSTANTS),
    errors=(
        (0.4, Errors(slip=0.02)),
        (0.4, Errors(slip=0.45)),
        (0.1, Errors(slip=0.05, shared=0.65)),
        (0.1, Errors(slip=0.02, shared=0.85)),
    ),
    wrong=(OPPOSITE, MORE, LESS),
    seed=5,
)
INPUTS = (-58, -17, -6, -1, 0, 1, 2, 3, 5, 8, 19, 73)


@dataclass(frozen=True)
class Function:
    """Steps as pairs of an index into `OPERATIONS` and a constant; ``ood`` chooses the wording."""

    steps: tuple[tuple[int, int], ...]
    ood: bool = False

    @property
    def text(self) -> str:
        words = [OPERATIONS[operation].words.format(k=k) for operation, k in self.steps]
        return (
            f"In Python, define f of n. In turn, {'; '.join(words)}" if self.ood else f"Write f(n): {', '.join(words)}"
        )

    @property
    def key(self) -> Hashable:
        return self.steps

    def value(self, n: int) -> int:
        """Return f(n)."""
        for operation, k in self.steps:
            n = OPERATIONS[operation].value(n, k)
        return n


class Code(Task[Function]):
    """See the module."""

    name = "code"
    ability = "code"

    def __init__(self) -> None:
        self.slips = Slips(FACTS)

    def draw(self, rng: random.Random, *, ood: bool) -> Function:
        length = rng.randint(5, 6) if ood else rng.randint(3, 4)
        return Function(tuple((rng.randrange(len(OPERATIONS)), rng.choice(CONSTANTS)) for _ in range(length)), ood)

    def truth(self, question: Function) -> str:
        tests = {"fn_name": "f", "inputs": [[n] for n in INPUTS], "outputs": [question.value(n) for n in INPUTS]}
        return json.dumps(tests)

    def right(self, question: Function) -> Worked:
        return work(question, [0] * len(question.steps))

    def candidate(self, question: Function, rng: random.Random, skill: float) -> Worked:
        return work(question, [self.slips.draw(step, rng, skill) for step in question.steps])

    def joint(self, question: Function, rng: random.Random, seen: Sequence[Worked]) -> Worked:
        return work(question, [plurality(step, rng) for step in zip(*(one.parts for one in seen), strict=True)])


def work(question: Function, errors: Sequence[int]) -> Worked:
    """Return the response with these errors, one a step; 0 is none."""
    lines = []
    for (operation, k), error in zip(question.steps, errors, strict=True):
        written = OPERATIONS[operation ^ 1 if error == OPPOSITE else operation].python
        lines.append(f"    n = {written.format(k=k + (error == MORE) - (error == LESS))}\n")
    return Worked(f"```python\ndef f(n):\n{''.join(lines)}    return n\n```", tuple(errors))
