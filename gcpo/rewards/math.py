"""Grading of mathematics: answers are compared as text, as numbers and by math-verify."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterator
from typing import Any

from gcpo.rewards import expressions, readings
from gcpo.rewards.answers import boxed_answers, stated_answer
from gcpo.rewards.math_verify_pool import shared
from gcpo.rewards.notation import TIME, normalize, plain, split_list
from gcpo.rewards.rationals import same_rational, scales_agree, unscaled
from gcpo.rewards.sources import without_array
from gcpo.rewards.units import conflicting_units, without_unit

__all__ = ["boxed_answer", "grade", "is_decided", "normalize", "right_answers", "same_answer"]

MAX_ANSWER_CHARS = 1000
"""A longer answer is graded as wrong; the answers of the supported data sets are much shorter."""

Questions = list[tuple[str, str]]
"""Pairs of a truth and an answer for math-verify; all of them have to be equal."""

_ALTERNATIVES = re.compile(r"(\d+(?: or \d+)+) \(.*\)", re.ASCII)
_WORDS = re.compile(r"[A-Za-z][A-Za-z ]{3,}|[A-Z][a-z]+")
_TEXT = re.compile(r"\\(?:text|mathrm|mbox)\w*\s*\{[A-Za-z ]{2,}\}")
_BASED = re.compile(r"[0-9A-Z]+_(?:\{\d+\}|\d)", re.ASCII)
_GROUPS_OF_THREE = re.compile(r"\$?(\d{3}(?:,\d{3})+)\$?", re.ASCII)
_PRIMES = re.compile(r"(?<=[A-Za-z})])'+")
_ELLIPSIS = re.compile(r"\\(?:l|c)?dots(?![A-Za-z])|\.\.\.")


def boxed_answer(response: str) -> str | None:
    """Return the answer in the boxes that end a response, see `boxed_answers`; several boxes give a list (``3, 5``)."""
    answers = _distinct_answers(response)
    return ", ".join(answers) if answers is not None else None


def _distinct_answers(response: str) -> list[str] | None:
    """Return `boxed_answers` without earlier forms of the same number."""
    answers = boxed_answers(response)
    if answers is None or len(answers) == 1:
        return answers
    return [one for at, one in enumerate(answers) if not any(_same(one, later) is True for later in answers[at + 1 :])]


def same_answer(answer: str, truth: Any) -> bool:
    """Return whether an answer is right, or equals one of several right answers.

    Both are normalised and compared as text, then exactly if both are rational numbers, and otherwise by
    math-verify within limits of time and memory.

    Args:
        answer: the given answer.
        truth: a text or a number, or a list of accepted ones. A value of another type equals no answer.

    Raises:
        GraderError: math-verify cannot be started.
    """
    verdict = _by_text_and_number(answer, truth)
    if isinstance(verdict, bool):
        return verdict
    return any(all(_same_mathematics(right, given) for right, given in questions) for questions in verdict)


def is_decided(solution_str: Any, ground_truth: Any) -> bool:
    """Return whether `grade` decides a response without math-verify, which is fast."""
    answers = _distinct_answers(solution_str) if isinstance(solution_str, str) else None
    return answers is not None and len(answers) == 1 and isinstance(_by_text_and_number(answers[0], ground_truth), bool)


def _by_text_and_number(answer: str, truth: Any) -> bool | list[Questions]:
    """Return whether an answer is right, or the questions for math-verify, a list for every undecided right answer."""
    if len(answer) > MAX_ANSWER_CHARS or not normalize(answer):
        return False
    undecided = []
    for right in right_answers(truth):
        verdict = _same(answer, right) if len(right) <= MAX_ANSWER_CHARS else False
        if verdict is True:
            return True
        if verdict:
            undecided.append(verdict)
    return undecided or False


def right_answers(truth: Any) -> Iterator[str]:
    """Yield the texts of all right answers.

    Args:
        truth: a text or a number, or a list of these; anything else holds none.
    """
    truth = without_array(truth)
    if isinstance(truth, list | tuple):
        for one in truth:
            yield from right_answers(one)
    elif isinstance(truth, str):
        yield from _alternatives(truth)
    elif isinstance(truth, int | float) and not isinstance(truth, bool) and math.isfinite(truth):
        yield str(truth)


def _alternatives(text: str) -> list[str]:
    """Return the right answers in a text.

    A text usually holds one; it holds several for ``["1", "2"]``, as data preparation writes them, and for AIME's
    ``1 or 2 (both were accepted)``.
    """
    if text.startswith('["'):
        try:
            texts = json.loads(text)
        except (ValueError, RecursionError):
            return [text]  # not JSON, so LaTeX
        if all(isinstance(one, str) for one in texts):
            return texts
    match = _ALTERNATIVES.fullmatch(text.strip())
    return match[1].split(" or ") if match else [text]


# ---- comparison as text and as numbers -------------------------------------------------------------------------------


def _same(answer: str, truth: str) -> bool | Questions:
    """Return whether two answers are the same, or the questions for math-verify that would decide it."""
    given, right = (expressions.special(one) or one for one in (normalize(answer), normalize(truth)))
    if not given or not right:
        return False
    texts = plain(answer), plain(truth)
    if conflicting_units(*texts):
        return False
    if _key(given) == _key(right):
        return True
    chosen = [readings.choice(text) for text in texts]
    if all(chosen) or any(one and one.text for one in chosen):
        return _same_choice(texts, chosen)
    if all(map(_TEXT.fullmatch, texts)):
        return False
    lists = _lists_of_three_digits(answer, truth, given, right)
    if lists is not None:
        return [lists]
    return _same_normal(*(normalize(expressions.unit_vectors(text)) for text in texts))


def _key(text: str) -> str:
    """Return a form in which normalised answers that are the same as text are equal."""
    text = re.sub(r"(?<!\d) | (?!\d)", "", text)
    text = re.sub(r"([_^])\{(\w)\}", r"\1\2", text)
    if _WORDS.fullmatch(text):
        return text.lower()
    return text[1] if re.fullmatch(r"\([A-Z]\)", text) else text


def _same_choice(texts: tuple[str, str], chosen: list[readings.Choice | None]) -> bool | Questions:
    """Compare answers of which one has a letter of multiple choice and its value."""
    given, right = chosen
    if given and right:
        if given.letter != right.letter or not (given.text and right.text):
            return given.letter == right.letter
        if all(re.search("[A-Za-z]{3}", re.sub(r"\\[A-Za-z]+", "", one.text)) for one in (given, right)):
            return True  # the same choice in other words
    return _same(*(one.text if one else text for one, text in zip(chosen, texts, strict=True)))


def _lists_of_three_digits(answer: str, truth: str, given: str, right: str) -> tuple[str, str] | None:
    """Return the truth and the answer if one is a list and the other could be one: ``100, 200`` and ``100,200``."""
    ambiguous = [_GROUPS_OF_THREE.fullmatch(text.strip()) for text in (answer, truth)]
    if ambiguous[0] and not ambiguous[1] and len(split_list(right)) > 1:
        return right, ambiguous[0][1].replace(",", ", ")
    if ambiguous[1] and not ambiguous[0] and len(split_list(given)) > 1:
        return ambiguous[1][1].replace(",", ", "), given
    return None


def _same_normal(given: str, right: str) -> bool | Questions:
    """Compare two normalised answers that are different texts."""
    both = given, right
    if any(map(TIME.fullmatch, both)) or all(map(_WORDS.fullmatch, both)) or all(map(_BASED.fullmatch, both)):
        return False
    if any(map(_ELLIPSIS.search, both)) and not any(map(same_rational, both, both)):
        return False  # math-verify ignores the dots
    if _PRIMES.findall(given) != _PRIMES.findall(right):
        return False  # math-verify ignores the primes
    number = same_rational(given, right)
    return _same_statement(given, right) if number is None else number


def _same_statement(given: str, right: str) -> bool | Questions:
    """Compare answers that may name their value."""
    moduli = readings.modulus(given), readings.modulus(right)
    if moduli[1] and moduli[0] != moduli[1]:
        return False
    said, true = both = [readings.stated(expressions.cases(text)) for text in (given, right)]
    if moduli[0]:
        said, true = both = [one._replace(value=readings.without_modulus(one.value), equation="") for one in both]
    if bool(said.equation) != bool(true.equation) and not (said.name or true.name):
        return False
    if said.equation or true.equation:
        return not (said.links or true.links) and [(expressions.expression(right), expressions.expression(given))]
    if said.name and true.name:
        said, true = both = [readings.by_name(one) for one in both]
        if _key(said.name) != _key(true.name):
            return False
    value = said.value if said.name else without_unit(said.value, letters=readings.is_number(true.value))
    verdict = _same_value(value, without_unit(true.value, letters=False))
    links = [(expressions.expression(one.value), expressions.expression(link)) for one in both for link in one.links]
    return verdict and (([] if verdict is True else verdict) + links or verdict)


def _same_value(given: str, right: str) -> bool | Questions:
    """Compare two values as text, as numbers, or by math-verify."""
    if _key(given) == _key(right):
        return True
    number = same_rational(given, right)
    if number is not None:
        return number
    (given, given_scale), (right, right_scale) = unscaled(given), unscaled(right)
    if not scales_agree(given_scale, right_scale):
        return False
    given, right = expressions.expression(given), expressions.expression(right)
    matrices = [expressions.is_matrix(text) for text in (given, right)]
    if any(matrices) and not all(matrices):
        given, right = (expressions.column(text) or text for text in (given, right))
    if any(map(expressions.is_set, (given, right))) and any(map(expressions.is_ordered, (given, right))):
        return False
    return [(right, given)]


@functools.lru_cache(maxsize=10_000)
def _same_mathematics(truth: str, answer: str) -> bool:
    return truth == answer or shared().same(truth, answer)


# ---- the reward ------------------------------------------------------------------------------------------------------


def grade(solution_str: Any, ground_truth: Any, *, require_boxed: bool = True) -> tuple[bool, bool]:
    """Grade a response.

    Args:
        solution_str: the response; a value that is not a string is wrong.
        ground_truth: see `same_answer`.
        require_boxed: if False, the answer of a response without a box may follow "the answer is" or ``####``.

    Returns:
        Whether its answer is right, and whether it has a boxed answer.

    Raises:
        GraderError: math-verify cannot be started.
    """
    response = solution_str if isinstance(solution_str, str) else ""
    answers = _distinct_answers(response)
    if answers is not None:
        right = same_answer(", ".join(answers), ground_truth) or (
            len(answers) > 1 and all(same_answer(answer, ground_truth) for answer in answers)
        )
        return right, True
    stated = None if require_boxed else stated_answer(response)
    return stated is not None and same_answer(stated, ground_truth), False
