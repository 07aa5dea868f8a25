"""The grader's comparison of numbers, checked against math-verify's on generated pairs.

``python -m benchmarks.grader_pairs --pairs 20000 --output outputs/grader_pairs`` generates pairs of numbers, each in
one of the forms that `gcpo.rewards` compares without math-verify, and grades every pair three times:

* ours: `gcpo.rewards.same_answer`, which must decide the pair without math-verify;
* exact: the same two expressions compared by math-verify with the exact rules of the worker processes;
* bare: math-verify with its own rules.

The generator knows both numbers and therefore the right verdict. The program fails if ours differs from that verdict
or from exact. It counts the differences of bare, and writes examples to ``grader_pairs.json``.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import random
import sys
from collections import Counter
from collections.abc import Iterator
from decimal import ROUND_HALF_EVEN, Decimal, localcontext
from fractions import Fraction
from typing import NamedTuple

from benchmarks.common import arguments, save


class Number(NamedTuple):
    """A written number: its text, its exact value, the form, and the decimals of a plain decimal."""

    text: str
    value: Fraction
    form: str
    decimals: int | None = None


class Pair(NamedTuple):
    """A truth, an answer, and whether the answer is right."""

    truth: Number
    answer: Number
    right: bool


def _integer(value: Fraction, rng: random.Random) -> Number | None:
    if value.denominator != 1:
        return None
    number = int(value)
    forms = [str(number), str(number), f"{number:+d}", f"{number}.0", f"{number}."]
    if number >= 0:
        forms.append(f"0{number}")
    if abs(number) >= 1000:
        forms += [f"{number:,}".replace(",", "{,}"), f"{number:,}".replace(",", r",\!")]
    return Number(rng.choice(forms), value, "integer")


def _decimal(value: Fraction, rng: random.Random) -> Number | None:
    """Return a decimal: exact, or rounded to one to nine places."""
    places = rng.randint(1, 9)
    with localcontext() as context:
        context.prec = 60
        rounded = (Decimal(value.numerator) / Decimal(value.denominator)).quantize(
            Decimal(1).scaleb(-places), ROUND_HALF_EVEN
        )
    text = f"{rounded:f}"
    return Number(text, Fraction(rounded), "decimal", places)


def _fraction(value: Fraction, rng: random.Random) -> Number | None:
    if value.denominator == 1 and rng.random() < 0.8:
        return None
    factor = rng.choice([1, 1, 2, 3, 10])
    above, below = abs(value.numerator) * factor, value.denominator * factor
    sign = "-" if value < 0 else ""
    if rng.random() < 0.3:
        return Number(f"{sign}{above}/{below}", value, "a/b")
    command = rng.choice([r"\frac", r"\dfrac", r"\tfrac"])
    return Number(f"{sign}{command}{{{above}}}{{{below}}}", value, "fraction")


def _mixed(value: Fraction, rng: random.Random) -> Number | None:
    whole, above = divmod(abs(value.numerator), value.denominator)
    if not whole or not above:
        return None
    sign = "-" if value < 0 else ""
    if rng.random() < 0.4:
        return Number(f"{sign}{whole} {above}/{value.denominator}", value, "mixed number in plain text")
    return Number(f"{sign}{whole}\\frac{{{above}}}{{{value.denominator}}}", value, "mixed number")


def _scientific(value: Fraction, rng: random.Random) -> Number | None:
    exponent = rng.randint(-30, 30)
    mantissa = Decimal(value.numerator) / Decimal(value.denominator)
    if Fraction(mantissa) == value and rng.random() < 0.8:  # it has a finite decimal form
        exponent = rng.randint(-6, 6)
        mantissa = mantissa.scaleb(-exponent)
    else:
        mantissa = Decimal(rng.randint(-99999, 99999)).scaleb(-rng.randint(0, 4))
        value = Fraction(mantissa) * Fraction(10) ** exponent
    if rng.random() < 0.3:
        return Number(f"{mantissa:f}e{exponent}", value, "e notation")
    times = rng.choice([r"\times ", r" \times ", r"\cdot "])
    return Number(f"{mantissa:f}{times}10^{{{exponent}}}", value, "scientific")


def _repeating(value: Fraction, rng: random.Random) -> Number | None:
    """Return the decimal expansion of a fraction with its period under a bar."""
    rest, digits, seen = abs(value.numerator) % value.denominator, "", {}
    while rest and rest not in seen and len(digits) < 40:
        seen[rest] = len(digits)
        digit, rest = divmod(rest * 10, value.denominator)
        digits += str(digit)
    if rest not in seen:
        return None
    start, sign = seen[rest], "-" if value < 0 else ""
    bar = rng.choice([r"\overline{%s}", r"\bar{%s}", "(%s)"]) % digits[start:]
    whole = abs(value.numerator) // value.denominator
    return Number(f"{sign}{whole}.{digits[:start]}{bar}", value, "repeating decimal")


FORMS = (_integer, _decimal, _fraction, _mixed, _scientific, _repeating)


def _value(rng: random.Random) -> Fraction:
    kind = rng.random()
    if kind < 0.3:
        return Fraction(rng.randint(-50, 50))
    if kind < 0.4:
        return Fraction(rng.randint(-(10**7), 10**7))
    return Fraction(rng.randint(-400, 400), rng.choice([2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 16, 25, 30, 99, 100, 1000]))


def _near(value: Fraction, rng: random.Random) -> Fraction:
    """Return a value that could result from a mistake."""
    mistakes = [-value, value + 1, value * 10, value + Fraction(1, 10 ** rng.randint(1, 20))]
    return rng.choice([*mistakes, 1 / value] if value else mistakes)


def _written(value: Fraction, rng: random.Random) -> Number:
    while True:
        number = rng.choice(FORMS)(value, rng)
        if number is not None:
            return number


def _stands_for(decimal: Number, number: Fraction) -> bool:
    """Return whether a decimal with six significant digits correctly rounds a number without finite decimal form."""
    digits = decimal.text.lstrip("+-0.").rstrip("0").replace(".", "")
    if decimal.form != "decimal" or len(digits) < 6:
        return False
    endless = 10 ** number.denominator.bit_length() % number.denominator > 0
    return endless and round(number, decimal.decimals) == decimal.value


def pairs(count: int, seed: int) -> Iterator[Pair]:
    """Yield pairs of numbers in the forms of `FORMS`.

    The pairs come in groups of 30: all ordered pairs of six texts, of which four are written for one value and two for
    values near it. A text may be the rounded form of its value; the right verdict is about the values of the texts.
    """
    rng = random.Random(seed)
    for number in range(count):
        if number % 30 == 0:
            value = _value(rng)
            texts = [_written(value, rng) for _ in range(4)] + [_written(_near(value, rng), rng) for _ in range(2)]
            group = list(itertools.permutations(texts, 2))
        truth, answer = group[number % 30]
        right = truth.value == answer.value or _stands_for(answer, truth.value) or _stands_for(truth, answer.value)
        yield Pair(truth, answer, right)


def _bare(found: list[Pair]) -> list[bool]:
    from math_verify import parse, verify

    @functools.lru_cache(maxsize=64)
    def read(text: str) -> list[object]:
        return parse(f"\\boxed{{{text}}}", parsing_timeout=None)

    return [bool(verify(read(p.truth.text), read(p.answer.text), timeout_seconds=None)) for p in found]


def ours(pair: Pair) -> bool | None:
    """Return the grader's verdict without math-verify, or ``None`` if it needs math-verify."""
    from gcpo.rewards import is_decided, same_answer

    if not is_decided(f"\\boxed{{{pair.answer.text}}}", pair.truth.text):
        return None
    return same_answer(pair.answer.text, pair.truth.text)


