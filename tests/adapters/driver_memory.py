"""Prints how much memory the causal stage takes on the driver for a batch of the paper's size; run as a program.

256 groups of 8 responses with 8 contexts and 8 generations to a context, of up to 16,384 tokens. Most responses are
short, so that the fields take little; a table of the batch is as wide as the longest one all the same.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import transfer_queue
from tensordict import TensorDict

from gcpo.adapters.schema import QueueBatch, nested
from gcpo.methods.base import Run
from gcpo.methods.gcpo.credit import CausalStage
from gcpo.methods.gcpo.settings import GCPOConfig

GROUPS, N, LONGEST, SIZE = 256, 8, 16384, 64
ROWS = GROUPS * N
PAGE = os.sysconf("SC_PAGE_SIZE")


def resident() -> int:
    """Bytes of this process that are in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * PAGE


def growth(work: Callable[[], Any]) -> int:
    """Bytes by which the process grows at most while it does ``work``."""
    before, peak, done = resident(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], resident())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return max(peak[0], resident()) - before


class Queue:
    """TransferQueue's reading and writing; what is written is counted and goes elsewhere."""

    def __init__(self, fields: dict[str, list[torch.Tensor]]) -> None:
        self.fields = fields
        self.written = 0

    def kv_batch_get(self, keys: list[str], partition_id: str, select_fields: list[str]) -> TensorDict:
        rows = [int(group) * N + int(session) for group, session, _ in (key.split("_") for key in keys)]
        columns = {name: nested([self.fields[name][row] for row in rows]) for name in select_fields}
        return TensorDict(columns, batch_size=len(rows))

    def kv_batch_put(self, keys: list[str], partition_id: str, fields: TensorDict) -> None:
        assert all(mask.any() for mask in fields["gcpo_kl_mask"].unbind())
        self.written += len(keys)


def make_batch(config: GCPOConfig) -> dict[str, list[torch.Tensor]]:
    """The fields that the stage reads."""
    generator = torch.Generator().manual_seed(0)
    slots = config.collider.num_draws
    samples = slots * config.collider.num_generations
    fields: dict[str, list[torch.Tensor]] = {}
    for row in range(ROWS):
        length = LONGEST if row % (32 * N) == 3 else int(torch.randint(50, 900, (1,), generator=generator))
        reward = torch.zeros(length)
        reward[-1] = float(row % 2)
        values = {
            "response_mask": torch.ones(length, dtype=torch.int64),
            "rm_scores": reward,
            "old_log_probs": -torch.rand(length, generator=generator),
            "gcpo_log_p": -torch.rand(slots * length, generator=generator),
            "gcpo_z": torch.randn(SIZE, generator=generator),
            "gcpo_z_regenerated": torch.randn(samples * SIZE, generator=generator),
            "gcpo_context_lengths": torch.full((slots,), 10_000),
            "gcpo_output_lengths": torch.full((samples,), 1_000),
            "gcpo_kl_weight": torch.ones(1),
            "gcpo_scored_tokens": torch.ones(4),
        }
        for name, value in values.items():
            fields.setdefault(name, []).append(value)
    return fields


def main() -> None:
    config = GCPOConfig.from_config({"preset": "paper"}, n=N, response_length=LONGEST)
    queue = Queue(make_batch(config))
    transfer_queue.kv_batch_get, transfer_queue.kv_batch_put = queue.kv_batch_get, queue.kv_batch_put
    lengths = [len(mask) for mask in queue.fields["response_mask"]]
    batch = transfer_queue.KVBatchMeta(
        keys=[f"{row // N}_{row % N}_0" for row in range(ROWS)],
        tags=[{"response_len": length} for length in lengths],
        partition_id="train",
    )
    stats = {"collider/draws": 8.0, "collider/ok": 8.0, "equal_rewards": 0.0}
    rows = QueueBatch(batch, step=1)
    stage = CausalStage(config, Run(N, LONGEST), rows, {uid: {"stats": stats} for uid in rows.groups})
    metrics: dict[str, float] = {}
    taken = growth(lambda: stage.credit(metrics))
    # Of a table of the batch in float64 a quarter is enough to be seen.
    table = ROWS * config.collider.num_draws * LONGEST * 8
    seen = growth(lambda: (torch.ones(table // 32), time.sleep(0.05)))
    fields = sum(value.nbytes for values in queue.fields.values() for value in values)
    found = {"written": queue.written, "taken": taken, "fields": fields, "table": table, "seen": seen}
    print(json.dumps({**found, "kl_mean": metrics["gcpo/reference/kl_mean"]}))


if __name__ == "__main__":
    main()
