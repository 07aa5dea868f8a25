"""Work that verl's agent loop does for every session, done once for a group or once for a worker.

verl makes the row of a session and writes it to its queue in one method, ``_agent_loop_postprocess``, and makes an
agent loop for every session in another, ``_run_agent_loop``. Both find the functions that they call through names of
their modules. `install` gives these names to objects that keep the rows of a session until its group is complete, and
that make the agent loop once. A row is written before verl publishes the state of its group, and nothing reads it
earlier.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import hydra
import transfer_queue as tq
from tensordict import TensorDict
from verl.experimental.agent_loop import agent_loop, single_turn_agent_loop
from verl.trainer.ppo.v1 import agent_loop_tq
from verl.utils.tensordict_utils import list_of_dict_to_tensordict


@dataclass
class Rows:
    """Rows that are not written yet: key, fields and tag of each."""

    keys: list[str] = field(default_factory=list)
    fields: list[dict[str, Any]] = field(default_factory=list)
    tags: list[dict[str, Any]] = field(default_factory=list)


async def write(sessions: Sequence[Rows], fields: TensorDict | None) -> None:
    """Write the rows of a group to the training partition.

    Args:
        sessions: the rows of each session; one each, since multi-turn and tool use are refused.
        fields: further fields, a row for each session.
    """
    keys = [key for one in sessions for key in one.keys]
    tags = [tag for one in sessions for tag in one.tags]
    batch = list_of_dict_to_tensordict([row for one in sessions for row in one.fields])
    if fields is not None:
        batch.update(fields)
    await tq.async_kv_batch_put(keys=keys, fields=batch, tags=tags, partition_id="train")


_KEPT: ContextVar[Rows | None] = ContextVar("rows of the open group", default=None)


@contextmanager
def kept() -> Iterator[Rows]:
    """Within the block, and only in this task, verl's agent loop keeps its rows in the object that is yielded."""
    rows = Rows()
    token = _KEPT.set(rows)
    try:
        yield rows
    finally:
        _KEPT.reset(token)


class _Queue:
    """transfer_queue, with a ``async_kv_batch_put`` that keeps rows."""

    def __getattr__(self, name: str) -> Any:
        return getattr(tq, name)

    async def async_kv_batch_put(self, keys: list[str], fields: Any, tags: list[dict], partition_id: str) -> Any:
        rows = _KEPT.get()
        if rows is None:
            return await tq.async_kv_batch_put(keys=keys, fields=fields, tags=tags, partition_id=partition_id)
        rows.keys += keys
        rows.fields += fields
        rows.tags += tags
        return None


def _as_batch(rows: list[dict[str, Any]]) -> Any:
    return list_of_dict_to_tensordict(rows) if _KEPT.get() is None else rows


class _Hydra:
    """hydra, with an ``instantiate`` that makes verl's loop for a single turn once; that loop has no state."""

    TARGET = f"{single_turn_agent_loop.__name__}.{single_turn_agent_loop.SingleTurnAgentLoop.__qualname__}"

    def __init__(self) -> None:
        self.utils, self.made = self, None

    def instantiate(self, config: dict[str, Any], **arguments: Any) -> Any:
        if config["_target_"] != self.TARGET:
            return hydra.utils.instantiate(config=config, **arguments)
        if self.made is None:
            self.made = hydra.utils.instantiate(config=config, **arguments)
        return self.made


def install() -> None:
    """Give verl's names to the objects of this module, in the process of a worker."""
    writes: Any = agent_loop_tq
    loops: Any = agent_loop
    writes.tq, writes.list_of_dict_to_tensordict, loops.hydra = _Queue(), _as_batch, _Hydra()
