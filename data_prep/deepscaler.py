"""The paper's training set for DeepScaleR-1.5B: AIME problems up to 2023, in verl's schema.

``python -m data_prep.deepscaler --source PATH_OR_HUB_ID --output DIR`` reads a json, jsonl or parquet file, or a data
set of the hub, and writes ``train.parquet``, ``test.parquet`` (later years, if the source has any) and
``provenance.json``. Two schemas are known: the hub's "AIME 1983-2024" (Year, Question, Answer; its 919 rows up to 2023
are the paper's) and DeepScaleR's ``aime.json`` (year, problem, answer; 975 rows).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DATA_SOURCE = "gcpo/aime"
HUB_ID = "di-zhang-fdu/AIME_1983_2024"
FIRST_YEAR, LAST_YEAR = 1983, 2023
INSTRUCTION = "Let's think step by step and output the final answer within \\boxed{}."
SUFFIXES = (".json", ".jsonl", ".parquet")


class SourceError(Exception):
    """A source that can't be used; the message is one sentence for the user."""


@dataclass(frozen=True)
class Schema:
    """What the columns of a source are called."""

    question: str
    answer: str
    year: str


SCHEMAS = (Schema("Question", "Answer", "Year"), Schema("problem", "answer", "year"))


@dataclass
class Prepared:
    """Rows in verl's schema, and what became of the others."""

    train: list[dict[str, Any]] = field(default_factory=list)
    test: list[dict[str, Any]] = field(default_factory=list)
    dropped: dict[str, list[int]] = field(default_factory=dict)
    """Why rows were dropped, and which, counted from 0 in the source."""

    def drop(self, reason: str, index: int) -> None:
        """Leave a row out."""
        self.dropped.setdefault(reason, []).append(index)


