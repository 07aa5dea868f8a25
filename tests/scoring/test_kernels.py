"""The SDPA fallback of GPUs, run on the CPU: the causal corner, masks and models."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from gcpo.scoring import PrefixForest, TreePack
from gcpo.scoring import attention as attention_module
from gcpo.scoring.attention import tree_attention, tree_attention_on
from gcpo.scoring.kernels import GatheredAttention, _lower_right, node_attention
from tests.scoring.test_attention import contexts, gap, gradient, model, one_at_a_time, packed, visible


class Fallback:
    """``SubtreeAttention`` replaced by the fallback that a GPU takes."""

    @staticmethod
    def apply(query, key, value, pack: TreePack, scaling: float) -> torch.Tensor:
        return GatheredAttention.apply(query, key, value, pack, scaling, range(len(pack.spans)))


@pytest.fixture
def fallback(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(attention_module, "SubtreeAttention", Fallback)
    yield


def test_the_corner() -> None:
    """The last query sees every key, the first one those up to its own place."""
    assert _lower_right(2, 5, torch.device("cpu")).int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert _lower_right(3, 3, torch.device("cpu")).int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 7), (2, 7), (5, 7), (7, 7)])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (4, 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_one_node(queries: int, keys: int, heads: tuple[int, int], masked: bool) -> None:
    """Every query against a loop over its visible keys; no key behind its place has any influence."""
    generator = torch.Generator().manual_seed(queries + keys)
    query = torch.randn(1, heads[0], queries, 4, dtype=torch.float64, generator=generator)
    key, value = torch.randn(2, 1, heads[1], keys, 4, dtype=torch.float64, generator=generator).unbind()
    own = torch.ones(queries, queries, dtype=torch.bool).tril() if masked else None
    if masked and queries > 2:
        own[2, 1] = False
    found = node_attention(query, key, value, own, 0.6)
    for head in range(heads[0]):
        shared = head // (heads[0] // heads[1])
        for at in range(queries):
            first = keys - queries
            seen = [k for k in range(keys) if k <= first + at and (own is None or k < first or own[at, k - first])]
            weights = (0.6 * key[0, shared, seen] @ query[0, head, at]).softmax(-1)
            torch.testing.assert_close(found[0, head, at], weights @ value[0, shared, seen])


@pytest.mark.usefixtures("fallback")
@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3", "Llama"])
def test_models(kind: str) -> None:
    """Log-probabilities and gradients of a model over the fallback are those of one sequence at a time."""
    net = model(kind, torch.float32)
    sequences, starts = contexts(5, 2)
    wanted = one_at_a_time(net, sequences, starts)
    with tree_attention_on(net.config):
        found = packed(net, PrefixForest(sequences, min_shared=2).packs(), sequences, starts)
        assert gap(found, wanted) < 2e-5
        assert gap(gradient(net, found), gradient(net, wanted)) < 2e-5


@pytest.mark.usefixtures("fallback")
def test_no_token_sees_the_future() -> None:
    """A token that changes leaves everything before it in its sequences, and all other branches, bit for bit."""
    (pack,) = PrefixForest(contexts(4, 2)[0], min_shared=2).packs()
    generator = torch.Generator().manual_seed(3)
    inputs = [torch.randn(1, heads, len(pack), 8, generator=generator) for heads in (4, 2, 2)]
    sees = visible(pack)
    before = tree_attention(torch.nn.Identity(), *inputs, None, tree_pack=pack)[0][0]
    for at in range(0, len(pack), 3):
        changed = [x.clone() for x in inputs]
        for x in changed[1:]:
            x[:, :, at] += 5.0
        after = tree_attention(torch.nn.Identity(), *changed, None, tree_pack=pack)[0][0]
        same = (after == before).flatten(1).all(-1)
        assert torch.equal(same, ~sees[:, at])


@pytest.mark.usefixtures("fallback")
def test_long_nodes() -> None:
    """Nodes of several blocks of the kernels, with more queries than keys above them and the other way round."""
    generator = torch.Generator().manual_seed(2)
    root, fork, *ends = (torch.randint(0, 99, (k,), generator=generator) for k in (300, 30, 520, 90, 300))
    sequences = [torch.cat([root, *rest]) for rest in ((fork, ends[0]), (fork, ends[1]), (ends[2],))]
    (pack,) = PrefixForest(sequences).packs()
    inputs = [torch.randn(1, h, len(pack), 16, generator=generator, requires_grad=True) for h in (4, 2, 2)]
    weight = torch.randn(1, 4, len(pack), 16, generator=generator)
    found, wanted = (
        (out, *torch.autograd.grad((out * weight).sum(), inputs))
        for out in (
            tree_attention(torch.nn.Identity(), *inputs, None, tree_pack=pack)[0].transpose(1, 2),
            scaled_dot_product_attention(*inputs, visible(pack), enable_gqa=True),
        )
    )
    assert gap(found, wanted) < 2e-6
