"""What a run did, from its metrics file: curves as a PNG, accuracy before and after, and where the checkpoint is.

``python -m gcpo.tools.report DIR...`` reads ``DIR/metrics.jsonl`` (of verl's ``file`` logger, one line a step:
``{"step": k, "data": {...}}``) of one run or of several, which are then drawn over each other.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gcpo.checkpoints import read_tracker
from gcpo.files import why, write_atomically

METRICS_FILE = "metrics.jsonl"
EARLIER_METRICS_FILE = "metrics.earlier.jsonl"
"""Lines of earlier starts of the same run: verl's file logger empties its file whenever it starts."""

REWARD_KEYS = ("critic/score/mean", "critic/rewards/mean")
UPSILON = "gcpo/upsilon"
CAUSAL_KL = "gcpo/reference/kl_mean"
MISSING = {part: f"gcpo/missing/{part}_frac" for part in ("draws", "targets", "references")}
"""Metrics of the shares that are missing of the parts that a step asked for."""
LENGTH = "response_length/mean"
GRAD_NORM = "actor/grad_norm"

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

_HELD_OUT = re.compile(r"^val-core/.+/acc/mean@\d+$")
_HELD_OUT_ANY = re.compile(r"^val-(core|aux)/.+/(acc|reward|score)/mean@\d+$")


class ReportError(Exception):
    """A run that can't be reported; the message is one sentence for the user."""


@dataclass
class Run:
    """The metrics of one run, by step."""

    directory: Path
    steps: dict[int, dict[str, float]] = field(default_factory=dict)
    name: str = ""
    """How the run is called in legends and tables."""

    def series(self, *keys: str) -> tuple[list[int], list[float]]:
        """Steps and values of the first of ``keys`` that a step has."""
        return series(self.steps, *keys)


