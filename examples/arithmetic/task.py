"""The embedded task: column addition and subtraction, computed digit by digit.

``python -m examples.arithmetic.task --output DIR`` writes ``train.parquet`` and ``test.parquet`` in verl's schema.
A question asks for the sum or the difference of two numbers of two, three or four digits (levels 1, 2 and 3) and
always needs a carry or a borrow. The response works from the last column to the first and boxes the result::

    What is 482 + 319?
    2+9=11 8+1+1=10 4+3+1=8 \\boxed{801}

`NoisySolver` writes such solutions with injected errors in the carries (``+1``) and borrows (``-1``);
`examples.arithmetic.warm_start` fine-tunes a model on them.
"""

from __future__ import annotations

import argparse
import io
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gcpo.files import lock, write_atomically

DATA_SOURCE = "gcpo/arithmetic"
LEVELS = (1, 2, 3)
TRAIN_SIZE = 4096
TEST_SIZE = 600
SEED = 20250

Operation = Literal["+", "-"]
OPERATIONS: tuple[Operation, ...] = ("+", "-")


class PrepError(Exception):
    """Input that this package cannot use; the message is one sentence for the user."""


@dataclass(frozen=True, order=True)
class Question:
    """One question: ``left operation right``; its level is the number of digits of its operands minus one."""

    level: int
    operation: Operation
    left: int
    right: int

    @property
    def text(self) -> str:
        """The question as text."""
        return f"What is {self.left} {self.operation} {self.right}?"

    @property
    def answer(self) -> int:
        """The right answer."""
        return self.left + self.right if self.operation == "+" else self.left - self.right

    @property
    def key(self) -> tuple[str, int, int]:
        """A key of the exercise, which is the same for a sum with swapped operands."""
        if self.operation == "+":
            return self.operation, min(self.left, self.right), max(self.left, self.right)
        return self.operation, self.left, self.right

    @property
    def columns(self) -> list[tuple[int, int]]:
        """The digits of both operands, last column first."""
        return [(int(a), int(b)) for a, b in zip(str(self.left)[::-1], str(self.right)[::-1], strict=True)]


@dataclass(frozen=True)
class Solution:
    """A worked solution. ``carries``: for each column, whether the carry into it was applied; None without a carry."""

    text: str
    carries: tuple[bool | None, ...]
    right: bool


def parse_question(text: str) -> Question:
    """Return the `Question` with this `Question.text`."""
    left, operation, right = text.removeprefix("What is ").removesuffix("?").split(" ")
    if operation not in OPERATIONS:
        raise ValueError(f"not a question of this task: {text!r}")
    return Question(len(left) - 1, operation, int(left), int(right))


def work_out(
    question: Question,
    keeps: Callable[[int], bool] = lambda column: True,
    slips: Callable[[int], int] = lambda column: 0,
) -> Solution:
    """Compute the answer to a question column by column.

    Args:
        question: the question.
        keeps: function of the column (0: the last digit) that returns whether the carry or borrow into it is applied.
        slips: function of the column that returns the error added to its result.
    """
    adds = question.operation == "+"
    steps: list[str] = []
    digits: list[int] = []
    carries: list[bool | None] = []
    carry = 0
    last = len(question.columns) - 1
    for column, (a, b) in enumerate(question.columns):
        carries.append(keeps(column) if carry else None)
        kept = int(bool(carries[-1]))
        if adds:
            result = min(max(a + b + kept + slips(column), 0), 19)
            steps.append(f"{a}+{b}{'+1' * kept}={result}")
            carry = int(result > 9)
            digits.append(result if column == last else result % 10)
        else:
            carry = int(a - b - kept < 0 and column < last)
            result = min(max(a + 10 * carry - b - kept + slips(column), 0), 9)
            steps.append(f"{a + 10 * carry}-{b}{'-1' * kept}={result}")
            digits.append(result)
    value = int("".join(str(digit) for digit in reversed(digits)))
    text = f"{' '.join(steps)} \\boxed{{{value}}}"
    return Solution(text, tuple(carries), value == question.answer)


