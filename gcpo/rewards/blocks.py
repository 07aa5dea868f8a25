"""Fenced code blocks of a response, and the selection of the program among them.

The fences follow CommonMark 0.31 (section 4.5), except for three rules, without which programs as models write them
would be lost:

* a block may be indented by any width. Its lines lose the indentation of its opening fence; a block whose first line
  has less indentation than the fence stays as it is;
* a closing fence may be indented by three spaces more than its opening fence (CommonMark counts from the list item);
* a fence inside a triple-quoted string of a Python block does not close the block.

``markdown-it-py`` is stricter in all three, so it cannot be used here. A test compares both on texts where they must
agree.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Block", "code_blocks", "program_blocks"]

TAB = 4
"""Columns of a tab stop in CommonMark."""
MAX_CLOSINGS = 32
"""Largest number of closing fences inside the strings of one block that are skipped."""

_QUOTES = re.compile(r"(?: {0,3}> ?)+")
_ITEMS = re.compile(r"(?:[ \t]*(?:[-+*]|[0-9]{1,9}[.)])[ \t]+)*[ \t]*")
_OPENING = re.compile(r"(`{3,})([^`]*)|(~{3,})(.*)", re.DOTALL)
_PYTHON = re.compile(r"\{?\s*\.?(?:lang(?:uage)?-)?(?:i?python|py|pypy)(?:[23](?:\.\d+)*)?(?![\w+#-])", re.IGNORECASE)
_STRINGS = re.compile(
    r"""#[^\n]*|\"{3}(?:\\.|[^\\])*?\"{3}|'{3}(?:\\.|[^\\])*?'{3}|\"{3}|'{3}|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'""",
    re.DOTALL,
)
"""Comments and strings of Python; a match that is only three quotes is an unclosed string."""
_INDENTED = re.compile(r"\A(?:[ \t]*\n)*[ \t]+\S")
"""The first line of the code is indented: it continues a function whose signature is in the question."""
_READS = re.compile(r"\binput\s*\(|\bstdin\b|\bopen\s*\(\s*0|\bfileinput\b|\bread\s*\(\s*0\b|/dev/stdin")
_PRINTS = re.compile(r"\bprint\s*\(|\bstdout\b")


@dataclass(frozen=True)
class Block:
    """A fenced code block.

    Attributes:
        code: its lines without the indentation of the fence.
        python: True if its info string says Python, None if it has no info string, False for another language.
        closed: whether it has a closing fence; without one it extends to the end of the text.
    """

    code: str
    python: bool | None
    closed: bool


@dataclass(frozen=True)
class _Fence:
    mark: str
    info: str
    column: int
    quotes: int

    @property
    def python(self) -> bool | None:
        info = self.info.strip()
        return _PYTHON.match(info) is not None if info else None

    def content(self, line: str) -> str | None:
        """Return the line without the marks of the block quote, or None if the quote has ended."""
        for _ in range(self.quotes):
            mark = re.match(r" {0,3}> ?", line)
            if mark is None:
                return None
            line = line[mark.end() :]
        return line

    def closed_by(self, line: str) -> bool:
        bare = line.strip(" \t")
        marks_only = len(bare) >= len(self.mark) and not bare.strip(self.mark[0])
        return marks_only and _indentation(line) < self.column + TAB


def code_blocks(text: str) -> list[Block]:
    """Return all fenced code blocks of a Markdown text, in order."""
    lines = re.split(r"\r\n|\n|\r", text)
    blocks, at = [], 0
    while at < len(lines):
        fence = _opening(lines[at])
        at += 1
        if fence is not None:
            block, at = _read_block(fence, lines, at)
            blocks.append(block)
    return blocks


def program_blocks(blocks: Sequence[Block], names: Sequence[str] = (), *, reads: bool = False) -> list[str]:
    """Return the candidate blocks for the program in order of likelihood, the most likely last.

    Blocks marked as Python count if any exists, otherwise blocks without an info string. A block without a
    closing fence counts only if there is no other. The program is then

    * if the tests use ``names``: the last block that defines one of them, otherwise the last that is indented as
      a whole, which continues the function of the question;
    * if the tests give standard input (``reads``): the last block that reads it, otherwise the last that prints;
    * if no block qualifies: the last one that is not empty.

    Returns:
        The code of the program and of all blocks before it; empty if there is no block.
    """
    usable = [block for block in blocks if block.closed or block.code.strip()]
    for closed, python in ((True, True), (True, None), (False, True), (False, None)):
        found = [block.code for block in usable if block.closed is closed and block.python is python]
        if found:
            return found[: _choice(found, names, reads) + 1]
    return []


def _choice(codes: Sequence[str], names: Sequence[str], reads: bool) -> int:
    tests = [_definition(names), _INDENTED] if names else [_READS, _PRINTS] if reads else []
    for test in (*tests, re.compile(r"\S")):
        for place in reversed(range(len(codes))):
            if test.search(codes[place]):
                return place
    return len(codes) - 1


def _definition(names: Sequence[str]) -> re.Pattern[str]:
    """Return a pattern for the definition of one of the names: a function, a class or a variable."""
    either = "|".join(map(re.escape, names))
    return re.compile(
        rf"^[ \t]*(?:async[ \t]+)?(?:def|class)[ \t]+(?:{either})\b|^(?:{either})[ \t]*(?::[^=\n]*)?=(?!=)",
        re.MULTILINE,
    )


def _opening(line: str) -> _Fence | None:
    quotes = _QUOTES.match(line)
    rest = line[quotes.end() :] if quotes else line
    before = _ITEMS.match(rest)
    assert before is not None
    fence = _OPENING.fullmatch(rest, before.end())
    if fence is None:
        return None
    mark, info = fence[1] or fence[3], fence[2] if fence[1] else fence[4]
    return _Fence(mark, info, len(before[0].expandtabs(TAB)), quotes[0].count(">") if quotes else 0)


def _read_block(fence: _Fence, lines: Sequence[str], start: int) -> tuple[Block, int]:
    """Return the block whose first line is ``start``, and the index of the line after it."""
    content: list[str] = []
    closings: list[int] = []
    end = None
    while end is None and len(closings) < MAX_CLOSINGS and start + len(content) < len(lines):
        line = fence.content(lines[start + len(content)])
        if line is None:
            break
        if fence.closed_by(line):
            closings.append(len(content))
            if fence.python is False or not _ends_in_string(content):
                end = len(content)
        content.append(line)
    if closings:
        end = closings[0] if end is None else end  # the string is never closed, so the first fence ends the block
        return Block(_dedented(content[:end], fence.column), fence.python, True), start + end + 1
    after = start + len(content)
    return Block(_dedented(content, fence.column), fence.python, after < len(lines)), after


def _ends_in_string(lines: Sequence[str]) -> bool:
    """Return whether a triple-quoted string is open at the end of Python code."""
    return any(one[0] in ('"""', "'''") for one in _STRINGS.finditer("\n".join(lines)))


def _dedented(lines: Sequence[str], width: int) -> str:
    first = next((line for line in lines if line.strip()), "")
    if _indentation(first) < width:
        return "\n".join(lines)
    return "\n".join(_without(line, width) for line in lines)


def _without(line: str, width: int) -> str:
    """Remove up to ``width`` columns of indentation from a line."""
    column = 0
    for place, character in enumerate(line):
        if column >= width or character not in " \t":
            return " " * (column - width if column > width else 0) + line[place:]
        column += 1 if character == " " else TAB - column % TAB
    return ""


def _indentation(line: str) -> int:
    return len(line[: len(line) - len(line.lstrip(" \t"))].expandtabs(TAB))
