"""The metrics of L2T that the line of a step and the curves show."""

from __future__ import annotations

from gcpo.methods.shown import Metrics, Shown


def _missing(metrics: Metrics) -> str:
    """The fraction of questions without a right answer that can be scored, above 0."""
    share = metrics.get("l2t/missing_frac", 0.0)
    return f"missing {100 * share:.{0 if share >= 0.1 else 1}f} % of answers" if share > 0 else ""


SHOWN = (
    Shown(("l2t/gain/mean",), "gain {:+.3f}", "fitting gain of the episodes"),
    Shown(("l2t/probability/last",), panel="probability of the right answer after the last episode"),
    Shown(line=_missing),
)
