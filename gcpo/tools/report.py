"""Report of a run: accuracy before and after, curves, the last checkpoint, and a page with the groups.

``gcpo report DIR...`` reads ``DIR/metrics.jsonl`` and the rollout dump of one or several runs; the curves of several
are drawn over each other.
"""

from __future__ import annotations

import argparse
import io
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gcpo.checkpoints import read_tracker
from gcpo.files import why, write_atomically
from gcpo.tools.groups.page import write_page
from gcpo.tools.metrics import (
    HELD_OUT,
    METRICS_FILE,
    REWARD,
    SHOWN,
    STEP_SECONDS,
    Shown,
    merge_lines,
    read_metrics,
    stage_seconds,
)

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Run", "ReportError", "load_runs", "main", "merge_lines", "plot", "print_table", "short_names"]


class ReportError(Exception):
    """A run that cannot be reported; the message is one sentence for the user."""


@dataclass
class Run:
    """The metrics of one run.

    Attributes:
        directory: its output folder.
        steps: metrics by step.
        name: name of the run in legends and tables.
    """

    directory: Path
    steps: dict[int, dict[str, float]]
    name: str = ""

    @property
    def names(self) -> list[str]:
        """The names of all metrics."""
        return list(dict.fromkeys(name for metrics in self.steps.values() for name in metrics))

    def series(self, name: str | None) -> pd.Series:
        """Return the values of a metric by step, empty if no step has it."""
        import pandas as pd

        found = {step: metrics[name] for step, metrics in self.steps.items() if name is not None and name in metrics}
        return pd.Series(found, dtype=float)


def load_run(directory: Path) -> Run:
    """Return the run in ``directory``; raise `ReportError` if there is nothing to report."""
    if not directory.is_dir():
        raise ReportError(f"there is no directory {directory}; give the --output of a run")
    steps = read_metrics(directory)
    if not steps:
        raise ReportError(f"{directory / METRICS_FILE} has no metrics yet; train first, with `file` in trainer.logger")
    return Run(directory, steps, directory.resolve().name)


def load_runs(directories: Sequence[Path]) -> list[Run]:
    """Return the runs in ``directories``, each with a name from `short_names`."""
    runs = [load_run(directory) for directory in directories]
    for run, name in zip(runs, short_names(directories), strict=True):
        run.name = name
    return runs


def short_names(directories: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that are different."""
    parts = [directory.resolve().parts for directory in directories]
    length = 1
    while length < max(map(len, parts)) and len({path[-length:] for path in parts}) < len(set(parts)):
        length += 1
    return ["/".join(path[-length:]) for path in parts]


def checkpoint_of(directory: Path) -> Path | None:
    """Return the newest checkpoint under ``directory/checkpoints``, or None."""
    root = directory / "checkpoints"
    step, problem = read_tracker(root)
    return None if step is None or problem else root / f"global_step_{step}"


# ---- curves ----------------------------------------------------------------------------------------------------------


class _Curve(NamedTuple):
    label: str
    values: pd.Series
    band: pd.Series | None = None
    style: str = "-"


def plot(runs: Sequence[Run], path: Path) -> list[str]:
    """Draw the curves of ``runs`` into a PNG; return the titles of the panels that have data."""
    titles, image = draw_curves(runs, "png")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, image)
    except OSError as error:
        raise ReportError(f"{path} can't be written: {why(error)}") from error
    return titles


def draw_curves(runs: Sequence[Run], form: str) -> tuple[list[str], bytes]:
    """Return the titles of the panels that have data, and the image as ``png`` or ``svg``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {title: curves for title, curves in _panels(runs).items() if curves}
    if not panels:
        raise ReportError(f"the metrics of {', '.join(str(run.directory) for run in runs)} hold nothing to draw")
    columns = len(panels) if len(panels) <= 3 else math.ceil(len(panels) / 2)
    rows = math.ceil(len(panels) / columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4.6 * columns, 3.1 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, curves) in zip(axes.flat, panels.items(), strict=False):
        _draw(axis, title, curves)
    image = io.BytesIO()
    figure.savefig(image, dpi=130, format=form)
    pyplot.close(figure)
    return list(panels), image.getvalue()


def _panels(runs: Sequence[Run]) -> dict[str, list[_Curve]]:
    shown = [one for group in SHOWN.values() for one in group if one.panel]
    panels = {one.panel: _curves(runs, one) for one in shown}
    if len(runs) > 1:  # only whole steps, to keep the panel readable
        return {**panels, "seconds per step": _curves(runs, Shown((STEP_SECONDS,)))}
    (run,) = runs
    stages = Run(run.directory, {step: stage_seconds(metrics) for step, metrics in run.steps.items()})
    curves = [_Curve(stage, stages.series(stage)) for stage in ("generate", "score", "update", "sync")]
    curves.append(_Curve("whole step", run.series(STEP_SECONDS), style="k--"))
    return {**panels, "seconds per stage": [curve for curve in curves if len(curve.values)]}


def _curves(runs: Sequence[Run], shown: Shown) -> list[_Curve]:
    """Return the first listed metric that the runs have as curves, the same metric for all."""
    name = shown.name_in(name for run in runs for name in run.names)
    curves = []
    for run in runs:
        values = run.series(name)
        if len(values):
            band = run.series(shown.spread).reindex(values.index) if shown.spread else None
            curves.append(_Curve(run.name, shown.scale * values, band))
    return curves


def _draw(axis: Any, title: str, curves: Sequence[_Curve]) -> None:
    for label, values, band, style in curves:
        marker = "o" if len(values) <= 25 else None
        (line,) = axis.plot(values.index, values, style, marker=marker, markersize=3, label=label)
        if band is not None:
            axis.fill_between(
                values.index, values - band, values + band, color=line.get_color(), alpha=0.18, linewidth=0
            )
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("step", fontsize=8)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)
    if title.startswith("seconds"):
        axis.set_ylim(bottom=0)
    if len(curves) > 1:
        axis.legend(fontsize=7)


