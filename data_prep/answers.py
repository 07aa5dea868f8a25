"""Answers as the reward function wants them: normalised once, when a set is prepared."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from data_prep.schema import Drop
from gcpo.rewards import boxed_answer, normalize

NO_ANSWER = ("proof", "notfound", "not found", "n/a")
"""What stands in the answer column of a problem that has none."""

_PLAIN = re.compile(r"-?(?:\d+(?:\.\d+)?|\.\d+)")
_ACCEPTED = re.compile(r"(\d+(?: or \d+)+)(?: \(.*\))?")


def answers_of(value: Any) -> list[str]:
    """All forms of an answer, each normalised and none twice: the value of an answer column, of any type.

    Raises:
        Drop: there is no answer that could be graded.
    """
    if isinstance(value, str) and (both := _ACCEPTED.fullmatch(value.strip())):
        value = both[1].split(" or ")
    forms = list(value) if isinstance(value, list | tuple) else [value]
    found: dict[str, str] = {}
    for form in forms:
        answer = canonical(form)
        if answer:
            found.setdefault(normalize(answer) or answer, answer)
    if not found:
        raise Drop("no answer")
    if any(answer.lower().strip(" .") in NO_ANSWER for answer in found.values()):
        raise Drop("the answer is a word for none, such as proof")
    return list(found.values())


def canonical(value: Any) -> str:
    """An answer as text: numbers without leading zeros, thousands separators, units and ``.0``; else as it stands."""
    if value is None or isinstance(value, bool):
        return ""
    if isinstance(value, float):
        if not math.isfinite(value):
            return ""
        value = int(value) if value.is_integer() else repr(value)
    text = re.sub(r"\s+", " ", str(value)).strip()
    number = normalize(text)
    return number if _PLAIN.fullmatch(number) else text


def encode(answers: Sequence[str]) -> str:
    """The column ``ground_truth``: the answer itself, or several right ones as a JSON list."""
    return answers[0] if len(answers) == 1 else json.dumps(list(answers), ensure_ascii=False)


def boxed(solution: Any) -> str:
    r"""What the last ``\boxed{}`` of a solution holds.

    Raises:
        Drop: there is none.
    """
    answer = boxed_answer(solution) if isinstance(solution, str) else None
    if answer is None or not answer.strip():
        raise Drop("no boxed answer in the solution")
    return answer


def text_of(value: Any, what: str = "question") -> str:
    """A text that is there.

    Raises:
        Drop: it is empty or no text.
    """
    text = value.strip() if isinstance(value, str) else ""
    if not text:
        raise Drop(f"empty {what}")
    return text
