"""GVPO on the real stack, in one start-up: two steps of four mini-batches."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.end_to_end.test_training import train

pytestmark = pytest.mark.slow


def test_two_steps(inputs: Path, tmp_path: Path) -> None:
    """Every step measures the log-ratios after its first mini-batch, and starts from the old policy."""
    steps, _ = train(
        "recipe.gcpo.main_gcpo",
        inputs,
        tmp_path,
        "gvpo",
        "--config-name=gcpo_quickstart",
        "method=gvpo",
        "trainer.total_training_steps=2",
        "trainer.save_freq=-1",
        "trainer.rollout_data_dir=null",
    )
    assert [step["step"] for step in steps] == [1, 2]
    for step in steps:
        ours = {name: value for name, value in step.items() if name.startswith("gvpo/")}
        assert all(math.isfinite(value) for value in ours.values())
        assert ours["gvpo/loss"] > 0 and ours["gvpo/log_ratio_std"] > 0 and ours["gvpo/reward/errors"] == 0
        assert 0 <= ours["gvpo/log_ratio_at_old"] < 1e-3 < ours["gvpo/log_ratio_std"]
        assert step["actor/grad_norm"] > 0
