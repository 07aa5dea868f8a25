"""The rows y_i under x_i, made from what a training row carries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorData
from verl.utils import tensordict_utils as tu

from gcpo.adapters.packed import filler, packed_batch, packed_rows
from gcpo.adapters.schema import nested
from gcpo.methods.fields import split as split_rows


def policy_slot(lengths: torch.Tensor) -> int:
    """The context that pi_theta is conditioned on: x_{i,0}, or the first that is there; -1 if none is."""
    present = torch.nonzero(lengths > 0).flatten()
    return int(present[0]) if len(present) else -1


def _rows(data: TensorDict) -> Iterator[tuple[torch.Tensor | None, dict[str, torch.Tensor]]]:
    """For every row the context that pi_theta is conditioned on, ``None`` without a reference, and its response."""
    names = ("responses", "response_mask", "gcpo_log_ref", "gcpo_kl_mask", "gcpo_kl_weight")
    contexts, lengths = data["gcpo_contexts"].unbind(), data["gcpo_context_lengths"].unbind()
    num_shared = int(tu.get_non_tensor_data(data, "gcpo", None)["num_shared"])
    for flat, length, *values in zip(contexts, lengths, *(data[name].unbind() for name in names), strict=True):
        row = dict(zip(names, values, strict=True))
        slot = policy_slot(length[:num_shared]) if bool(row["gcpo_kl_mask"].any()) else -1
        yield (split_rows(flat, length)[slot] if slot >= 0 else None), row


def _non_tensors(data: TensorDict) -> dict[str, Any]:
    return {key: value for key, value in data.items() if isinstance(value, NonTensorData)}


def conditioned_packs(data: TensorDict, settings: dict[str, Any], max_over_ranks: Callable[[int], int]) -> TensorDict:
    """The rows (x_i, y_i) as packed prefix trees; all ranks have as many packs.

    Args:
        data: see ``conditioned_batch``; rows without a reference and padding rows are left out.
        settings: ``max_token_len_per_gpu`` and ``min_shared_tokens``.
        max_over_ranks: the largest value of all ranks.

    Returns:
        A batch of ``packed_batch`` with ``gcpo_log_ref`` and ``gcpo_kl_mask``, flat in the order of the labels, and
        for every response ``gcpo_lengths`` and ``gcpo_kl_weight``.
    """
    chosen = [(context, row) for context, row in _rows(data) if context is not None]
    packs = packed_rows(
        [torch.cat([context, row["responses"]]) for context, row in chosen],
        [len(context) for context, _ in chosen],
        [None] * len(chosen),
        budget=settings["max_token_len_per_gpu"],
        min_shared=settings["min_shared_tokens"],
    )
    columns: dict[str, list[torch.Tensor]] = {
        name: [] for name in ("gcpo_log_ref", "gcpo_kl_mask", "gcpo_kl_weight", "gcpo_lengths")
    }
    for pack in packs:
        rows = [chosen[i][1] for i in pack.pack.sequences]
        for name in ("gcpo_log_ref", "gcpo_kl_mask", "gcpo_kl_weight"):
            columns[name].append(torch.cat([row[name] for row in rows]))
        columns["gcpo_lengths"].append(torch.tensor([len(row["responses"]) for row in rows]))
    for _ in range(max(1, max_over_ranks(len(packs))) - len(packs)):
        packs.append(filler())
        columns["gcpo_log_ref"].append(torch.zeros(1))
        columns["gcpo_kl_mask"].append(torch.zeros(1, dtype=torch.int64))
        columns["gcpo_kl_weight"].append(torch.zeros(1))
        columns["gcpo_lengths"].append(torch.ones(1, dtype=torch.int64))
    batch = packed_batch(packs, **columns)
    for key, value in _non_tensors(data).items():
        if key not in batch.keys():
            batch[key] = value
    return batch


def conditioned_batch(data: TensorDict) -> TensorDict:
    """One row (x_i, y_i) for every row of ``data``, so that all ranks have as many.

    A row without a reference, and a padding row, is replaced by two tokens whose mask is zero.

    Args:
        data: training rows with ``gcpo_contexts``, ``gcpo_context_lengths``, ``responses``, ``response_mask``,
            ``gcpo_log_ref``, ``gcpo_kl_mask`` and ``gcpo_kl_weight`` (nested), and the settings ``gcpo``.
    """
    columns: dict[str, list[torch.Tensor]] = {
        name: [] for name in ("prompts", "responses", "response_mask", "gcpo_log_ref", "gcpo_kl_mask", "gcpo_kl_weight")
    }
    for context, row in _rows(data):
        if context is None:
            token, mask = row["responses"][:1], row["gcpo_kl_mask"][:1] * 0
            row = {
                "responses": token,
                "response_mask": mask.to(row["response_mask"].dtype),
                "gcpo_log_ref": torch.zeros_like(row["gcpo_log_ref"][:1]),
                "gcpo_kl_mask": mask,
                "gcpo_kl_weight": row["gcpo_kl_weight"],
            }
            context = token
        columns["prompts"].append(context)
        for name, value in row.items():
            columns[name].append(value)
    inputs = [torch.cat(pair) for pair in zip(columns["prompts"], columns["responses"], strict=True)]
    batch = TensorDict(
        {
            **{name: nested(values) for name, values in columns.items()},
            "input_ids": nested(inputs),
            "position_ids": nested([torch.arange(len(row), device=row.device) for row in inputs]),
            "loss_mask": nested(columns["response_mask"]),
        },
        batch_size=len(inputs),
    )
    for key, value in _non_tensors(data).items():
        batch[key] = value
    size = tu.get_non_tensor_data(data, "gcpo", None)["micro_batch_size"]
    tu.assign_non_tensor(batch, use_dynamic_bsz=size is None, micro_batch_size_per_gpu=size, calculate_entropy=False)
    return batch
