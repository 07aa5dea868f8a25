"""The metrics of GVPO that the line of a step and the curves show."""

from __future__ import annotations

from gcpo.methods.shown import Shown

SHOWN = (
    Shown(("gvpo/loss",), "loss {:.4f}", "GVPO's loss of a group"),
    Shown(("gvpo/log_ratio_std",), panel="standard deviation of the log-ratios of a group"),
)
