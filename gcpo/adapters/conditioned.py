"""The rows y_i under x_i, made from what a training row carries."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorData
from verl.utils import tensordict_utils as tu

from gcpo.adapters.fields import nested, split_rows


def policy_slot(lengths: torch.Tensor) -> int:
    """The context that pi_theta is conditioned on: x_{i,0}, or the first that is there; -1 if none is."""
    present = torch.nonzero(lengths > 0).flatten()
    return int(present[0]) if len(present) else -1


def conditioned_batch(data: TensorDict) -> TensorDict:
    """One row (x_i, y_i) for every row of ``data``, so that all ranks have as many.

    A row without a reference, and a padding row, is replaced by two tokens whose mask is zero.

    Args:
        data: training rows with ``gcpo_contexts``, ``gcpo_context_lengths``, ``responses``, ``response_mask``,
            ``gcpo_log_ref`` and ``gcpo_kl_mask`` (nested), and the settings ``gcpo``.
    """
    columns: dict[str, list[torch.Tensor]] = {
        name: [] for name in ("prompts", "responses", "response_mask", "gcpo_log_ref", "gcpo_kl_mask")
    }
    contexts, lengths = data["gcpo_contexts"].unbind(), data["gcpo_context_lengths"].unbind()
    rows = zip(*(data[name].unbind() for name in list(columns)[1:]), strict=True)
    num_shared = int(tu.get_non_tensor_data(data, "gcpo", None)["num_shared"])
    for flat, length, (response, mask, log_ref, kl_mask) in zip(contexts, lengths, rows, strict=True):
        slot = policy_slot(length[:num_shared]) if bool(kl_mask.any()) else -1
        if slot >= 0:
            values = (split_rows(flat, length)[slot], response, mask, log_ref, kl_mask)
        else:
            token, zero = response[:1], torch.zeros_like(kl_mask[:1])
            values = (token, token, zero.to(mask.dtype), torch.zeros_like(log_ref[:1]), zero)
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
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
    for key, value in data.items():
        if isinstance(value, NonTensorData):
            batch[key] = value
    tu.assign_non_tensor(batch, use_dynamic_bsz=True, calculate_entropy=False)
    return batch
