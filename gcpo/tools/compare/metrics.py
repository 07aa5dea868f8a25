"""The metrics of a run that a comparison reads, under one name for both trainers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

NAMES = {
    "held_out": r"val-core/(?!.*ood).+/acc/mean@\d+",
    "ood": r"val-ood/acc/mean@\d+|val-core/.*ood.*/acc/mean@\d+",
    "reward": r"critic/score/mean",
    "grad_norm": r"actor/grad_norm",
    "response_length": r"response_length/mean",
    "seconds": r"timing_s/step",
    "upsilon": r"gcpo/upsilon/mean",
    "upsilon_right": r"gcpo/upsilon/mean_above",
    "upsilon_wrong": r"gcpo/upsilon/mean_below",
}
"""Column of the tables -> the metric as a regular expression."""
GENERATED = "tokens/generated"
"""All tokens that a step generates, as the one-file trainer logs them."""


def columns(metrics: Mapping[str, float]) -> dict[str, float]:
    """The values of a step by column; the mean where several sets have one."""
    found = {}
    for column, pattern in NAMES.items():
        values = [value for name, value in metrics.items() if re.fullmatch(pattern, name)]
        if values:
            found[column] = sum(values) / len(values)
    return found


def generated_tokens(metrics: Mapping[str, float]) -> float:
    """The tokens that a step generates, with collider draws and regenerated responses; NaN where that is not known.

    A method that makes auxiliary generations logs all parts under ``*/tokens/generated/``. Else these are verl's
    responses: verl logs the sum of prompts and responses, and the mean lengths of both.
    """
    if GENERATED in metrics:
        return metrics[GENERATED]
    parts = [value for name, value in metrics.items() if f"/{GENERATED}/" in name]
    if parts:
        return sum(parts)
    total, prompt, response = (
        metrics.get(name, math.nan) for name in ("perf/total_num_tokens", "prompt_length/mean", "response_length/mean")
    )
    return total * response / (prompt + response)


def curve(steps: Mapping[int, Mapping[str, float]]) -> list[dict[str, float]]:
    """A row for every step: the columns, and ``tokens``, the tokens generated up to then."""
    rows, tokens = [], 0.0
    for step, metrics in sorted(steps.items()):
        tokens += generated_tokens(metrics) if step > 0 else 0.0
        rows.append({"step": step, "tokens": tokens, **columns(metrics)})
    return rows


def final_evaluation(steps: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """Accuracies of the last step."""
    last = columns(steps[max(steps)]) if steps else {}
    return {name: last[name] for name in ("held_out", "ood") if name in last}
