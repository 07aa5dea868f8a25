"""What every data set goes through: read, convert, leave out, compare with the evaluation sets, write.

A set is a `DataSet`: where it lies on the hub, the schemas its files come in, and for each schema a function that turns
a raw row into a `Row` or raises `Drop`. `prepare` does the rest, the same for all of them, and writes parquet files in
verl's schema with a ``provenance.json`` beside them. The same input gives the same bytes.

All files have the same columns with the same types, so that verl, which puts several files of a run into one table,
can take any of them together.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import pyarrow as pa

    from data_prep.overlap import EvaluationSets

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")
SPLITS = ("train", "test", "validation")
BATCH = 1024
"""Rows that are taken from a table at a time."""
SEED = 20250
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


def read_source(dataset: DataSet, sources: Sequence[str], revision: str | None = None) -> Source:
    """Read local files, a local folder, or a data set of the hub; nothing: the set's usual place.

    Raises:
        DataError: it is not there, or it can't be read.
    """
    if not sources:
        if not dataset.hubs:
            raise DataError(
                f"{dataset.name} is no data set of the hub; give its file, {dataset.found_in}: --source FILE"
            )
        sources = [dataset.hubs[0].name]
    if len(sources) == 1 and _looks_like_hub(sources[0]):
        from data_prep.hub import read_hub

        return read_hub(dataset, dataset.hub(sources[0]), revision)
    if revision is not None:
        raise DataError(f"--revision is for data sets of the hub; {sources[0]} is read from this machine")
    files: list[Path] = []
    for source in sources:
        files += _files_of(dataset, Path(source).expanduser())
    return read_files(dataset, files)


def _looks_like_hub(source: str) -> bool:
    if Path(source).expanduser().exists() or source.endswith(SUFFIXES) or source.startswith((".", "~")):
        return False
    return re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None


def _files_of(dataset: DataSet, path: Path) -> list[Path]:
    """The file itself, or a folder's files of the set's split."""
    if not path.exists():
        raise DataError(f"there is no file or folder {path}; give one, or a data set of the hub as OWNER/NAME")
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise DataError(f"{path} is no {', '.join(SUFFIXES)} file; give one, or a data set of the hub")
        return [path]
    # A folder downloaded from the hub has one folder per configuration.
    configs = {config for hub in dataset.hubs for config in hub.configs if config}
    inside = [path / config for config in sorted(configs) if (path / config).is_dir()]
    found = sorted(
        file
        for folder in inside or [path]
        for file in folder.rglob("*")
        if file.name.endswith(SUFFIXES) and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if not found:
        raise DataError(f"{path} holds no {', '.join(SUFFIXES)} file; give the folder or the file with the rows")
    splits = {file: _split_of(file.relative_to(path)) for file in found}
    chosen = [file for file in found if splits[file] == dataset.split] or [file for file in found if not splits[file]]
    # Without the split in their names, parts of one set differ in numbers alone, and other files are other sets.
    kinds = {re.sub(r"\d+", "", file.name) for file in chosen if _split_of(Path(file.name)) is None}
    if chosen and len(kinds) <= 1:
        return chosen
    names = ", ".join(str(file.relative_to(path)) for file in found[:5]) + (", ..." if len(found) > 5 else "")
    raise DataError(f"{path} holds {names}, and which of them is {dataset.name} is not clear; give the file")


def _split_of(path: Path) -> str | None:
    for part in reversed(path.parts):
        for split in SPLITS:
            if re.match(rf"{split}(?![A-Za-z])", part.lower()):
                return split
    return None


def read_files(dataset: DataSet, files: Sequence[Path]) -> Source:
    """Rows of local files of the same schema.

    Raises:
        DataError: a file can't be read, or it has no rows.
    """
    import pyarrow as pa

    parts: list[Any] = []
    columns: list[set[str]] = []
    origin: list[dict[str, Any]] = []
    for file in files:
        rows, names = read_file(file, dataset.wanted)
        if not len(rows):
            raise DataError(f"{file} has no rows")
        parts.append(rows)
        columns.append(names)
        origin.append({"file": str(file), "rows": len(rows), "sha256": sha256_of(file)})
    if all(isinstance(part, pa.Table) for part in parts):
        try:
            joined: Any = parts[0] if len(parts) == 1 else pa.concat_tables(parts, promote_options="default")
        except (pa.ArrowException, TypeError) as error:
            raise DataError(f"{files[0].parent} holds files of different columns ({first_line(error)})") from error
    else:
        joined = [row for part in parts for row in (part.to_pylist() if isinstance(part, pa.Table) else part)]
    label = f"the file {files[0]}" if len(files) == 1 else f"{len(files)} files, {files[0]} first"
    return Source(Records(joined, set.intersection(*columns)), label, {"kind": "files", "files": origin})


def read_file(path: Path, wanted: Callable[[Iterable[str]], list[str]] = list) -> tuple[Any, set[str]]:
    """Rows of a json, jsonl (also gzipped) or parquet file, and the names of all its columns.

    Args:
        path: the file.
        wanted: told the columns of a parquet file, says which to read.

    Returns:
        A list of mappings, or an arrow table for parquet.

    Raises:
        DataError: it can't be read, or holds no rows of objects.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if path.name.endswith(".parquet"):
            names = pq.read_schema(path).names
            return pq.read_table(path, columns=wanted(names), partitioning=None), set(names)
        data = path.read_bytes()
        if path.name.endswith(".gz"):
            data = gzip.decompress(data)
        rows = _rows_of_json(data.decode("utf-8-sig"))
    except (OSError, ValueError, EOFError, zlib.error, RecursionError, pa.ArrowException) as error:
        raise DataError(f"{path} can't be read: {first_line(error)}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path} holds no list of rows; it must be a list of objects, or one object per line")
    return rows, {key for row in rows for key in row}


