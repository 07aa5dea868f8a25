"""The episodes of a group for the rollout dump."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from gcpo.episodes import texts_of
from gcpo.methods.gc2po.credit import GroupEpisodes, GroupResult
from gcpo.methods.stations import brief


def episodes_of(
    group: GroupEpisodes, result: GroupResult, responses: Sequence[Tensor], decode: Callable[[Sequence[int]], str]
) -> list[list[dict[str, Any]]]:
    """Return the episodes of every response, each with its text, terms, reward and mean advantage.

    Args:
        group: the episodes of n responses.
        result: their rewards and advantages.
        responses: token ids of the n responses.
        decode: see `gcpo.tokens.plain_decoder`.
    """
    found = []
    for i, response in enumerate(responses):
        index = group.index[i, : len(response)]
        texts = texts_of(response.tolist(), index.tolist(), decode)
        columns = [getattr(result, name)[i, : len(texts)] for name in ("robustness", "effectiveness", "reward")]
        advantage = result.advantage[i, : len(response)]
        found.append(
            [
                {
                    "text": text,
                    **dict(zip(("robustness", "effectiveness", "reward"), map(_number, values), strict=True)),
                    "advantage": _number(advantage[index == k].mean()),
                }
                for k, (text, *values) in enumerate(zip(texts, *columns, strict=True))
            ]
        )
    return found


def _number(value: Tensor) -> float | None:
    return brief(value[None])[0]
