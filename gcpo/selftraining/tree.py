"""The tree of one question: nodes, selection, back-up, ends, the answer, and the labels of the value model."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from gcpo.algorithms import process_values, uct


@dataclass(eq=False)
class Node:
    """A partial solution.

    Attributes:
        tokens: of the response so far.
        text: of the response so far.
        parent: ``None`` at the root.
        value: V.
        visits: N.
        children: empty until the node is expanded.
        finished: whether the policy has ended the response here.
        ended: whether the search does not go on below this node.
        completion: tokens that the policy adds greedily to an end that it has not finished.
        completion_text: their text.
        completed: whether the response is finished, with the completion.
        right: whether the answer of the response is right; ``None`` until it is graded.
    """

    tokens: tuple[int, ...] = ()
    text: str = ""
    parent: Node | None = None
    value: float = 0.0
    visits: int = 0
    children: list[Node] = field(default_factory=list)
    finished: bool = False
    ended: bool = False
    completion: tuple[int, ...] = ()
    completion_text: str = ""
    completed: bool = False
    right: bool | None = None

    def path(self) -> list[Node]:
        """From the root to this node."""
        nodes: list[Node] = [self]
        while nodes[-1].parent is not None:
            nodes.append(nodes[-1].parent)
        return nodes[::-1]

    def walk(self) -> Iterator[Node]:
        """This node and all below it, depth first."""
        stack: list[Node] = [self]
        while stack:
            node = stack.pop()
            yield node
            stack += reversed(node.children)


def best_child(node: Node, rng: random.Random, *, exploration: float, unvisited: float) -> Node:
    """The child with the highest score of `gcpo.algorithms.uct`; ties are broken at random."""
    scores = [
        uct(child.value, child.visits, node.visits, exploration=exploration, unvisited=unvisited)
        for child in node.children
    ]
    return rng.choice([child for child, score in zip(node.children, scores, strict=True) if score == max(scores)])


def back_up(node: Node) -> None:
    """Count a visit of the node and its ancestors; an expanded node gets the mean value of its children by visits."""
    for one in reversed(node.path()):
        one.visits += 1
        visits = sum(child.visits for child in one.children)
        if visits:
            one.value = sum(child.value * child.visits for child in one.children) / visits


def end_leaves(root: Node, end_gate: float) -> list[Node]:
    """The nodes without children that are ends, or whose value reaches the gate."""
    return [node for node in root.walk() if not node.children and (node.ended or node.value >= end_gate)]


def answer_node(root: Node, end_gate: float) -> Node:
    """The solution that the search answers with: the end of the highest value, else the node of the highest value."""
    ends = end_leaves(root, end_gate)
    return max(ends or root.walk(), key=lambda node: (node.value, len(node.tokens)))


def value_labels(
    root: Node, ends: Sequence[Node], rule: Literal["full", "simple"] = "full"
) -> list[tuple[Node, float]]:
    """Labels for the value model from a finished tree.

    A step is right if a right end is below it. m_k is the number of steps to the nearest right end. On a wrong branch
    the released code (``full``) takes m of the nearest right ancestor; the formula of the paper (``simple``) takes one
    less, since the wrong step was to be one of them. Both are then `gcpo.algorithms.process_values` along the path.

    Args:
        root: of the tree.
        ends: its ends, graded.
        rule: "full" or "simple".

    Returns:
        The nodes on the paths to the ends, except for the root, each with its label; nothing if no end is right.
    """
    distance: dict[Node, int] = {}
    for end in (end for end in ends if end.right):
        for steps, node in enumerate(reversed(end.path())):
            distance[node] = min(steps, distance.get(node, steps))
    if not distance:
        return []
    labels: dict[Node, float] = {}
    for end in ends:
        path = end.path()[1:]
        remaining, nearest = [], distance[root]
        for node in path:
            nearest = distance.get(node, nearest)
            remaining.append(nearest if node in distance or rule == "full" else max(nearest - 1, 0))
        wrong = torch.tensor([node not in distance for node in path], dtype=torch.float64)
        labels.update(
            zip(path, process_values(wrong, torch.tensor(remaining, dtype=torch.float64)).tolist(), strict=True)
        )
    return list(labels.items())
