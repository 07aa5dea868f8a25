"""Log-probabilities and hidden states of sequences, from the actor's own engine.

``Scorer`` is the one interface between what GCPO wants to know of the old policy and how the forward passes are laid
out. ``TreeScorer`` runs what sequences share once; ``DenseScorer`` runs every sequence by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu

from gcpo.adapters.packed import filler, packed_batch, packed_rows
from gcpo.adapters.schema import nested


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


@dataclass(kw_only=True)
class EngineScorer:
    """What scorers over an engine are made of. All ranks must call one together.

    Attributes:
        engine: a ``GCPOFSDPEngine`` in eval mode.
        settings: engine settings of the batch (``use_remove_padding``, ``use_fused_kernels``).
        temperature: of the rollout; log-probabilities are of the tempered policy, like verl's old log-probs.
        layer: ``features.layer``.
        max_tokens: token budget of a micro-batch.
        tokens: see ``Scorer``.
    """

    engine: Any
    settings: dict[str, Any]
    temperature: float
    layer: int
    max_tokens: int
    tokens: int = field(default=0, init=False)


@dataclass(kw_only=True)
class DenseScorer(EngineScorer):
    """One row of the engine's batch for every sequence, cut into micro-batches by token budget or by number.

    A rank with fewer sequences than another runs some of two tokens.

    Attributes:
        micro_batch_size: sequences of a micro-batch; ``None``: by tokens.
    """

    micro_batch_size: int | None = None

    def __call__(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        """Score ``requests``."""
        scores: list[Score] = [Score()] * len(requests)
        with_head = [i for i, request in enumerate(requests) if request.log_probs]
        states_only = [i for i, request in enumerate(requests) if not request.log_probs]
        for indices, head in ((with_head, True), (states_only, False)):
            count = self.engine.max_over_ranks(len(indices))
            if count == 0:
                continue
            size = self.micro_batch_size or 1
            count = -(-count // size) * size
            want_states = self.engine.max_over_ranks(int(any(requests[i].state_at is not None for i in indices)))
            output = self._forward([requests[i] for i in indices], count, head=head, states=bool(want_states))
            for row, i in enumerate(indices):
                request, log_probs, state = requests[i], None, None
                if head:
                    start = len(request.context) - 1
                    log_probs = output["log_probs"][row][start : start + len(request.target)].float().cpu()
                if request.state_at is not None:
                    state = output["states"][row].cpu()
                scores[i] = Score(log_probs, state)
        return scores

    def _forward(
        self, requests: list[ScoreRequest], count: int, *, head: bool, states: bool
    ) -> dict[str, list[torch.Tensor]]:
        rows = [torch.cat([request.context, request.target]) for request in requests]
        self.tokens += sum(map(len, rows))
        rows += [torch.zeros(2, dtype=torch.long)] * (count - len(rows))
        state_at = [request.state_at or 0 for request in requests] + [0] * (count - len(requests))
        batch = TensorDict(
            {
                "input_ids": nested(rows),
                "position_ids": nested([torch.arange(len(row)) for row in rows]),
                "loss_mask": nested([torch.ones_like(row) for row in rows]),
                "state_index": torch.tensor(state_at).unsqueeze(1),
            },
            batch_size=count,
        )
        longest = self.engine.max_over_ranks(max(map(len, rows)))
        tu.assign_non_tensor(
            batch,
            **self.settings,
            use_dynamic_bsz=self.micro_batch_size is None,
            micro_batch_size_per_gpu=self.micro_batch_size,
            max_token_len_per_gpu=max(self.max_tokens, longest),
            temperature=self.temperature,
            calculate_entropy=False,
            gcpo_log_probs=head,
        )
        if states:
            tu.assign_non_tensor(batch, gcpo_layer=self.layer)
        output = self.engine.infer_batch(batch)["model_output"]
        return {name: list(value.unbind()) for name, value in output.items()}


@dataclass(kw_only=True)
class TreeScorer(EngineScorer):
    """Sequences that share prefixes as packed trees, cut into micro-batches by token budget.

    The engine's ``tree_problem`` is ``None``; a sequence longer than the budget raises a ``BudgetError``. A rank with
    fewer packs than another runs some of two tokens.

    Attributes:
        min_shared: shorter stretches are repeated instead of shared.
    """

    min_shared: int

    def __call__(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        """Score ``requests``."""
        rows = packed_rows(
            [torch.cat([request.context, request.target]) for request in requests],
            [len(request.context) if request.log_probs else None for request in requests],
            [request.state_at for request in requests],
            budget=self.max_tokens,
            min_shared=self.min_shared,
        )
        self.tokens += sum(len(row.pack) for row in rows)
        batch = packed_batch(rows + [filler()] * (max(1, self.engine.max_over_ranks(len(rows))) - len(rows)))
        tu.assign_non_tensor(batch, **self.settings, temperature=self.temperature, gcpo_layer=self.layer)
        with self.engine.tree_attention():
            output = self.engine.infer_batch(batch)["model_output"]
        scores: list[Score] = [Score()] * len(requests)
        for row, flat, states in zip(rows, output["log_probs"].unbind(), output["states"].unbind(), strict=False):
            flat, states = flat.float().cpu(), states.cpu().view(len(row.state_at), -1) if len(row.state_at) else states
            at = taken = 0
            for i in row.pack.sequences:
                log_probs = state = None
                if requests[i].log_probs:
                    log_probs = flat[at : at + len(requests[i].target)]
                    at += len(log_probs)
                if requests[i].state_at is not None:
                    state = states[taken]
                    taken += 1
                scores[i] = Score(log_probs, state)
        return scores


def make_scorer(
    engine: Any,
    *,
    packing: str,
    min_shared: int,
    micro_batch_size: int | None = None,
    **arguments: Any,
) -> DenseScorer | TreeScorer:
    """``TreeScorer`` where ``packing`` is ``tree`` and the engine's model allows it, else ``DenseScorer``."""
    if packing == "tree" and engine.tree_problem is None:
        return TreeScorer(engine=engine, min_shared=min_shared, **arguments)
    return DenseScorer(engine=engine, micro_batch_size=micro_batch_size, **arguments)
