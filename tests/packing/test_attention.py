"""Packed trees through transformers' models, against one sequence at a time."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers
from torch.nn.functional import scaled_dot_product_attention

from gcpo.collider.plan import leave_one_out_plan
from gcpo.packing import PrefixForest, TreePack
from gcpo.packing.attention import tree_attention, tree_attention_on, tree_problem

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
    (pack,) = PrefixForest(sequences).packs()
    leaf = len(pack.spans) - 1
    other = next(k for k in range(leaf) if k not in pack.paths[leaf])
    wrong = dataclasses.replace(pack, parents=(*pack.parents[:-1], other))
    with tree_attention_on(net.config):
        assert gap(packed(net, [wrong], sequences, starts), wanted) > 1e-3


def test_finite_differences() -> None:
    """The backward pass of the attention by itself."""
    (pack,) = PrefixForest([torch.tensor(s) for s in ([1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 6])], min_shared=1).packs()
    generator = torch.Generator().manual_seed(1)

    def tensor(heads: int) -> torch.Tensor:
        return torch.randn(1, heads, len(pack), 3, generator=generator, dtype=torch.float64, requires_grad=True)

    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return tree_attention(torch.nn.Identity(), query, key, value, None, 0.7, tree_pack=pack)[0]

    assert torch.autograd.gradcheck(attention, (tensor(4), tensor(2), tensor(2)))


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


def test_what_cannot_be_packed() -> None:
    """Each reason is a sentence; a row of another length, a mask and dropout are refused."""
    net = model("Qwen2", torch.float32)
    assert tree_problem(net.config, net) is None
    windowed = transformers.Qwen2Config(use_sliding_window=True, max_window_layers=0, num_hidden_layers=2)
    assert "not full attention: sliding_attention" in tree_problem(windowed, net)
    assert "attention dropout" in tree_problem(transformers.Qwen2Config(attention_dropout=0.1), net)
    assert "caps" in tree_problem(transformers.PretrainedConfig(attn_logit_softcapping=30.0), net)
    assert "AttentionInterface" in tree_problem(net.config, torch.nn.Linear(1, 1))
    (pack,) = PrefixForest([torch.tensor([1, 2, 3])]).packs()
    rows = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ValueError, match="one row of 3 tokens, the model was given 1 of 4"):
        tree_attention(net, rows, rows, rows, None, tree_pack=pack)
    fit = rows[:, :, :3]
    with pytest.raises(ValueError, match="neither a mask nor dropout"):
        tree_attention(net, fit, fit, fit, torch.zeros(1), tree_pack=pack)
