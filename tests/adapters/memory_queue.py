"""TransferQueue in this process: what our code and verl's ask of it, without its Ray actors.

Rows are packed by TransferQueue's own function, so that they come back in the types in which it gives them back.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tensordict import NonTensorStack, TensorDict


class MemoryQueue:
    """Fields and tags by partition and key."""

    def __init__(self) -> None:
        self.fields: dict[str, dict[str, dict[str, Any]]] = {}
        self.tags: dict[str, dict[str, dict[str, Any]]] = {}

    def install(self, monkeypatch: pytest.MonkeyPatch) -> MemoryQueue:
        """Take the place of the functions of the module ``transfer_queue``, for verl and for us."""
        import transfer_queue

        monkeypatch.setattr(transfer_queue, "init", lambda *args, **kwargs: None)
        for name in ("kv_put", "kv_batch_put", "kv_batch_get"):
            function = getattr(self, name)

            async def wait(*args: Any, function: Any = function, **kwargs: Any) -> Any:
                return function(*args, **kwargs)

            monkeypatch.setattr(transfer_queue, name, function)
            monkeypatch.setattr(transfer_queue, f"async_{name}", wait)
        return self

    def kv_put(self, key: str, partition_id: str, fields: Any = None, tag: dict | None = None) -> Any:
        assert fields is None
        self.tags.setdefault(partition_id, {}).setdefault(key, {}).update(tag or {})

    def kv_batch_put(
        self, keys: list[str], partition_id: str, fields: TensorDict | None = None, tags: list[dict] | None = None
    ) -> Any:
        assert len(set(keys)) == len(keys)
        rows = self.fields.setdefault(partition_id, {})
        if fields is not None:
            assert fields.batch_size[0] == len(keys)
            for name in fields.keys():
                value = fields.get(name)
                values = value.tolist() if isinstance(value, NonTensorStack) else value.unbind()
                for key, item in zip(keys, values, strict=True):
                    # Stored elsewhere: nobody shares an object with the queue.
                    rows.setdefault(key, {})[name] = copy.deepcopy(item)
        for key, tag in zip(keys, tags or [], strict=False):
            self.tags.setdefault(partition_id, {}).setdefault(key, {}).update(tag)
        return self.meta(keys, partition_id)

    def kv_batch_get(self, keys: list[str], partition_id: str, select_fields: list[str] | None = None) -> TensorDict:
        from transfer_queue.storage.managers.simple_storage_manager import AsyncSimpleStorageManager

        rows = [self.fields[partition_id][key] for key in keys]
        # A field that is missing on any key is left out.
        names = [name for name in rows[0] if all(name in row for row in rows)]
        if select_fields is not None:
            names = [name for name in names if name in select_fields]
        pack = AsyncSimpleStorageManager._pack_field_values
        return TensorDict(
            {name: pack([copy.deepcopy(row[name]) for row in rows]) for name in names}, batch_size=len(keys)
        )

    def meta(self, keys: list[str], partition_id: str) -> Any:
        from transfer_queue import KVBatchMeta

        tags = [self.tags.get(partition_id, {}).get(key, {}) for key in keys]
        return KVBatchMeta(keys=list(keys), tags=tags, partition_id=partition_id)

    def finished_rows(self, partition_id: str = "train") -> list[str]:
        """Keys of the rows that the replay buffer would hand to the trainer, in order of arrival."""
        done = [uid for uid, tag in self.tags.get(partition_id, {}).items() if tag.get("status") == "finished"]
        return [key for key in self.fields.get(partition_id, {}) if key.rsplit("_", 2)[0] in done]


def row(queue: MemoryQueue, key: str, partition_id: str = "train") -> dict[str, Any]:
    """The fields of one key; tensors as they are."""
    return queue.fields[partition_id][key]


def as_lists(fields: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Some fields as plain lists."""
    return {name: fields[name].tolist() if isinstance(fields[name], torch.Tensor) else fields[name] for name in names}
