"""Equality of two outputs of a program.

The file is sent to the sandbox as text (see ``judge.py``), so it uses only the standard library, from Python 3.10 on.

Integers must be equal exactly, in any notation: ``3.0`` and ``3e0`` are 3, and ``1000009999.0`` is not
1000000007. Only where the *expected* output is a decimal (``0.5``, ``1e-3``) may the printed value differ, by
`RELATIVE` relatively or by `ABSOLUTE`.
"""

import decimal
import math
import re
import sys

RELATIVE = decimal.Decimal("1e-5")
ABSOLUTE = decimal.Decimal("1e-8")
LONGEST = 400
"""Largest length of a decimal that is compared as a number; longer ones must be the same text."""

_INTEGER = re.compile(r"[+-]?[0-9]+")
# An exponent has at most five digits, because the decimal module supports no more.
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,5})?")
_CONTEXT = decimal.Context(prec=50, Emax=decimal.MAX_EMAX, Emin=decimal.MIN_EMIN, traps=[])


def same_output(printed, expected):
    """Return whether two texts have the same words in the same lines, regardless of empty lines and runs of spaces."""
    lines, right = ([line.split() for line in text.splitlines() if line.strip()] for text in (printed, expected))
    if lines == right:
        return True
    return len(lines) == len(right) and all(
        len(a) == len(b) and all(x == y or same_word(x, y) for x, y in zip(a, b, strict=True))
        for a, b in zip(lines, right, strict=True)
    )


def same_word(printed, expected):
    """Return whether two different words are the same number; two integers in digits must be the same text."""
    if _INTEGER.fullmatch(expected):
        if _INTEGER.fullmatch(printed) or not _NUMBER.fullmatch(printed):
            return False
        return decimal.Decimal(printed) == decimal.Decimal(expected)
    if max(len(printed), len(expected)) > LONGEST or not _NUMBER.fullmatch(printed) or not _NUMBER.fullmatch(expected):
        return False
    return close(decimal.Decimal(printed), decimal.Decimal(expected))


def close(number, expected):
    """Return whether two finite decimals differ by rounding only."""
    difference = _CONTEXT.abs(_CONTEXT.subtract(number, expected))
    return difference <= _CONTEXT.fma(RELATIVE, _CONTEXT.abs(expected), ABSOLUTE)


def same_value(value, expected):
    """Return whether a result is equal to the expected one, up to the rounding of an expected float.

    Lists and dictionaries are compared item by item.
    """
    if isinstance(value, list) and isinstance(expected, list):
        return len(value) == len(expected) and all(map(same_value, value, expected))
    if isinstance(value, dict) and isinstance(expected, dict):
        return value.keys() == expected.keys() and all(same_value(value[key], expected[key]) for key in expected)
    if type(expected) is float and (type(value) is int or type(value) is float):
        if type(value) is int and value.bit_length() > sys.float_info.max_exp:
            return False  # larger than every float
        if math.isfinite(expected) and math.isfinite(value):
            return close(decimal.Decimal(value), decimal.Decimal(expected))
        return value == expected or (value != value and expected != expected)
    return value == expected
