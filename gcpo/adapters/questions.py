"""Names of the questions of a batch, the same in every run: what the seeds of their requests are made of."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from typing import Any

import torch
from tensordict import NonTensorStack, TensorDict
from verl.utils import tensordict_utils as tu

OCCURRENCE = "gcpo_occurrence"
"""Field of a prompt on its way to the agent-loop workers, an int: how many earlier rows of its step have the same text
and index. It is no field of a stored response."""


def question_key(row: dict[str, Any], occurrence: int = 0) -> str:
    """Names a question the same way in every run: its index in the data set, its text, and its occurrence.

    Args:
        row: ``raw_prompt``, and ``index`` where it is known.
        occurrence: how many earlier rows of its step are the same.
    """
    text = json.dumps([dict(message) for message in row["raw_prompt"]], default=str, sort_keys=True)
    key = f"{row.get('index')}-{hashlib.blake2b(text.encode(), digest_size=6).hexdigest()}"
    return f"{key}-{occurrence}" if occurrence else key


class QuestionCounter:
    """Numbers the rows of a step that are alike, in the order in which the trainer hands them out.

    That order is the data loader's, so it is the same in every run. Rows of one step may come in several batches; the
    batches of a validation count as one step.
    """

    def __init__(self) -> None:
        self._step: tuple[bool, Any] | None = None
        self._seen: Counter[str] = Counter()
        self.of_uid: dict[str, int] = {}
        """The occurrence of the rows of the latest step, by ``uid``."""

    def number(self, batch: TensorDict) -> None:
        """Write the field ``gcpo_occurrence``; a batch that has it stays as it is."""
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
    """The values of a field, one for every row; ``None`` where the batch lacks it."""
    value = batch.get(name, None)
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, NonTensorStack):
        return [value[row].data for row in range(len(batch))]
    return [getattr(value, "data", None)] * len(batch)
