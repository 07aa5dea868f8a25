"""How to go on after a run that ended early."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gcpo.checkpoints import newest_finished, step_of


def way_on(trainer: Mapping[str, Any]) -> str:
    """The end of a sentence about a run that ended early: the saved state, and how to go on.

    Args:
        trainer: verl's ``trainer`` group.
    """
    mode = trainer.get("resume_mode", "auto")
    found = newest_finished(Path(str(trainer.get("default_local_dir") or ".")))
    saved = f"the last whole checkpoint is {found} (step {step_of(found)})" if found else "no checkpoint had been saved"
    if mode == "resume_path":
        return f"{saved}; the same command starts again from {trainer.get('resume_from_path')}"
    if mode == "disable":
        return f"{saved}; with trainer.resume_mode=disable the same command starts again from step 1"
    if found:
        return f"{saved}; the same command goes on from it"
    return f"{saved}; the same command starts again from step 1"
