"""The order of the candidate blocks in the leave-one-out contexts x_{i,l} of a group.

All contexts of a group share text. Written as prefixes, they form a tree whose leaves are the n contexts: on
the way from the root to leaf i every candidate but i is placed exactly once, and at each fork the way to one
subtree places the blocks of the other. The tokens of the whole tree are then the sum over the candidates of
length times depth, which Huffman's construction makes as small as it can be. Where only some of the contexts are
wanted, the candidates that all of those hold stand first, once, and the tree is over the others.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

Block = tuple[str, int]
"""("candidate", k) or ("collider", l)."""


@dataclass(frozen=True)
class LeaveOneOutPlan:
    """Block orders of the contexts x_{i,l} of one group; made by `leave_one_out_plan`.

    Attributes:
        n: Number of candidates.
        draws: Number of collider draws per context.
        orders: ``orders[i][l]`` is the order of the blocks of x_{i,l}: every ("candidate", k) with k != i
            once, and ("collider", l) once.
        permutation: What breaks ties.
        leaves: The candidates whose contexts the tree is made for, in the order of the permutation.
    """

    n: int
    draws: int
    orders: tuple[tuple[tuple[Block, ...], ...], ...]
    permutation: tuple[int, ...]
    leaves: tuple[int, ...]

    def candidate_order(self, i: int) -> tuple[int, ...]:
        """The candidates of the contexts of i, in order: what a leave-one-out collider draw is made from."""
        return tuple(k for kind, k in self.orders[i][0] if kind == "candidate")

    def collider_order(self) -> tuple[int, ...]:
        """The candidates in the order in which the prompt of a shared collider draw holds all n of them.

        That of the first leaf, and the leaf itself: the prompt goes on where the leaf's own ends.
        """
        first = self.depth_first()[0]
        return (*self.candidate_order(first), first)

    def depth_first(self) -> tuple[int, ...]:
        """The leaves in the order of the tree, so that neighbours share the most."""
        place = {k: p for p, k in enumerate(self.permutation)}
        return tuple(sorted(self.leaves, key=lambda i: [place[k] for k in self.candidate_order(i)]))

    def unique_blocks(self) -> int:
        """Number of nodes of the prefix tree over the leaves' orders, collider and scored blocks left out."""
        paths = [self.candidate_order(i) for i in self.leaves]
        # Every prefix of a leaf's order is a node, named by the path to it.
        return len({path[:end] for path in paths for end in range(1, len(path) + 1)})


def leave_one_out_plan(
    n: int,
    draws: int,
    *,
    lengths: Sequence[float] | None = None,
    permutation: Sequence[int] | None = None,
    leaves: Collection[int] | None = None,
) -> LeaveOneOutPlan:
    """Orders the blocks of the leave-one-out contexts so that they share as many tokens as any order can.

    Args:
        n: Number of candidates in the group, at least 2.
        draws: Number of collider draws that a context comes with, at least 1.
        lengths: Lengths of the n candidate blocks, finite and at least 0; all equal when None.
        permutation: A permutation of ``range(n)`` that breaks ties and orders the blocks inside a subtree.
            Drawn at random per group, it keeps a candidate's place apart from its number. ``range(n)`` when
            None.
        leaves: The candidates whose contexts are wanted, at least one; the tokens of these contexts' tree are made
            few. All when None. The other contexts have an order too, which shares what it happens to.

    Returns:
        The plan, the same for the same arguments.

    Raises:
        ValueError: n below 2, draws below 1, or lengths, a permutation or leaves that do not fit.
    """
    if n < 2:
        raise ValueError(f"n is {n}, but a leave-one-out context needs a group of at least two responses.")
    if draws < 1:
        raise ValueError(f"draws is {draws}, but a context needs at least one collider draw.")
    if permutation is None:
        permutation = range(n)
    if sorted(permutation) != list(range(n)):
        raise ValueError(f"permutation {list(permutation)} is not a permutation of range({n}).")
    order = tuple(int(k) for k in permutation)
    if lengths is None:
        lengths = [1] * n
    _check_lengths(lengths, n)
    wanted = set(range(n) if leaves is None else leaves)
    if not wanted or not wanted <= set(order):
        raise ValueError(f"leaves {sorted(wanted)} are not some of the candidates 0 to {n - 1}.")
    inside = tuple(k for k in order if k in wanted)
    common = [k for k in order if k not in wanted]
    siblings = _huffman_orders({k: lengths[k] for k in inside}, inside)
    candidates = [[k for k in common if k != i] + siblings.get(i, list(inside)) for i in range(n)]
    orders = tuple(tuple(_with_collider(candidates[i], draw, draws) for draw in range(draws)) for i in range(n))
    return LeaveOneOutPlan(n, draws, orders, order, inside)


def collider_first(draws: int) -> bool:
    """Whether the collider block stands before the candidates.

    A single draw is a prefix that all contexts share; of several, each would start a tree of its own, so they
    come last.
    """
    return draws == 1


def _with_collider(candidates: Sequence[int], draw: int, draws: int) -> tuple[Block, ...]:
    """The blocks of one context: its candidates in order, and its collider draw."""
    blocks: list[Block] = [("candidate", k) for k in candidates]
    blocks.insert(0 if collider_first(draws) else len(blocks), ("collider", draw))
    return tuple(blocks)


def _huffman_orders(lengths: Mapping[int, float], order: Sequence[int]) -> dict[int, list[int]]:
    """For each candidate the others: the siblings on the way from the root of the Huffman tree to it."""
    place = {k: p for p, k in enumerate(order)}
    contexts: dict[int, list[int]] = {k: [] for k in order}
    # (length, tie break, members); a merged subtree comes after every leaf and older subtree of its length.
    heap: list[tuple[float, int, tuple[int, ...]]] = [(lengths[k], p, (k,)) for p, k in enumerate(order)]
    heapq.heapify(heap)
    for tie in range(len(order), 2 * len(order) - 1):
        (length_a, _, a), (length_b, _, b) = heapq.heappop(heap), heapq.heappop(heap)
        # The tree grows from its leaves: what is merged later stands earlier in the context.
        for members, siblings in ((a, b), (b, a)):
            for k in members:
                contexts[k][:0] = siblings
        heapq.heappush(heap, (length_a + length_b, tie, tuple(sorted(a + b, key=place.__getitem__))))
    return contexts


def _check_lengths(lengths: Sequence[float], n: int) -> None:
    """Raise a ValueError unless there are n finite lengths of at least 0."""
    if len(lengths) != n:
        raise ValueError(f"lengths holds {len(lengths)} numbers for {n} candidates.")
    if not all(math.isfinite(x) and x >= 0 for x in lengths):
        raise ValueError(f"lengths must be finite and at least 0, but are {list(lengths)}.")
