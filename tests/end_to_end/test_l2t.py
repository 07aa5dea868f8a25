"""L2T on the real stack, in one start-up: two steps with probes after every episode."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.end_to_end.test_training import train

pytestmark = pytest.mark.slow


def test_two_steps(inputs: Path, tmp_path: Path) -> None:
    """Both steps score probes and train on token advantages; nothing in the metrics is NaN."""
    steps, log = train(
        "recipe.gcpo.main_gcpo",
        inputs,
        tmp_path,
        "l2t",
        "--config-name=gcpo_quickstart",
        "method=l2t",
        "trainer.total_training_steps=2",
        "trainer.save_freq=-1",
        "trainer.rollout_data_dir=null",
    )
    assert [step["step"] for step in steps] == [1, 2] and "EpisodePromptDataset" in log
    for step in steps:
        ours = {name: value for name, value in step.items() if name.startswith("l2t/")}
        assert all(math.isfinite(value) for value in ours.values())
        assert ours["l2t/missing_frac"] == 0 and ours["l2t/reward/errors"] == 0
        assert 0 < ours["l2t/probability/last"] < 1 and ours["l2t/episodes/mean"] > 1
        assert 0 < ours["l2t/tokens/scored"] < ours["l2t/tokens/scored_unshared"]
        assert step["actor/grad_norm"] > 0 and step["timing_s/l2t_score"] > 0
