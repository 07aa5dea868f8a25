"""Base of the tasks: questions with answers, a solver that makes errors, and the splits in verl's schema."""

from __future__ import annotations

import io
import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from examples.arithmetic.task import PrepError
from gcpo.files import lock, write_atomically

SPLITS = ("test", "ood", "train")
"""In the order in which they are drawn: the held-out questions do not depend on the number of training questions."""
SIZES = {"test": 400, "ood": 200, "train": 4096}
SEED = 20260


class Asked(Protocol):
    """A question."""

    @property
    def text(self) -> str:
        """The question as text."""
        ...

    @property
    def key(self) -> Hashable:
        """A key of the exercise; questions with equal keys are the same exercise."""
        ...


class Written(Protocol):
    """A worked solution."""

    @property
    def text(self) -> str:
        """The text of the response."""
        ...


Q = TypeVar("Q", bound=Asked)
S = TypeVar("S", bound=Written)
T = TypeVar("T", bound=Hashable)


class Solver(ABC, Generic[Q, S]):
    """Interface for the warm start: questions, and worked solutions with and without candidates in the prompt."""

    @abstractmethod
    def warm_question(self, rng: random.Random) -> Q:
        """Return a question for the fine-tuning."""

    @abstractmethod
    def alone(self, question: Q, rng: random.Random) -> S:
        """Return a worked solution with the errors of the warm-started model."""

    @abstractmethod
    def candidate(self, question: Q, rng: random.Random, skill: float) -> S:
        """Return a worked solution whose error probabilities are multiplied by ``skill``, where that lowers them."""

    @abstractmethod
    def joint(self, question: Q, rng: random.Random, seen: Sequence[S]) -> S:
        """Return a worked solution of a solver that has read the solutions ``seen``."""

    def target(self, question: Q, rng: random.Random, seen: Sequence[S]) -> S:
        """Return the target response to a prompt with the solutions ``seen``."""
        return self.joint(question, rng, seen)

    @abstractmethod
    def sample_texts(self, rng: random.Random) -> tuple[str, str]:
        """Return a question and a right response, from which the tokenizer is made."""


@dataclass(frozen=True)
class Worked:
    """A worked solution. ``parts``: the choice at each place where an error is possible."""

    text: str
    parts: tuple[int, ...]


class Task(Solver[Q, Worked], Generic[Q]):
    """A task with splits."""

    name: str
    """Name of the experiment; the data source is ``gcpo/NAME``."""
    ability = "math"
    warm_ood = 0.15
    """Fraction of the warm start's questions that are out of distribution, so that the model can read them."""

    @abstractmethod
    def draw(self, rng: random.Random, *, ood: bool) -> Q:
        """Return a random question; with ``ood`` it has longer operands and other words."""

    @abstractmethod
    def truth(self, question: Q) -> str:
        """Return the ground truth of the reward."""

    @abstractmethod
    def right(self, question: Q) -> Worked:
        """Return the solution without an error."""

    def alone(self, question: Q, rng: random.Random) -> Worked:
        return self.candidate(question, rng, 1.0)

    def warm_question(self, rng: random.Random) -> Q:
        return self.draw(rng, ood=rng.random() < self.warm_ood)

    def sample_texts(self, rng: random.Random) -> tuple[str, str]:
        question = self.warm_question(rng)
        return question.text, self.right(question).text

    def splits(self, sizes: dict[str, int] | None = None, seed: int = SEED) -> dict[str, list[Q]]:
        """Return different questions for every split; the same every time.

        Raises:
            PrepError: there are not that many different questions.
        """
        sizes = sizes or SIZES
        taken: set[Hashable] = set()
        return {
            split: list(self._distinct(random.Random(f"{seed}/{self.name}/{split}"), sizes[split], split, taken))
            for split in SPLITS
        }

    def _distinct(self, rng: random.Random, count: int, split: str, taken: set[Hashable]) -> Iterable[Q]:
        for _ in range(count):
            for _ in range(10_000):
                question = self.draw(rng, ood=split == "ood")
                if question.key not in taken:
                    break
            else:
                raise PrepError(f"{self.name} has no {count} different questions; ask for fewer")
            taken.add(question.key)
            yield question

    def row(self, question: Q, index: int, split: str) -> dict[str, Any]:
        """Return one row of verl's schema."""
        return {
            "data_source": f"gcpo/{self.name}",
            "prompt": [{"role": "user", "content": question.text}],
            "ability": self.ability,
            "reward_model": {"style": "rule", "ground_truth": self.truth(question)},
            "extra_info": {"index": index, "split": split},
        }

    def prepare(self, output: Path, sizes: dict[str, int] | None = None) -> None:
        """Write a parquet file for every split into ``output``.

        Raises:
            PrepError: the folder cannot be written.
        """
        splits = self.splits(sizes)
        try:
            with lock(output):
                output.mkdir(parents=True, exist_ok=True)
                for split, drawn in splits.items():
                    rows = [self.row(question, i, split) for i, question in enumerate(drawn)]
                    write_parquet(output / f"{split}.parquet", rows)
        except OSError as error:
            raise PrepError(f"cannot write into {output}: {error}") from error
        print(f"{output}: " + ", ".join(f"{len(drawn)} {split}" for split, drawn in splits.items()) + " questions")


def write_parquet(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as a parquet file, at once."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), content)
    write_atomically(path, content.getvalue())


def plurality(values: Iterable[T], rng: random.Random) -> T:
    """Return the most frequent value; a random one of them if several are."""
    counts = Counter(values)
    most = max(counts.values())
    return rng.choice([value for value, count in counts.items() if count == most])


@dataclass(frozen=True)
class Errors:
    """Error probabilities of one fact.

    Attributes:
        slip: probability of a random error, independent in every solution.
        shared: probability of an error whose value is the same in every solution. Above 0.5 a greedy response has it,
            and most candidates of a group agree on it.
    """

    slip: float
    shared: float = 0.0


@dataclass(frozen=True)
class Facts:
    """Facts with their error probabilities, assigned by a seed.

    Attributes:
        keys: the facts, for example pairs of digits.
        errors: pairs of a fraction of the facts and its error probabilities; the fractions sum to 1.
        wrong: possible errors, as values that are added to the right answer.
        seed: of the assignment.
    """

    keys: tuple[Hashable, ...]
    errors: tuple[tuple[float, Errors], ...]
    wrong: tuple[int, ...]
    seed: int

    def table(self) -> dict[Hashable, tuple[Errors, int]]:
        """Return the error probabilities of every fact and the value of its shared error."""
        rng = random.Random(self.seed)
        keys = list(self.keys)
        rng.shuffle(keys)
        table: dict[Hashable, tuple[Errors, int]] = {}
        end = 0.0
        for share, errors in self.errors:
            start, end = end, end + share
            for key in keys[round(start * len(keys)) : round(end * len(keys))]:
                table[key] = errors, rng.choice(self.wrong)
        return table


class Slips:
    """Draws the errors of `Facts`."""

    def __init__(self, facts: Facts) -> None:
        self.wrong = facts.wrong
        self.table = facts.table()

    def draw(self, key: Hashable, rng: random.Random, skill: float = 1.0) -> int:
        """Return the value that is added to the right answer; 0 if the answer is right."""
        errors, shared = self.table[key]
        chance = rng.random()
        if chance < errors.shared * min(skill, 1.0):
            return shared
        if chance > 1 - errors.slip * min(skill, 1.0):
            return rng.choice(self.wrong)
        return 0
