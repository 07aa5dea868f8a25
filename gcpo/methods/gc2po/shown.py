"""The metrics of GC2PO that the line of a step and the curves show."""

from __future__ import annotations

from gcpo.methods.shown import Shown

SHOWN = (Shown(("gc2po/robustness/mean",), "robustness {:.3f}", "robustness of the episodes"),)
