"""The statistics against numbers by hand and scipy's."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from gcpo.tools.compare.metrics import columns, curve, final_evaluation, generated_tokens
from gcpo.tools.compare.results import Results, at_budget, budgets, mean_interval, paired, unpaired
from gcpo.tools.compare.tables import number


def long(values: dict[str, list[float | None]]) -> pd.DataFrame:
    rows = [
        ("t", "held-out", arm, seed, value)
        for arm, own in values.items()
        for seed, value in enumerate(own)
        if value is not None
    ]
    return pd.DataFrame(rows, columns=["task", "split", "arm", "seed", "value"])


def results(curves: dict[tuple[str, int], list[tuple[int, float, float | None]]]) -> Results:
    """From (arm, seed) -> (step, tokens, held-out accuracy)."""
    key = {"task": "t", "ood": np.nan, "state": "ok"}
    steps = [
        {**key, "arm": arm, "seed": seed, "step": step, "tokens": tokens, "held_out": value}
        for (arm, seed), own in curves.items()
        for step, tokens, value in own
    ]
    frame = pd.DataFrame(steps).astype({"held_out": float})
    return Results(frame.groupby(["arm", "seed"]).last().reset_index(), frame, [])


def test_interval():
    # Of 1, 2, 3: the standard deviation is 1, t(0.975, 2) = 4.302653, so the half-width is 4.302653 / sqrt(3).
    found = mean_interval([1.0, 2.0, 3.0])
    assert found.mean == 2 and found.high - found.mean == pytest.approx(2.484138, abs=1e-6)
    expected = stats.ttest_1samp([1.0, 2.0, 3.0], 0).confidence_interval()
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert number(found, scale=1) == "2.0 ± 2.5"


def test_too_few_values_for_an_interval():
    assert number(mean_interval([0.5])) == "50.0 ± ?"
    assert math.isnan(mean_interval([]).mean)


def test_paired_differences():
    values = long({"base": [0.1, 0.5, 0.9, 0.2], "arm": [0.2, 0.7, 1.0, None], "other": [None, None, None, 0.5]})
    found = paired(values, "base")
    assert found[found["arm"] == "arm"]["value"].to_list() == pytest.approx([0.1, 0.2, 0.1])
    assert found[found["arm"] == "other"][["seed", "value"]].to_numpy().tolist() == [[3, pytest.approx(0.3)]]
    assert "base" not in set(found["arm"])
    expected = stats.ttest_rel([0.2, 0.7, 1.0], [0.1, 0.5, 0.9]).confidence_interval()
    interval = mean_interval(found[found["arm"] == "arm"]["value"])
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))
    assert paired(values[values["arm"] != "base"], "base").empty


def test_bold_is_outside_the_noise():
    assert number(mean_interval([0.01, 0.02, 0.03]), 3, signed=True) == "+2.0 ± 2.5"
    assert number(mean_interval([0.02, 0.021, 0.022]), 3, signed=True) == "**+2.1 ± 0.2**"
    assert number(mean_interval([0.02, 0.02]), 2, signed=True) == "+2.0 ± 0.0"


def test_equal_tokens():
    """Cheap uses 100 and 140 tokens, so the budget is 120; dear passes it between two evaluations."""
    found = results(
        {
            ("cheap", 0): [(0, 0, 0.2), (1, 50, None), (2, 100, 0.4)],
            ("cheap", 1): [(0, 0, 0.2), (2, 140, 0.9)],
            ("dear", 0): [(0, 0, 0.2), (1, 80, 0.3), (2, 160, 0.7), (3, 300, 1.0)],
        }
    )
    assert budgets(found).to_dict() == {"t": 120}
    values = at_budget(found).set_index(["arm", "seed"])
    assert values.loc[("dear", 0), "value"] == pytest.approx(0.3 + 0.4 * 40 / 80)
    assert values.loc[("cheap", 1), "value"] == pytest.approx(0.2 + 0.7 * 120 / 140)
    assert values.loc[("cheap", 0), "value"] == pytest.approx(0.4)
    assert values["ended"].to_dict() == {("cheap", 0): True, ("cheap", 1): False, ("dear", 0): False}


def test_no_point_before_the_budget():
    """Without an evaluation at step 0 a run may have none; nothing is made up then."""
    found = results({("cheap", 0): [(0, 0, 0.2), (2, 100, 0.4)], ("dear", 0): [(1, 150, 0.3), (2, 300, 0.7)]})
    assert at_budget(found)["arm"].to_list() == ["cheap"]


def test_failed_runs_are_not_averaged():
    found = results({("a", 0): [(0, 0, 0.2), (2, 100, 0.4)], ("a", 1): [(0, 0, 0.2), (1, 10, 0.1)]})
    for frame in (found.runs, found.curves):
        frame.loc[frame["seed"] == 1, "state"] = "failed"
    assert found.final()["value"].to_list() == [0.4]
    assert budgets(found)["t"] == 100 and at_budget(found)["seed"].to_list() == [0]


def test_unpaired_differences():
    first, second = [0.5, 0.6, 0.7], [0.4, 0.45]
    found = unpaired(first, second)
    expected = stats.ttest_ind(first, second, equal_var=False).confidence_interval()
    assert found.mean == pytest.approx(0.175)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert math.isnan(unpaired([0.5], second).low)


def test_columns():
    metrics = {
        "val-core/gcpo/complement/acc/mean@1": 0.5,
        "val-core/gcpo/complement_ood/acc/mean@1": 0.25,
        "val-aux/gcpo/complement/acc/best@1/mean": 0.9,
        "actor/grad_norm": 2.0,
        "gcpo/upsilon/mean_above": 1.5,
    }
    assert columns(metrics) == {"held_out": 0.5, "ood": 0.25, "grad_norm": 2.0, "upsilon_right": 1.5}
    assert columns({"val-ood/acc/mean@1": 0.1}) == {"ood": 0.1}


def test_generated_tokens():
    assert generated_tokens({"tokens/generated": 7.0, "gcpo/tokens/generated/response": 3.0}) == 7
    assert generated_tokens({"gcpo/tokens/generated/response": 3.0, "gcpo/tokens/generated/collider": 2.0}) == 5
    # 4 rows of 10 prompt tokens and 5 response tokens.
    lengths = {"perf/total_num_tokens": 60.0, "prompt_length/mean": 10.0, "response_length/mean": 5.0}
    assert generated_tokens(lengths) == 20
    assert math.isnan(generated_tokens({}))


def test_curve_and_final_evaluation():
    held_out = "val-core/gcpo/arithmetic/acc/mean@1"
    steps = {0: {held_out: 0.1}, 1: {"tokens/generated": 5.0}, 2: {"tokens/generated": 6.0, held_out: 0.3}}
    assert [(row["step"], row["tokens"]) for row in curve(steps)] == [(0, 0), (1, 5), (2, 11)]
    assert final_evaluation(steps) == {"held_out": 0.3}
    assert final_evaluation({**steps, 3: {}}) == {} and final_evaluation({}) == {}
