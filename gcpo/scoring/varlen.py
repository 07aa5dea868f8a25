"""Attention over a packed prefix tree with flash-attn's kernel for sequences of different lengths.

The kernel handles many nodes in one call, each with the gathered keys of its path. A node that branches inside needs
a mask, which the kernel does not support: such nodes are small, and SDPA handles them one by one. The kernel handles
all other nodes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gcpo.notices import notice
from gcpo.scoring.kernels import GatheredAttention
from gcpo.scoring.tree import TreePack

logger = logging.getLogger(__name__)

_LARGEST_HEAD = 256
"""Of flash-attn."""


@dataclass(frozen=True)
class KernelCall:
    """One kernel call for several nodes.

    Attributes:
        nodes: indices of the nodes.
        queries: int64 [Q]: positions of their tokens in the row.
        keys: int64 [sum of their paths' lengths]: positions of their keys in the row.
        cumulative_queries: int32 [nodes + 1].
        cumulative_keys: int32 [nodes + 1].
        max_queries: tokens of the longest node.
        max_keys: tokens of the longest path.
    """

    nodes: tuple[int, ...]
    queries: Tensor
    keys: Tensor
    cumulative_queries: Tensor
    cumulative_keys: Tensor
    max_queries: int
    max_keys: int


def kernel_calls(pack: TreePack, device: torch.device | str = "cpu") -> tuple[KernelCall, ...]:
    """Return the kernel calls for all nodes without a mask.

    A gathered key takes as much memory as a token of the row, and many small nodes at the end of long paths
    would gather many times the row's tokens. A call therefore gathers no more keys than the row has tokens, so the
    token budget of the row bounds the gathered keys too.
    """
    lengths = [sum(pack.spans[node][1] - pack.spans[node][0] for node in path) for path in pack.paths]
    groups: list[list[int]] = []
    gathered = 0
    for node in range(len(pack.spans)):
        if node in pack.masks:
            continue
        if not groups or gathered + lengths[node] > len(pack):
            groups.append([])
            gathered = 0
        groups[-1].append(node)
        gathered += lengths[node]
    return tuple(_call(pack, nodes, lengths, device) for nodes in groups)


def _call(pack: TreePack, nodes: list[int], lengths: list[int], device: torch.device | str) -> KernelCall:
    queries = [pack.spans[node][1] - pack.spans[node][0] for node in nodes]
    keys = [lengths[node] for node in nodes]
    cumulative = [torch.tensor([0, *sizes]).cumsum(0).int().to(device) for sizes in (queries, keys)]
    return KernelCall(
        tuple(nodes),
        torch.cat([torch.arange(*pack.spans[node]) for node in nodes]).to(device),
        torch.cat([torch.arange(*pack.spans[ancestor]) for node in nodes for ancestor in pack.paths[node]]).to(device),
        cumulative[0],
        cumulative[1],
        max(queries),
        max(keys),
    )


@dataclass(frozen=True)
class _Layout:
    """The division of a row into kernel calls on one device.

    Attributes:
        calls: kernel calls.
        masked: the nodes that SDPA handles one by one.
        order: int64 [N]: index of every token of the row in the results of ``masked`` followed by ``calls``;
            ``None`` if these are in the order of the row.
    """

    calls: tuple[KernelCall, ...]
    masked: tuple[int, ...]
    order: Tensor | None


def _layout(pack: TreePack, device: torch.device) -> _Layout:
    """Return the layout of a row on a device, which is created once for all layers of a model."""
    if device not in pack.layouts:
        calls, masked = kernel_calls(pack, device), tuple(sorted(pack.masks))
        # Calls keep the nodes in row order, so only masked nodes are out of order.
        order = None
        if masked:
            places = [torch.arange(*pack.spans[node]).to(device) for node in masked]
            order = torch.cat([*places, *(call.queries for call in calls)]).argsort()
        pack.layouts[device] = _Layout(calls, masked, order)
    return pack.layouts[device]


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, pack: TreePack, scaling: float, kernel: Callable[..., Tensor]
) -> Tensor:
    """Compute the attention of a row: query and result [1, H, N, D], key and value [1, H', N, D].

    A node's queries are the last ones of its path, so the kernel's causal mask must end in the lower right corner, as
    flash-attn's does since 2.1.
    """
    layout = _layout(pack, query.device)
    parts = []
    if layout.masked:
        parts.append(GatheredAttention.apply(query, key, value, pack, scaling, layout.masked))
    for call in layout.calls:
        # Checkpointing gathers the keys again instead of keeping them.
        parts.append(checkpoint(_run, query, key, value, call, scaling, kernel, use_reentrant=False))
    out = torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]
    return out if layout.order is None else out.index_select(2, layout.order)


def _run(
    query: Tensor, key: Tensor, value: Tensor, call: KernelCall, scaling: float, kernel: Callable[..., Tensor]
) -> Tensor:
    out = kernel(
        query[0].transpose(0, 1)[call.queries],
        *(tensor[0].transpose(0, 1)[call.keys] for tensor in (key, value)),
        call.cumulative_queries,
        call.cumulative_keys,
        call.max_queries,
        call.max_keys,
        softmax_scale=scaling,
        causal=True,
    )
    return out.transpose(0, 1).unsqueeze(0)


@cache
def varlen_kernel() -> Callable[..., Tensor] | str:
    """Return flash-attn's kernel, or the reason why it is not available."""
    try:
        from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]  (built for GPUs)
    except ImportError as error:
        return f"flash-attn cannot be imported ({error}); install a version that is built for this torch"
    return flash_attn_varlen_func


def kernel_for(query: Tensor, value: Tensor) -> Callable[..., Tensor] | None:
    """Return the kernel for these heads, ``None`` if it does not support them; on a GPU the reason is logged once.

    Args:
        query: [1, H, N, D].
        value: [1, H', N, D].
    """
    if query.device.type != "cuda":
        return None
    if query.dtype not in (torch.float16, torch.bfloat16):
        problem = f"it computes in half precision only, and this model attends in {query.dtype}"
    elif query.shape[-1] != value.shape[-1]:
        problem = (
            f"its heads have one size, and this model's have {query.shape[-1]} for keys, {value.shape[-1]} for values"
        )
    elif query.shape[-1] > _LARGEST_HEAD:
        problem = f"its heads have at most {_LARGEST_HEAD} dimensions, and this model's have {query.shape[-1]}"
    else:
        kernel = varlen_kernel()
        if not isinstance(kernel, str):
            return kernel
        problem = kernel
    _say_slow(problem)
    return None


@cache
def _say_slow(problem: str) -> None:
    """Warn on the first rank, once per reason."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or torch.distributed.get_rank() == 0:
        notice(
            logger,
            "attention over packed trees does not use flash-attn on this GPU but PyTorch's SDPA for every node, which "
            f"gives the same results more slowly: {problem}",
        )
