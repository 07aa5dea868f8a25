"""The outcome reward: is the last boxed answer right, and is there one.

``compute_score`` has the signature of verl's custom reward functions (``reward.custom_reward_function``). The same
function grades in training and in validation.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import inspect
import logging
import math
import re
import threading
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import Any

__all__ = ["boxed_answer", "compute_score", "guarded", "normalize", "same_answer"]

logger = logging.getLogger(__name__)
# It warns once in every process that no time limit is set; see `_is_tame`.
logging.getLogger("math_verify").setLevel(logging.ERROR)

MAX_ANSWER_CHARS = 1000
"""A longer boxed answer is wrong: no answer of the supported data sets comes near."""
MAX_PARSED_CHARS = 200
"""A longer one is compared as text alone."""
MAX_SECONDS = 15.0
"""Two answers that math-verify can't compare in this time are different."""

_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)")
_GROUPED = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_ALTERNATIVES = re.compile(r"(\d+(?: or \d+)+)(?: \(.*\))?")


def boxed_answer(response: str) -> str | None:
    r"""What the last ``\boxed{...}`` with balanced braces holds, ``None`` where there is none.

    What stands in a thinking part, closed or not, does not count.
    """
    response = response.rpartition("</think>")[2]
    if "<think>" in response:
        return None
    return _last_boxed(response)


def _last_boxed(text: str) -> str | None:
    for match in reversed(list(_BOXED.finditer(text))[-20:]):
        depth = 1
        for at in range(match.end(), min(len(text), match.end() + MAX_ANSWER_CHARS + 1)):
            character = text[at]
            if character in "{}" and text[at - 1] != "\\":
                depth += 1 if character == "{" else -1
                if depth == 0:
                    return text[match.end() : at]
    return None


def normalize(answer: str) -> str:
    """An answer without what does not change it: spaces, units, dollar signs, thousands separators, leading zeros."""
    answer = answer.strip()
    if _BOXED.match(answer):
        answer = _last_boxed(answer) or answer
    answer = answer.replace("{,}", ",")
    answer = re.sub(r"\\[!,;: ]|\\q?quad\b|~|\\\$|\$", "", answer)
    answer = re.sub(r"(?<=\S)\\(?:text|mathrm|mbox)\s*\{\s*[A-Za-z .^0-9]*\}$", "", answer)
    answer = re.sub(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}", r"\1", answer)
    answer = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\degree|\\?%", "", answer)
    answer = re.sub(r"\\(?:left|right|displaystyle)(?![A-Za-z])", "", answer)
    answer = re.sub(r"\\[dt]frac(?![A-Za-z])", r"\\frac", answer)
    answer = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", answer)
    answer = re.sub(r"\s+", "", answer).rstrip(".")
    if _GROUPED.fullmatch(answer):
        answer = answer.replace(",", "")
    return _plain_number(answer) or answer


def _plain_number(answer: str) -> str | None:
    """``27`` for ``027`` and ``27.0``; ``None`` where it is no number."""
    if not _NUMBER.fullmatch(answer) or len(answer) > MAX_PARSED_CHARS:
        return None
    try:
        number = Decimal(answer)
    except InvalidOperation:
        return None
    if number == 0:
        return "0"
    plain = f"{number:f}"
    return plain.rstrip("0").rstrip(".") if "." in plain else plain


def same_answer(answer: str, truth: Any) -> bool:
    """Whether an answer is the right one, or one of several right ones.

    They are compared as text after ``normalize``, then as numbers, then as mathematics by math-verify.
    """
    if isinstance(truth, list | tuple):
        return any(same_answer(answer, one) for one in truth)
    text = _truth_text(truth)
    if text is None or len(answer) > MAX_ANSWER_CHARS:
        return False
    if match := _ALTERNATIVES.fullmatch(text.strip()):
        return any(same_answer(answer, one) for one in match[1].split(" or "))
    given, right = normalize(answer), normalize(text)
    if not given or not right:
        return False
    if given == right:
        return True
    if _NUMBER.fullmatch(given) and _NUMBER.fullmatch(right):
        return False
    return _is_tame(given) and _is_tame(right) and _same_mathematics(given, right)


def _truth_text(truth: Any) -> str | None:
    if isinstance(truth, str):
        return truth
    if isinstance(truth, bool) or not hasattr(truth, "__float__") or getattr(truth, "ndim", 0):
        return None
    try:
        return str(truth) if math.isfinite(truth) else None
    except (TypeError, ValueError, OverflowError):
        return None


