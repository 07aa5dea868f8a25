"""Exact comparison of two LaTeX expressions with math-verify.

math-verify reads the expressions and decides how sets, intervals, matrices, relations and numbers compare. Some of its
rules accept wrong answers. This module replaces those rules:

* Decimals are read as exact fractions, and numbers compare exactly (math-verify rounds to 6 and to 15 decimals).
* Only a fraction directly behind an integer makes a mixed number (math-verify reads ``5(5)`` as 10).
* Expressions are the same if they are equal wherever both have a real value, so ``sqrt(ab)`` is ``sqrt(a)sqrt(b)``.
* An equation differs from its right side, a list with a repeated element from the list without it, and two equations
  are not the same only because both have no solution.

Only the worker processes import this module, because it loads sympy.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

import sympy
from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy
from latex2sympy2_extended.math_normalization import NormalizationConfig, normalize_latex
from math_verify import grader
from sympy.core.function import AppliedUndef

from gcpo.rewards.rationals import endless

__all__ = ["same"]

CONFIG = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False
)
"""math-verify's own configuration without its units, which drop variables such as m and t."""
DIGITS = 400
"""Two constants that are not both rational are the same if they agree to this many digits."""
MIN_ROUNDED_DIGITS = 6
"""Significant digits that a decimal needs to count as an irrational number or a repeating fraction."""
SAMPLES = tuple(map(sympy.Rational, ("137/100", "271/83", "59/97", "401/53", "17/41")))
"""Values at which expressions are compared before they are simplified."""

_LETTERS = re.compile(r"\\[A-Za-z]+|[A-Za-z]")
_SPARE_SYMBOLS = ("\\Psi", "\\Xi", "\\Upsilon", "\\Omega", "\\Phi")
_SIMPLE_FRACTION = re.compile(r"\\frac\{\d+\}\{\d+\}", re.ASCII)
_NOT_SAMPLED = (sympy.Integral, sympy.Sum, sympy.Product, sympy.Limit, sympy.Derivative, AppliedUndef)

_IMAGINARY = {sympy.Symbol("i", real=real): sympy.I for real in (True, False, None)}

_decimals: dict[Any, int] = {}
"""The long decimals of the comparison: their exact values and the number of digits after the point."""


class _Exact(_Latex2Sympy):
    """math-verify's reader with exact decimals, and without mixed numbers that are not written as such."""

    def parse_number(self, text: str) -> Any:
        """Return a number; a decimal becomes an exact fraction."""
        number = super().parse_number(text)
        if not isinstance(number, sympy.Float):
            return number
        digits = text.replace(" ", "").replace(",", "")
        exact = sympy.Rational(digits)
        significant = digits.replace(".", "").lstrip("0")
        if len(significant) >= MIN_ROUNDED_DIGITS and digits.isascii() and "e" not in digits.lower():
            _decimals[abs(exact)] = len(digits.partition(".")[2])
        return exact

    def convert_postfix_list(self, arr: Any, i: int = 0) -> Any:
        """Read adjacent factors as a product, except for an integer before a fraction."""
        if i + 1 < len(arr):
            here, following = arr[i].getText(), arr[i + 1].getText()
            if here[-1:].isdigit() and following[:1] in "0123456789.":
                raise ValueError("two numbers side by side")
            if not (here.isdecimal() and _SIMPLE_FRACTION.fullmatch(following)):
                left = self.convert_postfix(arr[i])
                if isinstance(left, sympy.Expr) and not left.is_Matrix:
                    right = self.convert_postfix_list(arr, i + 1)
                    if isinstance(right, sympy.Expr) and not right.is_Matrix:
                        return self.mul_flat(left, right)
        return super().convert_postfix_list(arr, i)


# ---- numbers and expressions -----------------------------------------------------------------------------------------


def _same_value(gold: Any, pred: Any, *_: Any) -> bool:
    """Return whether two expressions or matrices are equal; replaces math-verify's numeric and symbolic comparison."""
    gold, pred = grader.safe_sympy_doit(gold), grader.safe_sympy_doit(pred)
    matrices = [isinstance(one, sympy.MatrixBase) for one in (gold, pred)]
    if any(matrices):
        return all(matrices) and gold.shape == pred.shape and all(map(_same_value, gold.flat(), pred.flat()))
    if not isinstance(gold, sympy.Expr) or not isinstance(pred, sympy.Expr):
        return False
    if not gold.has(*_NOT_SAMPLED) and not pred.has(*_NOT_SAMPLED):  # in a sum, i is an index
        gold, pred = gold.xreplace(_IMAGINARY), pred.xreplace(_IMAGINARY)
    if gold.has(sympy.nan, sympy.zoo) or pred.has(sympy.nan, sympy.zoo):
        return False
    if gold.free_symbols or pred.free_symbols or gold.has(AppliedUndef) or pred.has(AppliedUndef):
        return _same_function(gold, pred)
    return _same_constant(gold, pred)