@dataclass(frozen=True)
class NoisySolver:
    """A generator of worked solutions with errors injected at fixed probabilities.

    Attributes:
        forget_carry: probability that a carry into a column is forgotten.
        forget_borrow: the same for a borrow.
        miscount: probability that a column's result is off by one.
    """

    forget_carry: float
    forget_borrow: float
    miscount: float

    def solve(self, question: Question, rng: random.Random, reminded: frozenset[int] = frozenset()) -> Solution:
        """Write a worked solution.

        Args:
            question: the question.
            rng: source of the errors.
            reminded: columns whose carry is in a solution of the prompt; it is forgotten with probability 0.05.
        """
        forget = self.forget_carry if question.operation == "+" else self.forget_borrow

        def keeps(column: int) -> bool:
            return rng.random() >= (0.05 if column in reminded else forget)

        def slips(column: int) -> int:
            return rng.choice((-1, 1)) if rng.random() < self.miscount else 0

        return work_out(question, keeps, slips)


def draw_question(rng: random.Random, level: int, operation: Operation) -> Question:
    """Return a question of ``level`` whose computation needs at least one carry or borrow."""
    low, high = 10**level, 10 ** (level + 1) - 1
    while True:
        left, right = rng.randint(low, high), rng.randint(low, high)
        if operation == "-" and left < right:
            left, right = right, left
        question = Question(level, operation, left, right)
        if left != right and any(carry is not None for carry in work_out(question).carries):
            return question


def questions(rng: random.Random, count: int, taken: set[tuple[str, int, int]]) -> Iterator[Question]:
    """Yield ``count`` different questions outside ``taken``, alternating levels and operations; add them to ``taken``.

    Raises:
        PrepError: there are fewer different questions.
    """
    for i in range(count):
        level, operation = LEVELS[i % 3], OPERATIONS[(i // 3) % 2]
        for _ in range(10_000):
            question = draw_question(rng, level, operation)
            if question.key not in taken:
                break
        else:
            raise PrepError(f"there are no {count} different questions; ask for fewer")
        taken.add(question.key)
        yield question


def held_out(count: int = TEST_SIZE, seed: int = SEED) -> list[Question]:
    """Return the held-out questions, drawn first, so that they do not depend on the number of training questions."""
    return list(questions(random.Random(seed), count, set()))


def row(question: Question, index: int, split: str) -> dict[str, Any]:
    """Return one row of verl's schema."""
    return {
        "data_source": DATA_SOURCE,
        "prompt": [{"role": "user", "content": question.text}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(question.answer)},
        "extra_info": {"index": index, "level": question.level, "split": split},
    }


def prepare(output: Path, train_size: int = TRAIN_SIZE, test_size: int = TEST_SIZE, seed: int = SEED) -> None:
    """Write ``train.parquet`` and ``test.parquet`` into ``output``; the same bytes every time.

    Raises:
        PrepError: a size is not possible, or the folder cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if train_size < 1 or test_size < 1:
        raise PrepError(f"sizes must be positive, got --train-size {train_size} --test-size {test_size}")
    test = held_out(test_size, seed)
    taken = {question.key for question in test}
    train = list(questions(random.Random(seed + 1), train_size, taken))
    try:
        # Two quick starts in one checkout write the same files.
        with lock(output):
            output.mkdir(parents=True, exist_ok=True)
            for split, rows in (("train", train), ("test", test)):
                table = pa.Table.from_pylist([row(question, i, split) for i, question in enumerate(rows)])
                content = io.BytesIO()
                pq.write_table(table, content)
                write_atomically(output / f"{split}.parquet", content.getvalue())
    except OSError as error:
        raise PrepError(f"cannot write into {output}: {error}") from error
    print(f"{output}: {len(train)} training and {len(test)} held-out questions")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Make the arithmetic questions of the quick start.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--train-size", type=int, default=TRAIN_SIZE)
    parser.add_argument("--test-size", type=int, default=TEST_SIZE)
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args(argv)
    try:
        prepare(args.output, args.train_size, args.test_size, args.seed)
    except PrepError as error:
        print(f"arithmetic: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
