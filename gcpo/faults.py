"""Ends of a run that a user reads as one sentence: the cause, the saved state, and the way to go on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

TRACKER_FILE = "latest_checkpointed_iteration.txt"
"""verl writes the step of a checkpoint into this file after the checkpoint itself."""


class RunStoppedError(RuntimeError):
    """Ends the run on purpose; the message is one sentence for the user."""


class ServerLostError(RuntimeError):
    """The server that a request went to is gone; the request did not fail by itself, and the run cannot go on."""


def last_checkpoint(folder: Path) -> tuple[int, Path] | None:
    """Step and folder of the checkpoint that verl's tracker file names.

    Args:
        folder: ``trainer.default_local_dir``.

    Returns:
        ``None`` where no checkpoint was finished.
    """
    try:
        step = int((folder / TRACKER_FILE).read_text())
    except (OSError, ValueError):
        return None
    path = folder / f"global_step_{step}"
    return (step, path) if path.is_dir() else None


def way_on(trainer: Mapping[str, Any]) -> str:
    """The end of a sentence about a run that ended early: the saved state, and how to go on.

    Args:
        trainer: verl's ``trainer`` group.
    """
    mode = trainer.get("resume_mode", "auto")
    found = last_checkpoint(Path(str(trainer.get("default_local_dir") or ".")))
    saved = f"the last whole checkpoint is {found[1]} (step {found[0]})" if found else "no checkpoint had been saved"
    if mode == "resume_path":
        return f"{saved}; the same command starts again from {trainer.get('resume_from_path')}"
    if mode == "disable":
        return f"{saved}; with trainer.resume_mode=disable the same command starts again from step 1"
    if found:
        return f"{saved}; the same command goes on from it"
    return f"{saved}; the same command starts again from step 1"
