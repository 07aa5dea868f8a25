"""The figures of a comparison as PNG."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from gcpo.files import write_atomically
from gcpo.tools.compare.results import Results, mean_interval
from gcpo.tools.compare.settings import TRAINER_NAMES, Comparison, text_of
from gcpo.tools.evaluate.metrics import CONFIDENCE

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31", "#999999")
"""Those of Okabe and Ito, which the colour-blind can tell apart, and two more."""


class Panel(NamedTuple):
    """Curves over training.

    Attributes:
        metrics: column of the curves -> line style, and the text after the name of the arm.
        label: of the y axis.
        x: ``step`` or ``tokens``.
        scale: of the values.
        limits: of the possible values, which an interval may exceed.
    """

    metrics: Mapping[str, tuple[str, str]]
    label: str
    x: str = "step"
    scale: float = 1.0
    limits: tuple[float, float] = (-math.inf, math.inf)


LABELS = {"step": "step", "tokens": "generated tokens (mean over seeds)"}
ACCURACY = Panel({"held_out": ("-", "")}, "held-out accuracy, %", scale=100.0, limits=(0.0, 100.0))
CURVES = {
    "learning": [ACCURACY, ACCURACY._replace(x="tokens")],
    "gradient_norm": [Panel({"grad_norm": ("-", "")}, "gradient norm", limits=(0.0, math.inf))],
    "upsilon": [Panel({"upsilon_right": ("-", ", right"), "upsilon_wrong": ("--", ", wrong")}, "Υ")],
}


def save_figures(comparison: Comparison, results: Results, folder: Path) -> list[Path]:
    """Write the figures that have data; returns their paths."""
    measured = results.ok_curves().dropna(axis=1, how="all")
    figures = {
        name: curves(comparison, results, panels)
        for name, panels in CURVES.items()
        if any(metric in measured for panel in panels for metric in panel.metrics)
    }
    if comparison.vary and not results.final().empty:
        figures["sensitivity"] = sensitivity(comparison, results)
    for name, figure in figures.items():
        image = io.BytesIO()
        figure.savefig(image, dpi=140, format="png")
        write_atomically(folder / f"{name}.png", image.getvalue())
    return [folder / f"{name}.png" for name in figures]


def curves(comparison: Comparison, results: Results, panels: Sequence[Panel]) -> Figure:
    """A row for every panel, a column for every task; the arms of ``vary`` are left out."""
    tasks, data = comparison.tasks, results.ok_curves()
    figure = Figure(figsize=(1.6 + 3.4 * len(tasks), 3.3 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), len(tasks), squeeze=False)
    for panel, row in zip(panels, axes, strict=True):
        for task, axis in zip(tasks, row, strict=True):
            axis.set(title=task, xlabel=LABELS[panel.x], ylabel=panel.label if axis is row[0] else None)
            for i, arm in enumerate(comparison.methods):
                own = data[(data["task"] == task) & (data["arm"] == arm)]
                for metric, (style, suffix) in panel.metrics.items():
                    steps = own.dropna(subset=[metric]).groupby("step")
                    mean, half = panel.scale * steps[metric].mean(), panel.scale * steps[metric].sem()
                    half *= stats.t.ppf((1 + CONFIDENCE) / 2, np.maximum(steps.size() - 1, 1))
                    x = mean.index if panel.x == "step" else steps[panel.x].mean()
                    if len(mean):
                        color = COLORS[i % len(COLORS)]
                        axis.plot(x, mean, style, color=color, lw=1.6, label=arm + suffix)
                        band = np.clip([mean - half, mean + half], *panel.limits)
                        axis.fill_between(x, *band, color=color, alpha=0.15, linewidth=0)
    return _finish(figure, axes, comparison)


def sensitivity(comparison: Comparison, results: Results) -> Figure:
    """Figure 3: final accuracy over the values of each setting that is varied; dotted: the baseline."""
    final = results.final().query("split == 'held-out'")
    figure = Figure(figsize=(1.6 + 3.4 * len(comparison.vary), 3.6), layout="constrained")
    axes = figure.subplots(1, len(comparison.vary), squeeze=False, sharey=True)
    for axis, setting in zip(axes[0], comparison.vary, strict=True):
        chosen = [(text_of(value), name) for one, value, name in comparison.varied_arms() if one == setting]
        for i, task in enumerate(comparison.tasks):
            values = final[final["task"] == task].groupby("arm")["value"].apply(mean_interval)
            found = [values.get(name, mean_interval([])) for _, name in chosen]
            means, halves = [100 * one.mean for one in found], [50 * (one.high - one.low) for one in found]
            color = COLORS[i % len(COLORS)]
            axis.errorbar(range(len(chosen)), means, halves, marker="o", capsize=3, color=color, label=task)
            if comparison.baseline in values:
                label = f"{task}, {comparison.baseline}"
                axis.axhline(100 * values[comparison.baseline].mean, color=color, ls=":", lw=1.2, label=label)
        axis.set_xticks(range(len(chosen)), [text for text, _ in chosen])
        axis.set(xlabel=setting, ylabel="held-out accuracy, %" if axis is axes[0][0] else None)
    return _finish(figure, axes, comparison)


def _finish(figure: Figure, axes: Any, comparison: Comparison) -> Figure:
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        if axis.get_xlabel() == LABELS["tokens"]:
            axis.xaxis.set_major_formatter("{x:,.0f}")
            axis.tick_params(axis="x", rotation=30)
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    # In points: a letter takes about 5, and a line with its margins 40.
    columns = max(1, int(72 * figure.get_figwidth() / (40 + 5 * max(map(len, handles), default=0))))
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=columns, fontsize=9, frameon=False
    )
    trainer, seeds = TRAINER_NAMES[comparison.trainer], len(comparison.seeds)
    figure.suptitle(f"{comparison.title}\n{trainer}, {seeds} seeds, 95 % intervals over seeds", fontsize=9)
    return figure
