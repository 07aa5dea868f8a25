"""Whether verl can load the plug-in."""

from __future__ import annotations

import importlib.metadata


def plugin_problem() -> str | None:
    """Why the installed plug-in does not work, or ``None``. verl hides a plug-in that fails to load."""
    names = {entry.name for entry in importlib.metadata.entry_points(group="verl.plugins")}
    if "gcpo" not in names:
        return "gcpo is not installed as a plug-in of verl (entry point group verl.plugins): pip install -e ."
    import verl  # noqa: F401  (loads the plug-ins)
    from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY

    if "gcpo" not in TRAINER_REGISTRY:
        return "verl could not load the plug-in gcpo; the cause is printed above"
    return None
