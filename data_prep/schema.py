"""Description of a data set: its rows, the schemas of its files, and its place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import pyarrow as pa

BATCH = 1024
"""Number of rows that are converted from a table at a time."""
PROVENANCE = "provenance.json"


class DataError(Exception):
    """Input that cannot be used; the message is one sentence for the user."""


class Drop(Exception):
    """Raised by a schema's function: the row cannot be used; the reasons are counted."""


@dataclass(frozen=True)
class Row:
    """One problem of a data set.

    Attributes:
        question: the problem without instruction, by which duplicates and overlaps are found.
        ground_truth: passed to the reward function; see `data_prep.answers.encode` for several right answers.
        prompt: the user's message, or all messages; by default the question and the set's instruction.
        details: other columns worth keeping, as JSON values; written to ``extra_info.details``.
        held_out: a row of a training set for evaluation only, written to ``test.parquet``.
        note: a remark that is counted in the provenance, such as "two answers were accepted".
    """

    question: str
    ground_truth: str
    prompt: str | Sequence[Mapping[str, str]] | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    held_out: bool = False
    note: str | None = None


@dataclass(frozen=True)
class Schema:
    """One form of a set's rows.

    Attributes:
        columns: the columns that a source must have for this schema.
        convert: converts a raw row with these columns to a `Row`, or raises `Drop`.
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
        schemas: its schemas; the first one whose columns all exist is used.
        hubs: its places on the hub, the usual one first; empty for a set that is not on the hub.
        rows: the known numbers of rows of the source; other numbers are reported.
        split: the split that is read from a local folder; None: ``train`` or ``test`` by ``kind``.
        instruction: text after the question, following a space.
        found_in: the place of a set that is not on the hub, for the message that asks for its file.
        sample: number of rows to draw at random; None: all of them.
        few_shot: creates the set with examples from the given sources; None: the set has no examples.
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
        """Return the columns that a schema reads."""
        used = {column for schema in self.schemas for column in (*schema.columns, *schema.optional)}
        return [column for column in columns if column in used]

    def hub(self, name: str) -> Hub:
        """Return the access to a data set of the hub; an unknown one has the set's split and no configuration."""
        return {hub.name: hub for hub in self.hubs}.get(name, Hub(name, self.folder_split))


class Records:
    """Raw rows: a list of mappings, or an arrow table, of which only the requested rows become Python objects.

    Attributes:
        columns: all columns of the source, including those that were not read.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]] | pa.Table, columns: Iterable[str]) -> None:
        self._rows = rows
        self.columns = frozenset(columns)

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, indices: Sequence[int]) -> Iterator[Mapping[str, Any]]:
        """Yield the rows with these numbers, in order."""
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