_WILD = re.compile(
    r"\d{25}"  # a number this long
    r"|\d[eE][+-]?\d{3}"  # 1e999
    r"|\\(?:sum|prod|int|lim|bigcup|bigcap|operatorname|Gamma)"  # would be evaluated
    r"|\\[dt]?binom(?!(?:\{\d{1,3}\}|\{[a-z]\}|\d|[a-z]){2})|(?<!\{\d)(?<!\{\d\d)\\choose|\\choose(?!\d{1,3}\})"
    r"|(?<!\d)!|(?<![\d^{])\d{3,}!|!!|\^\{?[^{}]*\}?!"  # factorials of more than two digits
)
_POWER = re.compile(r"(?:\^|\*\*)")
_EXPONENT = re.compile(
    r"(?:\{[+-]?(?:\d{1,2}|[A-Za-z]|\d{1,2}[A-Za-z]|\\frac\{\d{1,2}\}\{\d{1,2}\}|\d/\d)\}|\d(?!\d)|[A-Za-z])"
)


def _is_tame(answer: str) -> bool:
    """Whether sympy, which evaluates what it parses, meets nothing huge: `_within` can't stop that."""
    if len(answer) > MAX_PARSED_CHARS or _WILD.search(answer):
        return False
    depth = deepest = 0
    for character in answer:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    if deepest > 10 or answer.count("\\frac") > 10 or re.search(r"[A-Za-z]{30}", answer):
        return False
    size = 1
    for power in _POWER.finditer(answer):
        exponent = _EXPONENT.match(answer, power.end())
        if exponent is None or _POWER.match(answer, exponent.end()):
            return False
        digits = re.search(r"\d+", exponent.group())
        value = max(1, int(digits.group())) if digits else 1
        if value > 20 and not answer[: power.start()][-1:].isdigit():
            return False
        size *= value
    return size <= 10_000


class _OutOfTime(BaseException):
    """Not an Exception, so that the libraries let it through."""


def _same_mathematics(answer: str, truth: str) -> bool:
    from math_verify import parse, verify

    # The library's own time limits are signals, which only the main thread can take; verl grades in others.
    def compare() -> bool:
        gold = parse(f"\\boxed{{{truth}}}", parsing_timeout=None)
        given = parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
        return bool(gold and given and verify(gold, given, timeout_seconds=None))

    return _within(MAX_SECONDS, compare)


def _within(seconds: float, function: Callable[[], bool]) -> bool:
    """What ``function`` returns; False where it raises or takes longer than ``seconds``.

    It runs in a thread of its own, which is made to raise when the time is over. That works between two steps of
    Python code; what would be long inside one (a huge power, a factorial) is refused by `_is_tame`.
    """
    results: list[bool] = []

    def work() -> None:
        with contextlib.suppress(Exception, _OutOfTime):
            results.append(function())

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    for _ in range(20):  # an exception that comes while an object is deleted is lost
        if not thread.is_alive():
            break
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_OutOfTime))
        thread.join(0.25)
    return bool(results and results[0])


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
    answer = boxed_answer(solution_str) if isinstance(solution_str, str) else None
    if answer is None:
        return {"score": 0.0, "acc": 0.0, "format": 0.0}
    try:
        right = float(same_answer(answer, ground_truth))
    except Exception:  # sympy raises all sorts of things on what models write
        right = 0.0
    return {"score": right, "acc": right, "format": 1.0}


def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A reward function that can't stop the run.

    Where ``function`` raises, or returns something without a finite score, the response scores 0 and
    ``reward_error`` is 1; otherwise ``reward_error`` is 0 and the result is that of ``function``. The mean of
    ``reward_error`` is the share of the responses that this happened to. The first error is logged with its cause.
    """
    known: dict[str, None] = {}
    logged: list[bool] = []

    def checked(result: Any) -> dict[str, Any]:
        values = dict(result) if isinstance(result, dict) else {"score": result}
        score = float(values["score"])
        if not math.isfinite(score):
            raise ValueError(f"the score is {score}")
        known.update(dict.fromkeys(values))
        return {**values, "score": score, "reward_error": 0.0}

    def fallback(error: Exception) -> dict[str, Any]:
        if not logged:
            logged.append(True)
            name = getattr(function, "__qualname__", repr(function))
            logger.warning("the reward function %s failed, its response scores 0: %r", name, error, exc_info=error)
        # verl drops a metric that any response lacks: all the keys seen so far are there.
        return {**dict.fromkeys(known, 0.0), "score": 0.0, "reward_error": 1.0}

    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def guarded_coroutine(*args: Any, **kwargs: Any) -> dict[str, Any]:
            try:
                return checked(await function(*args, **kwargs))
            except Exception as error:
                return fallback(error)

        return guarded_coroutine

    @functools.wraps(function)
    def guarded_function(*args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            return checked(function(*args, **kwargs))
        except Exception as error:
            return fallback(error)

    return guarded_function
