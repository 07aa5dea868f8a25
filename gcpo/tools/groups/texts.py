"""Texts of a model made safe to show: a terminal, a page and a reader see what is there and obey none of it."""

from __future__ import annotations

import math
import re
from typing import Any

_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)
"""Control characters but tab and newline, characters that reorder or hide text, and halves of surrogate pairs."""


def visible(text: str) -> str:
    """Return ``text`` with signs for all characters that a terminal or a browser would obey, hide or refuse."""
    return _HIDDEN.sub(lambda match: _sign(ord(match[0])), text)


def _sign(code: int) -> str:
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else f"\u27e8U+{code:04X}\u27e9"


def safe(value: Any) -> Any:
    """Return a value of JSON with all its texts `visible`, and ``None`` for numbers that are not finite."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, dict):
        return {visible(str(key)): safe(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [safe(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def shortened(text: str, limit: int | None) -> str:
    """Return the first ``limit`` characters of a text, and how many follow; ``None``: the whole text."""
    rest = 0 if limit is None else max(0, len(text) - limit)
    return f"{text[:limit]} \u2026 ({rest:,} more characters)" if rest else text
