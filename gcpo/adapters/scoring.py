"""Packed rows as micro-batches of verl's engine: one row of the batch is one pack.

`PackScorer` answers the requests of `gcpo.scoring.requests`. If the model supports it, requests that share prefixes
are packed into trees. Otherwise every request is one row, which uses verl's forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu

from gcpo.adapters.schema import nested
from gcpo.scoring.requests import Score, ScoreRequest
from gcpo.scoring.rows import PackedRow, filler, members, pack_rows


def packed_batch(rows: Sequence[PackedRow], **columns: Sequence[torch.Tensor]) -> TensorDict:
    """Return a batch whose micro-batches are the packs.

    Args:
        rows: the packs.
        columns: further fields, one tensor per row.
    """
    batch = TensorDict(
        {
            "input_ids": nested([row.pack.token_ids for row in rows]),
            "position_ids": nested([row.pack.position_ids for row in rows]),
            "loss_mask": nested([torch.ones_like(row.pack.token_ids) for row in rows]),
            "gcpo_row": torch.arange(len(rows)).unsqueeze(1),
            **{name: nested(list(values)) for name, values in columns.items()},
        },
        batch_size=len(rows),
    )
    # A tuple, because verl gives every row its own element of a list.
    tu.assign_non_tensor(
        batch, gcpo_rows=tuple(rows), use_dynamic_bsz=False, micro_batch_size_per_gpu=1, calculate_entropy=False
    )
    return batch


def row_of(micro_batch: TensorDict) -> PackedRow | None:
    """Return the pack of a micro-batch, or ``None`` if it has none."""
    rows: Any = tu.get_non_tensor_data(micro_batch, "gcpo_rows", None)
    return None if rows is None else rows[int(micro_batch["gcpo_row"][0, 0])]


def with_fillers(engine: Any, rows: Sequence[PackedRow], *, is_tree: bool) -> list[PackedRow]:
    """Add filler rows so that all ranks have equally many, at least one: FSDP gathers weights on all ranks together."""
    return [*rows] + [filler(is_tree=is_tree)] * (max(1, engine.max_over_ranks(len(rows))) - len(rows))


def attention_for(engine: Any, *, is_tree: bool) -> AbstractContextManager[None]:
    """Make the model attend over the rows inside the ``with`` block, which must include backward passes."""
    return engine.tree_attention() if is_tree else nullcontext()


def can_share(engine: Any, packing: str) -> bool:
    """Return whether rows are packed into trees: ``packing`` is ``tree``, and the engine's model allows it."""
    return packing == "tree" and engine.tree_problem is None


def run_packs(
    engine: Any, rows: Sequence[PackedRow], *, is_tree: bool, **constants: Any
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the flat values and states of every row, without gradient; all ranks must call it together.

    The values are the log-probabilities of the labels, then the squared gradients of the segments.

    Args:
        engine: a ``GCPOFSDPEngine`` in eval mode.
        rows: rows of this rank.
        is_tree: whether the rows are trees.
        constants: non-tensor entries of the batch.
    """
    batch = packed_batch(with_fillers(engine, rows, is_tree=is_tree))
    tu.assign_non_tensor(batch, **constants)
    with attention_for(engine, is_tree=is_tree):
        output = engine.infer_batch(batch)["model_output"]
    # Filler rows come last.
    return list(zip(output["log_probs"].unbind(), output["states"].unbind(), strict=True))[: len(rows)]


class PackScorer:
    """A scorer of sequences under the current weights, without gradient, in the order of the requests.

    All ranks must call it together.

    Args:
        engine: a ``GCPOFSDPEngine`` in eval mode.
        settings: engine settings of the batch (``use_remove_padding``, ``use_fused_kernels``).
        temperature: rollout temperature; log-probabilities are of the tempered policy, like verl's old log-probs.
        layer: the layer whose states are returned.
        is_tree: whether sequences share rows; see `can_share`.
        max_tokens: largest number of tokens of a row. With trees a longer sequence raises a ``BudgetError``.
        min_shared: shorter stretches are repeated instead of shared.

    Attributes:
        tokens: number of tokens that went through the model so far.
    """

    def __init__(
        self,
        engine: Any,
        *,
        settings: dict[str, Any],
        temperature: float,
        layer: int,
        is_tree: bool,
        max_tokens: int,
        min_shared: int = 8,
    ) -> None:
        self.engine, self.tokens = engine, 0
        self.is_tree, self.budget, self.min_shared = is_tree, max_tokens if is_tree else None, min_shared
        self.constants = {**settings, "temperature": temperature, "gcpo_layer": layer}

    def __call__(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        """Score ``requests``.

        Raises:
            ValueError: a gradient is requested, and ``layer`` is not -1, whose states are the inputs of the head.
        """
        if self.constants["gcpo_layer"] != -1 and any(request.gradient_of for request in requests):
            raise ValueError("gradients of the language-model head need a scorer of layer -1")
        rows = pack_rows(
            [torch.cat([request.context, request.target]) for request in requests],
            [len(request.context) if request.log_probs else None for request in requests],
            [request.state_at for request in requests],
            budget=self.budget,
            min_shared=self.min_shared,
            gradient_of=[request.gradient_of for request in requests],
        )
        self.tokens += sum(len(row.pack) for row in rows)
        found = run_packs(self.engine, rows, is_tree=self.is_tree, **self.constants)
        scores: list[Score] = [Score()] * len(requests)
        for row, sequences, (flat, states) in zip(rows, members(rows), found, strict=True):
            flat, states = flat.float().cpu(), states.cpu().view(len(row.state_at), -1) if len(row.state_at) else states
            flat, squares = flat.split([len(row.labels), row.segments])
            at = taken = done = 0
            for i in sequences:
                log_probs = state = gradient = None
                if requests[i].log_probs:
                    log_probs = flat[at : at + len(requests[i].target)]
                    at += len(log_probs)
                if requests[i].state_at is not None:
                    state = states[taken]
                    taken += 1
                if spans := len(requests[i].gradient_of):
                    gradient = squares[done : done + spans]
                    done += spans
                scores[i] = Score(log_probs, state, gradient)
        return scores
