"""Packed trees through transformers' models, against one sequence at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
import transformers
from torch.nn.functional import scaled_dot_product_attention

from gcpo.collider.plan import leave_one_out_plan
from gcpo.scoring import PrefixForest, TreePack
from gcpo.scoring.attention import tree_attention, tree_attention_on
from gcpo.scoring.kernels import GatheredAttention, SubtreeAttention

VOCABULARY = 61


def contexts(n: int, draws: int, seed: int = 0) -> tuple[list[torch.Tensor], list[int]]:
    """Every x_{i,l} followed by y_i, with ragged blocks, and where y_i begins."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(length: int) -> torch.Tensor:
        return torch.randint(0, VOCABULARY, (length,), generator=generator)

    question, tail = tokens(5), tokens(2)
    candidates = [tokens(4 + (3 * k) % 7) for k in range(n)]
    candidates[1] = candidates[1][:1]
    colliders = [tokens(6 + draw) for draw in range(draws)]
    plan = leave_one_out_plan(n, draws, lengths=[len(c) for c in candidates], permutation=list(reversed(range(n))))
    sequences, starts = [], []
    for i in range(n):
        for order in plan.orders[i]:
            blocks = [candidates[k] if kind == "candidate" else colliders[k] for kind, k in order]
            context = torch.cat([question, *blocks, tail])
            sequences.append(torch.cat([context, candidates[i]]))
            starts.append(len(context))
    return sequences, starts


def model(kind: str, dtype: torch.dtype) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
    )
    return getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype)


def log_probs_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def one_at_a_time(net, sequences: list[torch.Tensor], starts: list[int]) -> list[torch.Tensor]:
    found = []
    for sequence, start in zip(sequences, starts, strict=True):
        logits = net(sequence[None], use_cache=False).logits[0]
        found.append(log_probs_of(logits[start - 1 : -1], sequence[start:]))
    return found


def packed(net, packs: list[TreePack], sequences: list[torch.Tensor], starts: list[int]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = [torch.empty(0)] * len(sequences)
    for pack in packs:
        logits = net(
            pack.token_ids[None],
            attention_mask=None,
            position_ids=pack.position_ids[None],
            use_cache=False,
            tree_pack=pack,
        ).logits[0]
        for i, place in zip(pack.sequences, pack.places, strict=True):
            found[i] = log_probs_of(logits[place[starts[i] - 1 : -1]], sequences[i][starts[i] :])
    return found


def gradient(net, values: list[torch.Tensor]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    weights = [torch.randn(len(value), generator=generator).to(value) for value in values]
    net.zero_grad()
    sum((value * weight).sum() for value, weight in zip(values, weights, strict=True)).backward()
    return [parameter.grad.clone() for parameter in net.parameters()]


def gap(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    return max(float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in zip(found, wanted, strict=True))


# The norms of these models compute in float32 whatever the model's dtype, so float64 is as exact as they are.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 2e-6), (torch.float32, 2e-5)])
@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3", "Llama"])
@pytest.mark.parametrize(("n", "draws"), [(2, 1), (3, 3), (5, 2), (8, 1), (8, 8)])
def test_log_probs_and_gradients(kind: str, n: int, draws: int, dtype: torch.dtype, tolerance: float) -> None:
    """Packed in one row and cut by a budget: the log-probabilities and gradients of the sequences by themselves."""
    net = model(kind, dtype)
    sequences, starts = contexts(n, draws)
    wanted = one_at_a_time(net, sequences, starts)
    wanted_gradient = gradient(net, wanted)
    forest = PrefixForest(sequences, min_shared=2)
    longest = max(map(len, sequences))
    assert n == 2 or forest.tree_tokens < forest.dense_tokens
    for budget in (None, longest + 10):
        with tree_attention_on(net.config):
            found = packed(net, forest.packs(budget), sequences, starts)
            assert gap(found, wanted) < tolerance
            assert gap(gradient(net, found), wanted_gradient) < tolerance
    assert net.config._attn_implementation == "sdpa"


def test_gradient_checkpointing() -> None:
    """Layers that run again in the backward pass attend over the tree again."""
    net = model("Qwen2", torch.float32)
    sequences, starts = contexts(4, 2)
    wanted = gradient(net, one_at_a_time(net, sequences, starts))
    net.gradient_checkpointing_enable({"use_reentrant": False})
    net.train()
    with tree_attention_on(net.config):
        found = gradient(net, packed(net, PrefixForest(sequences).packs(), sequences, starts))
    assert gap(found, wanted) < 2e-5


def test_a_wrong_tree_is_found_out() -> None:
    """The comparison above fails for a layout whose nodes hang on the wrong parents."""
    net = model("Qwen2", torch.float64)
    sequences, starts = contexts(5, 2)
    wanted = one_at_a_time(net, sequences, starts)
    (pack,) = PrefixForest(sequences, min_shared=2).packs()
    wrong = dataclasses.replace(pack, parents=(*pack.parents[:-1], pack.paths[-1][-3]))
    with tree_attention_on(net.config):
        assert gap(packed(net, [pack], sequences, starts), wanted) < 2e-6
        assert gap(packed(net, [wrong], sequences, starts), wanted) > 1e-3


def masked_pack() -> TreePack:
    """Two trees; the first one's root branches inside and has children."""
    (pack,) = PrefixForest(
        [torch.tensor(s) for s in ([1, 2, 3, 4], [1, 2, 3, 5, 6], [1, 2, 3, 5, 7], [8, 9])], min_shared=1
    ).packs()
    mask = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 1, 1]], dtype=torch.bool)
    return dataclasses.replace(pack, masks={0: mask})


