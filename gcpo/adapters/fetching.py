"""Which fields of a batch a worker fetches.

A worker fetches every field that the batch names, for every one of its rows. Our fields hold the contexts, generations
and states of a whole group, and most of verl's stages read none of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import transfer_queue as tq
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

OWN_PREFIXES = ("gcpo_", "gc2po_")
"""What the names of our fields begin with."""


@contextmanager
def without_own_fields(batch: KVBatchMeta, keep: Collection[str] = ()) -> Iterator[None]:
    """Within, a worker that is given ``batch`` does not fetch our fields, except those in ``keep``."""
    before = batch.fields
    known = before
    if known is None:
        # What one row has, all have.
        known = list(tq.kv_batch_get(keys=batch.keys[:1], partition_id=batch.partition_id).keys())
    batch.fields = [name for name in known if not name.startswith(OWN_PREFIXES) or name in keep]
    try:
        yield
    finally:
        batch.fields = before


class OwnFieldsTrainer(PPOTrainerSync):
    """verl's synchronous trainer; its stages fetch none of our fields, the update those that it reads."""

    @property
    def update_fields(self) -> tuple[str, ...]:
        """Our fields that the update of the actor reads."""
        return ()

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        with without_own_fields(batch):
            return super()._compute_old_log_prob(batch, metrics)

    def _compute_ref_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        with without_own_fields(batch):
            return super()._compute_ref_log_prob(batch, metrics)

    def _compute_values(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        with without_own_fields(batch):
            return super()._compute_values(batch, metrics)

    def _update_critic(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        with without_own_fields(batch):
            return super()._update_critic(batch, metrics)

    def _update_actor(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        with without_own_fields(batch, self.update_fields):
            return super()._update_actor(batch, metrics)
