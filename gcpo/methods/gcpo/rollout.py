"""The collider draws of a group as fields of its rows: graded, counted, and kept for the dump."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gcpo.methods.base import RowFields, SampledGroup
from gcpo.methods.fields import flat, lengths, split
from gcpo.methods.gcpo.draws import KINDS, OUTCOMES, Draw, GroupResult
from gcpo.methods.gcpo.fields import (
    CONTEXT_LENGTHS,
    CONTEXTS,
    DUMP_DRAWS,
    DUMP_PROMPTS,
    DUMP_REWARDS,
    DUMP_TOKENS,
    GROUP,
    KL_WEIGHT,
    OUTPUT_LENGTHS,
    OUTPUTS,
)
from gcpo.methods.gcpo.settings import GCPOConfig
from gcpo.rewards import boxed_answer, normalize
from gcpo.seeding import request_seed

logger = logging.getLogger(__name__)


def is_chosen(config: GCPOConfig, purpose: str, key: tuple[Any, ...], fraction: float) -> bool:
    """Return whether a group belongs to the fraction ``fraction`` of the groups that are graded or dumped."""
    return request_seed(config.seed, purpose, *key) / 0x7FFFFFFF < fraction


async def grade_draws(group: SampledGroup, result: GroupResult, decode: Callable[[Sequence[int]], str]) -> None:
    """Grade the valid draws of a group and sum up its responses, only for our metrics.

    Args:
        group: the responses.
        result: the draws; their rewards and the statistics ``graded/*`` of the responses are added.
        decode: the text of token ids, as the reward function reads it.
    """

    async def grade(draw: Draw) -> None:
        draw.reward = await group.grade(draw.token_ids)

    valid = [draw for draw in result.draws if draw.valid]
    for outcome in await asyncio.gather(*map(grade, valid), return_exceptions=True):
        if isinstance(outcome, BaseException):
            logger.warning("gcpo: an auxiliary generation could not be graded: %s", outcome)
    answers = [boxed_answer(decode(response)) for response in group.responses]
    result.stats.update(response_stats(answers, group.rewards))


def response_stats(answers: Sequence[str | None], rewards: Sequence[float | None]) -> dict[str, float]:
    """Return ``graded/response``, ``graded/oracle`` and ``graded/majority`` of a group.

    They are the mean and the largest reward of the responses, and the mean reward of the responses with the most
    frequent answer. If several answers lead, they count equally.

    Args:
        answers: the answer of every response; ``None``: it has none and does not vote. Answers are equal if their
            normalised texts are. If no response has one, ``graded/majority`` is missing.
        rewards: the reward of every response; if one is ``None``, the result is empty.
    """
    known = [reward for reward in rewards if reward is not None]
    if not known or len(known) < len(rewards):
        return {}
    votes: dict[str, list[float]] = {}
    for answer, reward in zip(answers, known, strict=True):
        if answer is not None:
            votes.setdefault(normalize(answer), []).append(reward)
    stats = {"graded/response": float(np.mean(known)), "graded/oracle": float(max(known))}
    if votes:
        most = max(map(len, votes.values()))
        stats["graded/majority"] = float(np.mean([np.mean(own) for own in votes.values() if len(own) == most]))
    return stats


def empty_result(config: GCPOConfig, count: int) -> GroupResult:
    """Return the result of ``count`` rows without any draw."""
    slots = config.collider.num_draws + config.leave_one_out_draws
    generations = slots * config.collider.num_generations
    nothing = [[[]] * slots] * count, [[[]] * generations] * count
    return GroupResult(*nothing, draws=[], stats={"skipped": 1.0}, kl_weight=[0.0] * count)


def row_fields(result: GroupResult, *, dumps: bool, dump_this: bool) -> list[RowFields]:
    """Return the fields of every row of a group.

    Args:
        result: result of the collider stage.
        dumps: whether rows have the fields of the dump. TransferQueue omits a field that any row of a batch lacks,
            so every row has them if one group is dumped.
        dump_this: whether they contain the draws of this group.
    """
    rows: list[RowFields] = []
    for row, (contexts, outputs, weight) in enumerate(
        zip(result.contexts, result.outputs, result.kl_weight, strict=True)
    ):
        first = row == 0
        rows.append(
            {
                CONTEXTS: flat(contexts),
                CONTEXT_LENGTHS: lengths(contexts),
                OUTPUTS: flat(outputs),
                OUTPUT_LENGTHS: lengths(outputs),
                KL_WEIGHT: torch.tensor([weight]),
                GROUP: _report(result) if first else {},
                **(dump_fields(result.draws if first and dump_this else []) if dumps else {}),
            }
        )
    return rows


def _report(result: GroupResult) -> dict[str, Any]:
    stats = dict(result.stats)
    for kind in KINDS:
        graded = [draw.reward for draw in result.draws if draw.kind == kind and draw.reward is not None]
        stats[f"{kind}/graded"] = float(len(graded))
        stats[f"{kind}/reward"] = float(sum(graded))
    return {"stats": stats, "layout": result.plan, "causes": result.causes}


def dump_fields(draws: Sequence[Draw]) -> dict[Any, Tensor]:
    """Convert draws to four ragged rows, which `dumped_draws` reads; without draws each row is one zero."""
    number = {id(draw): j for j, draw in enumerate(draws)}
    prompts = [[block if isinstance(block, int) else -1 - number[id(block)] for block in draw.prompt] for draw in draws]
    tokens = [token for draw in draws for token in draw.token_ids]
    entries = [
        entry
        for draw, prompt in zip(draws, prompts, strict=True)
        for entry in (
            KINDS.index(draw.kind),
            OUTCOMES.index(draw.outcome),
            len(draw.token_ids),
            -1 if draw.left_out is None else draw.left_out,
            len(prompt),
        )
    ]
    rewards = [torch.nan if draw.reward is None else draw.reward for draw in draws]
    return {
        DUMP_TOKENS: torch.tensor(tokens or [0], dtype=torch.int32),
        DUMP_DRAWS: torch.tensor(entries or [0], dtype=torch.int32),
        DUMP_REWARDS: torch.tensor(rewards or [0.0], dtype=torch.float32),
        DUMP_PROMPTS: torch.tensor([block for prompt in prompts for block in prompt] or [0], dtype=torch.int32),
    }


def dumped_draws(tokens: Tensor, entries: Tensor, rewards: Tensor, prompts: Tensor) -> list[dict[str, Any]]:
    """Return the draws in a row of `dump_fields`, with ``reward`` and ``left_out`` ``None`` if there is none.

    ``draw`` is its number in the group, and ``prompt`` names the blocks of its prompt in order: ``response k`` or
    ``draw j``.
    """
    if len(entries) < 5:
        return []
    table = entries.view(-1, 5)
    columns = zip(
        table.tolist(), rewards.tolist(), split(tokens, table[:, 2]), split(prompts, table[:, 4]), strict=True
    )
    return [
        {
            "draw": number,
            "kind": KINDS[kind],
            "outcome": OUTCOMES[outcome],
            "left_out": None if left_out < 0 else left_out,
            "prompt": [f"response {block}" if block >= 0 else f"draw {-1 - block}" for block in prompt.tolist()],
            "reward": None if reward != reward else reward,
            "token_ids": piece.tolist(),
        }
        for number, ((kind, outcome, _, left_out, _), reward, piece, prompt) in enumerate(columns)
    ]
