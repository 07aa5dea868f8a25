"""Where the rows of a group stand: whole groups on one rank in one mini-batch."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from transfer_queue import KVBatchMeta

from gcpo.adapters.trainer import MethodTrainer
from tests.adapters.conftest import N
from tests.adapters.memory_queue import MemoryQueue
from tests.adapters.test_pipeline import Server, groups_of, make_trainer, questions, roll_out


class Trainer(MethodTrainer):
    method = SimpleNamespace(name="gcpo")

    def __init__(self, n: int, mini_batch: int, ranks: int) -> None:
        actor = SimpleNamespace(ppo_mini_batch_size=mini_batch)
        self.config = SimpleNamespace(actor_rollout_ref=SimpleNamespace(actor=actor, rollout=SimpleNamespace(n=n)))
        self.actor_rollout_wg = SimpleNamespace(_dispatch_info={"actor": list(range(ranks))})


def scattered(groups: int, n: int) -> KVBatchMeta:
    """Rows of different lengths in which no two rows of a group are neighbours."""
    keys = [f"uid{group}_{session}_0" for session in reversed(range(n)) for group in range(groups)]
    tags = [{"seq_len": 10 + (7 * k * k) % 90} for k in range(len(keys))]
    return KVBatchMeta(keys=keys, tags=tags, partition_id="train")


def parts(batch: KVBatchMeta, ranks: int, mini_batches: int) -> list[list[str]]:
    """The keys of every mini-batch of every rank: verl gives each rank the next rows, and each cuts its own in turn."""
    size = len(batch.keys) // (ranks * mini_batches)
    return [batch.keys[start : start + size] for start in range(0, len(batch.keys), size)]


@pytest.mark.parametrize(
    ("groups", "n", "mini_batch", "ranks"), [(4, 4, 2, 1), (4, 4, 2, 2), (8, 4, 4, 1), (8, 3, 4, 2), (2, 2, 1, 1)]
)
def test_groups_stay_together(groups: int, n: int, mini_batch: int, ranks: int) -> None:
    """Every mini-batch of every rank holds all rows of each of its groups, in the order of their sessions."""
    batch, metrics = scattered(groups, n), {}
    before = dict(zip(batch.keys, batch.tags, strict=True))
    Trainer(n, mini_batch, ranks)._keep_groups_together(batch, metrics)
    assert metrics == {"gcpo/balance/whole_groups": 1.0}
    assert dict(zip(batch.keys, batch.tags, strict=True)) == before
    mini_batches = parts(batch, ranks, groups // mini_batch)
    assert len(mini_batches) == ranks * groups // mini_batch
    for keys in mini_batches:
        for uid, members in groups_of(keys).items():
            assert members == [f"{uid}_{session}_0" for session in range(n)]


def test_the_mini_batches_are_balanced_over_groups() -> None:
    """A long group goes with a short one: no mini-batch has two of the long ones."""
    batch = scattered(4, 2)
    batch.tags = [{"seq_len": 1000 if key.startswith(("uid0", "uid1")) else 10} for key in batch.keys]
    Trainer(2, 2, 1)._keep_groups_together(batch, {})
    for keys in parts(batch, 1, 2):
        assert len({uid for uid in groups_of(keys) if uid in ("uid0", "uid1")}) == 1


@pytest.mark.parametrize("change", ["session failed", "padded", "a group over two ranks"])
def test_groups_that_do_not_divide(change: str) -> None:
    """The rows stay as verl balanced them, and the metric says so."""
    batch, ranks, metrics = scattered(4, 4), 2, {}
    if change == "session failed":
        batch = KVBatchMeta(keys=batch.keys[1:], tags=batch.tags[1:], partition_id="train")
    if change == "padded":
        batch = KVBatchMeta(
            keys=[*batch.keys, "pad_0_0"], tags=[*batch.tags, {"seq_len": 5, "is_padding": True}], partition_id="train"
        )
    if change == "a group over two ranks":
        ranks = 8
    before = list(batch.keys)
    Trainer(4, 2, ranks)._keep_groups_together(batch, metrics)
    assert batch.keys == before and metrics == {"gcpo/balance/whole_groups": 0.0}


def test_the_trainer_keeps_groups_together(
    make_config: Callable, queue: MemoryQueue, tokenizer: Any
) -> None:  # fmt: skip
    """In a step, after verl's balancing, which scatters the rows; also at two groups a mini-batch on two ranks."""
    config = make_config("gcpo.preset=light", "actor_rollout_ref.actor.ppo_mini_batch_size=4")
    roll_out(config, Server(), batch=questions(8))
    trainer = make_trainer(config, queue, tokenizer)
    together = MethodTrainer._keep_groups_together
    scatters = []

    def spy(self: Any, batch: Any, metrics: dict) -> None:
        scatters.extend(len(groups_of(keys)) for keys in parts(batch, 2, 2))
        together(self, batch, metrics)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MethodTrainer, "_keep_groups_together", spy)
        metrics: dict[str, float] = {}
        batch = trainer._balance_batch(queue.meta(queue.finished_rows(), "train"), metrics)
    assert max(scatters) > 2, "verl's balancing left the groups whole; the test shows nothing"
    assert metrics["gcpo/balance/whole_groups"] == 1.0
    for keys in parts(batch, 2, 2):
        assert [len(members) for members in groups_of(keys).values()] == [N, N]
