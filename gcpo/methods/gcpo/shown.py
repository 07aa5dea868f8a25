"""The metrics of GCPO that are shown in step lines and curves."""

from __future__ import annotations

from gcpo.methods.shown import Metrics, Shown


def _missing(metrics: Metrics) -> str:
    """Return the parts of a step that are missing, as percentages."""
    found = {part: metrics.get(f"gcpo/missing/{part}_frac", 0.0) for part in ("draws", "targets", "references")}
    parts = [f"{100 * one:.{0 if one >= 0.1 else 1}f} % of {part}" for part, one in found.items() if one > 0]
    return f"missing {', '.join(parts)}" if parts else ""


SHOWN = (
    Shown(
        ("gcpo/upsilon/mean",),
        "Υ {:.3f}",
        "Υ, causal weight (band: spread in a group)",
        spread="gcpo/upsilon/spread_in_group",
    ),
    Shown(("gcpo/reference/kl_mean",), "κ-KL {:.4f}", "κ-KL to the causal reference"),
    Shown(line=_missing),
)
