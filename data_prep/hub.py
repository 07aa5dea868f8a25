"""Reading from the hub, with the `datasets` library and its cache."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

from data_prep.core import DataError, DataSet, Hub, Records, Source, _first_line

TIMEOUT = 20
"""Seconds that the hub has to answer before the cache is asked instead."""


def read_hub(dataset: DataSet, hub: Hub, revision: str | None = None) -> Source:
    """The rows of a data set of the hub, or of its copy in the cache where the hub doesn't answer.

    Raises:
        DataError: neither has it, or it has no such revision, configuration or split.
    """
    import datasets
    import huggingface_hub
    import pyarrow as pa
    from huggingface_hub import errors

    datasets.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    answers = True
    try:
        # A commit that is named can't change between this question and the download.
        revision = huggingface_hub.HfApi().dataset_info(hub.name, revision=revision, timeout=TIMEOUT).sha
    except errors.GatedRepoError as error:
        raise DataError(f"the data set {hub.name} asks for consent on the hub; give it there, then log in") from error
    except errors.RevisionNotFoundError as error:
        raise DataError(f"the data set {hub.name} has no revision {revision} on the hub") from error
    except errors.RepositoryNotFoundError as error:
        raise DataError(
            f"there is no file {hub.name}, and the hub has no data set of this name that you may read"
        ) from error
    except Exception:  # no network: every HTTP library has its own errors
        answers = False
    loaded = []
    with _cache_only(not answers):
        for config in hub.configs:
            try:
                loaded.append(_one_split(datasets.load_dataset(hub.name, config, revision=revision), hub))
            except DataError:
                raise
            except Exception as error:
                if not answers:
                    raise DataError(
                        f"the data set {hub.name} is not in the cache, and the hub doesn't answer; "
                        "download it elsewhere and give the file or folder: --source PATH"
                    ) from error
                raise DataError(f"the data set {hub.name} can't be loaded: {_first_line(error)}") from error
    wanted = {column for schema in dataset.schemas for column in (*schema.columns, *schema.optional)}
    columns = set.intersection(*(set(one.column_names) for one in loaded))
    if not sum(map(len, loaded)):
        raise DataError(f"the data set {hub.name} has no rows in its split {hub.split}")
    tables = [
        one.with_format("arrow").select_columns([c for c in one.column_names if c in wanted])[:] for one in loaded
    ]
    records = Records(pa.concat_tables(tables, promote_options="default"), sorted(columns))
    revision = revision or _revision_of(loaded[0])
    origin = {
        "kind": "hub",
        "name": hub.name,
        "configs": list(hub.configs),
        "split": hub.split,
        "revision": revision,
        "from_cache": not answers,
        "rows": len(records),
        "sha256_of_rows": _hash_of_rows(records),
    }
    return Source(
        records, f"the hub's {hub.name}{'' if answers else ' (from the cache: the hub does not answer)'}", origin
    )


@contextlib.contextmanager
def _cache_only(wanted: bool) -> Iterator[None]:
    """Without this, the libraries try for half a minute to reach a hub that is known not to answer."""
    import datasets
    import huggingface_hub

    before = datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE
    if wanted:
        datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE = before


def _one_split(splits: Any, hub: Hub) -> Any:
    """The split asked for, or the only one that there is."""
    if hub.split in splits:
        return splits[hub.split]
    if len(splits) == 1:
        return next(iter(splits.values()))
    raise DataError(f"the data set {hub.name} has no split {hub.split}, only {', '.join(splits)}")


def _revision_of(loaded: Any) -> str | None:
    places = [*(loaded.info.download_checksums or {}), *(file["filename"] for file in loaded.cache_files)]
    found = [match[0] for place in places if (match := re.search(r"\b[0-9a-f]{40}\b", place))]
    return found[0] if found else None


def _hash_of_rows(records: Records) -> str:
    digest = hashlib.sha256()
    for row in records.read(range(len(records))):
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()
