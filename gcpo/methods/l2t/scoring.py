"""The actor's answers about every episode: the probability of the right answer, and the compression penalty."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gcpo.methods.base import Engine
from gcpo.methods.fields import Field
from gcpo.methods.l2t.fields import COUNTS, EPISODE_INDEX, PENALTY, PROBABILITY
from gcpo.methods.l2t.probes import ProbedRow
from gcpo.methods.l2t.settings import L2TConfig
from gcpo.scoring.requests import Score, Scorer, ScoreRequest

RELEASED_SCALE = 1e-2
"""Factor of the penalty in the released code of L2T."""


def score_rows(
    rows: Sequence[ProbedRow], config: L2TConfig, scorer: Scorer, engine: Engine
) -> dict[Field, list[Tensor]]:
    """Score the right answer after every episode of the rows, and the penalties of the episodes.

    Args:
        rows: the responses of this rank.
        config: the resolved settings.
        scorer: a scorer of layer -1.
        engine: the engine of ``scorer``.

    Returns:
        ``l2t_index``, ``l2t_probability``, ``l2t_counts``, and ``l2t_penalty`` unless the penalty is off.
    """
    one_step, released = config.penalty == "one_step", config.penalty == "released"
    probes = [row.requests() for row in rows]
    # Rows about which nothing is asked have no penalty either.
    whole = [[row.whole(gradients=one_step)] if probe else [] for row, probe in zip(rows, probes, strict=True)]
    asked = [[*probe, *response] if one_step else probe for probe, response in zip(probes, whole, strict=True)]
    scores = _score(asked, scorer)
    number = config.episodes.max_episodes
    probabilities = [
        [_log_probs(score).mean().exp() for score in own[: len(probe)]]
        for own, probe in zip(scores, probes, strict=True)
    ]
    found: dict[Field, list[Tensor]] = {
        EPISODE_INDEX: [torch.tensor(row.episodes.index(len(row.response)), dtype=torch.int64) for row in rows],
        PROBABILITY: _padded(probabilities, 1 + number),
    }
    if one_step:
        found[PENALTY] = _padded([_one_step(own, config.step_size) for own in scores], number)
    if released:
        found[PENALTY] = _padded(_released(rows, whole, scorer, engine), number)
        asked = [[*one, *response, *response] for one, response in zip(asked, whole, strict=True)]
    unshared = sum(len(request.context) + len(request.target) for one in asked for request in one)
    tokens = [count / max(len(rows), 1) for count in (scorer.tokens, unshared)]
    found[COUNTS] = [torch.tensor([*tokens, row.episodes.tagged, row.episodes.malformed]) for row in rows]
    return found


def _one_step(scores: Sequence[Score], step_size: float) -> Sequence[Tensor]:
    """Return C_k = (g_k . D_k)^2 with the imagined step D_k = ``step_size`` * g_k: (``step_size`` * |g_k|^2)^2.

    g_k is the gradient of log pi(z_k | s_k) with respect to the language-model head.
    """
    if not scores:
        return []
    squares = scores[-1].gradient_square
    assert squares is not None  # the last request asks for them
    return list((step_size * squares.double()).square())


def _released(
    rows: Sequence[ProbedRow], whole: Sequence[Sequence[ScoreRequest]], scorer: Scorer, engine: Engine
) -> list[list[Tensor]]:
    """Return C_k = 0.01 * (d log pi(z_k | s_k) / d D)^2, by a central difference.

    D is the change of the last decoder layer since the start of the run.
    """
    sides = []
    for sign in (1, -1):
        with engine.moved(sign) as step:
            scores = _score(whole, scorer)
            sides.append(
                [
                    [sign * _log_probs(score)[a:b].sum() / (2 * step) for score in own for a, b in row.episodes.spans]
                    for row, own in zip(rows, scores, strict=True)
                ]
            )
    return [
        [RELEASED_SCALE * (plus + minus).square() for plus, minus in zip(*pair, strict=True)]
        for pair in zip(*sides, strict=True)
    ]


def _score(asked: Sequence[Sequence[ScoreRequest]], scorer: Scorer) -> list[list[Score]]:
    """Return the scores of all requests, which are made together."""
    scores = iter(scorer([request for one in asked for request in one]))
    return [[next(scores) for _ in one] for one in asked]


def _log_probs(score: Score) -> Tensor:
    assert score.log_probs is not None  # every request asks for them
    return score.log_probs.double()


def _padded(rows: Sequence[Sequence[Tensor]], width: int) -> list[Tensor]:
    """Return rows of ``width`` values, float64, with NaN behind the values."""
    table = torch.full((len(rows), width), torch.nan, dtype=torch.float64)
    for row, values in zip(table, rows, strict=True):
        if values:
            row[: len(values)] = torch.stack(list(values))
    return list(table)
