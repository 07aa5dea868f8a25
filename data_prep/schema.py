"""What a data set is: its rows, the schemas that its files come in, and where it lies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import pyarrow as pa

BATCH = 1024
"""Rows that are taken from a table at a time."""
PROVENANCE = "provenance.json"


class DataError(Exception):
    """Input that can't be used; the message is one sentence for the user."""


class Drop(Exception):
    """Raised by a schema's function: the row can't be used; the message says why and is counted."""


@dataclass(frozen=True)
class Row:
    """One problem.

    Attributes:
        question: the problem without instruction; duplicates and overlaps are found by it.
        ground_truth: passed to the reward function; see `data_prep.answers.encode` for several right answers.
        prompt: the user's message, or all messages; by default the question and the set's instruction.
        details: other columns worth keeping, as JSON values; written to ``extra_info.details``.
        held_out: a row of a training set that must not be trained on; it goes to ``test.parquet``.
        note: counted in the provenance, such as "two answers were accepted".
    """

    question: str
    ground_truth: str
    prompt: str | Sequence[Mapping[str, str]] | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    held_out: bool = False
    note: str | None = None


@dataclass(frozen=True)
class Schema:
    """One form that a set's rows come in.

    Attributes:
        columns: the columns that a source must have to be read this way.
        convert: makes a `Row` of a raw row that has these columns, or raises `Drop`.
        optional: columns that ``convert`` reads if they exist; all others are ignored.
    """

    columns: tuple[str, ...]
    convert: Callable[[Mapping[str, Any]], Row]
    optional: tuple[str, ...] = ()


@dataclass(frozen=True)
class Hub:
    """A data set of the hub. Several configurations are read one after the other."""

    name: str
    split: str
    configs: tuple[str | None, ...] = (None,)


@dataclass(frozen=True)
class DataSet:
    """A data set that can be prepared.

    Attributes:
        name: the name in the command.
        title: one line for the list of sets.
        kind: ``train`` or ``eval``; only training sets lose duplicates and rows that an evaluation set has.
        ability: verl's column of this name.
        schemas: the forms it comes in; the first one whose columns all exist is used.
        hubs: where it is on the hub, the usual place first; empty for a set that is not on the hub.
        rows: the known numbers of rows of the source; another number is reported.
        split: the files of a local folder that are read; None: ``train`` or ``test`` by ``kind``.
        instruction: follows the question, after a space.
        found_in: where to find a set that is not on the hub, for the message that asks for its file.
        sample: number of rows to draw at random; None: all of them.
        few_shot: makes the set with examples from the given sources; None: the set has no examples.
        examples: the origin of the examples, for the provenance.
    """

    name: str
    title: str
    kind: Literal["train", "eval"]
    ability: Literal["math", "code"]
    schemas: tuple[Schema, ...]
    hubs: tuple[Hub, ...] = ()
    rows: tuple[int, ...] = ()
    split: str | None = None
    instruction: str = ""
    found_in: str = ""
    sample: int | None = None
    few_shot: Callable[[Sequence[str]], DataSet] | None = None
    examples: Mapping[str, Any] | None = None

    @property
    def folder_split(self) -> str:
        """The split whose files of a local folder are read."""
        return self.split or ("train" if self.kind == "train" else "test")

    def used(self, columns: Iterable[str]) -> list[str]:
        """The columns that a schema reads."""
        used = {column for schema in self.schemas for column in (*schema.columns, *schema.optional)}
        return [column for column in columns if column in used]

    def hub(self, name: str) -> Hub:
        """How to read a data set of the hub; an unknown one has the set's split and no configuration."""
        return {hub.name: hub for hub in self.hubs}.get(name, Hub(name, self.folder_split))


class Records:
    """Raw rows: a list of mappings, or an arrow table, of which only the requested rows become Python objects.

    Attributes:
        columns: all columns of the source, also those that were not read.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]] | pa.Table, columns: Iterable[str]) -> None:
        self._rows = rows
        self.columns = frozenset(columns)

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, indices: Sequence[int]) -> Iterator[Mapping[str, Any]]:
        """The rows of these numbers, in this order."""
        if isinstance(self._rows, Sequence):
            yield from (self._rows[index] for index in indices)
            return
        for start in range(0, len(indices), BATCH):
            yield from self._rows.take(list(indices[start : start + BATCH])).to_pylist()


@dataclass(frozen=True)
class Source:
    """Raw rows, a name for messages ("the file aime.json"), and their origin for the provenance."""

    records: Records
    label: str
    origin: dict[str, Any]
