"""The steps of every data set: read, convert, drop, decontaminate, write.

A set is a `data_prep.schema.DataSet`: its place on the hub, the schemas of its files, and for each schema a
function that turns a raw row into a `Row` or raises `Drop`. `prepare` does the rest for all sets. The same
input gives the same bytes.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.decontamination import EvaluationSets, key_of
from data_prep.files import SUFFIXES, files_of, read_files
from data_prep.gradable import TEXT_ONLY, checked, compared_as_text
from data_prep.hub import read_hub
from data_prep.output import check_output, verl_row, write_set
from data_prep.schema import DataError, DataSet, Drop, Row, Schema, Source

SEED = 20250


def read_source(dataset: DataSet, sources: Sequence[str], revision: str | None = None) -> Source:
    """Read local files, a local folder, or a data set of the hub; by default the set's usual place.

    Raises:
        DataError: the source does not exist or cannot be read.
    """
    if not sources:
        if not dataset.hubs:
            raise DataError(
                f"{dataset.name} is no data set of the hub; give its file, {dataset.found_in}: --source FILE"
            )
        sources = [dataset.hubs[0].name]
    if len(sources) == 1 and _looks_like_hub(sources[0]):
        return read_hub(dataset, dataset.hub(sources[0]), revision)
    if revision is not None:
        raise DataError(f"--revision is for data sets of the hub; {sources[0]} is read from this machine")
    return read_files(dataset, [file for one in sources for file in files_of(dataset, Path(one).expanduser())])


def _looks_like_hub(source: str) -> bool:
    if Path(source).expanduser().exists() or source.endswith(SUFFIXES) or source.startswith((".", "~")):
        return False
    return re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None


def find_schema(dataset: DataSet, source: Source) -> Schema:
    """Return the set's first schema whose columns the source has.

    Raises:
        DataError: a column is missing.
    """
    for schema in dataset.schemas:
        if source.records.columns.issuperset(schema.columns):
            return schema
    needed = " or ".join(f"({', '.join(schema.columns)})" for schema in dataset.schemas)
    have = ", ".join(sorted(source.records.columns)) or "none"
    raise DataError(f"{source.label} lacks columns of {dataset.name}: it has {have}, and {needed} are needed")


@dataclass
class Prepared:
    """Rows in verl's schema, and records of the other rows.

    Attributes:
        dropped: reason -> numbers (from 0 in the source) of the dropped rows.
        noted: note -> numbers of rows that were kept.
        overlaps: the rows that an evaluation set also has, with the position in that set and the similarity.
        changed: files in the output folder whose bytes changed.
    """

    dataset: DataSet
    train: list[dict[str, Any]] = field(default_factory=list)
    test: list[dict[str, Any]] = field(default_factory=list)
    dropped: dict[str, list[int]] = field(default_factory=dict)
    noted: dict[str, list[int]] = field(default_factory=dict)
    overlaps: list[dict[str, Any]] = field(default_factory=list)
    read: int = 0
    not_drawn: int = 0
    changed: list[str] = field(default_factory=list)

    @property
    def summary(self) -> str:
        """The numbers of dropped rows with the reasons."""
        return ", ".join(f"{len(which)} × {reason}" for reason, which in self.dropped.items()) or "none dropped"

    def require_rows(self, label: str) -> None:
        """Refuse a result without rows.

        Raises:
            DataError: no row remains, or a training set has none to train on.
        """
        if not self.train and not self.test:
            raise DataError(f"{label} has no usable row of {self.dataset.name} ({self.summary})")
        if self.dataset.kind == "train" and not self.train:
            raise DataError(f"{label} has no row of {self.dataset.name} to train on ({self.summary})")

    def provenance(self, source: Source, drawn: dict[str, int] | None, compared: list[Any]) -> dict[str, Any]:
        """Return the content of ``provenance.json``, without the written files."""
        listed = {
            name: {reason: {"count": len(which), "rows": which} for reason, which in reasons.items()}
            for name, reasons in (("dropped", self.dropped), ("noted", self.noted))
        }
        return {
            "set": self.dataset.name,
            "title": self.dataset.title,
            "kind": self.dataset.kind,
            "ability": self.dataset.ability,
            "source": {**source.origin, "columns": list(find_schema(self.dataset, source).columns)},
            "instruction": self.dataset.instruction,
            "examples": self.dataset.examples,
            "drawn": drawn,
            "rows": {
                "read": self.read,
                "train": len(self.train),
                "test": len(self.test),
                "dropped": sum(map(len, self.dropped.values())),
                "not_drawn": self.not_drawn,
            },
            **listed,
            "compared_with": compared,
            "overlaps": self.overlaps,
        }


def convert_rows(
    dataset: DataSet,
    source: Source,
    *,
    rows: int | None = None,
    seed: int = SEED,
    evaluation: EvaluationSets | None = None,
) -> Prepared:
    """Convert raw rows to verl's schema.

    Args:
        dataset: the set that the rows belong to.
        source: the raw rows.
        rows: number of usable rows to draw at random; None: all rows, in the order of the source.
        seed: seed of the draw; the same seed and source give the same rows in the same order.
        evaluation: problems that are excluded from training; ignored for an evaluation set.

    Raises:
        DataError: no schema fits.
    """
    schema = find_schema(dataset, source)
    order = list(range(len(source.records)))
    if rows is not None:
        random.Random(seed).shuffle(order)
    prepared = Prepared(dataset, read=len(order))
    seen: set[str] = set()
    for position, (index, raw) in enumerate(zip(order, source.records.read(order), strict=True)):
        if rows is not None and len(prepared.train) + len(prepared.test) == rows:
            prepared.not_drawn = len(order) - position
            break
        try:
            row = _convert(dataset, schema, raw)
            if dataset.kind == "train":
                _decontaminate(prepared, row, index, seen, evaluation)
        except Drop as reason:
            prepared.dropped.setdefault(str(reason), []).append(index)
            continue
        if row.note:
            prepared.noted.setdefault(row.note, []).append(index)
        trained = dataset.kind == "train" and not row.held_out
        part, split = (prepared.train, "train") if trained else (prepared.test, "test")
        part.append(verl_row(dataset, row, len(part), split, index))
    if dataset.ability == "math" and (as_text := compared_as_text([*prepared.train, *prepared.test])):
        prepared.noted[TEXT_ONLY] = as_text
    return prepared


def _convert(dataset: DataSet, schema: Schema, raw: Mapping[str, Any]) -> Row:
    """Convert a raw row.

    Raises:
        Drop: a column is missing, or the row cannot be used.
    """
    missing = [column for column in schema.columns if column not in raw]
    if missing:
        raise Drop(f"it lacks {', '.join(missing)}")
    row = schema.convert(raw)
    try:
        (row.question + row.ground_truth).encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON allows but no file
        raise Drop("half a character, which is no text") from None
    return checked(dataset, row)


def _decontaminate(prepared: Prepared, row: Row, index: int, seen: set[str], evaluation: EvaluationSets | None) -> None:
    """Drop a training row that is a duplicate or also in an evaluation set; a held-out row may be in one.

    Raises:
        Drop: the row is such a duplicate.
    """
    key = key_of(row.question)
    if key in seen:
        raise Drop("same question as an earlier row")
    seen.add(key)
    if not row.held_out and evaluation is not None and (overlap := evaluation.find(row.question)):
        prepared.overlaps.append({"row": index, "question": row.question[:120], **overlap})
        raise Drop(f"also in the evaluation set {overlap['set']} ({overlap['match']})")


def prepare(
    dataset: DataSet,
    output: Path,
    sources: Sequence[str] = (),
    *,
    revision: str | None = None,
    rows: int | None = None,
    seed: int = SEED,
    evaluation: EvaluationSets | None = None,
    examples: Sequence[str] = (),
    say: Callable[[str], None] = lambda line: None,
) -> Prepared:
    """Read a set and write ``train.parquet`` and/or ``test.parquet`` and ``provenance.json`` into ``output``.

    Args:
        dataset: the set to prepare.
        output: the set's folder, in which earlier files of this set are replaced.
        sources: local files, a folder, or a data set of the hub; by default the set's usual place.
        revision: revision of the data set of the hub.
        rows: number of rows to draw; None: the set's default.
        seed: seed of the draw.
        evaluation: problems that are excluded from training.
        examples: sources of the set with the few-shot examples, like ``sources``.
        say: called with a line about the source.

    Raises:
        DataError: the source cannot be used, no row remains, or ``output`` cannot be written; ``output`` is unchanged.
    """
    check_output(dataset, output)
    if dataset.few_shot is not None:
        dataset = dataset.few_shot(examples)
    elif examples:
        raise DataError(f"{dataset.name} is asked without examples; leave out --examples")
    source = read_source(dataset, sources, revision)
    say(f"{dataset.name}: {len(source.records)} rows from {source.label}")
    rows = dataset.sample if rows is None else rows
    prepared = convert_rows(dataset, source, rows=rows, seed=seed, evaluation=evaluation)
    prepared.require_rows(source.label)
    drawn = None if rows is None else {"rows": rows, "seed": seed}
    compared = evaluation.origin if evaluation is not None and dataset.kind == "train" else []
    provenance = prepared.provenance(source, drawn, compared)
    prepared.changed = write_set(output, {"train": prepared.train, "test": prepared.test}, provenance)
    return prepared
