"""Fields of the batch: each is declared once, with its shape, its type, its writer and its readers.

This module declares the fields of verl that methods read. Every method declares its own fields next to its code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gcpo.faults import RunStoppedError


class FieldError(RunStoppedError):
    """A field of the batch that is missing, or whose values differ from its declared shape or type."""


class Field(str):
    """The name of a field of the batch, with a description of its value per row.

    Attributes:
        dtype: dtype of its values; ``None``: any Python object.
        shape: of one row's value, with a letter or a text for each dimension.
        writer: the station that writes it.
        readers: the stations that read it.
        meaning: one sentence.
    """

    dtype: torch.dtype | None
    shape: str
    writer: str
    readers: str
    meaning: str

    def __new__(
        cls, name: str, dtype: torch.dtype | None, shape: str, *, writer: str, readers: str, meaning: str
    ) -> Field:
        """Create a field; see the attributes. ``shape`` has the form ``[T]`` or ``[L + L']``."""
        field = super().__new__(cls, name)
        field.dtype, field.shape, field.writer, field.readers = dtype, shape, writer, readers
        field.meaning = meaning
        return field

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        """Pickle a field as its name, since TransferQueue and Ray pickle the names of fields."""
        return str, (str(self),)

    def check(self, value: Any) -> Any:
        """Return ``value`` of one row if it matches this field's declaration.

        Raises:
            FieldError: it does not match.
        """
        if self.dtype is None:
            return value
        wanted = f"{self.dtype} {self.shape}"
        if not isinstance(value, Tensor):
            raise FieldError(f"the batch field {self} holds a {type(value).__name__}, and should hold {wanted}")
        if value.dtype != self.dtype or value.ndim != 1:
            found = f"{value.dtype} of shape {list(value.shape)}"
            raise FieldError(f"the batch field {self} holds {found}, and should hold {wanted}")
        return value


def flat(pieces: Sequence[Sequence[int]]) -> Tensor:
    """Concatenate token lists to one row, int64. Empty rows are stored as a single zero; their lengths are 0."""
    return torch.tensor([token for piece in pieces for token in piece] or [0], dtype=torch.int64)


def lengths(pieces: Sequence[Sequence[int]]) -> Tensor:
    """Return the length of every piece of `flat`, int64."""
    return torch.tensor([len(piece) for piece in pieces], dtype=torch.int64)


def split(row: Tensor, lengths: Tensor) -> list[Tensor]:
    """Split a row of `flat` into its pieces; a piece of length 0 is empty."""
    return list(row[: int(lengths.sum())].split(lengths.tolist()))


# ---- verl's ----------------------------------------------------------------------------------------------------------

PROMPTS = Field(
    "prompts", torch.int64, "[P]", writer="verl: sample", readers="score", meaning="Token ids of the prompt."
)
RESPONSES = Field(
    "responses",
    torch.int64,
    "[T]",
    writer="verl: sample",
    readers="score, credit, update",
    meaning="Token ids of the response.",
)
RESPONSE_MASK = Field(
    "response_mask",
    torch.int64,
    "[T]",
    writer="verl: sample",
    readers="credit, update",
    meaning="1 for the tokens that the policy wrote.",
)
REWARDS = Field(
    "rm_scores",
    torch.float32,
    "[T]",
    writer="verl: sample",
    readers="credit",
    meaning="The outcome reward, on the last token of the response.",
)
OLD_LOG_PROBS = Field(
    "old_log_probs",
    torch.float32,
    "[T]",
    writer="verl: score",
    readers="credit, update",
    meaning="log pi_old(y_t | q, y_<t).",
)
ADVANTAGES = Field(
    "advantages",
    torch.float32,
    "[T]",
    writer="verl: advantage",
    readers="update, report",
    meaning="Advantage of every token, 0 outside `response_mask`.",
)
REWARD_MODEL = Field(
    "reward_model", None, "", writer="data", readers="before_score", meaning="Column of the data set: the right answer."
)
INDEX = Field("index", None, "", writer="data", readers="layout", meaning="Place of the question in the data set.")
RAW_PROMPT = Field("raw_prompt", None, "", writer="data", readers="layout", meaning="The question as chat messages.")
DATA_SOURCE = Field("data_source", None, "", writer="data", readers="report", meaning="Name of the data set.")
EXTRA_FIELDS = Field(
    "extra_fields", None, "", writer="verl: sample", readers="report", meaning="What the reward function returned."
)