def _same_constant(gold: sympy.Expr, pred: sympy.Expr) -> bool:
    if gold.is_infinite or pred.is_infinite:
        return bool(gold == pred)
    return _is_zero(gold - pred) or _rounded(gold, pred) or _rounded(pred, gold)


def _is_zero(difference: sympy.Expr) -> bool:
    """Return whether a constant is zero: exactly, or to `DIGITS` digits where it is irrational."""
    if difference.is_Rational:
        return bool(difference.is_zero)
    value = difference.evalf(15, maxn=DIGITS)
    if not value.is_number or value.atoms(sympy.Symbol):
        return False
    parts = value.as_real_imag()
    if not all(isinstance(part, sympy.Float | sympy.Rational) for part in parts):
        return bool(sympy.simplify(difference).is_zero)
    # sympy marks digits that it cannot compute to any precision with a precision of 1: the value is zero.
    return all(part == 0 or getattr(part, "_prec", 2) == 1 for part in parts)


def _rounded(decimal: Any, number: Any) -> bool:
    """Return whether a written decimal is the correct rounding of a number without a finite decimal form."""
    digits = _decimals.get(abs(decimal)) if decimal.is_Rational else None
    if not digits or not number.is_real:
        return False
    if number.is_Rational and not endless(int(number.q)):
        return False
    return bool(abs(number - decimal).evalf(30) <= sympy.Rational(1, 2 * 10**digits))


def _same_function(gold: Any, pred: Any) -> bool:
    """Return whether two expressions with variables are equal wherever both have a real value."""
    symbols = sorted(gold.free_symbols | pred.free_symbols, key=str)
    sampled = not gold.has(*_NOT_SAMPLED) and not pred.has(*_NOT_SAMPLED)
    if sampled and any(_differ_at(point, gold, pred) for point in _points(symbols, positive=True)):
        return False
    if sympy.simplify(gold - pred).is_zero:
        return True
    if not sampled:
        return False
    positive = {symbol: sympy.Dummy(positive=True) for symbol in symbols}
    difference = (gold.xreplace(positive) - pred.xreplace(positive)).doit()
    if not sympy.simplify(sympy.expand_log(difference)).is_zero:
        return False
    return not any(_differ_at(point, gold, pred) for point in _points(symbols, positive=False))


