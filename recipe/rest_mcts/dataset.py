"""The data set of verl's SFT trainer: token ids as they were generated.

verl's own applies the chat template to messages, which for reasoning models removes the text inside ``<think>`` and for
any model encodes the text again, other than the policy wrote it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset


class TokenDataset(Dataset):
    """Rows of ``prompt_ids`` and ``response_ids``; the loss covers the response."""

    def __init__(self, parquet_files: str | Sequence[str], *_: Any, **__: Any) -> None:
        """verl passes a tokenizer and its settings too; nothing is left for them to do."""
        import pyarrow.parquet as pq

        files = [parquet_files] if isinstance(parquet_files, str) else parquet_files
        columns = ["prompt_ids", "response_ids"]
        self.rows = [row for file in files for row in pq.read_table(file, columns=columns).to_pylist()]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        prompt, response = self.rows[index]["prompt_ids"], self.rows[index]["response_ids"]
        ids = torch.tensor(prompt + response)
        return {
            "input_ids": ids,
            "position_ids": torch.arange(len(ids)),
            "loss_mask": torch.tensor([0] * len(prompt) + [1] * len(response)),
        }