def _rows_of_json(text: str) -> Any:
    """A list of objects, or one object per line, which files with the suffix .json are, too, now and then."""
    if text.lstrip()[:1] in ("[", ""):
        return json.loads(text) if text.strip() else []
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"line {number} is no JSON ({error})") from error
    return rows


def first_line(error: BaseException) -> str:
    """What an error says, without its other lines."""
    text = getattr(error, "strerror", None) or str(error)
    return (text.strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_schema(dataset: DataSet, source: Source) -> Schema:
    """The set's first schema whose columns the source has.

    Raises:
        DataError: a column is missing.
    """
    for schema in dataset.schemas:
        if source.records.columns.issuperset(schema.columns):
            return schema
    wanted = " or ".join(f"({', '.join(schema.columns)})" for schema in dataset.schemas)
    have = ", ".join(sorted(source.records.columns)) or "none"
    raise DataError(f"{source.label} lacks columns of {dataset.name}: it has {have}, and {wanted} are needed")


@dataclass
class Prepared:
    """Rows in verl's schema, and what became of the others."""

    dataset: DataSet
    train: list[dict[str, Any]] = field(default_factory=list)
    test: list[dict[str, Any]] = field(default_factory=list)
    dropped: dict[str, list[int]] = field(default_factory=dict)
    """Why rows were left out, and which, counted from 0 in the source."""
    noted: dict[str, list[int]] = field(default_factory=dict)
    """What is worth knowing of rows that were kept."""
    overlaps: list[dict[str, Any]] = field(default_factory=list)
    """The rows that also stand in an evaluation set, with where, and how alike they are."""
    read: int = 0
    not_drawn: int = 0
    changed: list[str] = field(default_factory=list)
    """Files that stood in the output folder with other bytes."""

    @property
    def summary(self) -> str:
        """How many rows were dropped, and why."""
        return ", ".join(f"{len(which)} × {reason}" for reason, which in self.dropped.items()) or "none dropped"


def convert_rows(
    dataset: DataSet,
    source: Source,
    *,
    rows: int | None = None,
    seed: int = SEED,
    evaluation: EvaluationSets | None = None,
) -> Prepared:
    """Rows in verl's schema.

    Args:
        dataset: what they are.
        source: the raw rows.
        rows: how many to draw at random among the usable ones; None: all, in the order of the source.
        seed: of the draw; the same seed and source give the same rows in the same order.
        evaluation: what must not be trained on; ignored for an evaluation set.

    Raises:
        DataError: no schema fits.
    """
    from data_prep.overlap import key_of

    schema = find_schema(dataset, source)
    order = list(range(len(source.records)))
    if rows is not None:
        random.Random(seed).shuffle(order)
    prepared = Prepared(dataset, read=len(order))
    seen: set[str] = set()
    for looked_at, (index, raw) in enumerate(zip(order, source.records.read(order), strict=True)):
        if rows is not None and len(prepared.train) + len(prepared.test) == rows:
            prepared.not_drawn = len(order) - looked_at
            break
        try:
            row = schema.convert(raw)
            if not is_unicode(row.question) or not is_unicode(row.ground_truth):
                raise Drop("half a character, which is no text")
            trained = dataset.kind == "train" and not row.held_out
            if dataset.kind == "train":
                key = key_of(row.question)
                if key in seen:
                    raise Drop("same question as an earlier row")
                seen.add(key)
            if trained and evaluation is not None and (overlap := evaluation.find(row.question)):
                prepared.overlaps.append({"row": index, "question": row.question[:120], **overlap})
                raise Drop(f"also in the evaluation set {overlap['set']} ({overlap['match']})")
        except Drop as reason:
            prepared.dropped.setdefault(str(reason), []).append(index)
            continue
        if row.note:
            prepared.noted.setdefault(row.note, []).append(index)
        part, split = (prepared.train, "train") if trained else (prepared.test, "test")
        part.append(_verl_row(dataset, row, len(part), split, index))
    return prepared


def is_unicode(text: str) -> bool:
    """False where there is a lone surrogate, which JSON can hold and no file can."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _verl_row(dataset: DataSet, row: Row, index: int, split: str, source_row: int) -> dict[str, Any]:
    prompt = row.prompt
    if prompt is None:
        prompt = f"{row.question} {dataset.instruction}".rstrip()
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    return {
        "data_source": dataset.data_source or f"gcpo/{dataset.name}",
        "prompt": [dict(message) for message in prompt],
        "ability": dataset.ability,
        "reward_model": {"style": dataset.style, "ground_truth": row.ground_truth},
        "extra_info": {
            "index": index,
            "split": split,
            "source_row": source_row,
            "question": row.question,
            "details": json.dumps(dict(row.details), sort_keys=True),
        },
    }


def parquet_schema() -> pa.Schema:
    """Columns and types of all files."""
    import pyarrow as pa

    text, number = pa.string(), pa.int64()
    return pa.schema(
        {
            "data_source": text,
            "prompt": pa.list_(pa.struct({"role": text, "content": text})),
            "ability": text,
            "reward_model": pa.struct({"style": text, "ground_truth": text}),
            "extra_info": pa.struct(
                {"index": number, "split": text, "source_row": number, "question": text, "details": text}
            ),
        }
    )


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
        dataset: what to prepare.
        output: a folder of its own; what this set wrote there before is replaced.
        sources: local files, a folder, or a data set of the hub; nothing: the set's usual place.
        revision: of the data set of the hub.
        rows: how many rows to draw; None: the set's own number.
        seed: of the draw.
        evaluation: what must not be trained on.
        examples: like ``sources``, of the set that few-shot examples are taken from.
        say: told what is read, and from where.

    Raises:
        DataError: the source can't be used, nothing of it is left, or ``output`` can't be written; what stood in
            ``output`` is then as it was.
    """
    _check_output(dataset, output)
    if dataset.few_shot is not None:
        dataset = dataset.few_shot(examples)
    elif examples:
        raise DataError(f"{dataset.name} is asked without examples; leave out --examples")
    source = read_source(dataset, sources, revision)
    say(f"{dataset.name}: {len(source.records)} rows from {source.label}")
    rows = dataset.sample if rows is None else rows
    prepared = convert_rows(dataset, source, rows=rows, seed=seed, evaluation=evaluation)
    if not prepared.train and not prepared.test:
        raise DataError(f"{source.label} has no usable row of {dataset.name} ({prepared.summary})")
    if dataset.kind == "train" and not prepared.train:
        raise DataError(f"{source.label} has no row of {dataset.name} to train on ({prepared.summary})")
    schema = find_schema(dataset, source)
    provenance = {
        "set": dataset.name,
        "title": dataset.title,
        "kind": dataset.kind,
        "ability": dataset.ability,
        "source": {**source.origin, "columns": list(schema.columns)},
        "instruction": dataset.instruction,
        "examples": dataset.examples,
        "drawn": None if rows is None else {"rows": rows, "seed": seed},
        "rows": {
            "read": prepared.read,
            "train": len(prepared.train),
            "test": len(prepared.test),
            "dropped": sum(map(len, prepared.dropped.values())),
            "not_drawn": prepared.not_drawn,
        },
        "dropped": {reason: {"count": len(which), "rows": which} for reason, which in prepared.dropped.items()},
        "noted": {note: {"count": len(which), "rows": which} for note, which in prepared.noted.items()},
        "compared_with": evaluation.origin if evaluation is not None and dataset.kind == "train" else [],
        "overlaps": prepared.overlaps,
    }
    prepared.changed = _write(output, {"train": prepared.train, "test": prepared.test}, provenance)
    return prepared


def _check_output(dataset: DataSet, output: Path) -> None:
    try:
        there = json.loads((output / PROVENANCE).read_text()).get("set", dataset.name)
    except FileNotFoundError:
        return
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{output} can't be used as output: {first_line(error)}") from error
    if there != dataset.name:
        raise DataError(f"{output} holds the set {there}; give another folder for {dataset.name}: --output DIR")


def _write(output: Path, parts: Mapping[str, list[dict[str, Any]]], provenance: dict[str, Any]) -> list[str]:
    """Write all files into a folder of their own and put them in their places when they are whole.

    Returns:
        The parquet files that were there before, with other bytes.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    staged: Path | None = None
    made: Path | None = None
    try:
        made = next((parent for parent in (*reversed(output.parents), output) if not parent.exists()), None)
        output.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=output))
        files = {}
        for split, rows in parts.items():
            if rows:
                path = staged / f"{split}.parquet"
                pq.write_table(pa.Table.from_pylist(rows, schema=parquet_schema()), path)
                files[path.name] = {"rows": len(rows), "sha256": sha256_of(path)}
        provenance = {**provenance, "files": files, "versions": {"pyarrow": pa.__version__}}
        (staged / PROVENANCE).write_text(json.dumps(provenance, indent=1, ensure_ascii=False) + "\n")
        there = [output / f"{split}.parquet" for split in parts if (output / f"{split}.parquet").exists()]
        changed = [path.name for path in there if files.get(path.name, {}).get("sha256") != sha256_of(path)]
        for path in there:
            if path.name not in files:
                path.unlink()
        for name in (*files, PROVENANCE):
            os.replace(staged / name, output / name)
        made = None
        return changed
    except (OSError, ValueError) as error:  # arrow's are one or the other
        raise DataError(f"{output} can't be written: {first_line(error)}") from error
    finally:
        if staged is not None:
            shutil.rmtree(staged, ignore_errors=True)
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)


def is_prepared(path: Path) -> bool:
    """Whether a parquet file is in verl's schema already."""
    import pyarrow.parquet as pq

    try:
        return {"prompt", "data_source", "reward_model"} <= set(pq.read_schema(path).names)
    except (OSError, ValueError):
        return False
