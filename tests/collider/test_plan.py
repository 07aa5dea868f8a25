"""The order of the blocks: optimal against exhaustive search, complete, steered by the permutation."""

import itertools
import math
import random

import pytest

from gcpo.collider import collider_first, leave_one_out_plan


def tree_tokens(orders, lengths):
    """Tokens of the prefix tree over candidate orders, as nested dicts: not the plan's own count."""
    root, tokens = {}, 0
    for order in orders:
        node = root
        for k in order:
            if k not in node:
                node[k] = {}
                tokens += lengths[k]
            node = node[k]
    return tokens


def candidate_orders(plan):
    return [[k for kind, k in blocks if kind == "candidate"] for contexts in plan.orders for blocks in contexts]


def binary_tree_costs(leaves, lengths):
    """The cost, summed length times depth, of every binary tree over a set of leaves."""
    if len(leaves) == 1:
        yield 0
        return
    weight, (first, *rest) = sum(lengths[k] for k in leaves), leaves
    for size in range(len(rest)):
        for with_first in itertools.combinations(rest, size):
            a, b = [first, *with_first], [k for k in rest if k not in with_first]
            for cost_a, cost_b in itertools.product(binary_tree_costs(a, lengths), binary_tree_costs(b, lengths)):
                yield weight + cost_a + cost_b


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_no_binary_tree_is_cheaper(n):
    rng = random.Random(n)
    worse = 0
    for _ in range(20):
        lengths = [rng.choice([0, 1, 5, 10, 300, 1000]) + rng.randrange(3) for _ in range(n)]
        plan = leave_one_out_plan(n, 2, lengths=lengths, permutation=rng.sample(range(n), n))
        costs = list(binary_tree_costs(list(range(n)), lengths))
        assert len(costs) == math.prod(range(1, 2 * n - 2, 2))  # (2n - 3)!! trees
        assert tree_tokens(candidate_orders(plan), lengths) == min(costs)
        worse += max(costs) > min(costs)
    assert worse > 10 or n == 2


@pytest.mark.parametrize("n", [2, 3, 4])
def test_no_choice_of_orders_is_cheaper(n):
    """Every way to order each context by itself: 2!^3 for n = 3, 3!^4 for n = 4."""
    rng = random.Random(n)
    contexts = [list(itertools.permutations([k for k in range(n) if k != i])) for i in range(n)]
    for lengths in (
        [1] * n,
        [rng.randrange(1, 100) for _ in range(n)],
        [rng.randrange(1, 100) for _ in range(n)],
    ):
        best = min(tree_tokens(orders, lengths) for orders in itertools.product(*contexts))
        assert tree_tokens(candidate_orders(leave_one_out_plan(n, 1, lengths=lengths)), lengths) == best


@pytest.mark.parametrize("n", range(2, 17))
@pytest.mark.parametrize("draws", [1, 3])
def test_equal_lengths_give_the_closed_form(n, draws):
    plan = leave_one_out_plan(n, draws, permutation=random.Random(n).sample(range(n), n))
    depth = math.ceil(math.log2(n))
    assert plan.unique_blocks() == n * depth - 2**depth + n
    assert plan.unique_blocks() == tree_tokens(candidate_orders(plan), [1] * n)
    assert {4: 8, 8: 24, 16: 64}.get(n, plan.unique_blocks()) == plan.unique_blocks()


def test_by_hand_for_four():
    """Equal lengths: {0,1} and {2,3} merge, then both. The context of 0 is the far pair, then its sibling."""
    plan = leave_one_out_plan(4, 1)
    assert [plan.candidate_order(i) for i in range(4)] == [(2, 3, 1), (2, 3, 0), (0, 1, 3), (0, 1, 2)]
    # Lengths 8, 4, 2, 1: 3 and 2 merge, then 1, then 0; tokens 8 + 4 * 2 + (2 + 1) * 3 = 8 + 8 + 9.
    plan = leave_one_out_plan(4, 1, lengths=[8, 4, 2, 1])
    assert [plan.candidate_order(i) for i in range(4)] == [(1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2)]
    assert tree_tokens(candidate_orders(plan), [8, 4, 2, 1]) == 25


@pytest.mark.parametrize("n", [2, 3, 5, 8, 13])
@pytest.mark.parametrize("draws", [1, 2, 4])
def test_every_context_holds_every_other_candidate_and_its_draw_once(n, draws):
    rng = random.Random(n * draws)
    lengths, permutation = [rng.randrange(1, 2000) for _ in range(n)], rng.sample(range(n), n)
    plan = leave_one_out_plan(n, draws, lengths=lengths, permutation=permutation)
    assert (plan.n, plan.draws, len(plan.orders)) == (n, draws, n)
    for i, contexts in enumerate(plan.orders):
        assert len(contexts) == draws
        for draw, blocks in enumerate(contexts):
            assert set(blocks) == {("candidate", k) for k in range(n) if k != i} | {("collider", draw)}
            assert len(blocks) == n
            assert blocks[0 if draws == 1 else -1] == ("collider", draw)
    first = plan.depth_first()[0]
    assert plan.collider_order() == (*plan.candidate_order(first), first) and plan.permutation == tuple(permutation)
    assert [len(set(map(tuple, candidate_orders(plan)[i * draws : (i + 1) * draws]))) for i in range(n)] == [1] * n


