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
        question: the bare problem; duplicates and overlaps are looked for in it.
        ground_truth: what the reward function is given; see `data_prep.answers.encode` for several right answers.
        prompt: the user's message, or all messages; by default the question and the set's instruction.
        details: whatever else is worth keeping, as JSON values; stands in ``extra_info.details``.
        held_out: a row of a training set that must not be trained on; it goes to ``test.parquet``.
        note: something to be counted in the provenance, such as "two answers were accepted".
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
        columns: what a source must have to be read this way.
        convert: makes a `Row` of a raw row that has these columns, or raises `Drop`.
        optional: columns that ``convert`` looks at if they are there; others are not read.
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
        name: what the command calls it.
        title: one line for the list of sets.
        kind: ``train`` or ``eval``; only rows of training sets are left out because they are doubled or also stand in
            an evaluation set.
        ability: verl's column of this name.
        schemas: the forms it comes in; the first one whose columns are all there is taken.
        hubs: where it lies on the hub, the usual place first; empty where it is no data set of the hub.
        found_in: where people find it, for the message that asks for a file where it is no data set of the hub.
        split: which files of a local folder are read.
        instruction: stands behind the question, after a space.
        style: verl's ``reward_model.style``.
        data_source: verl's column of this name; ``gcpo/<name>`` if empty.
        sample: how many rows are drawn at random; None: all of them.
        rows: how many rows the source is known to have; another number is reported.
        few_shot: makes the set with its examples, of which it is told the sources; None: it has none.
        examples: where they are from, for the provenance.
    """

    name: str
    title: str
    kind: Literal["train", "eval"]
    ability: Literal["math", "code"]
    schemas: tuple[Schema, ...]
    hubs: tuple[Hub, ...] = ()
    found_in: str = ""
    split: str = "train"
    instruction: str = ""
    style: str = "rule"
    data_source: str = ""
    sample: int | None = None
    rows: tuple[int, ...] = ()
    few_shot: Callable[[Sequence[str]], DataSet] | None = None
    examples: Mapping[str, Any] | None = None

    def wanted(self, columns: Iterable[str]) -> list[str]:
        """Those of the columns that a schema looks at."""
        used = {column for schema in self.schemas for column in (*schema.columns, *schema.optional)}
        return [column for column in columns if column in used]

    def hub(self, name: str) -> Hub:
        """How to read a data set of the hub: as it is known, or else like the usual one."""
        known = {hub.name: hub for hub in self.hubs}
        return known.get(name, Hub(name, self.split))


class Records:
    """Raw rows: a list of mappings, or an arrow table, of which only the rows asked for are made Python objects."""

    def __init__(self, rows: Sequence[Mapping[str, Any]] | pa.Table, columns: Iterable[str]) -> None:
        self._rows = rows
        self.columns = frozenset(columns)
        """All columns of the source, also those that were not read."""

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, indices: Sequence[int]) -> Iterator[Mapping[str, Any]]:
        """The rows of these numbers, in this order."""
        if isinstance(self._rows, Sequence):
            for index in indices:
                yield self._rows[index]
            return
        for start in range(0, len(indices), BATCH):
            yield from self._rows.take(list(indices[start : start + BATCH])).to_pylist()


@dataclass(frozen=True)
class Source:
    """Raw rows and where they are from."""

    records: Records
    label: str
    """For messages: "the file aime.json"."""
    origin: dict[str, Any]
    """For the provenance."""
