"""Outcome rewards, shared by training and evaluation.

``compute_score`` has the signature of verl's custom reward functions (``reward.custom_reward_function``). Answers are
graded by ``gcpo.rewards.math``, programs by ``gcpo.rewards.code``; `grader_of` chooses between them.
"""

from __future__ import annotations

import functools
import inspect
import logging
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import isfinite
from typing import Any

from gcpo.rewards.math import boxed_answer, is_decided, normalize, right_answers, same_answer
from gcpo.rewards.math import grade as _grade_math
from gcpo.rewards.math_verify_pool import GraderError, size
from gcpo.rewards.sources import grader_of, marked_answer, problem_of

__all__ = [
    "GraderError",
    "boxed_answer",
    "compute_score",
    "extracted_answer",
    "grade_many",
    "grader_of",
    "guarded",
    "normalize",
    "problem_of",
    "right_answers",
    "same_answer",
    "thinks",
]

logger = logging.getLogger(__name__)


def compute_score(
    data_source: Any,
    solution_str: Any,
    ground_truth: Any,
    extra_info: Any = None,
    *,
    format_weight: float = 0.0,
    require_think: bool = False,
    require_boxed: bool = True,
    **kwargs: Any,
) -> dict[str, float]:
    """Grade a response.

    The options come from ``reward.custom_reward_function.reward_kwargs``.

    Args:
        data_source: name of the data set; with the ground truth it selects the grader, see `grader_of`.
        solution_str: the response; a value that is not a string scores 0.
        ground_truth: the right answer, or a list of accepted answers; for programs the tests.
        extra_info: ``extra_info`` of the row; not used for mathematics.
        format_weight: share of the format in the score, from 0 to 1.
        require_think: whether the format asks for a thinking part before the answer, see `thinks`.
        require_boxed: if False, a response without a box may state its answer after words such as "the answer is".
        kwargs: options of `gcpo.rewards.code`, and other keywords that verl passes.

    Returns:
        ``acc``: 1 if the response is right, else 0. ``format``: 1 if it has the required form, else 0: a boxed answer,
        an answer after the mark that the data set asks for, or for programs a code block, after the thinking part if
        there is one. ``score``, the optimised reward: ``(1 - format_weight) * acc + format_weight * format``.

    Raises:
        ValueError: an option that is out of range, tests that cannot be read, or a row that no grader supports.
        GraderError: the grader itself does not start.
    """
    from gcpo.rewards import code

    _check_options(format_weight, require_think, require_boxed)
    grader = grader_of(data_source, ground_truth)
    if grader == "code":
        result = code.compute_score(solution_str, ground_truth, extra_info, **kwargs)
        right, formatted = result["acc"], bool(result["format"])
    elif (marked := marked_answer(solution_str, grader)) is not None:
        right, formatted = same_answer(marked, ground_truth), True
    else:
        right, formatted = _grade_math(solution_str, ground_truth, require_boxed=require_boxed)
    formatted = formatted and (thinks(solution_str) or not require_think)
    score = (1 - format_weight) * right + format_weight * formatted
    return {"score": float(score), "acc": float(right), "format": float(formatted)}


def _check_options(format_weight: Any, require_think: Any, require_boxed: Any) -> None:
    if isinstance(format_weight, bool) or not isinstance(format_weight, int | float) or not 0 <= format_weight <= 1:
        raise ValueError(f"reward option format_weight is {format_weight!r}; set it to a number from 0 to 1")
    for name, value in (("require_think", require_think), ("require_boxed", require_boxed)):
        if not isinstance(value, bool):
            raise ValueError(f"reward option {name} is {value!r}; set it to true or false")


def extracted_answer(data_source: Any, solution_str: Any, ground_truth: Any = None) -> str | None:
    """Return the part of a response that `compute_score` compares (an answer or a program), or None."""
    from gcpo.rewards import code

    if not isinstance(solution_str, str):
        return None
    grader = grader_of(data_source, ground_truth)
    if grader == "code":
        return code.extract(solution_str)
    marked = marked_answer(solution_str, grader)
    return boxed_answer(solution_str) if marked is None else marked


def thinks(response: str) -> bool:
    """Return whether a response begins with one closed, non-empty thinking part; the prompt may have opened it."""
    thought, closed, rest = response.partition("</think>")
    before, _, thought = thought.rpartition("<think>")
    return bool(closed and thought.strip()) and not before.strip() and not re.search("</?think>", rest)


def grade_many(
    responses: Sequence[Any],
    truths: Sequence[Any],
    data_sources: Sequence[Any] | str = "",
    extra_infos: Sequence[Any] | None = None,
    **kwargs: Any,
) -> list[dict[str, float]]:
    """Apply `compute_score` to [N] responses and [N] right answers, on all cores.

    Args:
        responses: [N] responses.
        truths: [N] right answers.
        data_sources: [N] names of data sets, or one name for all rows.
        extra_infos: [N] ``extra_info`` entries, if the grader needs them.
        kwargs: options of `compute_score`.

    Raises:
        ValueError, GraderError: as for `compute_score`, or the lengths differ.
    """
    sources = [data_sources] * len(responses) if isinstance(data_sources, str) else data_sources
    extras = [None] * len(responses) if extra_infos is None else extra_infos
    rows = list(zip(sources, responses, truths, extras, strict=True))
    with ThreadPoolExecutor(size()) as threads:
        # Text comparison alone is faster than handing the work to a thread.
        slow = {
            at: threads.submit(compute_score, *row, **kwargs)
            for at, row in enumerate(rows)
            if grader_of(row[0], row[2]) != "boxed" or not is_decided(row[1], row[2])
        }
        return [slow[at].result() if at in slow else compute_score(*row, **kwargs) for at, row in enumerate(rows)]


def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a reward function so that its errors cannot stop the run.

    If ``function`` raises an error or returns no finite score, the response scores 0 and
    ``reward_error`` is 1; otherwise ``reward_error`` is 0 and the result is that of ``function``. The mean of
    ``reward_error`` is the fraction of affected responses. The first error is logged with its cause.
    """
    known: dict[str, None] = {}
    logged: list[bool] = []

    def checked(result: Any) -> dict[str, Any]:
        values = dict(result) if isinstance(result, dict) else {"score": result}
        score = float(values["score"])
        if not isfinite(score):
            raise ValueError(f"the score is {score}")
        known.update(dict.fromkeys(values))
        return {**values, "score": score, "reward_error": 0.0}

    def fallback(error: Exception) -> dict[str, Any]:
        if not logged:
            logged.append(True)
            name = getattr(function, "__qualname__", repr(function))
            logger.warning("the reward function %s failed, its response scores 0: %r", name, error, exc_info=error)
        # verl drops a metric that any response lacks, so this result has all keys seen so far.
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
