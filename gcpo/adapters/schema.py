"""Batch fields in verl's batches: every read and write uses this module and is checked against the declaration.

The fields are declared in `gcpo.methods.fields` (those of verl's that methods read) and in the folder of each method.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transfer_queue as tq
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from gcpo.methods import fields as common
from gcpo.methods import method_class, method_names
from gcpo.methods.base import Batch
from gcpo.methods.fields import Field, FieldError


def nested(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return a jagged tensor of rows of different length."""
    return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)


def all_fields() -> list[Field]:
    """Return the fields of verl and of every method."""
    verls = [value for value in vars(common).values() if isinstance(value, Field)]
    return [*verls, *(field for name in method_names() for field in method_class(name).fields)]


def method_fields() -> frozenset[str]:
    """Return the names of the fields that methods write."""
    return frozenset(str(field) for name in method_names() for field in method_class(name).fields)


def session_of(key: str) -> tuple[str, int]:
    """Return the group and the session number from the key of a row, which verl writes ``{uid}_{session}_{output}``."""
    uid, session, _ = key.rsplit("_", 2)
    return uid, int(session)


def is_padding(tag: Mapping[str, Any]) -> bool:
    """Return whether a row is a copy that verl added so that the rows of a batch divide evenly."""
    return bool(tag.get("is_padding", False))


# ---- from fields to verl's batches, and back -------------------------------------------------------------------------


def to_batch(rows: Sequence[Mapping[Field, Any]]) -> TensorDict:
    """Convert rows of fields, as in the rollout, to a batch.

    Raises:
        FieldError: a value differs from its field's declaration, or rows have different fields.
    """
    for row in rows:
        if row.keys() != rows[0].keys():
            raise FieldError(f"a row of a group lacks the batch field {min(row.keys() ^ rows[0].keys())}")
        for field, value in row.items():
            field.check(value)
    return list_of_dict_to_tensordict([{str(field): value for field, value in row.items()} for row in rows])


def to_columns(fields: Mapping[Field, Sequence[torch.Tensor]], size: int) -> TensorDict:
    """Convert columns of fields, as in the actor, to a batch.

    Raises:
        FieldError: a value differs from its field's declaration, or a column does not have ``size`` rows.
    """
    for field, values in fields.items():
        if len(values) != size:
            raise FieldError(f"the batch field {field} has {len(values)} values for {size} rows")
        for value in values:
            field.check(value)
    return TensorDict({str(field): nested(values) for field, values in fields.items()}, batch_size=size)


def from_data(data: TensorDict, fields: Sequence[Field]) -> dict[Field, list[Any]]:
    """Return the given fields, each as a list with one entry per row.

    Raises:
        FieldError: a field is missing, or its values differ from its declaration.
    """
    found: dict[Field, list[Any]] = {}
    for field in fields:
        if field not in data.keys():
            raise FieldError(f"the batch lacks the field {field}, which {field.writer} should have written")
        value: Any = data[field]
        # Unbind once, because each indexing of a nested tensor would unbind it.
        values = list(value.unbind()) if isinstance(value, torch.Tensor) else list(value)
        found[field] = [field.check(entry) for entry in values]
    return found


def queue_get(meta: KVBatchMeta, fields: Sequence[Field | str] | None, keys: Sequence[str] | None = None) -> Any:
    """Return verl's ``TensorDict`` of rows in its queue.

    Args:
        meta: verl's batch.
        fields: field names; ``None``: all fields.
        keys: keys of the rows; ``None``: all rows.
    """
    names = None if fields is None else [str(field) for field in fields]
    keys = list(meta.keys if keys is None else keys)
    return tq.kv_batch_get(keys=keys, partition_id=_partition(meta), select_fields=names)


def queue_put(meta: KVBatchMeta, keys: Sequence[str], data: TensorDict) -> None:
    """Store the fields of ``data`` in rows of verl's queue."""
    tq.kv_batch_put(keys=list(keys), partition_id=_partition(meta), fields=data)


@contextmanager
def extra_info(meta: KVBatchMeta, name: str, value: Any) -> Iterator[None]:
    """Set a non-tensor entry ``name`` of the batch inside the ``with`` block."""
    assert meta.extra_info is not None  # verl sets it in every batch
    meta.extra_info[name] = value
    try:
        yield
    finally:
        meta.extra_info.pop(name, None)


def _partition(meta: KVBatchMeta) -> str:
    assert meta.partition_id is not None  # verl sets it in every batch
    return meta.partition_id


class QueueBatch(Batch):
    """The rows of a step in verl's queue.

    Args:
        meta: verl's batch.
        step: number of the step.
    """

    def __init__(self, meta: KVBatchMeta, step: int) -> None:
        self.meta, self.step, self.size = meta, step, len(meta.keys)
        self.groups = groups_of(meta)

    @property
    def response_lengths(self) -> list[int]:
        """Response lengths from verl's tags."""
        return [tag["response_len"] for tag in self.meta.tags]

    def fetch(self, rows: Sequence[int], fields: Sequence[Field]) -> dict[Field, list[Any]]:
        """Fetch fields as `Batch.fetch` does; the queue omits a field that any row lacks."""
        keys = [self.meta.keys[row] for row in rows]
        return from_data(queue_get(self.meta, fields, keys), fields)

    def put(self, rows: Sequence[int], fields: Mapping[Field, Sequence[Any]]) -> None:
        """Store fields as `Batch.put` does."""
        keys = [self.meta.keys[row] for row in rows]
        queue_put(self.meta, keys, to_columns(fields, len(keys)))


def groups_of(meta: KVBatchMeta) -> dict[str, list[int]]:
    """Return the rows of every group by its id, in the order of their sessions; without padding rows."""
    groups: dict[str, list[int]] = {}
    for row, (key, tag) in enumerate(zip(meta.keys, meta.tags, strict=True)):
        if not is_padding(tag):
            groups.setdefault(session_of(key)[0], []).append(row)
    return {uid: sorted(rows, key=lambda row: session_of(meta.keys[row])[1]) for uid, rows in groups.items()}
