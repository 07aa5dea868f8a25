"""Where the tokens of a response are split into steps. A step is never decoded and encoded again."""

from __future__ import annotations

from collections.abc import Sequence


def first_step(pieces: Sequence[str], separator: str, min_tokens: int = 0) -> int | None:
    """Number of tokens of the first step.

    The separator belongs to the step that it ends, if a token ends with it. A token that goes on after the separator
    (as `` \\`` where the separator is a blank) begins the next step. Separators before any other text end no step.

    Args:
        pieces: text of each token.
        separator: text between two steps.
        min_tokens: separators end no step that has fewer tokens.

    Returns:
        The number; ``None`` if the step does not end within these tokens.
    """
    text, searched = "", 0
    for index, piece in enumerate(pieces):
        before = text
        text += piece
        while (at := text.find(separator, searched)) >= 0:
            searched = at + len(separator)
            if not text[:at].strip():
                continue
            if text.endswith(separator) and index + 1 >= min_tokens:
                return index + 1
            if not text.endswith(separator) and before.strip() and index >= min_tokens:
                return index
    return None


def split(pieces: Sequence[str], separator: str, until: str = "", min_tokens: int = 0) -> list[int]:
    """Number of tokens up to the end of each step of a whole response; the last one is ``len(pieces)``.

    Args:
        pieces: text of each token.
        separator: text between two steps.
        until: the rest of the response after this text is one step; empty: nowhere.
        min_tokens: of a step, but for the last one.
    """
    ends: list[int] = []
    start = 0
    while start < len(pieces):
        inside = not (until and until in "".join(pieces[:start]))
        length = first_step(pieces[start:], separator, min_tokens) if inside else None
        start = len(pieces) if length is None else start + length
        ends.append(start)
    return ends
