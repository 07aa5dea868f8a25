"""The batch fields of L2T. T tokens in a response, K = ``episodes.max_episodes``."""

from __future__ import annotations

from functools import partial

import torch

from gcpo.methods.fields import Field

_before = partial(Field, writer="before_score", readers="score")
_score = partial(Field, writer="score", readers="credit")

PIECES = _before(
    "l2t_pieces",
    torch.int64,
    "[sum of piece_lengths]",
    meaning="Token ids of the text that closes a thinking part, of the probe, and of the right answer.",
)
PIECE_LENGTHS = _before(
    "l2t_piece_lengths", torch.int64, "[3]", meaning="Tokens of every piece; all 0: nothing is asked about the row."
)
EPISODE_INDEX = _score("l2t_index", torch.int64, "[T]", meaning="The episode of every token, -1 outside.")
PROBABILITY = _score(
    "l2t_probability",
    torch.float64,
    "[1 + K]",
    meaning="J, the length-normalised probability of the right answer after the prompt and after every episode; NaN "
    "where there is none.",
)
PENALTY = _score(
    "l2t_penalty", torch.float64, "[K]", meaning="C, the compression penalty of every episode; NaN where there is none."
)
COUNTS = _score(
    "l2t_counts",
    torch.float32,
    "[4]",
    meaning="An equal part of the rank's tokens (scored, without sharing), and whether the row's tags are there and "
    "malformed.",
)
ALL = (PIECES, PIECE_LENGTHS, EPISODE_INDEX, PROBABILITY, PENALTY, COUNTS)
