"""The outcome reward: is the last boxed answer right, and is there one.

``compute_score`` has the signature of verl's custom reward functions (``reward.custom_reward_function``). The same
function grades in training and in validation.
"""

from __future__ import annotations

import re
from typing import Any

MAX_ANSWER_CHARS = 400
"""Longer boxed answers are wrong by definition: parsing them could take for ever."""

# math-verify evaluates with sympy, which would expand these before it compares.
_EXPLOSIVE = re.compile(r"\d{40,}|\^\s*\{?\s*-?\d{3,}|!|\\binom|(\^.*){6,}", re.DOTALL)
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_THOUSANDS = re.compile(r"(?<=\d)(?:,|\\,|\\!|\{,\})+(?=\d{3}(?!\d))")


def last_boxed(text: str) -> str | None:
    """What the last ``\\boxed{...}`` with balanced braces holds, or ``None``."""
    for match in reversed(list(_BOXED.finditer(text))):
        depth = 1
        for at in range(match.end(), min(len(text), match.end() + MAX_ANSWER_CHARS + 1)):
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            if depth == 0:
                return text[match.end() : at]
    return None


def final_answer(solution: str) -> str | None:
    """The boxed answer of a response; what stands in the thinking part does not count."""
    if "</think>" in solution:
        solution = solution.rpartition("</think>")[2]
    elif "<think>" in solution:
        return None
    return last_boxed(solution)


def normalize(answer: str) -> str:
    """An answer without spaces, thousands separators, dollar signs, leading zeros and a trailing ``.0``."""
    answer = _THOUSANDS.sub("", answer.strip().strip("$").rstrip("."))
    answer = re.sub(r"\s+|\\[,;! ]", "", answer)
    if re.fullmatch(r"[+-]?\d+(\.0+)?", answer):
        return str(int(answer.split(".")[0]))
    return answer


def is_equal(answer: str, truth: str) -> bool:
    """Whether two answers are the same: as text after ``normalize``, else as mathematics by math-verify."""
    if normalize(answer) == normalize(truth):
        return True
    if len(answer) > MAX_ANSWER_CHARS or _EXPLOSIVE.search(answer):
        return False
    if re.fullmatch(r"[+-]?\d+(\.\d+)?", normalize(answer)) and re.fullmatch(r"[+-]?\d+(\.\d+)?", normalize(truth)):
        return float(normalize(answer)) == float(normalize(truth))
    from math_verify import parse, verify

    # The library's time limits are signals, which only the main thread can take; verl grades in others.
    gold = parse(f"\\boxed{{{truth}}}", parsing_timeout=None)
    given = parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
    return bool(verify(gold, given, timeout_seconds=None))


def compute_score(
    data_source: Any, solution_str: Any, ground_truth: Any, extra_info: Any = None, **kwargs: Any
) -> dict[str, float]:
    """Grade a response.

    Args:
        data_source: name of the data set; all are graded alike.
        solution_str: the response.
        ground_truth: the right answer, or a list of answers that are all right.
        extra_info: unused.
        kwargs: unused; verl may pass more.

    Returns:
        ``score`` and ``acc``: 1 if the last boxed answer is right, else 0. ``format``: 1 if there is a boxed answer.
        It never raises: an input of a wrong type scores 0.
    """
    answer = final_answer(solution_str) if isinstance(solution_str, str) else None
    if answer is None:
        return {"score": 0.0, "acc": 0.0, "format": 0.0}
    truths = ground_truth if isinstance(ground_truth, list | tuple) else [ground_truth]
    try:
        right = float(any(is_equal(answer, str(truth)) for truth in truths if truth is not None))
    except Exception:
        right = 0.0
    return {"score": right, "acc": right, "format": 1.0}
