"""Attention over a packed prefix tree, node by node.

``SubtreeAttention`` is for the CPU, ``GatheredAttention`` works on any device. The third implementation, one call of
flash-attn for many nodes, is in ``varlen``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from gcpo.scoring.tree import TreePack


class SubtreeAttention(torch.autograd.Function):
    """Attention node by node, for the CPU: one call for the keys of every node.

    The queries that see a node's keys are its own, causally, and those of all descendants, which follow in the row:
    a causal block with more queries than keys. A query gets a part of its result from every node on its path; the parts
    are merged by their log-sum-exps. The backward pass of every part uses the merged result.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, pack: TreePack, scaling: float) -> Tensor:
        rows, heads, tokens, _ = query.shape
        precise = torch.promote_types(query.dtype, torch.float32)
        # The memory layout [1, N, H, D] is that of the result.
        merged = query.new_empty(rows, tokens, heads, value.shape[-1], dtype=precise).transpose(1, 2)
        log_sum = query.new_empty(rows, heads, tokens, dtype=precise)
        for node, (keys, queries) in enumerate(_blocks(pack)):
            mask = _own_mask(pack, node, query)
            part, part_log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query[:, :, queries], key[:, :, keys], value[:, :, keys], 0.0, mask is None,
                attn_mask=mask, scale=scaling,
            )  # fmt: skip
            so_far, so_far_log_sum = merged[:, :, queries], log_sum[:, :, queries]
            if pack.parents[node] < 0:
                so_far.copy_(part)
                so_far_log_sum.copy_(part_log_sum)
            else:
                so_far.lerp_(part.to(precise), (part_log_sum - so_far_log_sum).sigmoid().unsqueeze(-1))
                torch.logaddexp(so_far_log_sum, part_log_sum, out=so_far_log_sum)
        out = merged.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, log_sum)
        ctx.pack, ctx.scaling = pack, scaling
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, log_sum = ctx.saved_tensors
        grads = torch.zeros_like(query), torch.empty_like(key), torch.empty_like(value)
        for node, (keys, queries) in enumerate(_blocks(ctx.pack)):
            mask = _own_mask(ctx.pack, node, query)
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad[:, :, queries], query[:, :, queries], key[:, :, keys], value[:, :, keys],
                out[:, :, queries], log_sum[:, :, queries], 0.0, mask is None, attn_mask=mask, scale=ctx.scaling,
            )  # fmt: skip
            grads[0][:, :, queries] += parts[0]
            grads[1][:, :, keys], grads[2][:, :, keys] = parts[1:]
        return (*grads, None, None)


def _blocks(pack: TreePack) -> Iterator[tuple[slice, slice]]:
    """Yield for every node the slice of its keys and the slice of the queries that see them."""
    for (start, end), last in zip(pack.spans, pack.subtree_ends, strict=True):
        yield slice(start, end), slice(start, last)


def _own_mask(pack: TreePack, node: int, query: Tensor) -> Tensor | None:
    """Return the additive mask of a node that branches inside and its descendants; ``None`` for any other node."""
    mask = pack.masks.get(node)
    if mask is None:
        return None
    own = torch.zeros(mask.shape, dtype=query.dtype).masked_fill(~mask, -torch.inf)
    return pad(own, (0, 0, 0, pack.subtree_ends[node] - pack.spans[node][1]))


def _lower_right(queries: int, keys: int, device: torch.device) -> Tensor:
    """Return the mask [queries, keys] of queries at the end of their keys' sequence."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def node_attention(query: Tensor, key: Tensor, value: Tensor, own: Tensor | None, scaling: float) -> Tensor:
    """Compute the attention of one node: query [1, H, S, D] at the end of key and value [1, H', P, D], mask ``own``."""
    queries, keys = query.shape[2], key.shape[2]
    if own is not None:
        mask = pad(own.to(query.device), (keys - queries, 0), value=True)
    elif queries == keys or queries == 1:
        return scaled_dot_product_attention(
            query, key, value, is_causal=queries > 1, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
    else:
        mask = _lower_right(queries, keys, query.device)
    # On a GPU the only kernel of SDPA that takes a mask and does not write all logits to memory takes no grouped
    # heads. The query heads that share a key head are therefore laid one behind another, as more queries of that head.
    groups = query.shape[1] // key.shape[1]
    folded = query.reshape(1, key.shape[1], groups * queries, query.shape[-1])
    out = scaled_dot_product_attention(folded, key, value, mask.repeat(groups, 1), scale=scaling)
    return out.reshape(1, query.shape[1], queries, value.shape[-1])


class GatheredAttention(torch.autograd.Function):
    """Attention node by node, for any device.

    The keys of a node's ancestors are gathered. Saved for the backward pass, they would take as much memory as
    sequences that share nothing, so the backward pass gathers them and computes the node's attention again. Only
    the keys of one path are gathered at a time, at most as many as the row has tokens.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, pack: TreePack, scaling: float, nodes: Sequence[int]
    ) -> Tensor:
        """Return the concatenated results of ``nodes``: [1, H, sum of their tokens, D]."""
        ctx.save_for_backward(query, key, value)
        ctx.pack, ctx.scaling, ctx.nodes = pack, scaling, nodes
        parts = []
        for node in nodes:
            keys, values = (gather(tensor, pack, pack.paths[node]) for tensor in (key, value))
            parts.append(node_attention(_own(query, pack, node), keys, values, pack.masks.get(node), scaling))
        return torch.cat(parts, dim=2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        pack = ctx.pack
        grads = [torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)]
        done = 0
        for node in ctx.nodes:
            path, (start, end) = pack.paths[node], pack.spans[node]
            parts = (_own(query, pack, node), gather(key, pack, path), gather(value, pack, path))
            with torch.enable_grad():
                inputs = [part.detach().requires_grad_() for part in parts]
                out = node_attention(inputs[0], inputs[1], inputs[2], pack.masks.get(node), ctx.scaling)
            of_query, *of_keys = torch.autograd.grad(out, inputs, grad[:, :, done : done + end - start])
            done += end - start
            grads[0][:, :, start:end] = of_query
            for total, part in zip(grads[1:], of_keys, strict=True):
                at = 0
                for ancestor in path:
                    low, high = pack.spans[ancestor]
                    total[:, :, low:high] += part[:, :, at : at + high - low]
                    at += high - low
        return (*grads, None, None, None)


def _own(tensor: Tensor, pack: TreePack, node: int) -> Tensor:
    """Return the columns of one node."""
    return tensor[:, :, slice(*pack.spans[node])]


def gather(tensor: Tensor, pack: TreePack, path: tuple[int, ...]) -> Tensor:
    """Return the columns of the nodes of ``path``, concatenated."""
    pieces = [tensor[:, :, slice(*pack.spans[node])] for node in path]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)
