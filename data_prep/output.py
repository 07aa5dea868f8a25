"""The prepared files: rows in verl's schema as parquet, with a ``provenance.json`` in the same folder.

All files have the same columns with the same types, because verl concatenates the files of a run.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.files import first_line, sha256_of
from data_prep.schema import PROVENANCE, DataError, DataSet, Row
from gcpo.files import lock

if TYPE_CHECKING:
    import pyarrow as pa


def verl_row(dataset: DataSet, row: Row, index: int, split: str, source_row: int) -> dict[str, Any]:
    """Return a row in verl's schema."""
    prompt = f"{row.question} {dataset.instruction}".rstrip() if row.prompt is None else row.prompt
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    return {
        "data_source": f"gcpo/{dataset.name}",
        "prompt": [dict(message) for message in prompt],
        "ability": dataset.ability,
        "reward_model": {"style": "rule", "ground_truth": row.ground_truth},
        "extra_info": {
            "index": index,
            "split": split,
            "source_row": source_row,
            "question": row.question,
            "details": json.dumps(dict(row.details), sort_keys=True, default=str),
        },
    }


def parquet_schema() -> pa.Schema:
    """Return the columns and types of every file."""
    import pyarrow as pa

    text, number = pa.string(), pa.int64()
    extra = {"index": number, "split": text, "source_row": number, "question": text, "details": text}
    return pa.schema(
        {
            "data_source": text,
            "prompt": pa.list_(pa.struct({"role": text, "content": text})),
            "ability": text,
            "reward_model": pa.struct({"style": text, "ground_truth": text}),
            "extra_info": pa.struct(extra),
        }
    )


def is_prepared(path: Path) -> bool:
    """Return whether a parquet file has verl's schema."""
    import pyarrow.parquet as pq

    try:
        return {"prompt", "data_source", "reward_model"} <= set(pq.read_schema(path).names)
    except (OSError, ValueError):
        return False


def check_output(dataset: DataSet, output: Path) -> None:
    """Refuse a folder that holds another set.

    Raises:
        DataError: the folder holds another set, or its provenance cannot be read.
    """
    try:
        existing = json.loads((output / PROVENANCE).read_text()).get("set", dataset.name)
    except FileNotFoundError:
        return
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{output} can't be used as output: {first_line(error)}") from error
    if existing != dataset.name:
        raise DataError(f"{output} holds the set {existing}; give another folder for {dataset.name}: --output DIR")


def write_set(output: Path, parts: Mapping[str, list[dict[str, Any]]], provenance: dict[str, Any]) -> list[str]:
    """Write all files into a temporary folder and rename them when they are complete.

    Args:
        output: the folder of the set.
        parts: rows in verl's schema by split.
        provenance: the provenance, to which ``files`` and ``versions`` are added.

    Returns:
        The parquet files that existed with other bytes.

    Raises:
        DataError: ``output`` cannot be written; it is then unchanged.
    """
    missing = [folder for folder in (output, *output.parents) if not folder.exists()]
    fresh = False
    try:
        # Two runs of one checkout may prepare the same set.
        with lock(output):
            fresh = not output.exists()
            output.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=output) as staged:
                return _write_staged(output, Path(staged), parts, provenance)
    except BaseException as error:
        if fresh:
            shutil.rmtree(output, ignore_errors=True)
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError | ValueError):  # arrow raises one of the two
            raise DataError(f"{output} can't be written: {first_line(error)}") from error
        raise


def _write_staged(
    output: Path, staged: Path, parts: Mapping[str, list[dict[str, Any]]], provenance: dict[str, Any]
) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = {}
    for split, rows in parts.items():
        if rows:
            path = staged / f"{split}.parquet"
            pq.write_table(pa.Table.from_pylist(rows, schema=parquet_schema()), path)
            files[path.name] = {"rows": len(rows), "sha256": sha256_of(path)}
    provenance = {**provenance, "files": files, "versions": {"pyarrow": pa.__version__}}
    (staged / PROVENANCE).write_text(json.dumps(provenance, indent=1, ensure_ascii=False) + "\n")
    old = [output / f"{split}.parquet" for split in parts if (output / f"{split}.parquet").exists()]
    changed = [path.name for path in old if files.get(path.name, {}).get("sha256") != sha256_of(path)]
    for path in old:
        if path.name not in files:
            path.unlink()
    for name in (*files, PROVENANCE):
        os.replace(staged / name, output / name)
    return changed
