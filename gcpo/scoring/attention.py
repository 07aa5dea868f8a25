"""Attention over a packed prefix tree, as an attention function of transformers.

``tree_attention`` is registered under ``ATTENTION`` and finds the layout of the row in the keyword ``tree_pack``, which
the model passes down. A query sees the keys of its ancestor nodes and the earlier keys of its own node.

On the CPU one kernel call handles the keys of every node. On a GPU one call of flash-attn handles all nodes of the row,
if it is installed and the row is in half precision, except for nodes that branch inside. Otherwise, after one warning,
one call of SDPA handles the queries of every node.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gcpo.scoring.kernels import GatheredAttention, SubtreeAttention
from gcpo.scoring.support import call_problem, tree_problem
from gcpo.scoring.tree import TreePack
from gcpo.scoring.varlen import kernel_for, varlen_attention

__all__ = ["ATTENTION", "AttentionRecord", "recorded_attention", "tree_attention", "tree_attention_on", "tree_problem"]

ATTENTION = "gcpo_tree"


@dataclass
class AttentionRecord:
    """Observations of the calls of the attention function.

    Attributes:
        problems: reasons why calls could not be answered exactly, without duplicates.
        dtypes: dtypes of the queries.
    """

    problems: list[str] = field(default_factory=list)
    dtypes: set[torch.dtype] = field(default_factory=set)


_record: AttentionRecord | None = None


@contextmanager
def recorded_attention() -> Iterator[AttentionRecord]:
    """Record calls that cannot be answered exactly instead of refusing them, inside the ``with`` block.

    An error in the middle of a sharded model's forward pass would leave its shards in an undefined state, so the probe
    of a model lets the pass finish and reads the record.
    """
    global _record
    before, _record = _record, AttentionRecord()
    try:
        yield _record
    finally:
        _record = before


def tree_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    tree_pack: TreePack | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute the attention of one packed row.

    Args:
        module: the attention layer.
        query: [1, H, N, D].
        key: [1, H', N, D], H a multiple of H'.
        value: as ``key``.
        attention_mask: must be ``None``, since the tree is the mask.
        scaling: factor of the logits; 1/sqrt(D) if ``None``.
        dropout: must be 0.
        tree_pack: the layout of the row; ``None`` if the model does not pass its keywords on, which is refused.
        kwargs: other keywords of transformers; one that is not known to be harmless must be ``None``.

    Returns:
        [1, N, H, D], and ``None`` for the attention weights. Under autocast the dtype is that of autocast.

    Raises:
        ValueError: the row does not have the pack's tokens, a mask or dropout is asked for, or a keyword has a
            value that this function does not understand (a window, a cap of the logits, a bias, sinks, ...).
    """
    if tree_pack is None:
        kind = type(module).__name__
        _judge(f"{kind} is not given the keywords of the model's call, tree_pack among them", query.dtype)
        return query.new_zeros(*query.shape[:-1], value.shape[-1]).transpose(1, 2), None
    if query.shape[0] != 1 or query.shape[2] != len(tree_pack) or key.shape[2] != len(tree_pack):
        raise ValueError(
            f"the pack holds one row of {len(tree_pack)} tokens, "
            f"the model was given {query.shape[0]} of {query.shape[2]} with {key.shape[2]} keys"
        )
    problem = call_problem(module, kwargs)
    if attention_mask is not None or dropout:
        problem = "attention over a packed tree takes neither a mask nor dropout"
    scaling = float(query.shape[-1] ** -0.5) if scaling is None else scaling
    device = query.device.type
    if torch.is_autocast_enabled(device):
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    _judge(problem, query.dtype)
    kernel = kernel_for(query, value)
    if kernel is not None:
        out = varlen_attention(query, key, value, tree_pack, scaling, kernel)
    elif device == "cpu" and query.shape[-1] == value.shape[-1]:
        out = SubtreeAttention.apply(query, key, value, tree_pack, scaling)
    else:
        out = GatheredAttention.apply(query, key, value, tree_pack, scaling, range(len(tree_pack.spans)))
    return out.transpose(1, 2).contiguous(), None


def _judge(problem: str | None, dtype: torch.dtype) -> None:
    """Refuse a call that cannot be answered exactly, or record it inside `recorded_attention`."""
    if _record is None:
        if problem is not None:
            raise ValueError(f"{problem}: score the sequences one at a time (gcpo.scoring.packing=dense)")
        return
    _record.dtypes.add(dtype)
    if problem is not None and problem not in _record.problems:
        _record.problems.append(problem)


def register_tree_attention() -> None:
    """Register ``ATTENTION`` with transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, tree_attention)


@contextmanager
def tree_attention_on(config: Any) -> Iterator[None]:
    """Let a model with this configuration attend over packed trees, inside the ``with`` block.

    Backward passes belong inside, because gradient checkpointing runs the layers again.
    """
    register_tree_attention()
    before = config._attn_implementation
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before
