"""Extraction of the answer from a response: its boxes, or a sentence or line if no box is required."""

from __future__ import annotations

import re

__all__ = ["answer_of", "boxed_answers", "stated_answer"]

_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_BOX_COMMAND = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)")
_EMPTY = re.compile(r"(?:\\(?:text|mathrm|l?dots|cdots)(?![A-Za-z])|[\s{}.$_\u2026]|\\[,;:! ])*")
_JOIN = re.compile(
    r"(?!\s*\n\s*\n)(?:[\s$&,;]|\\[()\[\],;: ]|\\\\|\\q?quad(?![A-Za-z])|(?<![A-Za-z])(?:and|or)(?![A-Za-z])"
    r"|\\(?:text|mathrm|mbox)\s*\{[\s,;]*(?:and|or)?[\s,;]*\}"
    r"|\(\w{1,3}\)|(?<![A-Za-z\\])[A-Za-z](?:_\w|_\{\w+\})?'?\s*=)*"
)
"""Text between two boxes that are parts of one answer: separators, "and", "or", "(b)" and "y =" only."""
_STATED = re.compile(
    r"(?:^[ \t]*\#{4}[ \t]*|\banswer\b[*_\s]*(?:(?:is|are|equals)\b|[:=])[*_\s]*:?)",
    re.IGNORECASE | re.MULTILINE,
)
_SENTENCE_END = re.compile(r"[.!?][*_$]*(?:\s|$)")
MAX_STATED_CHARS = 300
"""A longer sentence after "the answer is" does not count as an answer."""


def answer_of(response: str) -> str:
    """Return the text after the thinking part, or "" if that part is never closed."""
    answer = response.rpartition("</think>")[2]
    return "" if "<think>" in answer else answer


def boxed_answers(response: str) -> list[str] | None:
    r"""Return the answer in the boxes that end a response, or ``None`` if no box has balanced braces.

    The answer is the content of the last ``\boxed{...}`` that is not empty. Boxes that are parts of one answer, such as
    ``\boxed{3} and \boxed{5}``, give one text each. Of nested boxes the inner one counts. Boxes in a thinking part,
    closed or not, do not count.
    """
    text = answer_of(response)
    boxes = _closed_boxes(text)
    if not boxes:
        return None
    filled = [(start, end) for start, end in boxes if not _EMPTY.fullmatch(text, start, end)]
    if not filled:
        return [text[slice(*boxes[-1])].strip(" ")]
    parts = [filled[-1]]
    for before in reversed(filled[:-1]):
        command = text.rfind("\\", 0, parts[-1][0])
        if not _JOIN.fullmatch(text, before[1] + 1, command):
            break
        parts.append(before)
    contents = [_inner(text[start:end]) for start, end in reversed(parts)]
    return list(dict.fromkeys(contents))


def _closed_boxes(text: str) -> list[tuple[int, int]]:
    """Return start and end of the content of every closed outermost box, in linear time.

    A box that is never closed is ignored; closed boxes inside it count.
    """
    opened: list[int] = []  # start of the content of an open box; -1 for any other brace
    closed: list[tuple[int, int]] = []
    for token in _BRACES.finditer(text):
        if token[0] == "{":
            opened.append(-1)
        elif token[0] == "}":
            start = opened.pop() if opened else -1
            if start >= 0:
                while closed and closed[-1][0] > start:
                    closed.pop()
                closed.append((start, token.start()))
        elif len(token[0]) > 2:
            opened.append(token.end())
    return closed


def _inner(content: str) -> str:
    """Return the content of a box without nested boxes: the inner box if there is only one, else all of the content."""
    inner = [(start, end) for start, end in _closed_boxes(content) if not _EMPTY.fullmatch(content, start, end)]
    if len(inner) == 1:
        return _inner(content[slice(*inner[0])])
    return _BOX_COMMAND.sub("", content)


def stated_answer(response: str) -> str | None:
    """Return the sentence after the last "the answer is", "answer:" or ``####`` that follows the thinking part."""
    text = answer_of(response)
    marks = [*_STATED.finditer(text)]
    if not marks:
        return None
    rest = text[marks[-1].end() :].lstrip().partition("\n")[0]
    end = _SENTENCE_END.search(rest, 0, MAX_STATED_CHARS + 1)
    answer = (rest[: end.start()] if end else rest).strip(" \t*_")
    return answer if answer and len(answer) <= MAX_STATED_CHARS else None
