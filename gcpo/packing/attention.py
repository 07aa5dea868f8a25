"""Attention over a packed prefix tree, as an attention function of transformers.

``tree_attention`` is registered under ``ATTENTION`` and finds the layout of the row in the keyword ``tree_pack``, which
the model passes down. A query sees the keys of the nodes above its own and the earlier ones of its own.

On the CPU there is a kernel call for the keys of every node. On a GPU flash-attn takes the whole row in one call, where
it is installed and the row is in half precision; otherwise there is a call of SDPA for the queries of every node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from gcpo.packing.tree import TreePack

ATTENTION = "gcpo_tree"


class _SubtreeAttention(torch.autograd.Function):
    """Attention node by node, for the CPU: one call for the keys of every node.

    The queries that see a node's keys are its own, causally, and all of those below it, which stand right behind them:
    a causal block with more queries than keys. A query gets a part of its result from every node on its path; the parts
    are merged by their log-sum-exps. The backward pass of every part follows from the merged result.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, pack: TreePack, scaling: float) -> Tensor:
        rows, heads, tokens, _ = query.shape
        precise = torch.promote_types(query.dtype, torch.float32)
        # In memory [1, N, H, D], as it is returned in the end.
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
    """For every node the place of its keys, and that of the queries that see them."""
    for (start, end), last in zip(pack.spans, pack.subtree_ends, strict=True):
        yield slice(start, end), slice(start, last)


def _own_mask(pack: TreePack, node: int, query: Tensor) -> Tensor | None:
    """What is added to the logits of a node that branches inside and of all below it; ``None`` for any other node."""
    mask = pack.masks.get(node)
    if mask is None:
        return None
    own = torch.zeros(mask.shape, dtype=query.dtype).masked_fill(~mask, -torch.inf)
    return pad(own, (0, 0, 0, pack.subtree_ends[node] - pack.spans[node][1]))


def _lower_right(queries: int, keys: int, device: torch.device) -> Tensor:
    """Mask [queries, keys] of queries that are the last ones of their keys' sequence."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def _node_attention(query: Tensor, key: Tensor, value: Tensor, own: Tensor | None, scaling: float) -> Tensor:
    """Attention of one node: query [1, H, S, D] at the end of key and value [1, H', P, D]; ``own``: its mask."""
    queries, keys = query.shape[2], key.shape[2]
    if own is not None:
        mask, causal = pad(own.to(query.device), (keys - queries, 0), value=True), False
    elif queries == keys or queries == 1:
        mask, causal = None, queries > 1
    else:
        mask, causal = _lower_right(queries, keys, query.device), False
    return scaled_dot_product_attention(
        query, key, value, mask, is_causal=causal, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )


class _GatheredAttention(torch.autograd.Function):
    """Attention node by node, for any device.

    The keys of a node's ancestors are gathered for it; saved for the backward pass they would take as much memory as
    sequences that share nothing, so they are gathered, and the node's attention done, once more there.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, pack: TreePack, scaling: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.pack, ctx.scaling = pack, scaling
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        for node, path in enumerate(pack.paths):
            start, end = pack.spans[node]
            keys, values = _gather(key, pack, path), _gather(value, pack, path)
            own = pack.masks.get(node)
            out[:, :, start:end] = _node_attention(query[:, :, start:end], keys, values, own, scaling)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        pack = ctx.pack
        grads = [torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)]
        for node, path in enumerate(pack.paths):
            start, end = pack.spans[node]
            inputs = (query[:, :, start:end], _gather(key, pack, path), _gather(value, pack, path))
            with torch.enable_grad():
                inputs = tuple(tensor.detach().requires_grad_() for tensor in inputs)
                out = _node_attention(*inputs, pack.masks.get(node), ctx.scaling)
            of_query, *of_keys = torch.autograd.grad(out, inputs, grad[:, :, start:end])
            grads[0][:, :, start:end] = of_query
            for total, part in zip(grads[1:], of_keys, strict=True):
                at = 0
                for ancestor in path:
                    low, high = pack.spans[ancestor]
                    total[:, :, low:high] += part[:, :, at : at + high - low]
                    at += high - low
        return (*grads, None, None)


def _varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, pack: TreePack, scaling: float, kernel: Callable[..., Tensor]
) -> Tensor:
    """Attention of all nodes in one call of a kernel for sequences of different lengths, over gathered keys.

    A node's queries are the last ones of its path, so the causal mask must end in the lower right corner, as
    flash-attn's does since 2.1.
    """
    index, cumulative_queries, cumulative_keys = pack.key_index_on(query.device)
    out = kernel(
        query[0].transpose(0, 1),
        *(tensor[0].transpose(0, 1)[index] for tensor in (key, value)),
        cumulative_queries,
        cumulative_keys,
        max(end - start for start, end in pack.spans),
        int(pack.position_ids.max()) + 1,
        softmax_scale=scaling,
        causal=True,
    )
    return out.transpose(0, 1).unsqueeze(0)


@cache
def varlen_kernel() -> Callable[..., Tensor] | None:
    """flash-attn's kernel, ``None`` where it is not installed."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func


def _varlen_fits(query: Tensor, value: Tensor, pack: TreePack) -> bool:
    """Whether flash-attn takes this row."""
    sizes = {query.shape[-1], value.shape[-1]}
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.float16, torch.bfloat16)
        and len(sizes) == 1
        and max(sizes) <= 256
        and not pack.masks
        and varlen_kernel() is not None
    )


