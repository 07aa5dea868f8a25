"""Requests of GCPO to the actor's engine about every response, and the fields made from the answers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gcpo.methods.fields import PROMPTS, RESPONSES, Field, split
from gcpo.methods.gcpo.fields import (
    CONTEXT_LENGTHS,
    CONTEXTS,
    KL_WEIGHT,
    LOG_P,
    OUTPUT_LENGTHS,
    OUTPUTS,
    SCORED_TOKENS,
    Z_REGENERATED,
    Z,
)
from gcpo.methods.gcpo.settings import GCPOConfig
from gcpo.scoring.requests import Score, Scorer, ScoreRequest

SCORED_KINDS = ("response", "context", "regenerated")
"""Kinds of scored sequences: only y_i, y_i or the state of the prompt under x_{i,l}, and O_{i,l,m}."""


@dataclass
class ScoredRow:
    """A response: indices of its requests, ``None`` without a request, and its tokens by kind."""

    length: int
    response: int | None = None
    contexts: list[int | None] = field(default_factory=list)
    outputs: list[int | None] = field(default_factory=list)
    has_log_probs: bool = False
    tokens: list[float] = field(default_factory=lambda: [0.0] * len(SCORED_KINDS))


class RowRequests:
    """The requests of some responses.

    Args:
        config: the resolved settings.
        end_ids: tokens that end a response and are not content.

    Attributes:
        requests: requests of all rows so far.
        rows: one entry per row.
    """

    def __init__(self, config: GCPOConfig, end_ids: Collection[int]) -> None:
        self.config, self.end_ids = config, end_ids
        self.requests: list[ScoreRequest] = []
        self.rows: list[ScoredRow] = []

    def add(self, row: Mapping[Field, Tensor]) -> None:
        """Request the state of a response, its log-probabilities under its contexts, and its regenerations' states.

        Args:
            row: ``prompts`` and ``responses``; with collider draws the contexts, the outputs and ``gcpo_kl_weight``.
        """
        config, prompt, response = self.config, row[PROMPTS], row[RESPONSES]
        entry = ScoredRow(len(response))
        self.rows.append(entry)
        if config.weighting_on:
            entry.response = self._ask(self._state_request(prompt, response), "response")
        if not config.needs_rollout:
            return
        contexts = split(row[CONTEXTS], row[CONTEXT_LENGTHS])
        prompt_states = config.causal_target_on and config.features.source == "prompt"
        entry.has_log_probs = config.reference_on and float(row[KL_WEIGHT]) > 0
        for context in contexts:
            if not len(context) or not (entry.has_log_probs or prompt_states):
                entry.contexts.append(None)
                continue
            state_at = len(context) - 1 if prompt_states else None
            target = response if entry.has_log_probs else response[:0]
            request = ScoreRequest(context, target, entry.has_log_probs, state_at)
            entry.contexts.append(self._ask(request, "context"))
        if config.causal_target_on and config.features.source == "response":
            outputs = split(row[OUTPUTS], row[OUTPUT_LENGTHS])
            per_context = len(outputs) // len(contexts)
            for j, output in enumerate(outputs):
                request = self._state_request(contexts[j // per_context], output)
                entry.outputs.append(self._ask(request, "regenerated") if len(output) else None)

    def _ask(self, request: ScoreRequest, kind: str) -> int:
        self.requests.append(request)
        self.rows[-1].tokens[SCORED_KINDS.index(kind)] += len(request.context) + len(request.target)
        return len(self.requests) - 1

    def _state_request(self, context: Tensor, output: Tensor) -> ScoreRequest:
        if self.config.features.input == "response":
            context = context[:0]
        last = len(output) - 1
        while self.config.features.token == "last_content" and last > 0 and int(output[last]) in self.end_ids:
            last -= 1
        return ScoreRequest(context, output, state_at=len(context) + last)


def score_rows(
    rows: Mapping[Field, Sequence[Tensor]], config: GCPOConfig, scorer: Scorer, end_ids: Collection[int]
) -> dict[Field, list[Tensor]]:
    """Compute states and conditioned log-probabilities of the old policy for every row.

    Args:
        rows: see `RowRequests.add`, a list for each field.
        config: the resolved settings.
        scorer: scorer of the requests.
        end_ids: see `RowRequests`.

    Returns:
        ``gcpo_scored_tokens``, and ``gcpo_z``, ``gcpo_z_regenerated`` and ``gcpo_log_p`` if they are needed.
    """
    asked = RowRequests(config, end_ids)
    for values in zip(*rows.values(), strict=True):
        asked.add(dict(zip(rows, values, strict=True)))
    scores = scorer(asked.requests)
    share = scorer.tokens / len(asked.rows)
    fields = {SCORED_TOKENS: [torch.tensor([share, *row.tokens]) for row in asked.rows]}
    if config.weighting_on:
        fields[Z] = [_state(scores[row.response]) for row in asked.rows if row.response is not None]
    if config.causal_target_on:
        size = next((len(score.state) for score in scores if score.state is not None), 1)
        places = [row.contexts if config.features.source == "prompt" else row.outputs for row in asked.rows]
        fields[Z_REGENERATED] = [
            torch.cat([torch.zeros(size) if at is None else _state(scores[at]) for at in row]) for row in places
        ]
    if config.reference_on:
        fields[LOG_P] = [torch.cat(_log_probs(row, scores)) for row in asked.rows]
    return fields


def _state(score: Score) -> Tensor:
    assert score.state is not None
    return score.state


def _log_probs(row: ScoredRow, scores: Sequence[Score]) -> list[Tensor]:
    """Return the log-probabilities [T] under every context; zeros if not requested."""
    found = [None if at is None else scores[at].log_probs for at in row.contexts]
    return [torch.zeros(row.length) if values is None else values for values in found]