# ---- table -----------------------------------------------------------------------------------------------------------


HEADINGS: Sequence[str] = (
    "run",
    "steps",
    "accuracy before",
    "after",
    "change",
    "reward first → last",
    "seconds a step",
)


def _table_row(run: Run) -> list[str]:
    accuracy = 100 * run.series(HELD_OUT.name_in(run.names))
    rewards = run.series(REWARD.name_in(run.names))
    seconds = run.series(STEP_SECONDS)
    before = after = change = "–"
    if len(accuracy):
        before, after = (f"{accuracy.iloc[i]:.1f} % (step {accuracy.index[i]})" for i in (0, -1))
        change = f"{accuracy.iloc[-1] - accuracy.iloc[0]:+.1f} points"
    return [
        run.name,
        str(max(run.steps)),
        before,
        after,
        change,
        f"{rewards.iloc[0]:.3f} → {rewards.iloc[-1]:.3f}" if len(rewards) else "–",
        # The first step compiles and warms up, so the median shows the usual time.
        f"{seconds.median():.1f}" if len(seconds) else "–",
    ]


def print_table(runs: Sequence[Run]) -> None:
    """Print the accuracy before and after and the seconds per step for every run."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="before and after (held-out questions)")
    for column in HEADINGS:
        table.add_column(column, justify="left" if column == "run" else "right")
    for run in runs:
        table.add_row(*_table_row(run))
    # In a pipe the table would be limited to 80 columns.
    width = None if sys.stdout.isatty() else 140
    Console(width=width, highlight=False).print(table)


def write_report(runs: Sequence[Run], path: Path) -> str:
    """Write the page of ``runs``; return a sentence about its groups.

    Raises:
        ReportError: it cannot be written.
    """
    table = [dict(zip(HEADINGS, _table_row(run), strict=True)) for run in runs]
    try:
        curves = draw_curves(runs, "svg")[1]
    except ReportError:
        curves = None
    try:
        return write_page(path, {run.name: run.directory for run in runs}, table, curves)
    except OSError as error:
        raise ReportError(f"{path} can't be written: {why(error)}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments, print the report, and write the curves and the page; see the module's description."""
    parser = argparse.ArgumentParser(prog="gcpo report", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the --output of a run")
    parser.add_argument("--plot", type=Path, help="where the curves go (default: curves.png in the first RUN)")
    parser.add_argument("--page", type=Path, help="where the page goes (default: report.html in the first RUN)")
    options = parser.parse_args(arguments)
    try:
        runs = load_runs(options.runs)
    except (ReportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    path, page = options.plot or options.runs[0] / "curves.png", options.page or options.runs[0] / "report.html"
    code = 0
    print_table(runs)
    for write in (
        lambda: plot(runs, path) and f"curves:     {path}",
        lambda: f"page:       {page} ({write_report(runs, page)})",
    ):
        try:
            print(write())
        except ReportError as error:
            print(f"error: {error}", file=sys.stderr)
            code = 2
    for run in runs:
        checkpoint = checkpoint_of(run.directory)
        print(f"checkpoint: {checkpoint or f'none under {run.directory}/checkpoints'}")
    return code


if __name__ == "__main__":
    sys.exit(main())
