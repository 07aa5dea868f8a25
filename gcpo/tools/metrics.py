"""The metrics of a run: how its file is read, and which metrics the line of a step and the curves show.

verl's ``file`` logger writes ``metrics.jsonl``, one line a step: ``{"step": k, "data": {...}}``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gcpo import stability

METRICS_FILE = "metrics.jsonl"
EARLIER_METRICS_FILE = "metrics.earlier.jsonl"
"""Lines of earlier starts of the same run: verl's file logger empties its file whenever it starts."""

Metrics = Mapping[str, float]
"""The metrics of one step by name."""

# ---- reading ---------------------------------------------------------------------------------------------------------


def parse_line(line: str) -> tuple[int, dict[str, float]] | None:
    """Step and finite numbers of one line of the metrics file; None for a line that is cut off or something else."""
    try:
        record = json.loads(line)
        step, items = int(record["step"]), record["data"].items()
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return step, {key: float(value) for key, value in items if _is_number(value)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def merge_lines(lines: Iterable[str]) -> dict[int, dict[str, float]]:
    """Metrics by step. A step that comes twice, as after a resume, keeps the later value of every key."""
    steps: dict[int, dict[str, float]] = {}
    for step, metrics in filter(None, map(parse_line, lines)):
        steps.setdefault(step, {}).update(metrics)
    return steps


def read_metrics(directory: Path) -> dict[int, dict[str, float]]:
    """All metrics of the run in ``directory``, earlier starts included, in order of the steps; empty if none."""
    paths = [directory / name for name in (EARLIER_METRICS_FILE, METRICS_FILE)]
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in paths if path.is_file()]
    return dict(sorted(merge_lines(line for text in texts for line in text.splitlines()).items()))


# ---- what is shown ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """How a metric is shown.

    Attributes:
        names: patterns of the metric's name; the first that matches a name counts.
        line: format of its value in the line of a step, or a function of the step's metrics; empty: not in the line.
        panel: title of its curve in the plot; empty: no curve.
        scale: factor of the value in both.
        spread: a metric that is shown as ± behind the value, and as a band around the curve.
    """

    names: tuple[str, ...] = ()
    line: str | Callable[[Metrics], str] = ""
    panel: str = ""
    scale: float = 1.0
    spread: str | None = None

    def name_in(self, names: Iterable[str]) -> str | None:
        """The metric among ``names``, None where it is not there."""
        names = list(names)
        return next((name for pattern in self.names for name in names if re.fullmatch(pattern, name)), None)

    def text(self, metrics: Metrics) -> str:
        """Its part of the line of a step; empty where the step lacks it."""
        if not isinstance(self.line, str):
            return self.line(metrics)
        name = self.name_in(metrics) if self.line else None
        if name is None:
            return ""
        width = f"±{self.scale * metrics[self.spread]:.3f}" if self.spread and self.spread in metrics else ""
        return self.line.format(self.scale * metrics[name]) + width


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
    """Seconds by stage, those that were measured."""
    measured = {stage: [metrics[name] for name in names if name in metrics] for stage, names in STAGES.items()}
    return {stage: sum(values) for stage, values in measured.items() if values}


def _seconds(metrics: Metrics) -> str:
    if STEP_SECONDS not in metrics:
        return ""
    seconds = stage_seconds(metrics)
    parts = [f"{stage} {seconds[stage]:.1f}" for stage in ("generate", "score", "update") if stage in seconds]
    return f"{metrics[STEP_SECONDS]:.1f} s" + (f" ({', '.join(parts)})" if parts else "")


def _missing(metrics: Metrics) -> str:
    """The parts that a step asked for and that are missing, as fractions above 0."""
    found = {part: metrics.get(f"gcpo/missing/{part}_frac", 0.0) for part in ("draws", "targets", "references")}
    parts = [f"{100 * one:.{0 if one >= 0.1 else 1}f} % of {part}" for part, one in found.items() if one > 0]
    return f"missing {', '.join(parts)}" if parts else ""


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
    "gcpo/": (
        Shown(
            ("gcpo/upsilon/mean",),
            "Υ {:.3f}",
            "Υ, causal weight (band: spread in a group)",
            spread="gcpo/upsilon/spread_in_group",
        ),
        Shown(("gcpo/reference/kl_mean",), "κ-KL {:.4f}", "κ-KL to the causal reference"),
        Shown(line=_missing),
    ),
    "response_length/": (Shown(("response_length/mean",), "length {:.0f}", "response length, tokens"),),
    "actor/": (Shown(("actor/grad_norm",), panel="gradient norm"),),
    "timing_s/": (Shown(line=_seconds),),
    "stability/": (Shown(line=lambda metrics: "  ".join(stability.describe(metrics))),),
}
"""What is shown, in this order, by the prefix of the metrics; a method adds its own prefix."""


def step_line(step: int, metrics: Metrics, total: int | None = None) -> str:
    """One readable line about a step."""
    head = f"step {step:>{len(str(total or step))}}" + (f"/{total}" if total else "")
    return "  ".join([head, *filter(None, (shown.text(metrics) for group in SHOWN.values() for shown in group))])
