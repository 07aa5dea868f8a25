"""Sequences as packed rows, with the places whose logits and states are wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gcpo.scoring.tree import PrefixForest, TreePack


@dataclass(frozen=True)
class PackedRow:
    """A pack and what is wanted of it.

    Attributes:
        pack: the row.
        predict: int64 [K]: the places whose logits predict the labels.
        labels: int64 [K], sequence after sequence.
        state_at: int64 [Q]: the places whose hidden states are wanted.
        is_tree: whether the row needs tree attention. A row of one sequence does not: it is a plain causal row.
    """

    pack: TreePack
    predict: torch.Tensor
    labels: torch.Tensor
    state_at: torch.Tensor
    is_tree: bool = True


def pack_rows(
    sequences: Sequence[torch.Tensor],
    starts: Sequence[int | None],
    state_at: Sequence[int | None],
    *,
    budget: int | None,
    min_shared: int = 1,
) -> list[PackedRow]:
    """Pack sequences.

    Args:
        sequences: token ids [S].
        starts: where a sequence's targets begin, at least 1; ``None``: no log-probabilities.
        state_at: whose token's state is wanted; ``None``: no state.
        budget: tokens of a row; ``None``: every sequence is a row of its own.
        min_shared: see `PrefixForest`.

    Raises:
        BudgetError: a sequence is longer than ``budget``.
    """
    if budget is None:
        packs = [(PrefixForest([sequence]).packs()[0], [i]) for i, sequence in enumerate(sequences)]
    else:
        packs = [(pack, pack.sequences) for pack in PrefixForest(sequences, min_shared=min_shared).packs(budget)]
    rows = []
    empty = [torch.zeros(0, dtype=torch.int64)]
    for pack, members in packs:
        predict, labels, states = list(empty), list(empty), []
        for i, place in zip(members, pack.places, strict=True):
            start = starts[i]
            if start is not None:
                predict.append(place[start - 1 : -1])
                labels.append(pack.token_ids[place[start:]])
            at = state_at[i]
            if at is not None:
                states.append(int(place[at]))
        wanted = torch.cat(predict), torch.cat(labels), torch.tensor(states, dtype=torch.int64)
        rows.append(PackedRow(pack, *wanted, is_tree=budget is not None))
    return rows


def members(rows: Sequence[PackedRow]) -> list[Sequence[int]]:
    """Which sequences stand in each row of `pack_rows`, by their place in its input."""
    return [row.pack.sequences if row.is_tree else [at] for at, row in enumerate(rows)]


def filler(*, is_tree: bool) -> PackedRow:
    """A row of two tokens, for a rank that has fewer rows than another."""
    return pack_rows([torch.zeros(2, dtype=torch.int64)], [1], [0], budget=2 if is_tree else None)[0]
