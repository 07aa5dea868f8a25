"""The order of the candidate blocks in the leave-one-out contexts x_{i,l} of a group.

The contexts of a group share text. As a prefix tree, its leaves are the n contexts: on
the path from the root to leaf i every candidate but i is placed exactly once, and at each fork the path to one
subtree places the blocks of the other. The tokens of the whole tree are then the sum over the candidates of
length times depth, which Huffman's construction minimises. If only some of the contexts are
needed, the candidates that all of them contain come first, and the tree is over the others.
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
        n: number of candidates.
        draws: number of collider draws per context.
        orders: ``orders[i][l]`` is the order of the blocks of x_{i,l}: every ("candidate", k) with k != i
            once, and ("collider", l) once.
        permutation: the order that breaks ties.
        leaves: the candidates whose contexts the tree contains, in the order of the permutation.
    """

    n: int
    draws: int
    orders: tuple[tuple[tuple[Block, ...], ...], ...]
    permutation: tuple[int, ...]
    leaves: tuple[int, ...]

    def candidate_order(self, i: int) -> tuple[int, ...]:
        """Return the candidates of the contexts of i, also of its leave-one-out collider draws, in order."""
        return tuple(k for kind, k in self.orders[i][0] if kind == "candidate")

    def collider_order(self) -> tuple[int, ...]:
        """Return the candidates in the order of the prompt of a shared collider draw.

        It is the order of the first leaf, followed by the leaf itself, so that the prompts share a prefix.
        """
        first = self.depth_first()[0]
        return (*self.candidate_order(first), first)

    def depth_first(self) -> tuple[int, ...]:
        """The leaves in tree order, in which neighbours share the most."""
        place = {k: p for p, k in enumerate(self.permutation)}
        return tuple(sorted(self.leaves, key=lambda i: [place[k] for k in self.candidate_order(i)]))

    def unique_blocks(self) -> int:
        """Return the number of nodes of the prefix tree over the leaves' orders, without collider and scored blocks."""
        paths = [self.candidate_order(i) for i in self.leaves]
        # Every prefix of a leaf's order is a node, identified by its path.
        return len({path[:end] for path in paths for end in range(1, len(path) + 1)})


def leave_one_out_plan(
    n: int,
    draws: int,
    *,
    lengths: Sequence[float] | None = None,
    permutation: Sequence[int] | None = None,
    leaves: Collection[int] | None = None,
) -> LeaveOneOutPlan:
    """Order the blocks of the leave-one-out contexts so that the contexts share as many tokens as possible.

    Args:
        n: number of candidates in the group, at least 2.
        draws: number of collider draws per context, at least 1.
        lengths: lengths of the n candidate blocks, finite and at least 0; equal if None.
        permutation: a permutation of ``range(n)`` that breaks ties and orders the blocks inside a subtree.
            A random one per group makes a candidate's position independent of its index. ``range(n)`` if
            None.
        leaves: the candidates whose contexts are needed, at least one; the tree of these contexts is minimised. All if
            None. The other contexts have an order too, whose sharing is not optimised.

    Returns:
        The plan, which depends only on the arguments.

    Raises:
        ValueError: n below 2, draws below 1, or lengths, a permutation or leaves that are not valid.
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
    """Return whether the collider block precedes the candidates.

    A single draw is a prefix that all contexts share; several draws would each start a new tree, so they
    come last.
    """
    return draws == 1


def _with_collider(candidates: Sequence[int], draw: int, draws: int) -> tuple[Block, ...]:
    """Return the blocks of one context: the candidates in order and its collider draw."""
    blocks: list[Block] = [("candidate", k) for k in candidates]
    blocks.insert(0 if collider_first(draws) else len(blocks), ("collider", draw))
    return tuple(blocks)


def _huffman_orders(lengths: Mapping[int, float], order: Sequence[int]) -> dict[int, list[int]]:
    """Return for each candidate the others: the siblings on the path from the root of the Huffman tree to it."""
    place = {k: p for p, k in enumerate(order)}
    contexts: dict[int, list[int]] = {k: [] for k in order}
    # (length, tie break, members); a merged subtree comes after every leaf and older subtree of its length.
    heap: list[tuple[float, int, tuple[int, ...]]] = [(lengths[k], p, (k,)) for p, k in enumerate(order)]
    heapq.heapify(heap)
    for tie in range(len(order), 2 * len(order) - 1):
        (length_a, _, a), (length_b, _, b) = heapq.heappop(heap), heapq.heappop(heap)
        # The tree grows from its leaves: later merges come earlier in the context.
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
