"""Normalisation of answers for the reward function, done once when a set is prepared."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Any

from data_prep.schema import Drop
from gcpo.rewards import normalize, same_answer

NO_ANSWER = (
    # proofs
    "proof", "the proof", "see proof", "see the proof", "see above", "proof above", "proof complete",
    "proof is complete", "proof omitted", "proved", "proven", "hence proved", "as shown", "shown above",
    "qed", "q.e.d", r"\qed", r"\blacksquare", r"\square", r"\box", "\u25a0", "\u25a1", "\u220e",
    # references to a missing text
    "see solution", "see the solution", "see explanation", "see the explanation", "omitted",
    # empty columns of other programs
    "notfound", "not found", "answer not found", "no answer", "no answer found", "not available", "not provided",
    "not given", "n/a", "n.a", "nan", "none", "null", "unknown", "unanswered", "tbd", "todo",
)  # fmt: skip
"""Entries of answer columns that mean "no answer", in lower case, without fonts, dollar signs and punctuation
at the ends. Add a word here to drop its rows."""

_FONTS = re.compile(r"\\(?:text|math|operatorname)(?:bf|it|rm|sf|tt|normal)?\s*\{([^{}]*)\}|\\mbox\s*\{([^{}]*)\}")
_ENDS = " .,:;!?$-\u2010\u2011\u2012\u2013\u2014\u2212_\u2026"
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_PLAIN = re.compile(r"-?(?:\d+(?:\.\d+)?|\.\d+)")
# As in gcpo.rewards.math: with a remark these are alternatives, but a bare "4 or 5" is a list that needs both.
_ACCEPTED = re.compile(r"(\d+(?: or \d+)+) \(.*\)", re.ASCII)


def answers_of(value: Any) -> list[str]:
    """Return all right answers in the value of an answer column, normalised, without duplicates.

    Raises:
        Drop: there is no gradable answer.
    """
    if isinstance(value, str) and (both := _ACCEPTED.fullmatch(value.strip())):
        value = both[1].split(" or ")
    forms = list(value) if isinstance(value, list | tuple) else [value]
    if not all(form is None or isinstance(form, str | int | float | Decimal) for form in forms):
        raise Drop("an answer that is neither a text nor a number")
    found: dict[str, str] = {}
    for form in forms:
        answer = canonical(form)
        if answer:
            found.setdefault(normalize(answer) or answer, answer)
    if not found:
        raise Drop("no answer")
    if any(map(is_no_answer, found.values())):
        raise Drop("the answer is a word for none, such as proof")
    return list(found.values())


def is_no_answer(answer: str) -> bool:
    """Return whether an answer is one of `NO_ANSWER`, or only punctuation and dashes."""
    bare = _FONTS.sub(lambda match: match[1] or match[2] or "", answer)
    bare = re.sub(r"\s+", " ", bare).strip(_ENDS).lower()
    return not bare or bare in NO_ANSWER


def canonical(value: Any) -> str:
    """Return an answer as text: numbers lose leading zeros, thousands separators, units and ``.0``."""
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
    """Return the column ``ground_truth``: the answer itself, or several right ones as a JSON list."""
    return answers[0] if len(answers) == 1 else json.dumps(list(answers), ensure_ascii=False)


def boxed(solution: Any) -> str:
    r"""Return the answer in the ``\boxed{}`` of a solution.

    Raises:
        Drop: there is none, or several have different answers, which may be parts of the answer or steps to it.
    """
    found = [answer for answer in boxes_of(solution) if answer.strip()] if isinstance(solution, str) else []
    if not found:
        raise Drop("no boxed answer in the solution")
    if any(not same_answer(answer, found[-1]) for answer in dict.fromkeys(found[:-1])):
        raise Drop("several boxes with different answers in the solution")
    return found[-1]


def boxes_of(text: str) -> Iterator[str]:
    """Yield the contents of all closed boxes, in order; of nested boxes only the outermost counts."""
    at = 0
    while box := _BOX.search(text, at):
        at, depth = box.end(), 1
        for token in _BRACE.finditer(text, box.end()):
            depth += {"{": 1, "}": -1}.get(token[0], 0)
            if depth == 0:
                yield text[box.end() : token.start()]
                at = token.end()
                break


def string_of(value: Any, what: str) -> str:
    """Return ``value``; raise `Drop` if it is not a string."""
    if not isinstance(value, str):
        raise Drop(f"its {what} is no text")
    return value


def text_of(value: Any, what: str = "question") -> str:
    """Return ``value`` without surrounding white space; raise `Drop` if it is empty or not a string."""
    text = value.strip() if isinstance(value, str) else ""
    if not text:
        raise Drop(f"empty {what}")
    return text
