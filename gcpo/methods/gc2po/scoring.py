"""What GC2PO asks the actor's engine about every response, and the fields that the answers become."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gcpo.episodes import Episodes, split_response
from gcpo.methods.fields import PROMPTS, RESPONSES, Field, split
from gcpo.methods.gc2po.credit import effectiveness, gaussian_noise, group_noise
from gcpo.methods.gc2po.fields import (
    ANSWER_LENGTHS,
    ANSWERS,
    COUNTS,
    DIVERGENCE,
    EFFECTIVENESS,
    EPISODE_INDEX,
    PLACE,
    PROBE,
)
from gcpo.methods.gc2po.settings import GC2POConfig
from gcpo.scoring.branches import EpisodeRequest
from gcpo.seeding import request_seed
from gcpo.tokens import TokenReader


@dataclass(frozen=True)
class ScoredRow:
    """A response of this rank.

    Attributes:
        episodes: of the response.
        length: its tokens.
        seed: made of its tokens, so it is the same wherever the row stands.
        group: number of its group.
        place: in the batch.
        request: with nothing asked about it yet; ``None`` where nothing is to be.
    """

    episodes: Episodes
    length: int
    seed: int
    group: int
    place: int
    request: EpisodeRequest | None


class RowReader:
    """Splits responses into episodes.

    Args:
        config: the resolved settings.
        reader: of the tokenizer.
        end_ids: tokens that are no text at the end of a response: the control tokens.
        step: number of the step.
    """

    def __init__(self, config: GC2POConfig, reader: TokenReader, end_ids: Collection[int], step: int) -> None:
        self.config, self.reader, self.end_ids, self.step = config, reader, end_ids, step

    def read(self, row: Mapping[Field, Tensor]) -> ScoredRow:
        """A row with ``prompts``, ``responses`` and what `GC2PO.before_score` puts beside them."""
        config, prompt, response = self.config, row[PROMPTS], row[RESPONSES]
        wanted, group, place = row[PLACE].tolist()
        if not wanted:
            return ScoredRow(Episodes((), False, False), len(response), 0, group, place, None)
        episodes = split_response(
            response.tolist(),
            self.reader,
            end_ids=self.end_ids,
            separator=config.episodes.separator,
            max_episodes=config.episodes.max_episodes,
        )
        seed = request_seed(config.seed, "gc2po", self.step, prompt.tolist(), response.tolist())
        request = None
        if config.counterfactual and episodes.spans:
            answers = tuple(split(row[ANSWERS], row[ANSWER_LENGTHS])) if config.intervention == "hidden_state" else ()
            request = EpisodeRequest(prompt, response, episodes.ends, (), row[PROBE], answers, torch.zeros(0, 1, 1))
        return ScoredRow(episodes, len(response), seed, group, place, request)


def score_rows(
    rows: Sequence[ScoredRow],
    config: GC2POConfig,
    scorer: Any,
    *,
    size: int,
    gather: Callable[[list[Any]], list[Any]],
) -> dict[Field, list[Tensor]]:
    """Ask ``scorer`` for everything that the rows need.

    Args:
        rows: of this rank.
        config: the resolved settings.
        scorer: answers `EpisodeRequest`s.
        size: d, of a hidden state.
        gather: makes one list of the lists of all ranks.

    Returns:
        ``gc2po_index``, ``gc2po_divergence``, ``gc2po_effectiveness`` and ``gc2po_counts``.
    """
    limit = config.episodes.max_episodes
    divergence = torch.full((len(rows), limit), torch.nan, dtype=torch.float64)
    effect = torch.full((len(rows), limit), torch.nan, dtype=torch.float64)
    counts = torch.tensor([[0.0, 0.0, 0.0, row.episodes.tagged, row.episodes.malformed] for row in rows])
    if config.counterfactual:
        asked = {i: row.request for i, row in enumerate(rows) if row.request is not None}
        requests, scores, states = _ask(rows, asked, config, scorer, size, gather)
        for i, request, state, score in zip(asked, requests, states, scores, strict=True):
            if request.asked:
                divergence[i, list(request.asked)] = score.divergence.mean(-1)
            effect[i, : len(request.ends)] = effectiveness(state)
        tokens = (scorer.path_tokens, scorer.branch_tokens, scorer.unshared_tokens)
        counts[:, :3] = torch.tensor(tokens) / len(rows)
    return {
        EPISODE_INDEX: [torch.tensor(row.episodes.index(row.length), dtype=torch.int64) for row in rows],
        DIVERGENCE: list(divergence),
        EFFECTIVENESS: list(effect),
        COUNTS: list(counts),
    }


def _ask(
    rows: Sequence[ScoredRow],
    asked: Mapping[int, EpisodeRequest],
    config: GC2POConfig,
    scorer: Any,
    size: int,
    gather: Callable[[list[Any]], list[Any]],
) -> tuple[list[EpisodeRequest], list[Any], list[Tensor]]:
    """The requests with their perturbations, the answers, and the states [1 + K, d] of every request."""
    requests = list(asked.values())
    if config.perturbs and config.perturbation.distribution == "group":
        # Perturbations towards other responses need the states of all ranks first.
        states = [score.states for score in scorer(requests)]
        around = gather(
            [(rows[i].group, rows[i].place, rows[i].seed, s[1:]) for i, s in zip(asked, states, strict=True)]
        )
        requests = [_with_group_noise(rows[i], s[1:], around, config) for i, s in zip(asked, states, strict=True)]
        return requests, scorer(requests), states
    if config.perturbs:
        requests = [_with_gaussian_noise(rows[i], request, config, size) for i, request in asked.items()]
    scores = scorer(requests)
    return requests, scores, [score.states for score in scores]


def _asked(row: ScoredRow, request: EpisodeRequest, config: GC2POConfig) -> tuple[int, ...]:
    """The episodes to perturb: all or a random subset, and none where there is but one answer to change."""
    number, wanted = len(request.ends), config.episodes.max_perturbed
    if config.intervention == "hidden_state" and len(request.answers) < 2:
        return ()
    if wanted is None or wanted >= number:
        return tuple(range(number))
    order = torch.randperm(number, generator=torch.Generator().manual_seed(row.seed))
    return tuple(sorted(order[:wanted].tolist()))


def _with_gaussian_noise(row: ScoredRow, request: EpisodeRequest, config: GC2POConfig, size: int) -> EpisodeRequest:
    asked, perturbation = _asked(row, request, config), config.perturbation
    noise = gaussian_noise(row.seed, len(asked), perturbation.draws, size, perturbation.sigma)
    return replace(request, asked=asked, noise=noise)


def _with_group_noise(row: ScoredRow, states: Tensor, around: list[tuple], config: GC2POConfig) -> EpisodeRequest:
    """Perturbations towards other responses of the group, drawn from an order that only their tokens decide."""
    assert row.request is not None
    others = [entry for entry in around if entry[0] == row.group and entry[1] != row.place]
    others.sort(key=lambda entry: entry[2])
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(row.seed))
    chosen = [others[j][3] for j in order[: config.perturbation.draws].tolist()]
    asked = _asked(row, row.request, config) if chosen else ()
    if not asked:
        return replace(row.request, states=False)
    noise = group_noise(states[list(asked)], [_states_at(other, asked) for other in chosen], config.perturbation.eta)
    return replace(row.request, asked=asked, noise=noise, states=False)


def _states_at(states: Tensor, asked: Sequence[int]) -> Tensor:
    """The states [len(asked), d] of another response at the same episodes; its last one where it has fewer."""
    return states[torch.tensor(asked).clamp(max=len(states) - 1)]
