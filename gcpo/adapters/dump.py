"""Auxiliary generations in the queue, for the rollout dump."""

from __future__ import annotations

from typing import Any

import transfer_queue as tq
from transfer_queue import KVBatchMeta

from gcpo.adapters.fields import DUMP_FIELDS, dumped_draws


def fetch_dump(batch: KVBatchMeta) -> list[tuple[str, list[int], dict[str, Any]]]:
    """The draws that the rollout stored for the dump: uid of the group, token ids of its prompt, draw.

    A group's draws stand in its first row; only rows that hold some are fetched with their prompts.
    """
    real = [key for key, tag in zip(batch.keys, batch.tags, strict=True) if not tag.get("is_padding", False)]
    data = tq.kv_batch_get(keys=real, partition_id=batch.partition_id, select_fields=["index", *DUMP_FIELDS])
    if any(name not in data.keys() for name in DUMP_FIELDS):
        return []
    columns = zip(real, *(data[name].unbind() for name in DUMP_FIELDS), strict=True)
    found = {key: draws for key, *values in columns if (draws := dumped_draws(*values))}
    if not found:
        return []
    prompts = tq.kv_batch_get(keys=list(found), partition_id=batch.partition_id, select_fields=["prompts"])
    return [
        (key.rsplit("_", 2)[0], prompt.tolist(), draw)
        for (key, draws), prompt in zip(found.items(), prompts["prompts"].unbind(), strict=True)
        for draw in draws
    ]
