"""The batch fields that GVPO writes."""

from __future__ import annotations

import torch

from gcpo.methods.fields import Field

PLACE = Field(
    "gvpo_place",
    torch.int64,
    "[2]",
    writer="credit",
    readers="update",
    meaning="Number of the row's group in the batch, and of the row in its group.",
)
