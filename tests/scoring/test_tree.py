"""The prefix forest and its packs, against the definition."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gcpo.collider.plan import leave_one_out_plan
from gcpo.scoring import BudgetError, PrefixForest


def tensors(*sequences: list[int]) -> list[torch.Tensor]:
    return [torch.tensor(sequence) for sequence in sequences]


def visible(pack, at: int) -> list[int]:
    """Places that the token at place ``at`` may see, itself included, in the order of their positions."""
    (node,) = [k for k, (start, end) in enumerate(pack.spans) if start <= at < end]
    above = [place for k in pack.paths[node][:-1] for place in range(*pack.spans[k])]
    return above + list(range(pack.spans[node][0], at + 1))


def check(sequences: list[torch.Tensor], packs: list, budget: int | None) -> None:
    """Every sequence stands in one pack; each of its tokens sees its own prefix and nothing else."""
    assert sorted(i for pack in packs for i in pack.sequences) == list(range(len(sequences)))
    for pack in packs:
        assert budget is None or len(pack) <= budget
        assert [end for _, end in pack.spans[:-1]] == [start for start, _ in pack.spans[1:]]
        assert pack.spans[0][0] == 0 and pack.spans[-1][1] == len(pack)
        assert all(parent < node for node, parent in enumerate(pack.parents))
        for i, place in zip(pack.sequences, pack.places, strict=True):
            assert torch.equal(pack.token_ids[place], sequences[i])
            assert pack.position_ids[place].tolist() == list(range(len(sequences[i])))
            for position, at in enumerate(place.tolist()):
                assert visible(pack, at) == place[: position + 1].tolist()


def test_a_tree_by_hand() -> None:
    """Three sequences over a common stem, one of which ends where the others go on."""
    sequences = tensors([1, 2, 3, 4], [1, 2, 9], [1, 2])
    forest = PrefixForest(sequences, min_shared=1)
    assert (forest.tree_tokens, forest.dense_tokens) == (5, 9)
    (pack,) = forest.packs()
    assert pack.token_ids.tolist() == [1, 2, 3, 4, 9]
    assert pack.position_ids.tolist() == [0, 1, 2, 3, 2]
    assert pack.spans == ((0, 2), (2, 4), (4, 5)) and pack.parents == (-1, 0, 0)
    places = dict(zip(pack.sequences, pack.places, strict=True))
    assert {i: place.tolist() for i, place in places.items()} == {0: [0, 1, 2, 3], 1: [0, 1, 4], 2: [0, 1]}


def test_short_stretches_are_repeated() -> None:
    """What is shorter than ``min_shared`` is not worth a node."""
    sequences = tensors([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 7, 8], [1, 2, 9, 9, 9, 9])
    assert PrefixForest(sequences, min_shared=2).tree_tokens == 2 + 2 + 2 + 2 + 4
    assert PrefixForest(sequences, min_shared=3).tree_tokens == 4 + 2 + 2 + 6
    assert PrefixForest(sequences, min_shared=5).tree_tokens == 18


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=12),
    st.integers(1, 4),
    st.one_of(st.none(), st.integers(9, 40)),
)
def test_any_sequences(ids: list[list[int]], min_shared: int, budget: int | None) -> None:
    """Equal sequences, prefixes of others, nothing in common: every pack is exact and within the budget."""
    sequences = tensors(*ids)
    forest = PrefixForest(sequences, min_shared=min_shared)
    packs = forest.packs(budget)
    check(sequences, packs, budget)
    assert forest.tree_tokens <= sum(map(len, packs)) <= forest.dense_tokens
    if min_shared == 1:
        prefixes = {tuple(sequence[:end]) for sequence in ids for end in range(1, len(sequence) + 1)}
        assert forest.tree_tokens == len(prefixes)


@settings(max_examples=60, deadline=None)
@example([[0, 0], [0, 1, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0], [1]], 10)
@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=6), min_size=1, max_size=7), st.integers(6, 14))
def test_cuts_repeat_as_little_as_any(ids: list[list[int]], budget: int) -> None:
    """No other way to cut the depth-first order into rows of the budget takes fewer tokens."""
    forest = PrefixForest(tensors(*ids), min_shared=1)
    ordered = sorted(ids)

    def tokens(part: list[list[int]]) -> int:
        return len({tuple(s[:end]) for s in part for end in range(1, len(s) + 1)})

    best = min(
        sum(sizes)
        for count in range(len(ordered))
        for cuts in itertools.combinations(range(1, len(ordered)), count)
        if max(sizes := [tokens(ordered[a:b]) for a, b in itertools.pairwise((0, *cuts, len(ordered)))]) <= budget
    )
    assert sum(map(len, forest.packs(budget))) == best


@pytest.mark.parametrize(("n", "blocks"), [(2, 2), (4, 8), (8, 24), (16, 64)])
def test_the_contexts_of_a_plan(n: int, blocks: int) -> None:
    """Contexts laid out by ``leave_one_out_plan`` take the blocks that the plan says, once each."""
    size = 10
    plan = leave_one_out_plan(n, 2)
    assert plan.unique_blocks() == blocks
    names = {("candidate", k): k for k in range(n)} | {("collider", d): n + d for d in range(2)}
    sequences = [
        torch.cat([torch.full((size,), names[block]) for block in order]) for row in plan.orders for order in row
    ]
    assert PrefixForest(sequences).tree_tokens == size * (blocks + 2 * n)  # a collider block at every leaf


def test_errors() -> None:
    """A budget below the longest sequence names both; an empty sequence names itself."""
    forest = PrefixForest(tensors([1, 2, 3], [1, 2]))
    with pytest.raises(BudgetError, match="budget is 2 and the longest sequence has 3 tokens"):
        forest.packs(2)
    with pytest.raises(ValueError, match="sequence 1 of 2 is empty"):
        PrefixForest(tensors([1], []))
    with pytest.raises(ValueError, match="min_shared is 0"):
        PrefixForest(tensors([1]), min_shared=0)
    assert PrefixForest([]).packs(4) == []
