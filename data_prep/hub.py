"""Reading of data sets from the hub, with the `datasets` library and its cache."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from data_prep.files import first_line
from data_prep.schema import DataError, DataSet, Hub, Records, Source

if TYPE_CHECKING:
    import pyarrow as pa

HASHED = 65_536
"""Number of rows that are hashed at a time."""
TIMEOUT = 20
"""Seconds to wait for the hub before the cache is used."""


def read_hub(dataset: DataSet, hub: Hub, revision: str | None = None) -> Source:
    """Return the rows of a data set of the hub, or of its copy in the cache if the hub does not answer.

    Raises:
        DataError: neither has the data set, or it has no such revision, configuration or split, or no rows.
    """
    import datasets
    import huggingface_hub
    import pyarrow as pa

    datasets.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    commit = _commit(hub.name, revision)
    parts: list[Any] = []
    with _cache_only(commit is None):
        for config in hub.configs:
            try:
                # A fixed commit cannot change between the request for its hash and the download.
                splits = datasets.load_dataset(hub.name, config, revision=commit or revision)
            except Exception as error:  # builders of data sets raise many kinds of errors
                if commit is None:
                    raise DataError(
                        f"the data set {hub.name} is not in the cache, and the hub does not answer; "
                        "download it elsewhere and give the file or folder: --source PATH"
                    ) from error
                raise DataError(f"the data set {hub.name} can't be loaded: {first_line(error)}") from error
            parts.append(_one_split(splits, hub))
    found = commit or _commit_of_cache(parts[0])
    if revision not in (None, found) and commit is None:
        raise DataError(f"the revision {revision} of {hub.name} is not in the cache, and the hub does not answer")
    table = pa.concat_tables(
        [part.with_format("arrow").select_columns(dataset.used(part.column_names))[:] for part in parts],
        promote_options="default",
    )
    if not sum(map(len, parts)):
        raise DataError(f"the data set {hub.name} has no rows in its split {hub.split}")
    origin = {
        "kind": "hub",
        "name": hub.name,
        "configs": list(hub.configs),
        "split": hub.split,
        "revision": found,
        "rows": len(table),
        "sha256_of_rows": _hash_of_rows(table),
    }
    label = f"the hub's {hub.name}" + ("" if commit else ", from the cache, since the hub does not answer")
    return Source(Records(table, set.intersection(*(set(part.column_names) for part in parts))), label, origin)


def _commit(name: str, revision: str | None) -> str | None:
    """Return the commit of a revision, or None if the hub does not answer.

    Raises:
        DataError: the hub has no such data set or revision.
    """
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return huggingface_hub.HfApi().dataset_info(name, revision=revision, timeout=TIMEOUT).sha
    except errors.GatedRepoError as error:
        raise DataError(f"the data set {name} asks for consent on the hub; give it there, then log in") from error
    except errors.RevisionNotFoundError as error:
        raise DataError(f"the data set {name} has no revision {revision} on the hub") from error
    except errors.RepositoryNotFoundError as error:
        raise DataError(
            f"there is no file {name}, and no data set of this name on the hub that you may read"
        ) from error
    except Exception:  # no network: HTTP libraries and proxies raise many kinds of errors
        return None


@contextlib.contextmanager
def _cache_only(wanted: bool) -> Iterator[None]:
    """Switch the libraries offline, since they would retry an unreachable hub for half a minute."""
    import huggingface_hub
    from datasets import config

    before = config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE
    if wanted:
        config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE = before


def _one_split(splits: Any, hub: Hub) -> Any:
    """Return the requested split, or the only one."""
    if hub.split in splits:
        return splits[hub.split]
    if len(splits) == 1:
        return next(iter(splits.values()))
    raise DataError(f"the data set {hub.name} has no split {hub.split}, only {', '.join(splits)}")


def _commit_of_cache(part: Any) -> str | None:
    """Return the commit in the names of the files from which a data set was loaded."""
    places = [*(part.info.download_checksums or {}), *(file["filename"] for file in part.cache_files)]
    return next((match[0] for place in places if (match := re.search(r"\b[0-9a-f]{40}\b", place))), None)


def _hash_of_rows(table: pa.Table) -> str:
    digest = hashlib.sha256()
    for start in range(0, len(table), HASHED):
        # A slice keeps the chunks and offsets of the table, which would change the hash of equal rows.
        rows = table.take(list(range(start, min(start + HASHED, len(table)))))
        for batch in rows.combine_chunks().to_batches():
            digest.update(batch.serialize())
    return digest.hexdigest()
