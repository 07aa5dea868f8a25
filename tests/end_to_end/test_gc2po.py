"""GC2PO on the real stack, in one start-up: two steps in the faithful form."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.end_to_end.test_training import train

pytestmark = pytest.mark.slow


def test_two_steps(inputs: Path, tmp_path: Path) -> None:
    """Both steps score perturbed states and train on token advantages; nothing in the metrics is NaN."""
    steps, log = train(
        "recipe.gcpo.main_gcpo",
        inputs,
        tmp_path,
        "gc2po",
        "--config-name=gcpo_quickstart",
        "method=gc2po",
        "gc2po.intervention=hidden_state",
        "gc2po.perturbation.draws=3",
        "gc2po.episodes.max_perturbed=2",
        "trainer.total_training_steps=2",
        "trainer.save_freq=-1",
        "trainer.rollout_data_dir=null",
    )
    assert [step["step"] for step in steps] == [1, 2] and "EpisodePromptDataset" in log
    for step in steps:
        ours = {name: value for name, value in step.items() if name.startswith("gc2po/")}
        assert all(math.isfinite(value) for value in ours.values())
        assert ours["gc2po/fallback/groups_frac"] < 1 and ours["gc2po/reward/errors"] == 0
        assert 0 < ours["gc2po/robustness/mean"] <= 1 and 0 <= ours["gc2po/effectiveness/mean"] <= 1
        assert ours["gc2po/tokens/branches"] > 0
        assert ours["gc2po/tokens/scored"] < ours["gc2po/tokens/unshared"]
        assert ours["gc2po/advantage/spread_in_response"] > 0
        assert step["actor/grad_norm"] > 0 and step["timing_s/gc2po_score"] > 0
