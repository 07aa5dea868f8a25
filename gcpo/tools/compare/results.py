"""The results of a comparison as data frames, and their statistics.

Accuracies are in long form: the columns ``task``, ``split`` (held-out, or out of distribution), ``arm``, ``seed`` and
``value``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from gcpo.tools.compare.metrics import curve
from gcpo.tools.compare.runs import ResultsError, Run
from gcpo.tools.evaluate.metrics import CONFIDENCE, Interval, interval
from gcpo.tools.metrics import read_metrics

KEY = ["task", "arm", "seed"]
SPLITS = {"held_out": "held-out", "ood": "out of distribution"}
Frame = Any
"""A DataFrame or Series; the type stubs of pandas give unions for most operations."""
_OF_A_RUN = [*SPLITS, "tokens", "seconds"]
_OF_A_STEP = [*SPLITS, "tokens", "seconds", "grad_norm", "upsilon_right", "upsilon_wrong"]


@dataclass
class Results:
    """What is there of a comparison.

    Attributes:
        runs: a row for every planned run: `KEY`, ``state`` (ok, failed or missing), ``held_out``, ``ood`` and
            ``tokens`` of its last step, ``seconds``, ``error`` and ``folder``.
        curves: a row for every step of every run that has ended, with the ``state`` of the run.
        records: of the runs that have ended.
    """

    runs: Frame
    curves: Frame
    records: list[dict[str, Any]]

    def final(self) -> Frame:
        """Accuracies of the last step of the runs that ended well, in long form."""
        ok = self.runs[self.runs["state"] == "ok"]
        long = ok.melt(KEY, list(SPLITS), var_name="split").dropna(subset="value")
        return long.replace({"split": SPLITS})

    def held_out_at(self, step: int) -> Frame:
        """Held-out accuracies of the evaluations after ``step`` of the runs that ended well: `KEY` and ``value``."""
        return self.ok_curves().query("step == @step").dropna(subset="held_out").rename(columns={"held_out": "value"})

    def ok_curves(self) -> Frame:
        """The curves of the runs that ended well."""
        return self.curves[self.curves["state"] == "ok"]


def load(runs: Sequence[Run]) -> Results:
    """Read what is there.

    Raises:
        ResultsError: no run has ended, or one was made with another configuration or version.
    """
    rows, curves, records = [], [], []
    for run in runs:
        key = {"task": run.task, "arm": run.arm, "seed": run.seed}
        record, row = run.record(), {**key, "state": "missing", "error": "", "folder": str(run.folder)}
        if record:
            records.append(record)
            steps = curve(read_metrics(run.folder))
            row |= {name: record[name] for name in ("state", "seconds", "error")} | record["final"]
            row |= {"tokens": steps[-1]["tokens"] if steps else np.nan}
            curves += [{**key, "state": record["state"], **step} for step in steps]
        rows.append(row)
    if not records:
        folder = runs[0].folder.parents[3]
        raise ResultsError(f"{folder} has no run that has ended; start the same command without --tables-only")
    steps: Frame = pd.DataFrame(curves, columns=None if curves else [*KEY, "state", "step"])
    return Results(_with(pd.DataFrame(rows), _OF_A_RUN), _with(steps, _OF_A_STEP), records)


def _with(frame: Frame, columns: Sequence[str]) -> Frame:
    """The frame, where columns that nothing has are NaN."""
    return frame.reindex(columns=list(dict.fromkeys([*frame, *columns])))


def mean_interval(values: Sequence[float] | Frame) -> Interval:
    """Mean and 95 % interval (Student's t); NaN without values, and the interval of a single value is NaN."""
    return interval(list(values)) if len(values) else Interval(np.nan, np.nan, np.nan)


def paired(values: Frame, baseline: str) -> Frame:
    """Accuracies minus those of the arm ``baseline`` with the same task, split and seed; in long form.

    Runs whose twin is missing are left out.
    """
    wide = values.pivot(index=["task", "split", "seed"], columns="arm", values="value")
    if baseline not in wide:
        return values.iloc[:0]
    differences = wide.sub(wide[baseline], axis=0).drop(columns=baseline)
    return differences.stack().dropna().rename("value").reset_index()


def budgets(results: Results) -> Frame:
    """By task: the tokens that the cheapest arm generates in a run, as a mean over seeds."""
    ok = results.runs[results.runs["state"] == "ok"]
    return ok.groupby(["task", "arm"])["tokens"].mean().groupby("task").min()


def at_budget(results: Results) -> Frame:
    """Accuracies after as many generated tokens as the cheapest arm of the task generates in a run, in long form.

    The evaluations of a run are points (tokens generated up to then, accuracy), step 0 included. Between two of them
    the accuracy is interpolated linearly. A run that has fewer tokens in all keeps its last accuracy, and ``ended`` is
    true for it. A run without a point before the budget is left out.
    """
    budget, rows = budgets(results), []
    for (task, arm, seed), own in results.ok_curves().groupby(KEY):
        for split, name in SPLITS.items():
            points = own.dropna(subset=[split, "tokens"])
            if len(points) and points["tokens"].iloc[0] <= budget[task]:
                value = np.interp(budget[task], points["tokens"], points[split])
                rows.append((task, name, arm, seed, value, points["tokens"].iloc[-1] < budget[task]))
    return pd.DataFrame(rows, columns=["task", "split", "arm", "seed", "value", "ended"])


def unpaired(first: Sequence[float], second: Sequence[float]) -> Interval:
    """The mean of ``first`` minus that of ``second``, with Welch's 95 % interval."""
    difference = float(np.mean(first) - np.mean(second))
    if min(len(first), len(second)) < 2:
        return Interval(difference, np.nan, np.nan)
    low, high = stats.ttest_ind(first, second, equal_var=False).confidence_interval(CONFIDENCE)
    return Interval(difference, float(low), float(high))
