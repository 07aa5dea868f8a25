"""Reproducible names of the questions of a batch, from which the seeds of their requests are derived."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from typing import Any

import torch
from tensordict import NonTensorStack, TensorDict
from verl.utils import tensordict_utils as tu

OCCURRENCE = "gcpo_occurrence"
"""Field of a prompt on its way to the agent-loop workers, int: the number of earlier rows of its step with the same
text and index. A stored response does not have it."""


def question_key(row: dict[str, Any], occurrence: int = 0) -> str:
    """Return a name that is the same in every run, from a question's index in the data set, text and occurrence.

    Args:
        row: ``raw_prompt``, and ``index`` if it is known.
        occurrence: number of equal earlier rows of its step.
    """
    text = json.dumps([dict(message) for message in row["raw_prompt"]], default=str, sort_keys=True)
    key = f"{row.get('index')}-{hashlib.blake2b(text.encode(), digest_size=6).hexdigest()}"
    return f"{key}-{occurrence}" if occurrence else key


class QuestionCounter:
    """A counter that numbers the equal rows of a step in the order in which the trainer sends them.

    That order is the data loader's, so it is the same in every run. Rows of one step may come in several batches; the
    batches of a validation count as one step.
    """

    def __init__(self) -> None:
        self._step: tuple[bool, Any] | None = None
        self._seen: Counter[str] = Counter()
        self.of_uid: dict[str, int] = {}
        """The occurrence of the rows of the latest step, by ``uid``."""

    def number(self, batch: TensorDict) -> None:
        """Write the field ``gcpo_occurrence`` unless the batch has it."""
        if OCCURRENCE in batch.keys():
            return
        validate = bool(tu.get_non_tensor_data(batch, "validate", False))
        step = (validate, tu.get_non_tensor_data(batch, "global_steps", None))
        if step != self._step:
            self._step, self._seen, self.of_uid = step, Counter(), {}
        occurrences = []
        for prompt, index in zip(_column(batch, "raw_prompt"), _column(batch, "index"), strict=True):
            key = question_key({"raw_prompt": prompt, "index": index})
            occurrences.append(self._seen[key])
            self._seen[key] += 1
        self.of_uid.update(zip(_column(batch, "uid"), occurrences, strict=True))
        tu.assign_non_tensor_stack(batch, OCCURRENCE, occurrences)


def _column(batch: TensorDict, name: str) -> list[Any]:
    """Return the values of a field, one for every row, each ``None`` if the batch lacks it."""
    value = batch.get(name, None)
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, NonTensorStack):
        return [value[row].data for row in range(len(batch))]
    return [getattr(value, "data", None)] * len(batch)
