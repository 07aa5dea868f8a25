"""The batch fields of GC2PO. T tokens in a response, K = ``episodes.max_episodes``."""

from __future__ import annotations

from functools import partial

import torch

from gcpo.methods.fields import Field

_before = partial(Field, writer="before_score", readers="score")
_score = partial(Field, writer="score", readers="credit")

PLACE = _before(
    "gc2po_place",
    torch.int64,
    "[3]",
    meaning="Whether anything is asked about the row, the number of its group, and its place in the batch.",
)
ANSWERS = _before(
    "gc2po_answers",
    torch.int64,
    "[sum of answer_lengths]",
    meaning="Token ids of the answers that are scored, one after another.",
)
ANSWER_LENGTHS = _before("gc2po_answer_lengths", torch.int64, "[answers]", meaning="Tokens of every answer.")
PROBE = _before("gc2po_probe", torch.int64, "[tokens]", meaning="Token ids of the answer prompt.")
EPISODE_INDEX = _score("gc2po_index", torch.int64, "[T]", meaning="The episode of every token, -1 outside.")
DIVERGENCE = _score(
    "gc2po_divergence",
    torch.float64,
    "[K]",
    meaning="The mean of KL(q || q_m) over the perturbations; NaN where nothing was asked.",
)
EFFECTIVENESS = _score(
    "gc2po_effectiveness",
    torch.float64,
    "[K]",
    meaning="How far the state moves in the episode; NaN where there is no episode.",
)
COUNTS = _score(
    "gc2po_counts",
    torch.float32,
    "[5]",
    meaning="An equal part of the rank's tokens (path, branches, unshared), and whether the row's tags are there and "
    "malformed.",
)
ALL = (PLACE, ANSWERS, ANSWER_LENGTHS, PROBE, EPISODE_INDEX, DIVERGENCE, EFFECTIVENESS, COUNTS)
