"""Sets and files for the tests, and the place of real ones."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.__main__ import main
from data_prep.schema import DataSet, Drop, Row, Schema

SHARED_DATA = Path(os.environ.get("GCPO_SHARED_DATA", Path(__file__).resolve().parents[2].parent / "shared" / "data"))

AIME_ROWS = [
    {"ID": "1983-1", "Year": 1983, "Problem Number": 1, "Question": "Find x.", "Answer": "060", "Part": None},
    {"ID": "1995-3", "Year": 1995, "Question": "Find y.", "Answer": "080 or 081 (both were accepted)"},
    {"ID": "1995-4", "Year": 1995, "Question": "  ", "Answer": "1"},
    {"ID": "1995-5", "Year": 1995, "Question": "Find  x.", "Answer": "60"},
    {"ID": "1996-1", "Year": 1996, "Question": "Find z.", "Answer": None},
    {"ID": "2023-1", "Year": 2023, "Question": "Find v.", "Answer": "8"},
    {"ID": "2024-1", "Year": 2024, "Question": "Find w.", "Answer": "7"},
]


def real(*parts: str) -> Path:
    """A real file; the test is skipped where it is not on this machine."""
    path = SHARED_DATA.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path} is not on this machine (GCPO_SHARED_DATA names another place)")
    return path


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """A file of the form that its suffix names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if path.name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    elif path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(lines if path.name.endswith(".jsonl") else json.dumps(rows))
    return path


def run(*arguments: str | Path) -> int:
    """The command line."""
    return main([str(argument) for argument in arguments])


def table(path: Path) -> list[dict[str, Any]]:
    """The rows of a parquet file."""
    return pq.read_table(path).to_pylist()


def truths(path: Path) -> list[str]:
    """The right answers in a parquet file."""
    return [row["reward_model"]["ground_truth"] for row in table(path)]


def provenance(folder: Path) -> dict[str, Any]:
    """What stands beside a prepared set."""
    return json.loads((folder / "provenance.json").read_text())


def files_under(folder: Path) -> list[str]:
    """Everything in a folder, hidden or not."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def _convert(row: Any) -> Row:
    if row["a"] is None:
        raise Drop("no answer")
    return Row(str(row["q"]), str(row["a"]))


TINY = DataSet("tiny", "two columns", "train", "math", (Schema(("q", "a"), _convert),))
