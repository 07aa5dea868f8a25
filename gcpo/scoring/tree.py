"""Prefix trees over token sequences, and their packing into rows of bounded length.

A node of the tree is a stretch of tokens that the same sequences share. Its queries see the keys of its ancestors
and, causally, its own. The tree is built from the tokens themselves, so packing is always exact: an order of the
blocks that shares little costs time, never correctness.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch


class BudgetError(ValueError):
    """A token budget that cannot hold the longest sequence."""


@dataclass(frozen=True)
class TreePack:
    """A packed row of N tokens with some of a forest's sequences.

    Attributes:
        sequences: indices of its sequences in the forest's input.
        token_ids: int64 [N].
        position_ids: int64 [N], position of every token in its sequences.
        spans: start and end of every node in the row. A node follows its parent and precedes all nodes after its
            parent's subtree.
        parents: the parent of every node, -1 for a root.
        places: for every sequence, int64 [its length]: the positions of its tokens in the row.
        masks: for a node that branches inside, bool [its length, its length]: the own keys that its queries see;
            every other node is causal.
    """

    sequences: tuple[int, ...]
    token_ids: torch.Tensor
    position_ids: torch.Tensor
    spans: tuple[tuple[int, int], ...]
    parents: tuple[int, ...]
    places: tuple[torch.Tensor, ...]
    masks: Mapping[int, torch.Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.token_ids)

    @cached_property
    def paths(self) -> tuple[tuple[int, ...], ...]:
        """For every node the nodes from its root down to itself."""
        paths: list[tuple[int, ...]] = []
        for node, parent in enumerate(self.parents):
            paths.append((*(paths[parent] if parent >= 0 else ()), node))
        return tuple(paths)

    @cached_property
    def subtree_ends(self) -> tuple[int, ...]:
        """For every node the end of the last node below it, or its own.

        Raises:
            ValueError: another node stands between a node and its parent.
        """
        for node, parent in enumerate(self.parents):
            if parent >= 0 and parent not in self.paths[node - 1]:
                raise ValueError(
                    f"node {node} of the tree stands behind node {node - 1}, "
                    f"which is not below its parent, node {parent}"
                )
        ends = [end for _, end in self.spans]
        for node in range(len(ends) - 1, -1, -1):
            if self.parents[node] >= 0:
                ends[self.parents[node]] = max(ends[self.parents[node]], ends[node])
        return tuple(ends)

    @cached_property
    def layouts(self) -> dict[torch.device, Any]:
        """Per device, a kernel's data for this row, which is created once for all layers of a model."""
        return {}


@dataclass(frozen=True)
class Node:
    """A stretch of tokens that the same sequences share.

    Attributes:
        parent: the parent node, or -1.
        start: position of its first token in its sequences.
        end: position after its last token.
        sequence: one of its sequences.
    """

    parent: int
    start: int
    end: int
    sequence: int


def shared_stretches(lengths: Sequence[int], common: Sequence[int], min_shared: int) -> tuple[list[Node], list[int]]:
    """Return the prefix trees of sequences in depth-first order.

    Args:
        lengths: tokens of every sequence.
        common: for every sequence the length of the common prefix with the previous one; 0 for the first.
        min_shared: a stretch shorter than this is repeated instead of shared.

    Returns:
        The nodes, parents first, and the last node of every sequence.
    """
    nodes: list[Node] = []
    leaves = [-1] * len(lengths)
    # Ranges of sequences that share their first `depth` tokens, with the node that holds them.
    todo = [(0, len(lengths), 0, -1)] if lengths else []
    while todo:
        low, high, depth, parent = todo.pop()
        children: list[tuple[int, int]] = []
        start = low
        for k in range(low + 1, high + 1):
            if k == high or common[k] < depth + min_shared:
                children.append((start, k))
                start = k
        below = []
        for first, last in children:
            end = min([lengths[first], *common[first + 1 : last]])
            node = parent
            if end > depth:
                node = len(nodes)
                nodes.append(Node(parent, depth, end, first))
            if last - first == 1:
                leaves[first] = node
            else:
                below.append((first, last, end, node))
        # A sequence that ends where its range forks is a child without own tokens.
        todo.extend(reversed(below))
    return nodes, leaves


def chains_of(nodes: Sequence[Node], leaves: Sequence[int]) -> list[tuple[int, ...]]:
    """Return for every sequence its nodes, from the root to its last one."""
    chains = []
    for leaf in leaves:
        chain, node = [], leaf
        while node >= 0:
            chain.append(node)
            node = nodes[node].parent
        chains.append(tuple(reversed(chain)))
    return chains


def shared_with_previous(nodes: Sequence[Node], chains: Sequence[tuple[int, ...]]) -> list[int]:
    """Return for every sequence the tokens in nodes shared with the previous one in depth-first order."""
    shared = [0] * len(chains)
    for k, (before, chain) in enumerate(pairwise(chains), 1):
        for a, b in zip(before, chain, strict=False):
            if a != b:
                break
            shared[k] = nodes[a].end
    return shared


