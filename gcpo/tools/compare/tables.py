"""The tables of a comparison in markdown."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pandas as pd

from gcpo.tools.compare.results import KEY, SPLITS, Frame, Results, at_budget, budgets, mean_interval, paired, unpaired
from gcpo.tools.compare.settings import TRAINER_NAMES, Comparison, text_of
from gcpo.tools.evaluate.metrics import Interval, outside_noise

NOTHING = "–"
READING = "Mean ± half of the 95 % interval over seeds (Student's t); n is given where it is not the number of seeds."
PAIRED = (
    f"{READING} Differences are paired by seed. Bold: the interval leaves out 0; it is not corrected for the number of "
    "comparisons."
)


def markdown(table: Frame) -> str:
    """A table of texts with its index as the first column."""
    lines = [[table.index.name, *table.columns], ["---"] * (1 + table.shape[1]), *table.reset_index().to_numpy()]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def number(found: Interval, count: int = 0, *, scale: float = 100.0, digits: int = 1, signed: bool = False) -> str:
    """A mean with its interval; a signed one, of ``count`` values, is bold where the interval leaves out 0."""
    half = "?" if math.isnan(found.high) else f"{scale * (found.high - found.low) / 2:.{digits}f}"
    text = f"{scale * found.mean:{'+' if signed else ''}.{digits}f} ± {half}"
    return f"**{text}**" if signed and half != "?" and outside_noise(found, count) else text


class Tables:
    """The tables of ``results``; ``command`` is the one that made the runs."""

    def __init__(self, comparison: Comparison, results: Results, command: str) -> None:
        self.comparison, self.results = comparison, results
        self.arms, self.base, self.steps = list(comparison.arms()), comparison.baseline, comparison.steps
        self.command = command

    def text(self) -> str:
        """The whole document."""
        c = self.comparison
        size = f"{len(self.arms)} methods, {len(c.tasks)} tasks, {len(c.seeds)} seeds, {c.steps} steps."
        sections = [self.final(), self.budget(), self.cost(), self.upsilon(), self.varied(), self.failed()]
        return "\n\n".join([f"# {c.title}", f"{size} {self._provenance()}", *filter(None, sections)]) + "\n"

    def final(self) -> str:
        """Accuracies of the last step, and their differences to the baseline."""
        values, states = self.results.final(), self.results.runs.groupby("arm")["state"].apply(_counts)
        table = self._grid(values).assign(runs=states)
        differences = self._grid(paired(values, self.base), signed=True)
        first = self._section(f"Accuracy after {self.steps} steps, %", table, READING)
        second = self._section(f"Difference to {self.base} after {self.steps} steps, points", differences, PAIRED)
        return f"{first}\n\n{second}"

    def budget(self) -> str:
        """The same at equal generated tokens."""
        values = at_budget(self.results)
        if values.empty:
            return ""
        sizes = ", ".join(f"{task} {tokens:,.0f}" for task, tokens in budgets(self.results).items())
        ended = int(values[values["split"] == SPLITS["held_out"]]["ended"].sum())
        text = (
            "All generated tokens count, collider draws and regenerated responses included. The budget of a task is "
            f"the mean of its cheapest arm: {sizes}. Between the evaluations of a run the accuracy is interpolated "
            f"linearly. A run that ended with fewer tokens keeps its last accuracy ({ended} runs)."
        )
        differences = self._grid(paired(values, self.base), signed=True)
        at = "at equal generated tokens"
        first = self._section(f"Accuracy {at}, %", self._grid(values), f"{text} {READING}")
        return f"{first}\n\n{self._section(f'Difference to {self.base} {at}, points', differences, PAIRED)}"

    def cost(self) -> str:
        """Tokens and seconds of a step."""
        steps = self.results.ok_curves().query("step > 0")
        runs = steps.groupby(KEY).agg(tokens=("tokens", "max"), steps=("step", "max"), seconds=("seconds", "median"))
        runs["tokens"] /= runs["steps"]
        means = runs.groupby(["task", "arm"])[["tokens", "seconds"]].mean()
        table: Frame = pd.DataFrame(index=pd.Index(self.arms, name="method"))
        for task in self.comparison.tasks:
            for column, digits in (("tokens", 0), ("seconds", 2)):
                found = means[column].get(task, pd.Series(dtype=float)).reindex(self.arms)
                pairs = zip(found, found / found[self.base], strict=True)
                table[f"{task}, {column}"] = [
                    NOTHING if math.isnan(v) else f"{v:,.{digits}f} ({r:.2f} ×)" for v, r in pairs
                ]
        text = (
            f"Means over seeds; in brackets the ratio to {self.base}. Seconds: the median of the steps of a run. "
            "Runs that share a machine slow each other down."
        )
        return self._section("Generated tokens and seconds of a step", table, text)

    def upsilon(self) -> str:
        """Upsilon of the better and of the worse responses of a group."""
        means = self.results.ok_curves().groupby(KEY, sort=False)[["upsilon_right", "upsilon_wrong"]].mean().dropna()
        means["difference"] = means["upsilon_right"] - means["upsilon_wrong"]
        table = means.groupby(["task", "arm"], sort=False).agg(
            lambda own: number(mean_interval(own), len(own), scale=1, digits=3, signed=own.name == "difference")
        )
        table.columns = ["right", "wrong", "difference"]
        table.index = pd.Index([f"{arm}, {task}" for task, arm in table.index], name="method and task")
        text = (
            "Υ of the responses whose reward is above the mean of their group (right) and below it (wrong), the mean "
            "over the steps of a run. Groups with equal rewards are left out. Bold: the interval leaves out 0."
        )
        return "" if table.empty else self._section("Υ against correctness", table, text)

    def varied(self) -> str:
        """Figure 3 as a table."""
        arms = self.comparison.varied_arms()
        if not arms:
            return ""
        table = self._grid(self.results.final()).reindex([name for *_, name in arms])
        table.index = pd.Index([f"{setting}={text_of(value)}" for setting, value, _ in arms], name="setting")
        title = f"Settings of {self.comparison.varied}, one at a time: accuracy after {self.steps} steps, %"
        return self._section(title, table, READING)

    def failed(self) -> str:
        """The runs that failed."""
        runs = self.results.runs[self.results.runs["state"] == "failed"]
        lines = [
            f"* {r.task}, {r.arm}, seed {r.seed}: {'; '.join(r.error[-2:])} ({r.folder})" for r in runs.itertuples()
        ]
        return "\n\n".join(["## Failed runs", "\n".join(lines)]) if lines else ""

    # ---- parts -------------------------------------------------------------------------------------------------------

    def _grid(self, values: Frame, *, signed: bool = False) -> Frame:
        """A row for every arm, a column for every task and split that was measured."""
        seeds = len(self.comparison.seeds)

        def cell(own: Frame) -> str:
            return number(mean_interval(own), len(own), signed=signed) + (
                f" (n = {len(own)})" if len(own) < seeds else ""
            )

        cells = values.groupby(["arm", "task", "split"])["value"].agg(cell).unstack(["task", "split"])
        columns = [
            (task, split) for task in self.comparison.tasks for split in SPLITS.values() if (task, split) in cells
        ]
        arms = [arm for arm in self.arms if not (signed and arm == self.base)]
        table = cells.reindex(index=arms, columns=columns).fillna(NOTHING)
        return table.set_axis([f"{task}, {split}" for task, split in columns], axis=1).rename_axis("method")

    def _section(self, title: str, table: Frame, text: str) -> str:
        seeds = ", ".join(map(str, self.comparison.seeds))
        trainer, states = TRAINER_NAMES[self.comparison.trainer], _counts(self.results.runs["state"])
        return f"## {title}\n\n{markdown(table)}\n\n{text} Trainer: {trainer}. Seeds: {seeds}. Runs: {states}."

    def _provenance(self) -> str:
        """The command, and the commits, machines and versions of all runs."""
        parts = {
            name: Counter(_plain(record[name]) for record in self.results.records)
            for name in ("commit", "machine", "versions")
        }
        mixed = [name for name, counts in parts.items() if len(counts) > 1]
        texts = {
            name: "; ".join(f"{text} ({count} runs)" if name in mixed else text for text, count in counts.items())
            for name, counts in parts.items()
        }
        warning = f" **The runs differ in {' and '.join(mixed)}.**" if mixed else ""
        return (
            f"Command: `{self.command}`. Commit: {texts['commit']}. Machine: {texts['machine']}. "
            f"Versions: {texts['versions']}.{warning}"
        )


def _plain(value: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value) or "unknown"


def _counts(states: Frame) -> str:
    counts = Counter(states)
    return ", ".join(f"{counts[state]} {state}" for state in ("ok", "failed", "missing") if counts[state])


def agreement(comparisons: tuple[Comparison, Comparison], results: tuple[Results, Results]) -> str:
    """Held-out accuracies of two comparisons side by side, for tasks and arms of one name, after the steps of the
    shorter one.
    """
    step = min(comparison.steps for comparison in comparisons)
    first, second = (one.held_out_at(step).groupby(["task", "arm"])["value"] for one in results)
    rows: dict[str, list[str]] = {}
    for key, own in first:
        if key in second.groups:
            pair = own.to_list(), second.get_group(key).to_list()
            texts = [f"{number(mean_interval(values))} (n = {len(values)})" for values in pair]
            rows[f"{key[1]}, {key[0]}"] = [*texts, number(unpaired(*pair), min(map(len, pair)), signed=True)]
    if not rows:
        return f"The two comparisons have no task and method in common that both evaluate after {step} steps."
    names = [f"{TRAINER_NAMES[one.trainer]}, %" for one in comparisons]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=[*names, "difference, points"])
    text = (
        f"Held-out accuracy after {step} steps. Difference of the means with Welch's 95 % interval; bold: the interval "
        "leaves out 0."
    )
    return f"## Do the two agree?\n\n{markdown(table.rename_axis('method and task'))}\n\n{text}"