def exact(pair: Pair) -> bool:
    """Return math-verify's verdict with the rules of the worker processes."""
    from gcpo.rewards.expressions import expression
    from gcpo.rewards.math_verify_rules import same
    from gcpo.rewards.notation import normalize

    try:
        return same(expression(normalize(pair.truth.text)), expression(normalize(pair.answer.text)))
    except Exception:  # unreadable expressions differ, as in a worker
        return False


def main() -> None:
    """Command line."""
    parser = arguments(__doc__, "outputs/grader_pairs", model=False)
    parser.add_argument("--pairs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    found = list(pairs(args.pairs, args.seed))
    bare = _bare(found)  # before the exact rules replace math-verify's
    wrong: dict[str, list[str]] = {"ours": [], "exact": [], "bare": []}
    forms: Counter[str] = Counter()
    for pair, theirs in zip(found, bare, strict=True):
        forms[pair.answer.form] += 1
        for name, verdict in (("ours", ours(pair)), ("exact", exact(pair)), ("bare", theirs)):
            if verdict is not pair.right:
                wrong[name].append(f"{pair.truth.text} | {pair.answer.text} | right: {pair.right} | {name}: {verdict}")
    accepted = [line for line in wrong["bare"] if line.endswith("True")]
    result = {
        "pairs": args.pairs,
        "seed": args.seed,
        "right pairs": sum(pair.right for pair in found),
        "forms of the answers": dict(forms.most_common()),
        "verdicts that are wrong": {name: len(lines) for name, lines in wrong.items()},
        "wrong answers that bare math-verify accepts": len(accepted),
        "examples": {name: lines[:20] for name, lines in wrong.items()} | {"bare accepts": accepted[:20]},
    }
    save(args.output / "grader_pairs.json", result)
    print(json.dumps(result, indent=2))
    if wrong["ours"] or wrong["exact"]:
        sys.exit("grader_pairs: the comparison of numbers differs from math-verify's exact one")


if __name__ == "__main__":
    main()
