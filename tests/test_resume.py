"""The end of a sentence about a run that ended early."""

from __future__ import annotations

from pathlib import Path

import pytest

from gcpo.checkpoints import MANIFEST, TRACKER, way_on


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints of the steps 2 and 4, and one of step 6 that was not finished."""
    for step in (2, 4, 6):
        (tmp_path / f"global_step_{step}").mkdir()
    for step in (2, 4):
        (tmp_path / f"global_step_{step}" / MANIFEST).write_text("{}")
    (tmp_path / TRACKER).write_text("6")
    return tmp_path


def test_no_checkpoint(tmp_path: Path) -> None:
    """No folder at all, an empty one, and an unfinished checkpoint."""
    for root in (tmp_path / "none", tmp_path):
        assert way_on({"default_local_dir": str(root)}) == (
            "no checkpoint had been saved; the same command starts again from step 1"
        )
    (tmp_path / "global_step_6").mkdir()
    assert way_on({"default_local_dir": str(tmp_path)}).startswith("no checkpoint had been saved")


def test_the_same_command_goes_on(folder: Path) -> None:
    assert way_on({"default_local_dir": str(folder), "resume_mode": "auto"}) == (
        f"the last whole checkpoint is {folder}/global_step_4 (step 4); the same command goes on from it"
    )


def test_other_ways_to_resume(folder: Path) -> None:
    trainer = {"default_local_dir": str(folder), "resume_mode": "disable"}
    assert "(step 4)" in way_on(trainer) and way_on(trainer).endswith("starts again from step 1")
    trainer = {**trainer, "resume_mode": "resume_path", "resume_from_path": "/runs/a/global_step_2"}
    assert way_on(trainer).endswith("the same command starts again from /runs/a/global_step_2")
