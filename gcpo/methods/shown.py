"""Display of metrics in step lines and curves.

A method declares it in a module ``shown`` of its folder, whose ``SHOWN`` is a tuple of `Shown`. The launcher reads it,
so such a module imports neither torch nor verl.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

Metrics = Mapping[str, float]
"""The metrics of one step by name."""


@dataclass(frozen=True)
class Shown:
    """The display of a metric.

    Attributes:
        names: patterns of the metric's name; the first match counts.
        line: format of its value in the line of a step, or a function of the step's metrics; empty: not in the line.
        panel: title of its curve in the plot; empty: no curve.
        scale: factor of the value in both.
        spread: a metric that is shown as ± after the value, and as a band around the curve.
    """

    names: tuple[str, ...] = ()
    line: str | Callable[[Metrics], str] = ""
    panel: str = ""
    scale: float = 1.0
    spread: str | None = None

    def name_in(self, names: Iterable[str]) -> str | None:
        """Return the metric among ``names``, or None."""
        names = list(names)
        return next((name for pattern in self.names for name in names if re.fullmatch(pattern, name)), None)

    def text(self, metrics: Metrics) -> str:
        """Return the metric's part of a step line, empty if the step lacks it."""
        if not isinstance(self.line, str):
            return self.line(metrics)
        name = self.name_in(metrics) if self.line else None
        if name is None:
            return ""
        width = f"±{self.scale * metrics[self.spread]:.3f}" if self.spread and self.spread in metrics else ""
        return self.line.format(self.scale * metrics[name]) + width


def shown_of(name: str) -> tuple[Shown, ...]:
    """Return the metrics that a method of `gcpo.methods` shows."""
    module = f"{__package__}.{name}.shown"
    return importlib.import_module(module).SHOWN if importlib.util.find_spec(module) else ()
