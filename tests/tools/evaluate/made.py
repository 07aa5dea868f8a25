"""Small question sets, and a sampler that answers by rule, for tests that need no model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gcpo.tools.evaluate.questions import QuestionSet, load_sets
from gcpo.tools.evaluate.sampling import Completion, Prompts, Request


def rows(count: int, **changes: Any) -> list[dict[str, Any]]:
    """Questions "What is i + i?"."""
    return [
        {
            "data_source": "gcpo/sums",
            "prompt": [{"role": "user", "content": f"What is {i} + {i}?"}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(2 * i)},
            "extra_info": {"index": i},
            **changes,
        }
        for i in range(count)
    ]


def write_set(path: Path, found: list[dict[str, Any]]) -> Path:
    """A parquet file of these rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(found), path)
    return path


def sums(folder: Path, count: int = 4, name: str = "sums") -> QuestionSet:
    """A set of ``count`` sums."""
    (found,) = load_sets([str(write_set(folder / f"{name}.parquet", rows(count)))])
    return found


def prompts_of(*sets: QuestionSet, context: int | None = None) -> Prompts:
    """Prompts of as many tokens as the row's number and one more."""
    ids = {question.id: [1] * (question.row + 1) for found in sets for question in found.questions}
    return Prompts(ids, context)


class Rule:
    """A sampler that answers as ``answer(question row, sample index)`` says, some samples at a time.

    Attributes:
        asked: the requests that it was given, in order.
        starts: how often it was started.
        encode: the tokens of a text; by default one for every character.
    """

    def __init__(self, sets: Sequence[QuestionSet], answer: Callable[[int, int], str], batch: int = 3) -> None:
        self._rows = {question.id: question.row for found in sets for question in found.questions}
        self._answer = answer
        self._batch = batch
        self.asked: list[Request] = []
        self.starts = 0
        self.stop_after: int | None = None
        self.encode: Callable[[str], list[int]] = lambda text: [1] * len(text)

    def __call__(self, log: Path) -> Callable[[Sequence[Request]], Iterator[list[Completion]]]:
        self.starts += 1
        return self.sample

    def sample(self, requests: Sequence[Request]) -> Iterator[list[Completion]]:
        """Finished samples, the last ones of a batch first."""
        for at in range(0, len(requests), self._batch):
            if self.stop_after is not None and len(self.asked) >= self.stop_after:
                raise KeyboardInterrupt
            batch = requests[at : at + self._batch]
            self.asked += batch
            yield [self._completion(request) for request in reversed(batch)]

    def _completion(self, request: Request) -> Completion:
        question, _, index = request.key.rpartition(":")
        # The text shows the seed, so that a sample with another seed is another sample.
        text = f"seed {request.seed}: {self._answer(self._rows[question], int(index))}"
        cut = len(text) > 200
        return Completion(request.key, text, self.encode(text), "length" if cut else "stop")
