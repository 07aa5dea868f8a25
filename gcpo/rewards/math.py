"""Grading of mathematics: the last boxed answer, normalised, and compared as text, as numbers and by math-verify."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

from gcpo.rewards.pool import shared

__all__ = ["boxed_answer", "grade", "is_decided", "normalize", "same_answer"]

MAX_ANSWER_CHARS = 1000
"""A longer answer is wrong: none of the supported data sets comes near."""
MAX_TEXT_CHARS = 2000
"""How much of the end of a response without a box is searched where no box is required."""


# ---- the answer of a response --------------------------------------------------------------------------------------

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)


def boxed_answer(response: str) -> str | None:
    r"""What the last ``\boxed{...}`` with balanced braces holds, ``None`` where there is none.

    What stands in a thinking part, closed or not, does not count.
    """
    response = response.rpartition("</think>")[2]
    return None if "<think>" in response else _last_boxed(response)


def _last_boxed(text: str) -> str | None:
    """Of the boxes that are closed the one that opens last, in time linear in the length."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    content = _last_closed(text, start)
    return _last_closed(text, 0) if content is None else content


def _last_closed(text: str, start: int) -> str | None:
    opened: list[int] = []  # where the content of an open box begins; -1 for any other brace
    begin = end = -1
    for token in _BRACES.finditer(text, start):
        if token[0] == "{":
            opened.append(-1)
        elif token[0] == "}":
            content = opened.pop() if opened else -1
            if content > begin:
                begin, end = content, token.start()
        elif len(token[0]) > 2:
            opened.append(token.end())
    return None if begin < 0 else text[begin:end]


# ---- its normal form -----------------------------------------------------------------------------------------------

