"""Selection, back-up, ends and labels, with numbers by hand."""

from __future__ import annotations

import random

import pytest

from gcpo.selftraining.tree import Node, answer_node, back_up, best_child, end_leaves, value_labels


def tree(*texts: str, right: tuple[str, ...] = (), wrong: tuple[str, ...] = ()) -> tuple[Node, dict[str, Node]]:
    """A tree whose nodes are given by their texts, parents first; ``right`` and ``wrong`` are its ends."""
    nodes = {"": Node()}
    for text in texts:
        parent = nodes[text[:-1]]
        node = Node(tuple(map(ord, text)), text, parent, ended=text in right + wrong)
        node.right = text in right if node.ended else None
        parent.children.append(node)
        nodes[text] = node
    return nodes[""], nodes


def labels(root: Node, rule: str) -> dict[str, float]:
    return {node.text: value for node, value in value_labels(root, end_leaves(root, 2.0), rule)}  # type: ignore[arg-type]


REFERENCE = ("a", "x", "ab", "ay", "abc")


def test_labels_of_the_released_code() -> None:
    """The reference tree: a wrong branch below a right node has m of that node."""
    root, _ = tree(*REFERENCE, right=("abc",), wrong=("x", "ay"))
    found = labels(root, "full")
    assert found == pytest.approx({"a": 1 / 3, "ab": 2 / 3, "abc": 1, "ay": 1 / 9, "x": 0})


def test_labels_of_the_formula() -> None:
    """(k - 2) / K for a wrong step k after right ones."""
    root, _ = tree(*REFERENCE, "abz", right=("abc",), wrong=("x", "ay", "abz"))
    found = labels(root, "simple")
    assert found == pytest.approx({"a": 1 / 3, "ab": 2 / 3, "abc": 1, "abz": 1 / 3, "ay": 0, "x": 0})


def test_the_distance_is_that_of_the_nearest_right_end() -> None:
    """Root to `c` are two steps by `bc` and three by `ade`; below the wrong `bx` a further wrong step goes down too."""
    root, _ = tree("b", "a", "ad", "ade", "bc", "bx", "bxy", right=("ade", "bc"), wrong=("bxy",))
    found = labels(root, "simple")
    assert found == pytest.approx({"a": 1 / 3, "ad": 2 / 3, "ade": 1, "b": 1 / 2, "bc": 1, "bx": 0, "bxy": 0})
    found = labels(root, "full")
    # b: (1 - 0) / 2; bx: 1/2 - (1/2) / 2; bxy: 1/4 - (3/4) / 2 < 0
    assert found == pytest.approx({"a": 1 / 3, "ad": 2 / 3, "ade": 1, "b": 1 / 2, "bc": 1, "bx": 1 / 4, "bxy": 0})


def test_two_right_ends_of_one_node() -> None:
    """`a` is one step away from `ab` and two from `acd`; `ac` has half of the rest still before it."""
    root, _ = tree("a", "ab", "ac", "acd", right=("ab", "acd"))
    assert labels(root, "full") == pytest.approx({"a": 1 / 2, "ab": 1, "ac": 3 / 4, "acd": 1})


def test_no_labels() -> None:
    """Without a right end there are none; nodes on no path to an end have none."""
    root, _ = tree("a", "x", wrong=("x",))
    assert labels(root, "full") == {}
    root, _ = tree("a", "x", right=("x",))
    assert labels(root, "full") == {"x": 1.0}


def test_back_up() -> None:
    """Children (.8, 1) and (.2, 3) give .35, and their parent's parent the mean of its own children."""
    root, nodes = tree("a", "ab", "ac", "d")
    nodes["ab"].value, nodes["ab"].visits = 0.8, 1
    nodes["ac"].value, nodes["ac"].visits = 0.2, 3
    nodes["d"].value, nodes["d"].visits = 0.05, 2
    nodes["a"].visits, root.visits = 3, 5
    back_up(nodes["a"])
    assert nodes["a"].value == pytest.approx(0.35) and nodes["a"].visits == 4
    assert root.value == pytest.approx((0.35 * 4 + 0.05 * 2) / 6) and root.visits == 6
    assert nodes["d"].visits == 2


def test_selection() -> None:
    """Child 1 has the score 1.0887, child 2 without visits .4 + .9; with a smaller bonus the first one wins."""
    root, nodes = tree("a", "b")
    root.visits, nodes["a"].visits = 4, 2
    nodes["a"].value, nodes["b"].value = 0.5, 0.4
    chosen = best_child(root, random.Random(0), exploration=0.5, unvisited=0.9)
    assert chosen is nodes["b"]
    assert best_child(root, random.Random(0), exploration=0.5, unvisited=0.6) is nodes["a"]


def test_ties_are_broken_at_random() -> None:
    root, _ = tree("a", "b", "c")
    rng = random.Random(0)
    chosen = {best_child(root, rng, exploration=0.5, unvisited=0.9).text for _ in range(50)}
    assert chosen == {"a", "b", "c"}


def test_ends_and_the_answer() -> None:
    """An end has no children and is ended or reaches the gate; the best end answers before a better node."""
    root, nodes = tree("a", "x", "ab", "ac", wrong=("x",))
    for text, value in (("a", 0.95), ("x", 0.3), ("ab", 0.5), ("ac", 0.8)):
        nodes[text].value = value
    assert [node.text for node in end_leaves(root, 0.8)] == ["ac", "x"]
    assert answer_node(root, 0.8) is nodes["ac"]
    assert answer_node(root, 0.9) is nodes["x"]
    nodes["x"].ended = False
    assert answer_node(root, 0.9) is nodes["a"]
    assert [node.text for node in root.walk()] == ["", "a", "ab", "ac", "x"]
