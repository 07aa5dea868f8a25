"""The end of a sentence about a run that ended early."""

from __future__ import annotations

from pathlib import Path

import pytest

from gcpo.faults import TRACKER_FILE, last_checkpoint, way_on


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "global_step_4").mkdir()
    (tmp_path / TRACKER_FILE).write_text("4")
    return tmp_path


def test_last_checkpoint(folder: Path) -> None:
    assert last_checkpoint(folder) == (4, folder / "global_step_4")


@pytest.mark.parametrize("tracker", [None, "", "four", "5"])
def test_no_checkpoint(folder: Path, tracker: str | None) -> None:
    """No tracker, one that is empty or unreadable, and one that names a folder that is not there."""
    if tracker is None:
        (folder / TRACKER_FILE).unlink()
    else:
        (folder / TRACKER_FILE).write_text(tracker)
    assert last_checkpoint(folder) is None
    assert way_on({"default_local_dir": str(folder)}) == (
        "no checkpoint had been saved; the same command starts again from step 1"
    )


def test_the_same_command_goes_on(folder: Path) -> None:
    assert way_on({"default_local_dir": str(folder), "resume_mode": "auto"}) == (
        f"the last whole checkpoint is {folder}/global_step_4 (step 4); the same command goes on from it"
    )


def test_other_ways_to_resume(folder: Path) -> None:
    trainer = {"default_local_dir": str(folder), "resume_mode": "disable"}
    assert "(step 4)" in way_on(trainer) and way_on(trainer).endswith("starts again from step 1")
    trainer = {**trainer, "resume_mode": "resume_path", "resume_from_path": "/runs/a/global_step_2"}
    assert way_on(trainer).endswith("the same command starts again from /runs/a/global_step_2")
