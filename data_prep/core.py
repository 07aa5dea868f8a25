"""What every data set goes through: read, convert, leave out, compare with the evaluation sets, write.

A set is a `data_prep.schema.DataSet`: where it lies on the hub, the schemas its files come in, and for each schema a
function that turns a raw row into a `Row` or raises `Drop`. `prepare` does the rest, the same for all of them, and
writes parquet files in verl's schema with a ``provenance.json`` beside them. The same input gives the same bytes.

All files have the same columns with the same types, so that verl, which puts several files of a run into one table,
can take any of them together.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.decontamination import EvaluationSets, key_of
from data_prep.files import SUFFIXES, files_of, first_line, read_files, sha256_of
from data_prep.gradable import TEXT_ONLY, checked, compared_as_text
from data_prep.hub import read_hub
from data_prep.schema import PROVENANCE, DataError, DataSet, Drop, Row, Schema, Source
from gcpo.files import lock

if TYPE_CHECKING:
    import pyarrow as pa

SEED = 20250


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
        return read_hub(dataset, dataset.hub(sources[0]), revision)
    if revision is not None:
        raise DataError(f"--revision is for data sets of the hub; {sources[0]} is read from this machine")
    files: list[Path] = []
    for source in sources:
        files += files_of(dataset, Path(source).expanduser())
    return read_files(dataset, files)


def _looks_like_hub(source: str) -> bool:
    if Path(source).expanduser().exists() or source.endswith(SUFFIXES) or source.startswith((".", "~")):
        return False
    return re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None


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
            row = _convert(dataset, schema, raw)
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
    if dataset.ability == "math" and (as_text := compared_as_text([*prepared.train, *prepared.test])):
        prepared.noted[TEXT_ONLY] = as_text
    return prepared


def _convert(dataset: DataSet, schema: Schema, raw: Mapping[str, Any]) -> Row:
    """A row of the set.

    Raises:
        Drop: a column is missing, or the row cannot be used.
    """
    missing = [column for column in schema.columns if column not in raw]
    if missing:
        raise Drop(f"it lacks {', '.join(missing)}")
    row = schema.convert(raw)
    if not is_unicode(row.question) or not is_unicode(row.ground_truth):
        raise Drop("half a character, which is no text")
    return checked(dataset, row)


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
            "details": json.dumps(dict(row.details), sort_keys=True, default=str),
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
    made = next((parent for parent in (*reversed(output.parents), output) if not parent.exists()), None)
    with contextlib.ExitStack() as stack:
        try:
            # Two runs of one checkout prepare the same set.
            stack.enter_context(lock(output))
        except OSError as error:
            raise DataError(f"{output} can't be written: {first_line(error)}") from error
        return _write_locked(output, parts, provenance, made)


def _write_locked(
    output: Path, parts: Mapping[str, list[dict[str, Any]]], provenance: dict[str, Any], made: Path | None
) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    staged: Path | None = None
    try:
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