def _gather(tensor: Tensor, pack: TreePack, path: tuple[int, ...]) -> Tensor:
    """The columns of the nodes of ``path``, one after another."""
    pieces = [tensor[:, :, slice(*pack.spans[node])] for node in path]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


def tree_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    tree_pack: TreePack,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one packed row.

    Args:
        module: the attention layer.
        query: [1, H, N, D].
        key: [1, H', N, D], H a multiple of H'.
        value: as ``key``.
        attention_mask: must be ``None``: the tree is the mask.
        scaling: of the logits, 1/sqrt(D) where ``None``.
        dropout: must be 0.
        tree_pack: the layout of the row.
        kwargs: ignored; transformers passes more.

    Returns:
        [1, N, H, D], and ``None`` for the attention weights. Under autocast its dtype is that of autocast.

    Raises:
        ValueError: the row does not have the pack's tokens, or a mask or dropout is asked for.
    """
    if query.shape[0] != 1 or query.shape[2] != len(tree_pack):
        raise ValueError(
            f"the pack holds one row of {len(tree_pack)} tokens, "
            f"the model was given {query.shape[0]} of {query.shape[2]}"
        )
    if attention_mask is not None or dropout:
        raise ValueError("attention over a packed tree takes neither a mask nor dropout")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    device = query.device.type
    if torch.is_autocast_enabled(device):
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    if _varlen_fits(query, value, tree_pack):
        # Under the checkpoint the gathered keys are gathered again instead of kept.
        out = checkpoint(_varlen_attention, query, key, value, tree_pack, scaling, varlen_kernel(), use_reentrant=False)
    else:
        subtrees = device == "cpu" and query.shape[-1] == value.shape[-1]
        attention = _SubtreeAttention if subtrees else _GatheredAttention
        out = attention.apply(query, key, value, tree_pack, scaling)
    return out.transpose(1, 2).contiguous(), None


def register_tree_attention() -> None:
    """Make ``ATTENTION`` known to transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, tree_attention)


def tree_problem(config: Any, model: type[torch.nn.Module]) -> str | None:
    """Why a model can't be run on packed trees, ``None`` if it can.

    Args:
        config: the model's transformers configuration.
        model: the class of the model.
    """
    kind = model.__name__
    if not getattr(model, "_supports_attention_backend", False):
        return f"{kind} does not take its attention function from transformers' AttentionInterface"
    others = set(getattr(config, "layer_types", None) or []) - {"full_attention"}
    if others:
        return f"{kind} has layers that are not full attention: {', '.join(sorted(others))}"
    if getattr(config, "attn_logit_softcapping", None):
        return f"{kind} caps its attention logits"
    if getattr(config, "attention_dropout", 0.0):
        return f"{kind} has attention dropout"
    return None


@contextmanager
def tree_attention_on(config: Any) -> Iterator[None]:
    """Within, a model with this configuration attends over packed trees.

    Backward passes belong inside: gradient checkpointing runs the layers again.
    """
    register_tree_attention()
    before = config._attn_implementation
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before