def read_source(source: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of a file or of a data set of the hub, and where they are from.

    Raises:
        SourceError: it is not there, or it can't be read.
    """
    path = Path(source).expanduser()
    looks_like_path = path.suffix in SUFFIXES or source.startswith(("/", ".", "~"))
    if path.exists() or looks_like_path or not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        return _read_file(path)
    return _read_hub(source)


def _read_file(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    if not path.exists():
        raise SourceError(f"there is no file {path}; give a {', '.join(SUFFIXES)} file or a data set of the hub")
    if path.is_dir() or path.suffix not in SUFFIXES:
        raise SourceError(f"{path} is no {', '.join(SUFFIXES)} file; give one, or a data set of the hub")
    try:
        data = path.read_bytes()
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            rows: Any = pq.read_table(path).to_pylist()
        elif path.suffix == ".jsonl":
            rows = [json.loads(line) for line in data.decode().splitlines() if line.strip()]
        else:
            rows = json.loads(data)
    except (OSError, ValueError) as error:  # pyarrow's and json's errors are ValueErrors
        raise SourceError(f"{path} can't be read: {str(error).splitlines()[0]}") from error
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise SourceError(f"{path} holds no list of rows; it must be a list of objects, one per problem")
    return rows, {"file": path.name, "sha256": hashlib.sha256(data).hexdigest()}


def _read_hub(name: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    import datasets

    try:
        loaded = datasets.load_dataset(name, split="train")
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise SourceError(
            f"the data set {name} can't be loaded from the hub ({reason}); "
            "where the hub can't be reached, download it elsewhere and give the file: --source FILE.parquet"
        ) from error
    rows = loaded.to_list()
    digest = hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()
    return rows, {"hub": name, "split": "train", "sha256_of_rows": digest}


def find_schema(rows: Sequence[Mapping[str, Any]], source: str) -> Schema:
    """The schema whose columns the rows have.

    Raises:
        SourceError: there are no rows, or a column is missing.
    """
    if not rows:
        raise SourceError(f"{source} has no rows")
    columns = {key for row in rows for key in row}
    for schema in SCHEMAS:
        if {schema.question, schema.answer, schema.year} <= columns:
            return schema
    wanted = " or ".join(f"{s.question}, {s.answer}, {s.year}" for s in SCHEMAS)
    raise SourceError(f"{source} lacks columns: it has {', '.join(sorted(columns))}, and {wanted} are needed")


def prepare_rows(
    rows: Iterable[Mapping[str, Any]], schema: Schema, first_year: int = FIRST_YEAR, last_year: int = LAST_YEAR
) -> Prepared:
    """Rows in verl's schema: training rows of the years asked for, test rows of later years."""
    prepared = Prepared()
    seen: set[str] = set()
    for index, row in enumerate(rows):
        question, answer = _text(row.get(schema.question)), _answer(row.get(schema.answer))
        try:
            year = int(row[schema.year])
        except (KeyError, TypeError, ValueError):
            prepared.drop("no year", index)
            continue
        if year < first_year:
            prepared.drop(f"before {first_year}", index)
        elif not question:
            prepared.drop("empty question", index)
        elif not answer:
            prepared.drop("no answer", index)
        elif (key := re.sub(r"\s+", " ", question)) in seen:
            prepared.drop("same question as an earlier row", index)
        else:
            seen.add(key)
            split, target = ("train", prepared.train) if year <= last_year else ("test", prepared.test)
            target.append(
                {
                    "data_source": DATA_SOURCE,
                    "prompt": [{"role": "user", "content": f"{question} {INSTRUCTION}"}],
                    "ability": "math",
                    "reward_model": {"style": "rule", "ground_truth": answer},
                    "extra_info": {"index": len(target), "split": split, "year": year, "source_row": index},
                }
            )
    return prepared


def _text(value: Any) -> str:
    return value.strip() if isinstance(value, str) else ""


def _answer(value: Any) -> str:
    """The answer as text: AIME's are integers, which some copies pad with zeros and others keep as floats."""
    if isinstance(value, bool) or value is None:
        return ""
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else ""
    text = str(value).strip()
    return str(int(text)) if text.isdigit() else text


def prepare(source: str, output: Path, first_year: int = FIRST_YEAR, last_year: int = LAST_YEAR) -> Prepared:
    """Read ``source`` and write the parquet files and ``provenance.json`` into ``output``.

    Raises:
        SourceError: the source can't be used, nothing of it is left, or ``output`` can't be written.
    """
    rows, origin = read_source(source)
    prepared = prepare_rows(rows, find_schema(rows, source), first_year, last_year)
    if not prepared.train:
        reasons = ", ".join(f"{len(which)} × {reason}" for reason, which in prepared.dropped.items()) or "none dropped"
        raise SourceError(f"{source} has no usable problem of {first_year} to {last_year} ({reasons})")
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        output.mkdir(parents=True, exist_ok=True)
        for split, part in (("train", prepared.train), ("test", prepared.test)):
            path = output / f"{split}.parquet"
            if not part:
                path.unlink(missing_ok=True)
                continue
            unfinished = output / f".{split}.parquet.part"
            pq.write_table(pa.Table.from_pylist(part), unfinished)
            unfinished.replace(path)
        provenance = {
            "source": origin,
            "years": {"train": [first_year, last_year], "test": f"after {last_year}"},
            "rows": {"read": len(rows), "train": len(prepared.train), "test": len(prepared.test)},
            "dropped": {reason: {"count": len(w), "rows": w} for reason, w in prepared.dropped.items()},
            "instruction": INSTRUCTION,
        }
        (output / "provenance.json").write_text(json.dumps(provenance, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise SourceError(f"{output} can't be written: {error.strerror or error}") from error
    return prepared


def is_prepared(path: Path) -> bool:
    """Whether a parquet file is in verl's schema already."""
    import pyarrow.parquet as pq

    try:
        return {"prompt", "data_source", "reward_model"} <= set(pq.read_schema(path).names)
    except (OSError, ValueError):
        return False


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: see the module's description."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.deepscaler", description="AIME problems up to 2023 in verl's schema."
    )
    parser.add_argument("--source", default=HUB_ID, help=f"file or data set of the hub (default: {HUB_ID})")
    parser.add_argument("--output", type=Path, help="directory for the parquet files")
    parser.add_argument(
        "--is-prepared", type=Path, metavar="FILE", help="exit with 0 if FILE is in verl's schema, else with 1"
    )
    parser.add_argument("--first-year", type=int, default=FIRST_YEAR)
    parser.add_argument("--last-year", type=int, default=LAST_YEAR, help="later years go to test.parquet")
    options = parser.parse_args(arguments)
    if options.is_prepared:
        return 0 if is_prepared(options.is_prepared) else 1
    if options.output is None:
        parser.error("the following arguments are required: --output")
    try:
        prepared = prepare(options.source, options.output, options.first_year, options.last_year)
    except SourceError as error:
        print(f"deepscaler: {error}", file=sys.stderr)
        return 2
    print(f"{options.output}: {len(prepared.train)} problems to train on, {len(prepared.test)} of later years")
    for reason, which in prepared.dropped.items():
        print(f"dropped: {len(which)} × {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
