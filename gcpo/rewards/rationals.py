"""Exact comparison of answers that are rational numbers, without math-verify."""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction

from gcpo.rewards.notation import DECIMAL, NUMBER, SCALED, SCALES

__all__ = ["endless", "exact_fractions", "same_rational", "value"]

_EXPONENT = r"(?:\{([+-]?\d{1,3})\}|(\d))"
_SCIENTIFIC = re.compile(
    rf"([+-]?{DECIMAL})(?:[eE]([+-]?\d{{1,3}})| ?(?:\\times|\\cdot|\*) ?10\^{_EXPONENT})?", re.ASCII
)
_POWER_OF_TEN = re.compile(rf"([+-]?1)0\^{_EXPONENT}", re.ASCII)
_FRACTION = re.compile(rf"([+-]?)(\d*)\\frac\{{([+-]?{DECIMAL})\}}\{{([+-]?{DECIMAL})\}}", re.ASCII)
_RATIO = re.compile(rf"([+-]?{DECIMAL})/({DECIMAL})", re.ASCII)
_MIXED = re.compile(r"([+-]?)(\d+) (\d+)/(\d+)", re.ASCII)
_BAR = r"\\(?:overline|bar)\s*(?:\{(\d+)\}|(\d))"
_DOTS = r"((?:\\dot\s*\{?\d\}?\d*)?\\dot\s*\{?\d\}?)"
_REPEATING = re.compile(rf"(?<![\w.])(\d*)\.(\d*)(?:{_BAR}|{_DOTS}|\((\d+)\))", re.ASCII)
_CONTINUED = re.compile(r"([+-]?)(\d*)\.(\d*?)(?:(\d)\4\4+|(\d{2,6})\5+)(?:\.\.\.|\\l?dots)", re.ASCII)
_INNER_MIXED = re.compile(r"(?<![\w./}])(\d+) (\d+)/(\d+)(?![\w./])", re.ASCII)
_INNER_SCIENTIFIC = re.compile(rf"(?<![\w.])({DECIMAL})[eE]([+-]?\d{{1,3}})(?!\w)", re.ASCII)


def value(text: str) -> Fraction | None:
    """Return a normalised answer as a rational number, or ``None`` if it is not one.

    Decimals, repeating decimals, fractions, mixed numbers and scientific notation are supported.
    """
    if match := _SCIENTIFIC.fullmatch(text):
        return Fraction(Decimal(match[1])) * Fraction(10) ** int(match[2] or match[3] or match[4] or 0)
    if match := _POWER_OF_TEN.fullmatch(text):
        return int(match[1]) * Fraction(10) ** int(match[2] or match[3])
    if match := _REPEATING.fullmatch(text.lstrip("+-")):
        return (-1 if text.startswith("-") else 1) * _repeating(match)
    if match := _CONTINUED.fullmatch(text):
        sign, whole, fixed, *period = match.groups()
        number = _with_period(whole, fixed, period[0] or period[1])
        return -number if sign == "-" else number
    return _ratio(text)


def _ratio(text: str) -> Fraction | None:
    """Return the value of a fraction or a mixed number."""
    if match := _FRACTION.fullmatch(text):
        sign, whole, above, below = match.groups()
        if whole and not (above + below).isdecimal():  # ambiguous: 2 times a fraction, or a mixed number
            return None
    elif match := _MIXED.fullmatch(text):
        sign, whole, above, below = match.groups()
        if int(above) >= int(below):
            return None
    elif match := _RATIO.fullmatch(text):
        sign, whole, above, below = "", "", *match.groups()
    else:
        return None
    if Fraction(Decimal(below)) == 0:
        return None
    number = int(whole or 0) + Fraction(Decimal(above)) / Fraction(Decimal(below))
    return -number if sign == "-" else number


def _repeating(match: re.Match[str]) -> Fraction:
    r"""Return the value of ``0.1\overline{6}``, ``0.1\dot{6}`` or ``0.1(6)``."""
    whole, fixed, *periods = match.groups()
    return _with_period(whole, fixed, "".join(re.findall(r"\d", next(filter(None, periods)), re.ASCII)))


def _with_period(whole: str, fixed: str, period: str) -> Fraction:
    start = Fraction(int((whole + fixed) or 0), 10 ** len(fixed))
    return start + Fraction(int(period), 10 ** len(fixed) * (10 ** len(period) - 1))


def exact_fractions(text: str) -> str:
    """Convert repeating decimals and mixed numbers of a normalised answer to LaTeX fractions, for math-verify."""
    text = _REPEATING.sub(lambda m: _latex(_repeating(m)), text)
    text = _INNER_MIXED.sub(lambda m: rf"{m[1]}\frac{{{m[2]}}}{{{m[3]}}}" if int(m[2]) < int(m[3]) else m[0], text)
    return _INNER_SCIENTIFIC.sub(r"\1\\times 10^{\2}", text)


def _latex(number: Fraction) -> str:
    return rf"\frac{{{number.numerator}}}{{{number.denominator}}}"


def same_rational(answer: str, truth: str) -> bool | None:
    """Return whether two normalised answers are the same number, or ``None`` if one of them is not a rational number.

    The question may ask for per cent or millions, so 25 % equals 25.
    """
    answer, answer_scale = unscaled(answer)
    truth, truth_scale = unscaled(truth)
    given, right = value(answer), value(truth)
    if given is None or right is None:
        return None
    if given * Fraction(10) ** answer_scale == right * Fraction(10) ** truth_scale:
        return True
    if not scales_agree(answer_scale, truth_scale):
        return False
    return given == right or _rounds_to(right, answer) or _rounds_to(given, truth)


def unscaled(text: str) -> tuple[str, int]:
    """Return a normalised answer without its percent sign or its "million", and the power of ten of that scale."""
    scaled = SCALED.fullmatch(text)
    return (scaled[1], SCALES[scaled[2]]) if scaled else (text, 0)


def scales_agree(one: int, other: int) -> bool:
    """Return whether two numbers have the same scale, or one of them has none."""
    return one == other or 0 in (one, other)


def _rounds_to(number: Fraction, decimal: str) -> bool:
    """Return whether a decimal with at least six significant digits is the rounding of a number without finite form."""
    digits = decimal.partition(".")[2]
    if not NUMBER.fullmatch(decimal) or len(decimal.lstrip("+-0.").replace(".", "")) < 6 or not digits:
        return False
    return round(number, len(digits)) == Fraction(Decimal(decimal)) and endless(number.denominator)


def endless(denominator: int) -> bool:
    """Return whether a number with this denominator, in lowest terms, has no finite decimal form."""
    return pow(10, denominator.bit_length(), denominator) != 0
