"""Packed prefix trees as micro-batches of verl's engine: one row of the batch is one pack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu

from gcpo.adapters.schema import nested
from gcpo.scoring import PrefixForest, TreePack


@dataclass(frozen=True)
class PackedRow:
    """A pack and what is wanted of it.

    Attributes:
        pack: the row.
        predict: int64 [K]: the places whose logits predict the labels.
        labels: int64 [K], sequence after sequence.
        state_at: int64 [Q]: the places whose hidden states are wanted.
    """

    pack: TreePack
    predict: torch.Tensor
    labels: torch.Tensor
    state_at: torch.Tensor


def packed_rows(
    sequences: Sequence[torch.Tensor],
    starts: Sequence[int | None],
    state_at: Sequence[int | None],
    *,
    budget: int,
    min_shared: int,
) -> list[PackedRow]:
    """Pack sequences.

    Args:
        sequences: token ids [S].
        starts: where a sequence's targets begin, at least 1; ``None``: no log-probabilities.
        state_at: whose token's state is wanted; ``None``: no state.
        budget: tokens of a row.
        min_shared: see ``PrefixForest``.

    Raises:
        BudgetError: a sequence is longer than ``budget``.
    """
    rows = []
    empty = [torch.zeros(0, dtype=torch.int64)]
    for pack in PrefixForest(sequences, min_shared=min_shared).packs(budget):
        predict, labels, states = list(empty), list(empty), []
        for i, place in zip(pack.sequences, pack.places, strict=True):
            start = starts[i]
            if start is not None:
                predict.append(place[start - 1 : -1])
                labels.append(pack.token_ids[place[start:]])
            if state_at[i] is not None:
                states.append(int(place[state_at[i]]))
        rows.append(PackedRow(pack, torch.cat(predict), torch.cat(labels), torch.tensor(states, dtype=torch.int64)))
    return rows


def filler() -> PackedRow:
    """A row of two tokens, for a rank that has fewer packs than another."""
    return packed_rows([torch.zeros(2, dtype=torch.int64)], [1], [0], budget=2, min_shared=1)[0]


def packed_batch(rows: Sequence[PackedRow], **columns: Sequence[torch.Tensor]) -> TensorDict:
    """A batch whose micro-batches are the packs.

    Args:
        rows: the packs.
        columns: more fields, one tensor for every row.
    """
    batch = TensorDict(
        {
            "input_ids": nested([row.pack.token_ids for row in rows]),
            "position_ids": nested([row.pack.position_ids for row in rows]),
            "loss_mask": nested([torch.ones_like(row.pack.token_ids) for row in rows]),
            "gcpo_row": torch.arange(len(rows)).unsqueeze(1),
            **{name: nested(list(values)) for name, values in columns.items()},
        },
        batch_size=len(rows),
    )
    # A tuple, because verl gives every row its own element of a list.
    tu.assign_non_tensor(
        batch, gcpo_rows=tuple(rows), use_dynamic_bsz=False, micro_batch_size_per_gpu=1, calculate_entropy=False
    )
    return batch


def row_of(micro_batch: TensorDict) -> PackedRow | None:
    """The pack that a micro-batch holds, ``None`` for any other micro-batch."""
    rows: Any = tu.get_non_tensor_data(micro_batch, "gcpo_rows", None)
    return None if rows is None else rows[int(micro_batch["gcpo_row"][0, 0])]
