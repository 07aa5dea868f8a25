"""Requests of a method to the actor's engine about single sequences, and the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class ScoreRequest:
    """A request about one sequence.

    Attributes:
        context: token ids [C], C >= 0.
        target: token ids [T], T >= 0, with C + T >= 1.
        log_probs: whether log pi(target_t | context, target_<t) is requested; needs C >= 1 and T >= 1.
        state_at: requested hidden state's position in context + target, or ``None``.
        gradient_of: spans [start, end) of the target, which do not overlap. For each, the square of the gradient of
            its log pi with respect to the language-model head is requested; needs ``log_probs``.
    """

    context: torch.Tensor
    target: torch.Tensor
    log_probs: bool = False
    state_at: int | None = None
    gradient_of: Sequence[tuple[int, int]] = ()


@dataclass(frozen=True)
class Score:
    """The requested values, float32 on the CPU, each ``None`` if not requested.

    Attributes:
        log_probs: [T].
        state: [d].
        gradient_square: one value per span, see `gcpo.algorithms.head_gradient_square`.
    """

    log_probs: torch.Tensor | None = None
    state: torch.Tensor | None = None
    gradient_square: torch.Tensor | None = None


class Scorer(Protocol):
    """Scores sequences under the current weights, without gradient, in the order of the requests."""

    tokens: int
    """Number of tokens that went through the model since the scorer was created."""

    def __call__(self, requests: Sequence[ScoreRequest]) -> list[Score]: ...
