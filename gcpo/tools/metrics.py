"""The metrics of a run: reading of its file, and selection of the metrics in step lines and curves.

verl's ``file`` logger writes ``metrics.jsonl``, one line a step: ``{"step": k, "data": {...}}``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gcpo import stability
from gcpo.methods import method_names
from gcpo.methods.shown import Metrics, Shown, shown_of

METRICS_FILE = "metrics.jsonl"
EARLIER_METRICS_FILE = "metrics.earlier.jsonl"
"""Lines of earlier starts of the same run: verl's file logger empties its file whenever it starts."""

# ---- reading ---------------------------------------------------------------------------------------------------------


def parse_line(line: str) -> tuple[int, dict[str, float]] | None:
    """Return the step and the finite numbers of a line of the metrics file, or None if the line is not complete."""
    try:
        record = json.loads(line)
        step, items = int(record["step"]), record["data"].items()
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return step, {key: float(value) for key, value in items if _is_number(value)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def merge_lines(lines: Iterable[str]) -> dict[int, dict[str, float]]:
    """Return metrics by step. A duplicate step, as after a resume, keeps the later value of every key."""
    steps: dict[int, dict[str, float]] = {}
    for step, metrics in filter(None, map(parse_line, lines)):
        steps.setdefault(step, {}).update(metrics)
    return steps


def read_metrics(directory: Path) -> dict[int, dict[str, float]]:
    """Return all metrics of the run in ``directory``, including earlier starts, in order of the steps."""
    paths = [directory / name for name in (EARLIER_METRICS_FILE, METRICS_FILE)]
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in paths if path.is_file()]
    return dict(sorted(merge_lines(line for text in texts for line in text.splitlines()).items()))


# ---- shown metrics ---------------------------------------------------------------------------------------------------


STAGES: dict[str, tuple[str, ...]] = {
    "generate": ("timing_s/gen",),
    # The causal stage (timing_s/gcpo_*) runs inside verl's timer of the old log-probabilities.
    "score": ("timing_s/old_log_prob", "timing_s/ref", "timing_s/adv"),
    "update": ("timing_s/update_actor",),
    "sync": ("timing_s/update_weights",),
    "validate": ("timing_s/testing",),
    "save": ("timing_s/save_checkpoint",),
}
"""Stages of a step and the timers that they add up. Validation lies outside verl's ``timing_s/step``."""
STEP_SECONDS = "timing_s/step"


def stage_seconds(metrics: Metrics) -> dict[str, float]:
    """Return the measured seconds by stage."""
    measured = {stage: [metrics[name] for name in names if name in metrics] for stage, names in STAGES.items()}
    return {stage: sum(values) for stage, values in measured.items() if values}


def _seconds(metrics: Metrics) -> str:
    if STEP_SECONDS not in metrics:
        return ""
    seconds = stage_seconds(metrics)
    parts = [f"{stage} {seconds[stage]:.1f}" for stage in ("generate", "score", "update") if stage in seconds]
    return f"{metrics[STEP_SECONDS]:.1f} s" + (f" ({', '.join(parts)})" if parts else "")


REWARD = Shown(("critic/score/mean", "critic/rewards/mean"), "reward {:.3f}", "reward (training, mean)")
HELD_OUT = Shown(
    (r"val-core/.+/acc/mean@\d+", r"val-(core|aux)/.+/(acc|reward|score)/mean@\d+"),
    "held-out {:.1f} %",
    "accuracy on held-out questions, %",
    scale=100.0,
)
"""verl's core accuracy, else another mean score."""

SHOWN: dict[str, tuple[Shown, ...]] = {
    "critic/": (REWARD,),
    "val-": (HELD_OUT,),
    **{f"{name}/": shown_of(name) for name in method_names()},
    "response_length/": (Shown(("response_length/mean",), "length {:.0f}", "response length, tokens"),),
    "actor/": (Shown(("actor/grad_norm",), panel="gradient norm"),),
    "timing_s/": (Shown(line=_seconds),),
    "stability/": (Shown(line=lambda metrics: "  ".join(stability.describe(metrics))),),
}
"""The metrics that are shown, in order, by prefix."""


def step_line(step: int, metrics: Metrics, total: int | None = None) -> str:
    """Return a readable line about a step."""
    head = f"step {step:>{len(str(total or step))}}" + (f"/{total}" if total else "")
    return "  ".join([head, *filter(None, (shown.text(metrics) for group in SHOWN.values() for shown in group))])
