"""Token lists and ragged rows as fields of verl's batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gcpo.collider.draws import KINDS, OUTCOMES, Draw

DUMP_FIELDS = ("gcpo_dump_tokens", "gcpo_dump_draws", "gcpo_dump_rewards")
"""The auxiliary generations of a group, which only the rollout dump reads."""


def nested(rows: list[torch.Tensor]) -> torch.Tensor:
    """A jagged tensor of rows of different length."""
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def split_rows(flat: torch.Tensor, lengths: torch.Tensor) -> list[torch.Tensor]:
    """Cut ``flat`` [sum(lengths) or more] into pieces; a piece of length 0 is empty."""
    return list(flat[: int(lengths.sum())].split(lengths.tolist()))


def flat_field(name: str, lengths: str, pieces: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """Token lists as one flat row and their lengths; an empty row is one zero, which no length counts."""
    flat = [token for piece in pieces for token in piece] or [0]
    return {
        name: torch.tensor(flat, dtype=torch.int64),
        lengths: torch.tensor([len(piece) for piece in pieces], dtype=torch.int64),
    }


def dump_fields(draws: Sequence[Draw]) -> dict[str, torch.Tensor]:
    """Auxiliary generations as three ragged rows, which `dumped_draws` reads.

    A row of a nested tensor must not be empty, so a row without draws holds one zero in each field.

    Returns:
        ``gcpo_dump_tokens``, int32: the token ids of all draws, one after another. ``gcpo_dump_draws``, int32 [3 * D]:
        kind, outcome and number of tokens of every draw. ``gcpo_dump_rewards``, float32 [D]: NaN where a draw was not
        graded.
    """
    tokens = [token for draw in draws for token in draw.token_ids]
    entries = [
        entry for draw in draws for entry in (KINDS.index(draw.kind), OUTCOMES.index(draw.outcome), len(draw.token_ids))
    ]
    rewards = [torch.nan if draw.reward is None else draw.reward for draw in draws]
    values = (
        torch.tensor(tokens or [0], dtype=torch.int32),
        torch.tensor(entries or [0], dtype=torch.int32),
        torch.tensor(rewards or [0.0], dtype=torch.float32),
    )
    return dict(zip(DUMP_FIELDS, values, strict=True))


def dumped_draws(tokens: torch.Tensor, entries: torch.Tensor, rewards: torch.Tensor) -> list[dict[str, Any]]:
    """The draws of one row of `dump_fields`: ``kind``, ``outcome``, ``reward`` (or ``None``) and ``token_ids``."""
    if len(entries) < 3:
        return []
    table = entries.view(-1, 3)
    pieces = split_rows(tokens, table[:, 2])
    return [
        {
            "kind": KINDS[kind],
            "outcome": OUTCOMES[outcome],
            "reward": None if reward != reward else reward,
            "token_ids": piece.tolist(),
        }
        for (kind, outcome, _), reward, piece in zip(table.tolist(), rewards.tolist(), pieces, strict=True)
    ]