class PrefixForest:
    """The prefix trees of a set of sequences.

    Args:
        sequences: token ids, int64 [S], S >= 1, in any order; equal ones and prefixes of others are fine.
        min_shared: a stretch shorter than this is repeated instead of shared, since every node needs an attention
            call.

    Raises:
        ValueError: a sequence is empty, or ``min_shared`` is below 1.
    """

    def __init__(self, sequences: Sequence[torch.Tensor], *, min_shared: int = 8) -> None:
        if min_shared < 1:
            raise ValueError(f"min_shared is {min_shared}, it must be at least 1")
        for i, sequence in enumerate(sequences):
            if not len(sequence):
                raise ValueError(f"sequence {i} of {len(sequences)} is empty")
        self.sequences = [sequence.detach().to("cpu", torch.int64) for sequence in sequences]
        # Big-endian bytes of non-negative ids sort as the ids do.
        names = [sequence.numpy().astype(">u4").tobytes() for sequence in self.sequences]
        self.order = sorted(range(len(names)), key=names.__getitem__)
        """The sequences in depth-first order."""
        rows = [self.sequences[i].numpy() for i in self.order]
        common = [0, *(common_prefix(a, b) for a, b in pairwise(rows))]
        self._nodes, leaves = shared_stretches([len(self.sequences[i]) for i in self.order], common, min_shared)
        chains = chains_of(self._nodes, leaves)
        self._shared = shared_with_previous(self._nodes, chains)
        self._chains = dict(zip(self.order, chains, strict=True))

    @property
    def dense_tokens(self) -> int:
        """Number of tokens of all sequences without sharing."""
        return sum(map(len, self.sequences))

    @property
    def tree_tokens(self) -> int:
        """Number of tokens of all nodes, that is, of one pack without a budget."""
        return sum(node.end - node.start for node in self._nodes)

    def packs(self, budget: int | None = None) -> list[TreePack]:
        """Cut the forest into rows of at most ``budget`` tokens with as few repeated tokens as possible.

        A row holds consecutive sequences in depth-first order; a cut repeats the prefix that both sides share. Of cuts
        that repeat equally many tokens, those with fewer rows are chosen.

        Args:
            budget: tokens of a row; ``None``: one row.

        Raises:
            BudgetError: a sequence is longer than ``budget``.
        """
        if not self.order:
            return []
        if budget is None:
            return [self._pack(self.order)]
        longest = max(map(len, self.sequences))
        if longest > budget:
            raise BudgetError(
                f"the token budget is {budget} and the longest sequence has {longest} tokens: "
                f"raise the budget to at least {longest}, or shorten the blocks"
            )
        cuts = cheapest_cuts([len(self.sequences[i]) for i in self.order], self._shared, budget)
        return [self._pack(self.order[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]

    def _pack(self, chosen: Sequence[int]) -> TreePack:
        kept = sorted({node for i in chosen for node in self._chains[i]}, key=self._depth_first_key(chosen))
        children: dict[int, int] = {}
        for node in kept:
            children[self._nodes[node].parent] = children.get(self._nodes[node].parent, 0) + 1
        row_of: dict[int, tuple[int, int]] = {}
        number: dict[int, int] = {}
        spans: list[tuple[int, int]] = []
        parents: list[int] = []
        tokens, positions, at = [], [], 0
        for node in kept:
            entry = self._nodes[node]
            size = entry.end - entry.start
            row_of[node] = (at, at + size)
            if entry.parent >= 0 and children[entry.parent] == 1:
                # An only child directly follows its parent, so both are one node for the attention.
                number[node] = number[entry.parent]
                spans[number[node]] = (spans[number[node]][0], at + size)
            else:
                number[node] = len(spans)
                spans.append((at, at + size))
                parents.append(number[entry.parent] if entry.parent >= 0 else -1)
            tokens.append(self.sequences[self.order[entry.sequence]][entry.start : entry.end])
            positions.append(torch.arange(entry.start, entry.end))
            at += size
        places = tuple(torch.cat([torch.arange(*row_of[node]) for node in self._chains[i]]) for i in chosen)
        return TreePack(tuple(chosen), torch.cat(tokens), torch.cat(positions), tuple(spans), tuple(parents), places)

    def _depth_first_key(self, chosen: Sequence[int]) -> Callable[[int], tuple[int, int]]:
        first: dict[int, tuple[int, int]] = {}
        for rank, i in enumerate(chosen):
            for depth, node in enumerate(self._chains[i]):
                first.setdefault(node, (rank, depth))
        return first.__getitem__


def cheapest_cuts(lengths: Sequence[int], shared: Sequence[int], budget: float) -> list[int]:
    """Return where to cut sequences in depth-first order into packs with as few repeated tokens as possible.

    Args:
        lengths: tokens of every sequence, none more than ``budget``.
        shared: for every sequence the tokens that it shares with the previous one; 0 for the first.
        budget: tokens of a pack.

    Returns:
        The first sequence of every pack, followed by the number of sequences.
    """
    count = len(lengths)
    # Per k: (repeated tokens, packs) of the first k sequences, compared in this order, and the last pack's start.
    best: list[tuple[tuple[float, int], int]] = [((0.0, 0), 0)]
    for last in range(1, count + 1):
        cheapest = ((float("inf"), 0), 0)
        tokens = 0
        for first in range(last - 1, -1, -1):
            # The pack's first sequence adds all its tokens, each next one only its new tokens.
            tokens += lengths[first]
            if first + 1 < last:
                tokens -= shared[first + 1]
            if tokens > budget:
                break
            repeated, packs = best[first][0]
            cheapest = min(cheapest, ((repeated + (shared[first] if first else 0), packs + 1), first))
        best.append(cheapest)
    cuts = [count]
    while cuts[-1]:
        cuts.append(best[cuts[-1]][1])
    return cuts[::-1]


def common_prefix(a: Sequence[int] | np.ndarray, b: Sequence[int] | np.ndarray) -> int:
    """Return the length of the common prefix of two sequences."""
    size = min(len(a), len(b))
    differ = np.flatnonzero(np.asarray(a)[:size] != np.asarray(b)[:size])
    return int(differ[0]) if len(differ) else size
