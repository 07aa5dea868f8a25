"""What L2T asks the actor's engine about every response, and the fields that the answers become."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gcpo.episodes import Episodes, split_response
from gcpo.methods.fields import PROMPTS, RESPONSES, Field, split
from gcpo.methods.l2t.fields import PIECE_LENGTHS, PIECES
from gcpo.methods.l2t.settings import L2TConfig, ProbeConfig
from gcpo.rewards import grader_of, normalize, right_answers
from gcpo.scoring.requests import ScoreRequest
from gcpo.tokens import TokenReader, last_occurrence, plain_decoder

OPEN, CLOSED = "<think>", "</think>"


def right_answer(data_source: Any, truth: Any) -> str | None:
    """The first right answer that can stand in a box; ``None`` where there is none, as for a program with its tests.

    Args:
        data_source: name of the data set.
        truth: column ``ground_truth`` of the data set.
    """
    if grader_of(data_source, truth) == "code":
        return None
    return next((answer.strip() for answer in right_answers(truth) if normalize(answer)), None)


def pieces_of(answer: str, probe: ProbeConfig, encode: Callable[[str], list[int]]) -> list[list[int]]:
    """Token ids of the text that closes a thinking part, of the probe, and of the answer behind it.

    Probe and answer are encoded as one text, since a token can hold the end of the one and the beginning of the other.
    Such a token belongs to the answer.
    """
    alone, together = encode(probe.text), encode(probe.text + answer + probe.suffix)
    start = next((k for k, (a, b) in enumerate(zip(alone, together, strict=False)) if a != b), len(alone))
    return [encode(probe.close_think), together[:start], together[start:]]


@dataclass(frozen=True)
class ProbedRow:
    """A response of this rank.

    Attributes:
        prompt: token ids.
        response: token ids.
        episodes: of the response.
        thinking: the tokens [start, end) of the response behind whose first ones the thinking part is open.
        pieces: see `pieces_of`; all empty: nothing is asked.
    """

    prompt: Tensor
    response: Tensor
    episodes: Episodes
    thinking: tuple[float, float]
    pieces: list[Tensor]

    def requests(self) -> list[ScoreRequest]:
        """The right answer behind the prompt and behind every episode."""
        close, probe, answer = self.pieces
        if not len(answer):
            return []
        start, behind = self.thinking
        requests = []
        for end in (0, *(end for _, end in self.episodes.spans)):
            shown = [self.prompt, self.response[:end], *([close] if start <= end < behind else []), probe]
            requests.append(ScoreRequest(torch.cat(shown), answer, log_probs=True))
        return requests

    def whole(self, *, gradients: bool) -> ScoreRequest:
        """The response behind its prompt, and with ``gradients`` also the gradient of every episode."""
        spans = self.episodes.spans if gradients else ()
        return ScoreRequest(self.prompt, self.response, log_probs=True, gradient_of=spans)


class RowReader:
    """Splits responses into episodes, and finds their thinking part.

    Args:
        config: the resolved settings.
        tokenizer: of the model.
        end_ids: tokens that are no text at the end of a response: the control tokens.
    """

    def __init__(self, config: L2TConfig, tokenizer: Any, end_ids: Collection[int]) -> None:
        self.episodes, self.end_ids = config.episodes, end_ids
        self._reader, self._decode = TokenReader(tokenizer), plain_decoder(tokenizer)

    def read(self, row: Mapping[Field, Tensor]) -> ProbedRow:
        """A row with the fields of `L2T.score_inputs`."""
        prompt, response = row[PROMPTS], row[RESPONSES]
        episodes = split_response(
            response.tolist(),
            self._reader,
            end_ids=self.end_ids,
            separator=self.episodes.separator,
            max_episodes=self.episodes.max_episodes,
        )
        pieces = split(row[PIECES], row[PIECE_LENGTHS])
        return ProbedRow(prompt, response, episodes, self._thinking(prompt.tolist(), response.tolist()), pieces)

    def _thinking(self, prompt: list[int], response: list[int]) -> tuple[float, float]:
        before = self._decode(prompt)
        if before.rfind(OPEN) > before.rfind(CLOSED):
            start: float = 0
        else:
            start = (last_occurrence(self._decode, response, OPEN) or (0, math.inf))[1]
        return start, (last_occurrence(self._decode, response, CLOSED) or (0, math.inf))[1]
