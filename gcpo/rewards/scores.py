"""Conversion of a reward function's result to values that verl's batches and metrics accept."""

from __future__ import annotations

import logging
import math
import reprlib
from collections.abc import Mapping
from decimal import Decimal
from numbers import Real
from typing import Any

from gcpo.notices import notice

logger = logging.getLogger(__name__)

_METRICS = ("score", "acc", "format")
"""Entries of ``reward_extra_info`` that are averaged over responses: a number, or missing."""
_LARGEST = 3.4028234663852886e38
"""The largest finite float32; verl keeps scores in float32."""

_warned: set[str] = set()


def number(value: Any) -> float | None:
    """Return ``value`` as a float if it is one number, else ``None``.

    A number is a Python ``bool``, ``int``, ``float``, ``Fraction`` or ``Decimal``, and a numpy or torch value with one
    element that holds one of these. Texts and lists are not numbers.
    """
    elements = getattr(value, "numel", None) or getattr(value, "size", None)
    if hasattr(value, "item") and elements is not None:
        if (elements() if callable(elements) else elements) != 1:
            return None
        value = value.item()
    if not isinstance(value, Real | Decimal):
        return None
    try:
        return float(value)
    except (OverflowError, ValueError):  # an integer beyond the floats, a signalling NaN
        return math.nan


def score_problem(value: Any) -> str | None:
    """Return why ``value`` cannot be a reward, or ``None`` where it can: it is one number that is finite in float32."""
    score = number(value)
    if score is None:
        return f"returned {reprlib.repr(value)} ({type(value).__name__}), which is no number"
    if not math.isfinite(score) or abs(score) > _LARGEST:
        return f"returned {score}, which is no finite number"
    return None


def checked_info(info: Any) -> dict[str, Any]:
    """Return ``reward_extra_info`` with values that verl's metrics and dumps accept.

    Numbers are Python's; texts, ``None`` and truth values stay. ``score``, ``acc`` and ``format`` are dropped if
    they are not one finite number. Other values become texts, which verl does not average. Both are reported once
    per name.
    """
    checked: dict[str, Any] = {}
    for name, value in info.items() if isinstance(info, Mapping) else ():
        found = number(value)
        if name in _METRICS:
            if found is not None and math.isfinite(found):
                checked[name] = found
                continue
            _warn(name, value, "is left out of the metrics")
        elif found is not None:
            checked[name] = value if isinstance(value, bool | int | float) else found
        elif value is None or isinstance(value, str):
            checked[name] = value
        else:
            checked[name] = str(value)
            _warn(name, value, "is kept as text")
    return checked


def _warn(name: str, value: Any, consequence: str) -> None:
    if name in _warned:
        return
    _warned.add(name)
    notice(
        logger,
        f"the reward function returned a {type(value).__name__} under {name!r}, which is not one finite number and "
        f"{consequence} (reported once)",
    )
