"""A warning for a first step in which every reward is 0.

Without rewards no response has an advantage, and the run does not learn. The usual cause is a prompt that asks for
the answer in another form than the reward function reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transfer_queue import KVBatchMeta

from gcpo.adapters.schema import queue_get
from gcpo.rewards import extracted_answer

EXAMPLES = 3
TAIL = 200
"""Number of final characters of a response that are shown."""
SHOWN = 100
"""Number of characters of an answer that are shown."""


def zero_reward_warning(batch: KVBatchMeta, tokenizer: Any, *, ours: bool) -> list[str]:
    """Return the lines of the warning, with examples from different groups, or no lines if any reward is not 0.

    Args:
        batch: the rows of a step, with ``rm_scores`` and ``responses`` [T] each and the columns of the data file.
        tokenizer: decodes the responses.
        ours: whether the reward function is the one of ``gcpo.rewards``, whose extracted answer can be shown.
    """
    rows = [row for row, tag in enumerate(batch.tags) if not tag.get("is_padding", False)]
    scores = queue_get(batch, ["rm_scores"])["rm_scores"]
    if not rows or any(bool((score != 0).any()) for row, score in enumerate(scores.unbind()) if row in set(rows)):
        return []
    by_group = {batch.keys[row].rsplit("_", 2)[0]: batch.keys[row] for row in reversed(rows)}
    keys = list(reversed(by_group.values()))[:EXAMPLES]
    names = ["responses", "reward_model", "data_source"]
    data = queue_get(batch, names, keys)
    columns = [list(data[name]) if name in data.keys() else [None] * len(keys) for name in names[1:]]
    lines = [
        f"every reward of the first step is 0 ({len(rows)} responses), so no response has an advantage; check that "
        "the prompt asks for the answer in the form that the reward function reads"
    ]
    for ids, entry, source in zip(data["responses"].unbind(), *columns, strict=True):
        truth = entry.get("ground_truth") if isinstance(entry, Mapping) else None
        response = tokenizer.decode(ids.tolist(), skip_special_tokens=True)
        answer = f"extracted answer: {_extracted(source, response, truth)}; " if ours else ""
        lines.append(f"the response ends with {response[-TAIL:]!r}; {answer}right answer: {_short(truth)}")
    return lines


def _extracted(source: Any, response: str, truth: Any) -> str:
    try:
        answer = extracted_answer(source, response, truth)
    except ValueError as error:
        return f"none ({error})"
    return "none" if answer is None else _short(answer)


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}..."