def parse_line(line: str) -> tuple[int, dict[str, float]] | None:
    """Step and numbers of one line of the metrics file; None for a line that is cut off or something else."""
    try:
        record = json.loads(line)
        step, data = int(record["step"]), record["data"]
        items = data.items()
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return step, {key: float(value) for key, value in items if _is_number(value)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def merge_lines(lines: Iterable[str], into: dict[int, dict[str, float]] | None = None) -> dict[int, dict[str, float]]:
    """Metrics by step. A step that comes twice, as after a resume, keeps the later value of every key."""
    steps = {} if into is None else into
    for line in lines:
        parsed = parse_line(line)
        if parsed:
            steps.setdefault(parsed[0], {}).update(parsed[1])
    return steps


def read_metrics(directory: Path) -> dict[int, dict[str, float]]:
    """All metrics of the run in ``directory``, earlier starts included, in order of the steps; empty if none."""
    steps: dict[int, dict[str, float]] = {}
    for name in (EARLIER_METRICS_FILE, METRICS_FILE):
        path = directory / name
        if path.is_file():
            merge_lines(path.read_text(encoding="utf-8", errors="replace").splitlines(), steps)
    return dict(sorted(steps.items()))


def load_run(directory: Path) -> Run:
    """The run in ``directory``; raises `ReportError` where there is nothing to report."""
    if not directory.is_dir():
        raise ReportError(f"there is no directory {directory}; give the --output of a run")
    steps = read_metrics(directory)
    if not steps:
        raise ReportError(f"{directory / METRICS_FILE} has no metrics yet; train first, with `file` in trainer.logger")
    return Run(directory, steps, directory.resolve().name)


def load_runs(directories: Sequence[Path]) -> list[Run]:
    """The runs in ``directories``, named by the shortest end of their paths that tells them apart."""
    runs = [load_run(directory) for directory in directories]
    parts = [run.directory.resolve().parts for run in runs]
    length = 1
    while length < max(map(len, parts)) and len({path[-length:] for path in parts}) < len(set(parts)):
        length += 1
    for run, path in zip(runs, parts, strict=True):
        run.name = "/".join(path[-length:])
    return runs


def series(steps: Mapping[int, Mapping[str, float]], *keys: str) -> tuple[list[int], list[float]]:
    """Steps and values of the first of ``keys`` that a step has."""
    xs, ys = [], []
    for step, metrics in steps.items():
        value = first(metrics, *keys)
        if value is not None:
            xs.append(step)
            ys.append(value)
    return xs, ys


def first(metrics: Mapping[str, float], *keys: str) -> float | None:
    """Value of the first of ``keys`` that is there."""
    return next((metrics[key] for key in keys if key in metrics), None)


def held_out_key(steps: Iterable[Mapping[str, float]]) -> str | None:
    """The metric that holds the accuracy on held-out questions: verl's core accuracy, else another mean score."""
    keys = {key: None for metrics in steps for key in metrics if key.startswith("val-")}
    for pattern in (_HELD_OUT, _HELD_OUT_ANY):
        found = next((key for key in keys if pattern.match(key)), None)
        if found:
            return found
    return None


def stage_seconds(metrics: Mapping[str, float]) -> dict[str, float]:
    """Seconds by stage, those that were measured."""
    seconds = {}
    for stage, timers in STAGES.items():
        values = [metrics[timer] for timer in timers if timer in metrics]
        if values:
            seconds[stage] = sum(values)
    return seconds


def missing_shares(metrics: Mapping[str, float]) -> dict[str, float]:
    """The missing shares of a step that are above 0, by part: draws, targets, references."""
    return {part: metrics[key] for part, key in MISSING.items() if metrics.get(key, 0.0) > 0}


def checkpoint_of(directory: Path) -> Path | None:
    """The newest checkpoint under ``directory/checkpoints``, None where there is none."""
    root = directory / "checkpoints"
    step, problem = read_tracker(root)
    return None if step is None or problem else root / f"global_step_{step}"


def plot(runs: Sequence[Run], path: Path) -> list[str]:
    """Draw the curves of ``runs`` into a PNG; returns the titles of the panels, those without data left out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [panel for panel in _panels(runs) if panel[1]]
    if not panels:
        raise ReportError(f"the metrics of {', '.join(str(run.directory) for run in runs)} hold nothing to draw")
    columns = len(panels) if len(panels) <= 3 else math.ceil(len(panels) / 2)
    rows = math.ceil(len(panels) / columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4.6 * columns, 3.1 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, curves) in zip(axes.flat, panels, strict=False):
        for curve in curves:
            marker = "o" if len(curve.x) <= 25 else None
            axis.plot(curve.x, curve.y, curve.style, color=curve.color, marker=marker, markersize=3, label=curve.label)
            if curve.low and curve.high:
                axis.fill_between(curve.x, curve.low, curve.high, color=curve.color, alpha=0.18, linewidth=0)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        if title in _FROM_ZERO:
            axis.set_ylim(bottom=0)
        if len(curves) > 1:
            axis.legend(fontsize=7)
    image = io.BytesIO()
    figure.savefig(image, dpi=130, format="png")
    pyplot.close(figure)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, image.getvalue())
    except OSError as error:
        raise ReportError(f"{path} can't be written: {why(error)}") from error
    return [title for title, _ in panels]


_FROM_ZERO = ("seconds per stage", "seconds per step")


@dataclass
class _Curve:
    x: list[int]
    y: list[float]
    color: str
    label: str
    style: str = "-"
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)


def _panels(runs: Sequence[Run]) -> list[tuple[str, list[_Curve]]]:
    colors = [f"C{index % 10}" for index in range(len(runs))]
    titles: list[tuple[str, list[_Curve]]] = []

    def simple(title: str, *keys: str, scale: float = 1.0) -> None:
        curves = []
        for run, color in zip(runs, colors, strict=True):
            x, y = run.series(*keys)
            if x:
                curves.append(_Curve(x, [scale * value for value in y], color, run.name))
        titles.append((title, curves))

    simple("reward (training, mean)", *REWARD_KEYS)
    key = held_out_key(metrics for run in runs for metrics in run.steps.values())
    simple("accuracy on held-out questions, %", *((key,) if key else ()), scale=100.0)
    titles.append(("Υ, causal weight (band: spread in a group)", _upsilon(runs, colors)))
    simple("κ-KL to the causal reference", CAUSAL_KL)
    simple("response length, tokens", LENGTH)
    simple("gradient norm", GRAD_NORM)
    titles.append(("seconds per stage" if len(runs) == 1 else "seconds per step", _stages(runs, colors)))
    return titles


def _upsilon(runs: Sequence[Run], colors: Sequence[str]) -> list[_Curve]:
    curves = []
    for run, color in zip(runs, colors, strict=True):
        steps = {step: metrics for step, metrics in run.steps.items() if f"{UPSILON}/mean" in metrics}
        if not steps:
            continue
        mean = [metrics[f"{UPSILON}/mean"] for metrics in steps.values()]
        curve = _Curve(list(steps), mean, color, run.name)
        if all(f"{UPSILON}/spread_in_group" in metrics for metrics in steps.values()):
            spread = [metrics[f"{UPSILON}/spread_in_group"] for metrics in steps.values()]
            curve.low = [value - width for value, width in zip(mean, spread, strict=True)]
            curve.high = [value + width for value, width in zip(mean, spread, strict=True)]
        curves.append(curve)
    return curves


def _stages(runs: Sequence[Run], colors: Sequence[str]) -> list[_Curve]:
    """One run: a curve per stage of a step. Several: the whole step of each, or the panel can't be read."""
    if len(runs) > 1:
        curves = [
            _Curve(*run.series("timing_s/step"), color, run.name) for run, color in zip(runs, colors, strict=True)
        ]
        return [curve for curve in curves if curve.x]
    curves = []
    for index, stage in enumerate(("generate", "score", "update", "sync")):
        seconds = {step: stage_seconds(metrics) for step, metrics in runs[0].steps.items()}
        points = {step: values[stage] for step, values in seconds.items() if stage in values}
        if points:
            curves.append(_Curve(list(points), list(points.values()), f"C{index}", stage))
    x, y = runs[0].series("timing_s/step")
    if x:
        curves.append(_Curve(x, y, "0.4", "whole step", "--"))
    return curves


def accuracy_change(run: Run) -> tuple[int, float, int, float] | None:
    """First and last step with a held-out accuracy, each with its value; None where none was measured."""
    key = held_out_key(run.steps.values())
    if key is None:
        return None
    x, y = run.series(key)
    return x[0], y[0], x[-1], y[-1]


def print_table(runs: Sequence[Run]) -> None:
    """Print accuracy before and after, and what a step took, for every run."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="before and after (held-out questions)")
    for column in ("run", "steps", "accuracy before", "after", "change", "reward first → last", "seconds a step"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for run in runs:
        change = accuracy_change(run)
        before, after, gain = ("–", "–", "–")
        if change:
            first_step, first_value, last_step, last_value = change
            before = f"{100 * first_value:.1f} % (step {first_step})"
            after = f"{100 * last_value:.1f} % (step {last_step})"
            gain = f"{100 * (last_value - first_value):+.1f} points"
        rewards = run.series(*REWARD_KEYS)[1]
        seconds = run.series("timing_s/step")[1]
        # The first step compiles and warms up; the median shows what the others take.
        median = sorted(seconds)[len(seconds) // 2] if seconds else None
        table.add_row(
            run.name,
            str(max(run.steps)),
            before,
            after,
            gain,
            f"{rewards[0]:.3f} → {rewards[-1]:.3f}" if rewards else "–",
            f"{median:.1f}" if median is not None else "–",
        )
    # Piped into a file the table would be squeezed into 80 columns.
    width = None if sys.stdout.isatty() else 140
    Console(width=width, highlight=False).print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: see the module's description."""
    parser = argparse.ArgumentParser(prog="python -m gcpo.tools.report", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="DIR", help="the --output of a run")
    parser.add_argument("--plot", type=Path, help="where the curves go (default: curves.png in the first DIR)")
    options = parser.parse_args(arguments)
    try:
        runs = load_runs(options.runs)
    except (ReportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    path, code = options.plot or options.runs[0] / "curves.png", 0
    print_table(runs)
    try:
        plot(runs, path)
        print(f"curves:     {path}")
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    for run in runs:
        checkpoint = checkpoint_of(run.directory)
        print(f"checkpoint: {checkpoint or f'none under {run.directory}/checkpoints'}")
    return code


if __name__ == "__main__":
    sys.exit(main())
