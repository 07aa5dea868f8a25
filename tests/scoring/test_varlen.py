"""Attention with flash-attn's kernel, against a stand-in that does what flash-attn documents."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from gcpo.scoring import PrefixForest, TreePack, varlen
from gcpo.scoring import attention as attention_module
from gcpo.scoring.attention import tree_attention
from gcpo.scoring.branches import EpisodeRequest, pack_requests
from gcpo.scoring.kernels import GatheredAttention
from gcpo.scoring.varlen import kernel_calls, kernel_for, varlen_attention
from tests.scoring.test_attention import contexts, masked_pack, visible


class Kernel:
    """``flash_attn_varlen_func``: [total, H, D], causal to the lower right corner."""

    def __init__(self) -> None:
        self.queries: list[int] = []
        self.keys: list[int] = []

    def __call__(self, query, key, value, cu_queries, cu_keys, max_queries, max_keys, *, softmax_scale, causal):
        assert causal and cu_queries.dtype == cu_keys.dtype == torch.int32
        assert cu_queries[-1] == len(query) and cu_keys[-1] == len(key) == len(value)
        self.queries.append(len(query))
        self.keys.append(len(key))
        out = []
        for (a, b), (c, d) in zip(
            itertools.pairwise(cu_queries.tolist()), itertools.pairwise(cu_keys.tolist()), strict=True
        ):
            assert b - a <= max_queries and d - c <= max_keys
            mask = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - b + a)
            rows = (x.transpose(0, 1)[None] for x in (query[a:b], key[c:d], value[c:d]))
            found = scaled_dot_product_attention(*rows, mask, scale=softmax_scale, enable_gqa=True)
            out.append(found[0].transpose(0, 1))
        return torch.cat(out)


def inject_pack(fused_tokens: int, responses: int = 2) -> TreePack:
    """A row of GC2PO's ``hidden_state``: branches with a mask behind responses and their prompt."""
    generator = torch.Generator().manual_seed(4)

    def tokens(length: int) -> torch.Tensor:
        return torch.randint(3, 90, (length,), generator=generator)

    prompt, probe, answers = tokens(9), tokens(3), (tokens(2), tokens(4))
    noise = torch.zeros(2, 3, 8)
    requests = [
        EpisodeRequest(prompt, tokens(40 + i), (11, 25, 37), (0, 2), probe, answers, noise) for i in range(responses)
    ]
    (row,) = pack_requests(requests, 4096, fused_tokens=fused_tokens)
    assert row.pack.masks
    return row.pack


PACKS = {
    "a tree without masks": lambda: PrefixForest(contexts(8, 2)[0], min_shared=2).packs()[0],
    "a root with a mask and children": masked_pack,
    "responses fused with their branches": lambda: inject_pack(512),
    "a masked node behind every episode": lambda: inject_pack(0),
}


def random_inputs(pack: TreePack) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(1, heads, len(pack), 6, dtype=torch.float64, generator=generator, requires_grad=True)
        for heads in (4, 2, 2)
    ]


@pytest.mark.parametrize("name", PACKS)
def test_results_and_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masked nodes with SDPA and all others with the kernel give attention under the whole mask, also its gradients."""
    pack, kernel = PACKS[name](), Kernel()
    inputs = random_inputs(pack)
    wanted = scaled_dot_product_attention(*inputs, visible(pack), scale=0.7, enable_gqa=True)
    monkeypatch.setattr(attention_module, "kernel_for", lambda query, value: kernel)
    found = tree_attention(torch.nn.Identity(), *inputs, None, scaling=0.7, tree_pack=pack)[0].transpose(1, 2)
    torch.testing.assert_close(found, wanted)
    weight = torch.randn(wanted.shape, dtype=torch.float64)
    for ours, right in zip(
        *(torch.autograd.grad((out * weight).sum(), inputs) for out in (found, wanted)), strict=True
    ):
        torch.testing.assert_close(ours, right)


def test_masked_nodes_do_not_turn_the_row_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """All tokens outside masked nodes reach the kernel; only the masked nodes are done one by one."""
    pack, kernel = inject_pack(0), Kernel()
    one_by_one: list[int] = []
    original = GatheredAttention.forward

    def forward(ctx: Any, query, key, value, pack, scaling, nodes) -> torch.Tensor:
        one_by_one.extend(nodes)
        return original(ctx, query, key, value, pack, scaling, nodes)

    monkeypatch.setattr(GatheredAttention, "forward", forward)
    with torch.no_grad():
        varlen_attention(*random_inputs(pack), pack, 0.7, kernel)
    assert one_by_one == sorted(pack.masks)
    masked = sum(pack.spans[node][1] - pack.spans[node][0] for node in pack.masks)
    assert sum(kernel.queries) == len(pack) - masked > 0


@pytest.mark.parametrize("name", PACKS)
def test_gathered_keys_are_within_the_budget(name: str) -> None:
    """No call gathers more keys than the row has tokens, which the token budget bounds; the calls hold every node."""
    pack, kernel = PACKS[name](), Kernel()
    with torch.no_grad():
        varlen_attention(*random_inputs(pack), pack, 0.7, kernel)
    assert max(kernel.keys) <= len(pack)
    nodes = [node for call in kernel_calls(pack) for node in call.nodes]
    assert nodes == [node for node in range(len(pack.spans)) if node not in pack.masks]


def test_many_leaves_behind_a_long_path() -> None:
    """The keys of all nodes together are far more than the row's tokens; they are gathered in several calls."""
    stem = torch.arange(3, 203)
    (pack,) = PrefixForest([torch.cat([stem, torch.arange(10 * k, 10 * k + 9)]) for k in range(30, 50)]).packs()
    calls = kernel_calls(pack)
    assert sum(len(call.keys) for call in calls) > 8 * len(pack)
    assert len(calls) > 8 and max(len(call.keys) for call in calls) <= len(pack)