@pytest.mark.parametrize(("n", "count"), [(3, 1), (3, 2), (4, 2), (4, 3), (5, 2)])
def test_no_choice_of_orders_is_cheaper_for_some_leaves(n, count):
    """Every way to order each of the wanted contexts by itself; the other contexts are whole too."""
    rng = random.Random(10 * n + count)
    for _ in range(3):
        lengths, permutation = [rng.randrange(1, 100) for _ in range(n)], rng.sample(range(n), n)
        leaves = rng.sample(range(n), count)
        contexts = [list(itertools.permutations([k for k in range(n) if k != i])) for i in leaves]
        best = min(tree_tokens(orders, lengths) for orders in itertools.product(*contexts))
        plan = leave_one_out_plan(n, 2, lengths=lengths, permutation=permutation, leaves=leaves)
        assert set(plan.depth_first()) == set(leaves) and len(plan.depth_first()) == count
        assert tree_tokens([plan.candidate_order(i) for i in leaves], lengths) == best


def test_where_the_collider_stands():
    assert collider_first(1) and not collider_first(2) and not collider_first(8)


@pytest.mark.parametrize("n", [3, 6, 8, 11])
def test_permutation_relabels_the_plan(n):
    """With equal lengths candidates only change names, so a random permutation puts each anywhere alike."""
    permutation = random.Random(n).sample(range(n), n)
    plain, moved = leave_one_out_plan(n, 1), leave_one_out_plan(n, 1, permutation=permutation)
    for p in range(n):
        renamed = tuple(permutation[k] for k in plain.candidate_order(p))
        assert moved.candidate_order(permutation[p]) == renamed


def test_position_says_nothing_about_identity():
    """Over all 120 permutations of five candidates each is first as often as any other: 120 * 5 / 5 times."""
    first = [0] * 5
    for permutation in itertools.permutations(range(5)):
        plan = leave_one_out_plan(5, 1, permutation=permutation)
        for i in range(5):
            first[plan.candidate_order(i)[0]] += 1
    assert first == [120] * 5


def test_siblings_stand_in_the_order_of_the_permutation():
    """{3,1} and {0,2} merge by the permutation 3, 1, 0, 2: the far pair of 0 is (3, 1) in that order."""
    plan = leave_one_out_plan(4, 2, permutation=[3, 1, 0, 2])
    assert plan.candidate_order(0) == (3, 1, 2) and plan.candidate_order(3) == (0, 2, 1)


def test_same_arguments_same_plan():
    arguments = {"lengths": [5, 5, 7, 7, 1], "permutation": [4, 2, 0, 1, 3]}
    assert leave_one_out_plan(5, 2, **arguments) == leave_one_out_plan(5, 2, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 1, "draws": 1}, "n is 1, but a leave-one-out context needs a group of at least two"),
        ({"n": 0, "draws": 1}, "n is 0"),
        ({"n": 3, "draws": 0}, "draws is 0, but a context needs at least one"),
        ({"n": 3, "draws": 1, "lengths": [1, 2]}, "lengths holds 2 numbers for 3 candidates"),
        ({"n": 3, "draws": 1, "lengths": [1, -2, 3]}, "lengths must be finite and at least 0"),
        ({"n": 3, "draws": 1, "lengths": [1, math.nan, 3]}, "lengths must be finite and at least 0"),
        ({"n": 3, "draws": 1, "permutation": [0, 1]}, r"not a permutation of range\(3\)"),
        ({"n": 3, "draws": 1, "permutation": [0, 1, 1]}, r"permutation \[0, 1, 1\] is not"),
        ({"n": 3, "draws": 1, "permutation": [1, 2, 3]}, r"permutation \[1, 2, 3\] is not"),
        ({"n": 3, "draws": 1, "leaves": []}, r"leaves \[\] are not some of the candidates 0 to 2"),
        ({"n": 3, "draws": 1, "leaves": [0, 3]}, r"leaves \[0, 3\] are not some of"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        leave_one_out_plan(arguments.pop("n"), arguments.pop("draws"), **arguments)


def test_depth_first_order() -> None:
    """Neighbours in it share a prefix wherever any two do: leaves of one subtree stand together."""
    plan = leave_one_out_plan(8, 2, lengths=[3, 1, 4, 1, 5, 9, 2, 6], permutation=[5, 2, 7, 0, 1, 3, 6, 4])
    order = plan.depth_first()
    assert sorted(order) == list(range(8))
    prefixes: dict[tuple[int, ...], list[int]] = {}
    for rank, i in enumerate(order):
        path = plan.candidate_order(i)
        for end in range(1, len(path) + 1):
            prefixes.setdefault(path[:end], []).append(rank)
    assert all(ranks == list(range(ranks[0], ranks[0] + len(ranks))) for ranks in prefixes.values())