_DECIMAL = r"(?:\d+(?:\.\d*)?|\.\d+)"
_NUMBER = re.compile(rf"[+-]?{_DECIMAL}", re.ASCII)
_GROUPED = re.compile(r"[+-]?\d{1,3}(?:(?:,\d{3})+|(?: \d{3})+)(?:\.\d+)?", re.ASCII)
_TIME = re.compile(r"(\d{1,2})(?::00|(:\d\d))? *([ap])\.? ?m\.?", re.ASCII | re.IGNORECASE)
_SCALES = {"%": -2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALED = re.compile(r"(.*[^ ]) ?(%|(?<![A-Za-z])(?:thousand|million|billion|trillion)(?![A-Za-z]))[A-Za-z ]*")
_FONT = r"\\(?:(?:text|math)(?:bf|it|rm|sf|tt|normal)?|mbox)\s*"
_UNIT = re.compile(rf"(?:\\cdot|\\times|/|\s)*{_FONT}\{{([\w ./^-]*)\}}\s*(?:\^\s*(?:\{{[^{{}}]*\}}|\w))?$", re.ASCII)
_NO_UNIT = re.compile(r"\b(?:and|or|if|percent|thousand|million|billion|trillion)\b", re.IGNORECASE)

_SYMBOLS = str.maketrans(
    {
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2212", "-"),
        **dict.fromkeys("\u00a0\u2009\u202f\t\r\n", " "),
        "\uff0c": ",", "\uff05": "%", "\u00d7": r"\times ", "\u00b7": r"\cdot ", "\u03c0": r"\pi ",
        "\u221e": r"\infty ", "\u00b0": r"^\circ ", "\u00b2": "^2", "\u00b3": "^3", "\u2264": r"\le ",
        "\u2265": r"\ge ", "\u222a": r"\cup ", "\u221a": r"\sqrt ",
    }
)  # fmt: skip


def _rules(*rules: tuple[str, str]) -> list[tuple[re.Pattern[str], str]]:
    return [(re.compile(pattern, re.ASCII), new) for pattern, new in rules]


_TIDY = _rules(
    (r"\\(?:left|right)\s*\.", ""),
    (r"\\(?:left|right|middle|[bB]igg?[lrm]?|displaystyle|textstyle)(?![A-Za-z])", ""),
    (r",\\!\s*|\{,\}", ","),
    (r"(?<=\d)\\[,;: ](?=\d{3}(?!\d))", ""),
    (r"(?<!\\)\\!", ""),
    (r"(?<!\\)\\[,;:> ]|~|\\q?quad(?![A-Za-z])", " "),
    (r"\\?[$\u00a3\u20ac]", ""),
)
_NO_FONT = _rules((_FONT + r"\{([^{}]*)\}", r"\1"))
_SHORTEN = _rules(
    (r"\\?%|(?<![A-Za-z])percent(?![A-Za-z])", "%"),
    (r"\s*(?:\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree)\s*[CF]?\s*(?=$|[,)\]])", ""),
    (r"(?<=\d)\s*\^\s*\{?(?:\s*\\prime)+\s*\}?$", ""),
    (r"\^(?:\\prime(?![A-Za-z])|\{\s*\\prime\s*\})", "'"),
    (r"\\[cdt]frac(?![A-Za-z])", r"\\frac"),
    (r"\\frac\s*(\w)\s*(?=[\w{])", r"\\frac{\1}"),
    (r"\\frac\s*(\{[^{}]*\})\s*(\w)", r"\\frac\1{\2}"),
    (r"\\sqrt\s*(\w)", r"\\sqrt{\1}"),
    (r" +", " "),
    (r"(?<![\w,]) | (?!\w)", ""),  # the others part words, numbers, a command from what follows, or a list
)


def _apply(rules: list[tuple[re.Pattern[str], str]], text: str) -> str:
    for pattern, new in rules:
        text = pattern.sub(new, text)
    return text.strip()


@functools.lru_cache(maxsize=10_000)
def normalize(answer: str) -> str:
    """An answer without what does not change it.

    That is boxes, dollar signs, fonts, spaces, units, degree signs, thousands separators, leading zeros and decimals
    that are zero. LaTeX stays LaTeX, and normalising it again changes nothing. Percent signs and words like
    "million" stay.
    """
    answer = answer.translate(_SYMBOLS).strip()
    if _BOX.match(answer):
        answer = _last_boxed(answer) or answer
    answer = _apply(_TIDY, answer)
    if time := _TIME.fullmatch(_apply(_NO_FONT, answer)):
        return f"{time[1]}{time[2] or ''} {time[3].lower()}.m."
    while unit := _UNIT.search(answer):
        number = answer[: unit.start()]
        if _NO_UNIT.search(unit[1]) or not re.search(r"[\d\\]", number):
            break
        answer = number
    answer = _apply(_SHORTEN, _apply(_NO_FONT, answer)).rstrip(". ")
    if scaled := _SCALED.fullmatch(answer):
        return _plain_number(scaled[1]) + ("%" if scaled[2] == "%" else f" {scaled[2]}")
    return _plain_number(answer)


def _plain_number(text: str) -> str:
    """``1027`` for ``01,027.0``; what is no number stays as it is."""
    ungrouped = re.sub("[, ]", "", text) if _GROUPED.fullmatch(text) else text
    if not _NUMBER.fullmatch(ungrouped):
        return text
    number = Decimal(ungrouped)
    if number == 0:
        return "0"
    plain = f"{number:f}"
    return plain.rstrip("0").rstrip(".") if "." in plain else plain


# ---- comparison ----------------------------------------------------------------------------------------------------

_ALTERNATIVES = re.compile(r"(\d+(?: or \d+)+)(?: \(.*\))?", re.ASCII)
_WORDS = re.compile(r"[A-Za-z][A-Za-z ]{3,}")
_BASED = re.compile(r"[0-9A-Z]+_(?:\{\d+\}|\d)", re.ASCII)
_EXPONENT = r"(?:\{([+-]?\d{1,3})\}|(\d))"
_SCIENTIFIC = re.compile(
    rf"([+-]?{_DECIMAL})(?:[eE]([+-]?\d{{1,3}})| ?(?:\\times|\\cdot|\*) ?10\^{_EXPONENT})?", re.ASCII
)
_POWER_OF_TEN = re.compile(rf"([+-]?1)0\^{_EXPONENT}", re.ASCII)
_FRACTION = re.compile(rf"([+-]?)(\d*)\\frac\{{([+-]?{_DECIMAL})\}}\{{([+-]?{_DECIMAL})\}}", re.ASCII)
_RATIO = re.compile(rf"([+-]?{_DECIMAL})/({_DECIMAL})", re.ASCII)


def same_answer(answer: str, truth: Any) -> bool:
    """Whether an answer is the right one, or one of several right ones.

    Both are normalised and compared as text, then, where both are rational numbers, exactly, and otherwise by
    math-verify within limits of time and memory.

    Args:
        answer: what was answered.
        truth: a text or a number, or a list of such that are all right. Anything else equals no answer.

    Raises:
        GraderError: math-verify cannot be run at all.
    """
    verdict = _by_text_and_number(answer, truth)
    return verdict if isinstance(verdict, bool) else any(_same_mathematics(right, given) for right, given in verdict)


def is_decided(solution_str: Any, ground_truth: Any) -> bool:
    """Whether `grade` needs no math-verify for a response, and so next to no time."""
    answer = boxed_answer(solution_str) if isinstance(solution_str, str) else None
    return answer is not None and isinstance(_by_text_and_number(answer, ground_truth), bool)


def _by_text_and_number(answer: str, truth: Any) -> bool | list[tuple[str, str]]:
    """Whether an answer is right, or what math-verify has to compare to tell: right answers, each with the answer."""
    given = normalize(answer) if len(answer) <= MAX_ANSWER_CHARS else ""
    open_questions = []
    for right in _truths(truth) if given else ():
        verdict = _same(given, normalize(right)) if len(right) <= MAX_ANSWER_CHARS else False
        if verdict is True:
            return True
        if verdict:
            open_questions.append(verdict)
    return open_questions or False


def _truths(truth: Any) -> Iterator[str]:
    """The texts of all right answers."""
    if type(truth).__module__ == "numpy" and hasattr(truth, "tolist"):  # lists come back from parquet as arrays
        truth = truth.tolist()
    if isinstance(truth, list | tuple):
        for one in truth:
            yield from _truths(one)
    elif isinstance(truth, str):
        yield from _alternatives(truth)
    elif isinstance(truth, int | float) and not isinstance(truth, bool) and math.isfinite(truth):
        yield str(truth)


def _alternatives(text: str) -> list[str]:
    """The right answers that a text holds: one, ``["1", "2"]`` as data preparation writes several, or ``1 or 2``."""
    if text.startswith('["'):
        try:
            texts = json.loads(text)
        except (ValueError, RecursionError):
            return [text]  # not JSON, so LaTeX
        if all(isinstance(one, str) for one in texts):
            return texts
    match = _ALTERNATIVES.fullmatch(text.strip())
    return match[1].split(" or ") if match else [text]


def _same(answer: str, truth: str) -> bool | tuple[str, str]:
    """Whether two normalised answers are the same, or the truth and the answer that math-verify has to compare."""
    if not truth:
        return False
    if _key(answer) == _key(truth):
        return True
    both = answer, truth
    if any(map(_TIME.fullmatch, both)) or all(map(_WORDS.fullmatch, both)) or all(map(_BASED.fullmatch, both)):
        return False
    answer, answer_scale = _unscaled(answer)
    truth, truth_scale = _unscaled(truth)
    # The unit of the question may be per cent, or millions: then 25 % is 25.
    comparable = answer_scale == truth_scale or 0 in (answer_scale, truth_scale)
    given, right = _value(answer), _value(truth)
    if given is None or right is None:
        return comparable and (truth, answer)
    if given * Fraction(10) ** answer_scale == right * Fraction(10) ** truth_scale:
        return True
    return comparable and (given == right or _rounds_to(right, answer) or _rounds_to(given, truth))


def _key(text: str) -> str:
    """What two answers that are the same as text have in common."""
    text = re.sub(r"(?<!\d) | (?!\d)", "", text)
    text = re.sub(r"([_^])\{(\w)\}", r"\1\2", text)
    if _WORDS.fullmatch(text):
        return text.lower()
    return text[1] if re.fullmatch(r"\([A-Z]\)", text) else text


def _unscaled(text: str) -> tuple[str, int]:
    """A normalised answer without its percent sign or its "million", and the power of ten that this stands for."""
    scaled = _SCALED.fullmatch(text)
    return (scaled[1], _SCALES[scaled[2]]) if scaled else (text, 0)


def _value(text: str) -> Fraction | None:
    """The rational number that a normalised answer is, also in scientific notation; ``None`` where it is none."""
    if match := _SCIENTIFIC.fullmatch(text):
        return Fraction(Decimal(match[1])) * Fraction(10) ** int(match[2] or match[3] or match[4] or 0)
    if match := _POWER_OF_TEN.fullmatch(text):
        return int(match[1]) * Fraction(10) ** int(match[2] or match[3])
    if match := _FRACTION.fullmatch(text):
        sign, whole, above, below = match.groups()
        if whole and not (above + below).isdecimal():  # 2 times a fraction, or a mixed number?
            return None
    elif match := _RATIO.fullmatch(text):
        sign, whole, above, below = "", "", *match.groups()
    else:
        return None
    if Fraction(Decimal(below)) == 0:
        return None
    value = int(whole or 0) + Fraction(Decimal(above)) / Fraction(Decimal(below))
    return -value if sign == "-" else value


def _rounds_to(number: Fraction, decimal: str) -> bool:
    """Whether a decimal with six significant digits or more is a number that has no end as a decimal, rounded."""
    digits = decimal.partition(".")[2]
    if not _NUMBER.fullmatch(decimal) or len(decimal.lstrip("+-0.").replace(".", "")) < 6 or not digits:
        return False
    return round(number, len(digits)) == Fraction(Decimal(decimal)) and _endless(number)


def _endless(number: Fraction) -> bool:
    rest = number.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest != 1


@functools.lru_cache(maxsize=10_000)
def _same_mathematics(truth: str, answer: str) -> bool:
    return shared().same(truth, answer)


# ---- the reward ----------------------------------------------------------------------------------------------------


def grade(solution_str: Any, ground_truth: Any, *, require_boxed: bool = True) -> tuple[bool, bool]:
    """Grade a response.

    Args:
        solution_str: the response; one that is no text is wrong.
        ground_truth: see `same_answer`.
        require_boxed: False: where there is no box, math-verify looks for an answer after words like "the answer is".

    Returns:
        Whether its answer is right, and whether it has a boxed answer.

    Raises:
        GraderError: math-verify cannot be run at all.
    """
    response = solution_str if isinstance(solution_str, str) else ""
    answer = boxed_answer(response)
    if answer is not None:
        return same_answer(answer, ground_truth), True
    return not require_boxed and _states(response, ground_truth), False


def _states(response: str, truth: Any) -> bool:
    """Whether math-verify finds the right answer after a word like "answer" behind the thinking part."""
    text = response.rpartition("</think>")[2]
    if "<think>" in text or "answer" not in text[-MAX_TEXT_CHARS:].lower():
        return False
    return any(
        shared().same(normalize(one), text[-MAX_TEXT_CHARS:], boxed=False)
        for one in _truths(truth)
        if one.strip() and len(one) <= MAX_ANSWER_CHARS
    )
