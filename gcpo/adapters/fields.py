"""Token lists and ragged rows as fields of verl's batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch


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
