"""Raw rows from local files and folders."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from data_prep.schema import DataError, DataSet, Records, Source

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")
SPLITS = ("train", "test", "validation")


def files_of(dataset: DataSet, path: Path) -> list[Path]:
    """Return the file itself, or the files of the set's split in a folder."""
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
    splits = {file: split_of(file.relative_to(path)) for file in found}
    chosen = [file for file in found if splits[file] == dataset.folder_split] or [
        file for file in found if not splits[file]
    ]
    # Names without a split differ only in numbers if they are parts of one set.
    kinds = {re.sub(r"\d+", "", file.name) for file in chosen if split_of(Path(file.name)) is None}
    if chosen and len(kinds) <= 1:
        return chosen
    names = ", ".join(str(file.relative_to(path)) for file in found[:5]) + (", ..." if len(found) > 5 else "")
    raise DataError(f"{path} holds {names}, and which of them is {dataset.name} is not clear; give the file")


def split_of(path: Path) -> str | None:
    for part in reversed(path.parts):
        for split in SPLITS:
            if re.match(rf"{split}(?![A-Za-z])", part.lower()):
                return split
    return None


def read_files(dataset: DataSet, files: Sequence[Path]) -> Source:
    """Read the rows of local files with the same schema.

    Raises:
        DataError: a file cannot be read, or it has no rows.
    """
    import pyarrow as pa

    parts: list[Any] = []
    columns: list[set[str]] = []
    origin: list[dict[str, Any]] = []
    for file in files:
        rows, names = read_file(file, dataset.used)
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


def read_file(path: Path, used: Callable[[Iterable[str]], list[str]] = list) -> tuple[Any, set[str]]:
    """Read the rows of a json, jsonl (also gzipped) or parquet file, and the names of all its columns.

    Args:
        path: the file.
        used: function that selects the columns to read from a parquet file.

    Returns:
        A list of mappings, or an arrow table for parquet.

    Raises:
        DataError: the file cannot be read, or has no rows of objects.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if path.name.endswith(".parquet"):
            with pq.ParquetFile(path) as file:
                names = file.schema_arrow.names
                return file.read(columns=used(names)), set(names)
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
    """Return a list of objects, or one object per line, which some files with the suffix .json also contain."""
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
    """Return the first line of an error's message."""
    text = getattr(error, "strerror", None) or str(error)
    return (text.strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