def visible(pack: TreePack) -> torch.Tensor:
    """Which tokens of the row see which, token by token, bool [N, N]."""
    seen = torch.zeros(len(pack), len(pack), dtype=torch.bool)
    for node, path in enumerate(pack.paths):
        start, end = pack.spans[node]
        for ancestor in path[:-1]:
            seen[start:end, slice(*pack.spans[ancestor])] = True
        own = torch.ones(end - start, end - start, dtype=torch.bool).tril()
        seen[start:end, start:end] = pack.masks.get(node, own)
    return seen


def gathered(query, key, value, pack: TreePack, scaling: float) -> torch.Tensor:
    """The way of a GPU without flash-attn, over all nodes."""
    return GatheredAttention.apply(query, key, value, pack, scaling, range(len(pack.spans)))


@pytest.mark.parametrize("attention", [gathered, SubtreeAttention.apply])
def test_against_a_dense_mask(attention: Callable[..., torch.Tensor]) -> None:
    """Results and gradients are those of attention under the whole mask; the gradients, those of finite differences."""
    pack = masked_pack()
    generator = torch.Generator().manual_seed(1)
    query, key, value = (
        torch.randn(1, heads, len(pack), 3, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads in (4, 2, 2)
    )

    def run(*inputs: torch.Tensor) -> torch.Tensor:
        return attention(*inputs, pack, 0.7)

    wanted = scaled_dot_product_attention(query, key, value, visible(pack), scale=0.7, enable_gqa=True)
    torch.testing.assert_close(run(query, key, value), wanted)
    assert torch.autograd.gradcheck(run, (query, key, value))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    """flash-attn's kernel (bfloat16) and SDPA (float32) attend over the tree as attention under the whole mask does."""
    (pack,) = PrefixForest(contexts(8, 2)[0], min_shared=2).packs()
    inputs = [torch.randn(1, h, len(pack), 64, device="cuda", requires_grad=True) for h in (4, 2, 2)]
    wanted = scaled_dot_product_attention(*inputs, visible(pack).cuda(), enable_gqa=True)
    halves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    found = tree_attention(torch.nn.Identity(), *halves, None, tree_pack=pack)[0].transpose(1, 2)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert gap([found.float()], [wanted]) < tolerance
    weight = torch.randn(wanted.shape, device="cuda")
    ours = torch.autograd.grad((found.float() * weight).sum(), halves)
    assert gap([x.float() for x in ours], torch.autograd.grad((wanted * weight).sum(), inputs)) < 2 * tolerance


def test_long_nodes() -> None:
    """Nodes of several blocks of the kernel, where queries outnumber keys and the other way round."""
    generator = torch.Generator().manual_seed(2)
    root, fork, *ends = (torch.randint(0, 99, (k,), generator=generator) for k in (700, 30, 520, 90, 300))
    sequences = [torch.cat([root, *rest]) for rest in ((fork, ends[0]), (fork, ends[1]), (ends[2],))]
    (pack,) = PrefixForest(sequences).packs()
    inputs = [torch.randn(1, h, len(pack), 16, generator=generator, requires_grad=True) for h in (2, 1, 1)]
    weight = torch.randn(1, 2, len(pack), 16, generator=generator)
    found, wanted = (
        (out, *torch.autograd.grad((out * weight).sum(), inputs))
        for out in (
            tree_attention(torch.nn.Identity(), *inputs, None, tree_pack=pack)[0].transpose(1, 2),
            scaled_dot_product_attention(*inputs, visible(pack), enable_gqa=True),
        )
    )
    assert gap(found, wanted) < 2e-6


def test_autocast() -> None:
    """Queries and keys that a norm left in float32 meet values in bfloat16 (Qwen3)."""
    net = model("Qwen3", torch.float32)
    sequences, starts = contexts(4, 2)
    wanted = one_at_a_time(net, sequences, starts)
    with torch.autocast("cpu", torch.bfloat16), tree_attention_on(net.config):
        found = packed(net, PrefixForest(sequences, min_shared=2).packs(), sequences, starts)
        gradients = gradient(net, found)
    assert gap(found, wanted) < 2e-2
    assert gap(gradients, gradient(net, wanted)) < 0.2


def test_bfloat16() -> None:
    """A model in bfloat16: packing changes less than the format itself does."""
    sequences, starts = contexts(5, 2)
    exact = one_at_a_time(model("Qwen2", torch.float64), sequences, starts)
    net = model("Qwen2", torch.bfloat16)
    dense = [values.double() for values in one_at_a_time(net, sequences, starts)]
    with tree_attention_on(net.config):
        found = packed(net, PrefixForest(sequences, min_shared=2).packs(), sequences, starts)
    assert gap(dense, exact) > 1e-4
    assert gap([values.double() for values in found], exact) < 1.5 * gap(dense, exact)


def test_a_node_apart_from_its_parent() -> None:
    """The children of a node stand right behind it; a row that is laid out otherwise is refused."""
    pack = dataclasses.replace(masked_pack(), parents=(-1, 0, 0, 2, 1, -1))
    with pytest.raises(ValueError, match="node 4 of the tree stands behind node 3, which is not below its parent"):
        _ = pack.subtree_ends


def test_every_token_sees_its_prefix_alone() -> None:
    """The attention of a token is scaled dot-product attention over the keys of its own sequence."""
    sequences = [torch.tensor(s) for s in ([1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 6])]
    (pack,) = PrefixForest(sequences, min_shared=1).packs()
    query, key, value = torch.randn(3, 1, 2, len(pack), 4, dtype=torch.float64).unbind()
    found, weights = tree_attention(torch.nn.Identity(), query, key, value, None, tree_pack=pack)
    assert weights is None and found.shape == (1, len(pack), 2, 4)
    for place in pack.places:
        alone = scaled_dot_product_attention(query[:, :, place], key[:, :, place], value[:, :, place], is_causal=True)
        torch.testing.assert_close(found[:, place], alone.transpose(1, 2))


def test_rows_that_do_not_fit() -> None:
    """A row of another length, keys of a cache, a mask and dropout are refused."""
    (pack,) = PrefixForest([torch.tensor([1, 2, 3])]).packs()
    module, rows = torch.nn.Identity(), torch.zeros(1, 2, 4, 8)
    fit = rows[:, :, :3]
    with pytest.raises(ValueError, match="one row of 3 tokens, the model was given 1 of 4"):
        tree_attention(module, rows, rows, rows, None, tree_pack=pack)
    with pytest.raises(ValueError, match="1 of 3 with 4 keys"):
        tree_attention(module, fit, rows, rows, None, tree_pack=pack)
    with pytest.raises(ValueError, match="neither a mask nor dropout"):
        tree_attention(module, fit, fit, fit, torch.zeros(1), tree_pack=pack)
    with pytest.raises(ValueError, match="neither a mask nor dropout"):
        tree_attention(module, fit, fit, fit, None, dropout=0.1, tree_pack=pack)
