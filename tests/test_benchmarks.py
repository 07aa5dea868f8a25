"""Functions that the benchmarks share, and the numbers of the estimator study that can be checked by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch

from benchmarks import common
from benchmarks.estimators import TABLES, cell
from benchmarks.kappa_gradients import cosine, fraction_variance, largest_part
from benchmarks.sampled_groups import N


def test_an_interval_by_hand():
    """1, 2, 3: mean 2, standard error 1/sqrt(3), and Student's t of 2 degrees of freedom at .975 is 4.3027."""
    mean, half = common.interval([1.0, 2.0, 3.0, math.nan])
    assert mean == 2 and half == pytest.approx(4.302653 / math.sqrt(3))
    assert common.interval([5.0])[0] == 5 and math.isnan(common.interval([5.0])[1])


def test_tables(capsys):
    common.print_table(["a", "b"], [1, "x"])
    assert capsys.readouterr().out == "| a | b |\n| --- | --- |\n| 1 | x |\n\n"
    upsilon = TABLES[0]
    assert cell(upsilon["split half"], {"split half": None}) == "–"
    assert cell(upsilon["split half"], {"split half": [0.125, 0.5]}) == "0.12 ± 0.50"
    assert cell(TABLES[2]["cosine to paper"], {"cosine to paper": [1, 0.5, 2]}) == "1.00 (0.50 to 2.00)"
    with pytest.raises(KeyError):
        cell(upsilon["spread"], {})


def test_results_are_saved_with_their_record(tmp_path):
    common.save(tmp_path / "new" / "x.json", {"a": 1})
    saved = json.loads((tmp_path / "new" / "x.json").read_text())
    assert saved["a"] == 1 and saved["versions"]["verl"] and saved["command"].startswith("python -m benchmarks.")


def test_gradients_of_groups_by_hand():
    """Two groups whose responses all have the gradients (3, 0) and (0, 1)."""
    one, other = torch.tensor([3.0, 0.0]).expand(N, 2), torch.tensor([0.0, 1.0]).expand(N, 2)
    gradients = torch.cat([one, other])
    assert largest_part(gradients) == pytest.approx(0.9)
    assert fraction_variance(gradients, 0.25, seed=0) == {
        "fraction": 0.25,
        "cosine": pytest.approx(1),
        "relative variance": pytest.approx(0),
    }
    value, low, high = cosine(gradients, torch.cat([one, -other]), seed=0)
    assert value == pytest.approx(0.8) and low == pytest.approx(-1) and high == pytest.approx(1)