def _points(symbols: list[Any], positive: bool) -> Iterator[dict[Any, Any]]:
    """Yield values for the symbols: all positive, or one symbol negative in turn."""
    for shift in range(3):
        count = len(SAMPLES)
        point = {symbol: SAMPLES[(at + shift) % count] + at // count for at, symbol in enumerate(symbols)}
        if positive:
            yield point
        else:
            yield from ({**point, symbol: -point[symbol]} for symbol in symbols)


def _differ_at(point: dict[Any, Any], *both: sympy.Expr) -> bool:
    """Return whether both expressions have real values at a point, and different ones."""
    if not all(_is_defined(one, point) for one in both):
        return False
    first, second = (one.subs(point).evalf(30) for one in both)
    if not (first.is_Float or first.is_Rational) or not (second.is_Float or second.is_Rational):
        return False
    return bool(abs(first - second) > sympy.Float("1e-20") * (abs(first) + abs(second)))


def _is_defined(expression: sympy.Expr, point: dict[Any, Any]) -> bool:
    """Return whether all roots, powers, logarithms and factorials of an expression have real values at a point."""
    roots = (node for node in expression.atoms(sympy.Pow) if not node.exp.is_integer)
    nodes = (*roots, *expression.atoms(sympy.log, sympy.factorial))
    return all(node.args[0].subs(point).is_positive for node in nodes)


# ---- equations, sets and lists ---------------------------------------------------------------------------------------

_compare_expressions = grader.sympy_expr_eq
_compare_names = grader.sympy_compare_symbols
_solve_and_compare = grader.sympy_solve_and_compare


def _same_expression(gold: Any, pred: Any, *args: Any, **kwargs: Any) -> bool:
    """Compare as math-verify does, except that an equation is not its right side and repeated elements count."""
    for one, other in ((gold, pred), (pred, gold)):
        if grader.is_equation(one) and not grader.is_equation(other) and not _is_assignment(one):
            return False
    counts = _count(gold), _count(pred)
    if None not in counts and counts[0] != counts[1]:
        return False
    if isinstance(gold, sympy.FiniteSet) and isinstance(pred, sympy.FiniteSet) and counts[0] != len(gold):
        return _same_elements(gold, pred, *args)  # sets drop repeated elements, lists do not
    if grader.is_relation(gold) and grader.is_relation(pred) and not grader.is_equation(gold):
        same_regions = _same_regions(gold, pred)
        if same_regions is not None:
            return same_regions
    return _compare_expressions(gold, pred, *args, **kwargs)


def _is_assignment(equation: Any) -> bool:
    return isinstance(equation, sympy.Eq) and isinstance(equation.lhs, sympy.Symbol)


def _count(expression: Any) -> int | None:
    """Return the number of elements of a list as written; 1 for an expression, ``None`` for other sets."""
    if isinstance(expression, sympy.FiniteSet):
        return len(getattr(expression, "_unsorted_args", expression.args))
    if isinstance(expression, sympy.Tuple):
        return len(expression)
    if isinstance(expression, sympy.Interval) and expression.is_open:
        return 2  # it may be a pair
    return None if isinstance(expression, sympy.Set) or grader.is_relation(expression) else 1


def _same_regions(gold: Any, pred: Any) -> bool | None:
    """Return whether two inequalities in one variable have the same solutions; ``None`` if this cannot be decided."""
    if gold.free_symbols != pred.free_symbols or len(gold.free_symbols) != 1:
        return None
    try:
        difference = gold.as_set().symmetric_difference(pred.as_set())
    except Exception:  # sympy cannot solve it
        return None
    return difference.is_empty


def _same_elements(gold: Any, pred: Any, *args: Any) -> bool:
    """Return whether two lists or tuples have the same elements, in order if the right answer is ordered."""
    golds, preds = ([*getattr(one, "_unsorted_args", one.args)] for one in (gold, pred))
    if len(golds) != len(preds):
        return False
    if not isinstance(gold, sympy.FiniteSet):
        return all(grader.sympy_expr_eq(g, p, *args) for g, p in zip(golds, preds, strict=True))
    for one in golds:
        match = next((at for at, p in enumerate(preds) if grader.sympy_expr_eq(one, p, *args)), None)
        if match is None:
            return False
        del preds[match]
    return True


def _same_names(gold: Any, pred: Any) -> bool:
    """Replace math-verify's comparison of a variable with an expression, which compares only their names."""
    return bool(_compare_names(gold, pred)) or _same_value(gold, pred)


def _same_solutions(gold: Any, pred: Any, *args: Any) -> bool:
    """Replace math-verify's comparison of solutions, which accepts any two equations without solutions."""
    return bool(sympy.solve(gold, gold.free_symbols)) and _solve_and_compare(gold, pred, *args)


grader.sympy_numeric_eq = _same_value
grader.sympy_symbolic_eq = lambda gold, pred: False  # _same_value has decided
grader.sympy_expr_eq = _same_expression
grader.sympy_compare_symbols = _same_names
grader.sympy_deep_compare_set_and_tuple = _same_elements
grader.sympy_solve_and_compare = _same_solutions


# ---- the comparison --------------------------------------------------------------------------------------------------


def _tell_apart(truth: str, answer: str) -> tuple[str, str]:
    """Return both texts with other symbols for the capitals that also occur as small letters.

    math-verify lowers all letters, and so takes R - r for 0.
    """
    found = [set(_LETTERS.findall(text)) for text in (truth, answer)]
    clashing = sorted({one for symbols in found for one in symbols if one.isupper() and one.lower() in symbols})
    spare = [symbol for symbol in _SPARE_SYMBOLS if symbol not in found[0] | found[1]]
    names = {capital: symbol + " " for capital, symbol in zip(clashing, spare, strict=False)}
    if not names:
        return truth, answer
    renamed = [_LETTERS.sub(lambda m: names.get(m[0], m[0]), text) for text in (truth, answer)]
    return renamed[0], renamed[1]


def _region(expression: Any) -> Any:
    """Return the set of numbers that an inequality or a set describes."""
    return expression.as_set() if grader.is_relation(expression) else expression


def _parsed(text: str, real: bool) -> Any:
    for word, join in ((r"\lor", sympy.Union), (r"\land", sympy.Intersection)):
        parts = text.split(word)
        if len(parts) > 1:
            return join(*(_region(_parsed(part, real)) for part in parts))
    return _Exact(is_real=real).parse(normalize_latex(text, config=CONFIG))


@functools.lru_cache(maxsize=512)
def _cached(text: str, real: bool) -> tuple[Any, dict[Any, int]]:
    """Return math-verify's expression for a text, and the long decimals in the text."""
    _decimals.clear()
    return _parsed(text, real), dict(_decimals)


def same(truth: str, answer: str) -> bool:
    """Return whether two LaTeX expressions, the right answer and the given one, are the same.

    Raises:
        Exception: an expression cannot be read, or sympy cannot handle it. The caller counts this as "not the same".
    """
    truth, answer = _tell_apart(truth, answer)
    real = not any(map(grader.should_treat_as_complex, (truth, answer)))
    (gold, found), (pred, more) = _cached(truth, real), _cached(answer, real)
    _decimals.clear()
    _decimals.update(found | more)
    return bool(grader.verify(gold, pred, allow_set_relation_comp=True, timeout_seconds=None))