def test_calls_by_hand() -> None:
    """Where the keys of every node stand, and the lengths."""
    (pack,) = PrefixForest([torch.tensor(s) for s in ([1, 2, 3, 4], [1, 2, 9], [1, 2])], min_shared=1).packs()
    assert pack.spans == ((0, 2), (2, 4), (4, 5))
    first, second, third = kernel_calls(pack)  # 2 + 4 keys are more than the row's 5 tokens, and so are 4 + 3
    assert [call.queries.tolist() for call in (first, second, third)] == [[0, 1], [2, 3], [4]]
    assert [call.keys.tolist() for call in (first, second, third)] == [[0, 1], [0, 1, 2, 3], [0, 1, 4]]
    assert third.cumulative_queries.tolist() == [0, 1] and third.cumulative_keys.tolist() == [0, 3]
    assert (third.nodes, third.max_queries, third.max_keys) == ((2,), 1, 3)
    wide = dataclasses.replace(pack, parents=(-1, -1, -1))
    (call,) = kernel_calls(wide)
    assert call.keys.tolist() == call.queries.tolist() == [0, 1, 2, 3, 4]
    assert call.cumulative_keys.tolist() == [0, 2, 4, 5] and (call.max_queries, call.max_keys) == (2, 2)


# ---- which kernel a GPU takes ----------------------------------------------------------------------------------------


def heads(dtype: torch.dtype = torch.bfloat16, size: int = 64) -> Any:
    """What ``kernel_for`` looks at, as of a tensor on a GPU."""
    return SimpleNamespace(device=SimpleNamespace(type="cuda"), dtype=dtype, shape=(1, 2, 8, size))


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Any:
    """What is logged; nothing has been said and no import tried before."""
    varlen.varlen_kernel.cache_clear()
    varlen._say_slow.cache_clear()
    caplog.set_level(logging.WARNING, logger="gcpo")
    yield caplog
    varlen.varlen_kernel.cache_clear()
    varlen._say_slow.cache_clear()


def test_missing_flash_attn_is_said_once(said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the reason and what to install; on the CPU nobody misses it."""
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    cpu = torch.zeros(1, 2, 8, 64, dtype=torch.bfloat16)
    assert kernel_for(cpu, cpu) is None and not said.messages
    for _ in range(3):
        assert kernel_for(heads(), heads()) is None
    (message,) = said.messages
    assert "flash-attn cannot be imported" in message and "built for this torch" in message and "SDPA" in message


@pytest.mark.parametrize(
    ("query", "value", "reason"),
    [
        (heads(torch.float32), heads(torch.float32), "half precision only, and this model attends in torch.float32"),
        (heads(size=96), heads(size=64), "96 for keys, 64 for values"),
        (heads(size=288), heads(size=288), "at most 256 dimensions"),
    ],
)
def test_heads_that_flash_attn_does_not_take(said: Any, monkeypatch, query: Any, value: Any, reason: str) -> None:
    """Each reason is said once, also where flash-attn is installed."""
    module = ModuleType("flash_attn")
    module.flash_attn_varlen_func = Kernel()
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    for _ in range(2):
        assert kernel_for(query, value) is None
    assert len(said.messages) == 1 and reason in said.messages[0]
    assert kernel_for(heads(), heads()) is module.flash_attn_varlen_func
