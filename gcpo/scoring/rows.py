"""Packed rows of sequences, with the positions whose logits and states are requested."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from gcpo.scoring.tree import PrefixForest, TreePack


@dataclass(frozen=True)
class PackedRow:
    """A packed row and the requested outputs.

    Attributes:
        pack: the row.
        predict: int64 [K]: the positions whose logits predict the labels.
        labels: int64 [K], sequence after sequence.
        state_at: int64 [Q]: the positions of the requested hidden states.
        is_tree: whether the row needs tree attention; a row of one sequence is plainly causal.
        segment: int64 [K]: the segment of every label whose gradient is requested, -1 for other labels.
        segments: number of segments, sequence after sequence; 0: no gradient is requested.
    """

    pack: TreePack
    predict: torch.Tensor
    labels: torch.Tensor
    state_at: torch.Tensor
    is_tree: bool = True
    segment: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    segments: int = 0


def pack_rows(
    sequences: Sequence[torch.Tensor],
    starts: Sequence[int | None],
    state_at: Sequence[int | None],
    *,
    budget: int | None,
    min_shared: int = 1,
    gradient_of: Sequence[Sequence[tuple[int, int]]] | None = None,
) -> list[PackedRow]:
    """Pack sequences into rows.

    Args:
        sequences: token ids [S].
        starts: position of a sequence's first target, at least 1; ``None``: no log-probabilities.
        state_at: position of the requested state; ``None``: no state.
        budget: largest number of tokens of a row; ``None``: one row per sequence.
        min_shared: see `PrefixForest`.
        gradient_of: spans of the targets whose gradients are requested, see `ScoreRequest`; ``None``: none.

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
        segment, segments = list(empty), 0
        for i, place in zip(members, pack.places, strict=True):
            start = starts[i]
            if start is not None:
                predict.append(place[start - 1 : -1])
                labels.append(pack.token_ids[place[start:]])
                segment.append(torch.full_like(labels[-1], -1))
                for first, end in gradient_of[i] if gradient_of is not None else ():
                    segment[-1][first:end] = segments
                    segments += 1
            at = state_at[i]
            if at is not None:
                states.append(int(place[at]))
        wanted = torch.cat(predict), torch.cat(labels), torch.tensor(states, dtype=torch.int64)
        is_tree = budget is not None
        rows.append(PackedRow(pack, *wanted, is_tree=is_tree, segment=torch.cat(segment), segments=segments))
    return rows


def members(rows: Sequence[PackedRow]) -> list[Sequence[int]]:
    """Return the input indices of the sequences in each row of `pack_rows`."""
    return [row.pack.sequences if row.is_tree else [at] for at, row in enumerate(rows)]


def filler(*, is_tree: bool) -> PackedRow:
    """Return a row of two tokens, which pads a rank that has fewer rows than another."""
    return pack_rows([torch.zeros(2, dtype=torch.int64)], [1], [0], budget=2 if is_tree else None)[0]
