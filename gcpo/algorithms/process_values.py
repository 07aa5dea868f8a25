"""Values of partial solutions and the selection rule of a tree search, as in ReST-MCTS*."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gcpo.algorithms._checks import as_float, check_at_least, check_shape


@torch.no_grad()
def process_values(wrong: Tensor, remaining: Tensor) -> Tensor:
    """Computes the values v_1..v_K of the partial solutions along one path.

    See "ReST-MCTS*: LLM Self-Training via Process Reward Guided Tree Search" (arXiv 2406.03816), Section 3.1:
    w_k = (1 - v_{k-1}) / (m_k + 1) * (1 - 2 r_k) and v_k = max(v_{k-1} + w_k, 0) with v_0 = 0. If every step is
    right and m_k = K - k, then v_k = k / K.

    Args:
        wrong: [K], r_k: 1 if step k is wrong, 0 if it is right, or the estimated probability that it is wrong.
        remaining: [K], m_k: number of further steps to a right answer after step k; at least 0.

    Returns:
        [K], values between 0 and 1; float64 if an input is float64, else float32. No gradient. K = 0 gives no values.

    Raises:
        ValueError: Shapes that differ, or a number outside its range.
    """
    sizes: dict[str, int] = {}
    check_shape("wrong", wrong, "K", sizes)
    check_shape("remaining", remaining, "K", sizes)
    wrong, remaining = as_float(wrong, remaining)
    if not bool(((wrong >= 0) & (wrong <= 1)).all()):
        raise ValueError("wrong has values outside [0, 1].")
    if not bool((remaining >= 0).all()):
        raise ValueError("remaining has values below 0.")
    values = torch.zeros_like(wrong)
    value = wrong.new_zeros(())
    for k in range(len(wrong)):
        value = (value + (1 - value) / (remaining[k] + 1) * (1 - 2 * wrong[k])).clamp(min=0)
        values[k] = value
    return values


def uct(value: float, visits: int, parent_visits: int, *, exploration: float = 0.5, unvisited: float = 0.9) -> float:
    """Computes the score by which the search chooses among the children of a node.

    See "ReST-MCTS*: LLM Self-Training via Process Reward Guided Tree Search" (arXiv 2406.03816), Section 3.2, with the
    factor 2 under the root of the released code: value + exploration * sqrt(2 ln(parent_visits) / visits).

    Args:
        value: The value of the child.
        visits: How often the child was visited.
        parent_visits: How often its parent was visited; 0 counts as 1.
        exploration: The weight of the second term.
        unvisited: Takes the place of the second term where ``visits`` is 0.

    Returns:
        The score.

    Raises:
        ValueError: A negative number of visits.
    """
    check_at_least("visits", visits, 0)
    check_at_least("parent_visits", parent_visits, 0)
    if visits == 0:
        return value + unvisited
    return value + exploration * math.sqrt(2 * math.log(max(parent_visits, 1)) / visits)
