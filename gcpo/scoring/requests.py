"""What a method asks the actor's engine about one sequence, and the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class ScoreRequest:
    """One sequence.

    Attributes:
        context: token ids [C], C >= 0.
        target: token ids [T], T >= 0, with C + T >= 1.
        log_probs: whether log pi(target_t | context, target_<t) is wanted; needs C >= 1 and T >= 1.
        state_at: position in context + target whose hidden state is wanted, or ``None``.
    """

    context: torch.Tensor
    target: torch.Tensor
    log_probs: bool = False
    state_at: int | None = None


@dataclass(frozen=True)
class Score:
    """What was asked for: ``log_probs`` [T] and ``state`` [d], float32 on the CPU, or ``None``."""

    log_probs: torch.Tensor | None = None
    state: torch.Tensor | None = None


class Scorer(Protocol):
    """Scores sequences under the current weights, without gradient, in the order of the requests."""

    tokens: int
    """Tokens that went through the model since the scorer was made."""

    def __call__(self, requests: Sequence[ScoreRequest]) -> list[Score]: ...
