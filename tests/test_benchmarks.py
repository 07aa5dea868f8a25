"""Functions that the benchmarks share, and the numbers of the estimator study that can be checked by hand."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import bare_step, common, trl_step
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


def test_parts_of_a_step_by_hand():
    """A step of 10 s through verl; what no stage names is the rest."""
    step = {
        **{"timing_s/gen": 3.0, "timing_s/old_log_prob": 4.0, "timing_s/update_actor": 1.5, "timing_s/step": 10.0},
        **{"timing_s/gcpo_score": 2.0, "timing_s/gcpo_credit": 0.5, "response_length/mean": 5.0},
        **{"gcpo/tokens/generated/response": 640.0, "gcpo/tokens/generated/collider": 60.0},
    }
    parts = bare_step.verl_parts(step, 16)
    seconds = [parts[name] for name in bare_step.PARTS]
    assert seconds == [3.0, 1.5, 2.0, 0.5, 1.5, 1.5, 10.0] and parts["generated"] == 700
    bare = {**dict.fromkeys(bare_step.PARTS, 0.0), "generation": 0.5, "whole step": 2.0, "generated": 350}
    header, rows = bare_step.table({"balanced": {"verl": parts, "one file": bare}})
    assert header == ["seconds", "balanced, verl", "balanced, one file", "balanced, ratio"]
    assert rows[0] == ["generation", "3.00", "0.50", "6.0 ×"] and rows[2] == ["scoring", "2.00", "0.00", "–"]
    assert rows[-2:] == [["whole step", "10.00", "2.00", "5.0 ×"], ["generated", "700", "350", "2.0 ×"]]


def test_the_bare_steps_have_all_parts(tiny_model, run_inputs, tmp_path, monkeypatch):
    """The parts of a step are all of its time, and the extra pass is no part of it."""
    generate = bare_step.Trainer.generate
    whole = lambda *args, **options: [replace(y, is_cut=False) for y in generate(*args, **options)]  # noqa: E731
    monkeypatch.setattr(bare_step.Trainer, "generate", whole)  # the model is random and never ends a response
    for method in bare_step.METHODS:
        for step in bare_step.bare_steps(method, str(tiny_model), str(run_inputs), tmp_path, 2):
            named = {part: step[part] for part in bare_step.PARTS if part not in ("whole step", "old log-prob")}
            assert sum(named.values()) == pytest.approx(step["whole step"])
            assert step["old log-prob"] > 0 and 0 <= step["rest"] < 0.2 * step["whole step"]
            assert (step["scoring"] > 0.01) == (method == "balanced") and step["generated"] > 0


def test_trl_is_graded_as_our_runs():
    completions = [[{"role": "assistant", "content": text}] for text in (r"\boxed{4}", r"\boxed{5}", "4")]
    truths, sources = [{"ground_truth": "4"}] * 3, ["gcpo/sums"] * 3
    assert trl_step.reward(completions, truths, sources, prompts=None) == [1.0, 0.0, 0.0]


def test_without_trl_one_sentence(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["trl_step"])
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(SystemExit, match="benchmarks/trl_step.py has the command that installs trl"):
        trl_step.main()
