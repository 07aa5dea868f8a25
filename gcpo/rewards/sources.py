"""Selection of the grader of a row, and the place of the answer in a response.

verl's data preparation asks for GSM8K answers after ``####`` and for DAPO answers after ``Answer:``; all other
mathematics uses a box. Programs are recognised by the name of their data set or by their ground truth, which is
JSON with tests. `grader_of` refuses rows that no grader supports; before a run starts, `problem_of`
reports them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Literal

from gcpo.rewards.answers import answer_of

__all__ = ["Grader", "grader_of", "is_code", "marked_answer", "problem_of", "without_array"]

Grader = Literal["boxed", "hashes", "answer_line", "code"]
"""``boxed``, ``hashes`` and ``answer_line`` are mathematics, named after the place of the answer."""

VERL_CODE = frozenset({"codecontests", "apps", "codeforces", "taco"})
"""The data sets of verl's own code reward."""
CODE = VERL_CODE | {
    "code_contests", "livecodebench", "lcbv5", "leetcode", "deepcoder", "primeintellect", "mbpp", "mbppplus",
    "mbpp_plus", "humaneval", "humanevalplus", "humaneval_plus", "openai_humaneval", "kodcode", "acecode",
    "bigcodebench",
}  # fmt: skip
"""Names of data sets of programs, without the owner, in lower case."""
OWN_CODE = ("gcpo/mbpp", "gcpo/humaneval", "gcpo/eurus_code")
"""Prefixes of the names that ``data_prep`` gives to its sets of programs."""
DAPO = frozenset({"math_dapo", "math", "math_dapo_reasoning"})
"""The names that verl grades by the line ``Answer:``; a name that begins with ``aime`` is graded in the same way."""
REFUSED = {
    "searchr1_": "question answering by search, which is graded by the words of the answer",
}
"""Prefixes of names of data sets that verl grades and gcpo does not."""

_TEST_CODE = re.compile(r"\s*(?:assert\b|(?:async )?def \w+\(|import \w|from \w+(?:\.\w+)* import |class \w+|@\w)")
_HASHES = re.compile(r"####[\s*$\\(]*([-+]?[0-9][0-9,]*(?:\.[0-9]+)?)(?![\w/^]|\*(?!\*)|\.[0-9])", re.ASCII)
_ANSWER_LINE = re.compile(r"\banswer\b[*_ \t]*:[*_ \t]*([^\n]*[^\s*_][^\n]*)", re.IGNORECASE)
_AROUND = re.compile(r"^(?:\\\(|\\\[)\s*|\s*(?:\\\)|\\\])[.\s]*$")
LONGEST_TAIL = 2000
"""Number of characters at the end of a response in which a marked answer is searched."""


def is_code(data_source: Any) -> bool:
    """Return whether the name of a data set says that its answers are programs."""
    if not isinstance(data_source, str):
        return False
    name = data_source.lower()
    return name.rpartition("/")[2] in CODE or name.startswith(OWN_CODE)


def grader_of(data_source: Any, ground_truth: Any = None) -> Grader:
    """Return the grader of a row.

    Args:
        data_source: the name of its data set; an unknown name means mathematics with a boxed answer.
        ground_truth: its right answer or its tests. Where this is JSON with objects, the row is a program, whatever the
            name of the data set.

    Raises:
        ValueError: no grader supports the row; the message gives the reason.
    """
    name = data_source.lower() if isinstance(data_source, str) else ""
    bare = name.rpartition("/")[2]
    for beginning, kind in REFUSED.items():
        if bare.startswith(beginning):
            raise ValueError(f"the data set {data_source} is {kind}; gcpo.rewards has no grader for it")
    if is_code(data_source) or _holds_tests(ground_truth):
        return "code"
    if isinstance(ground_truth, str) and _TEST_CODE.match(ground_truth) and "assert" in ground_truth:
        raise ValueError(
            f"the ground truth of a row of {data_source} is Python code; put tests into JSON, as in docs/sandbox.md"
        )
    if name.startswith("gcpo/"):
        return "boxed"  # data_prep asks for a box
    if bare.startswith("gsm8k"):
        return "hashes"
    return "answer_line" if name in DAPO or bare.startswith("aime") or "dapo" in bare else "boxed"


def problem_of(data_source: Any, ground_truth: Any) -> str | None:
    """Return why a row cannot be graded, as one sentence, or None. No program is run."""
    from gcpo.rewards import code

    try:
        if grader_of(data_source, ground_truth) == "code":
            code.program_of("", code.load_tests(ground_truth))
    except (SyntaxError, TypeError, ValueError, RecursionError) as error:
        return " ".join(str(error).split())
    return None


def _holds_tests(ground_truth: Any) -> bool:
    """Return whether a ground truth is a JSON object or a list of objects, unlike LaTeX or a list of answers."""
    if isinstance(ground_truth, str):
        text = ground_truth.lstrip()
        if not text.startswith(("{", "[")) or "{" not in text or '"' not in text:
            return False
        try:
            ground_truth = json.loads(text)
        except (ValueError, RecursionError):
            return False
    ground_truth = without_array(ground_truth)
    if isinstance(ground_truth, list | tuple):
        return any(isinstance(one, Mapping) for one in ground_truth)
    return isinstance(ground_truth, Mapping) and bool(ground_truth)


def without_array(truth: Any) -> Any:
    """Convert a numpy value to a Python value, since lists are read from parquet as arrays."""
    return truth.tolist() if type(truth).__module__ == "numpy" and hasattr(truth, "tolist") else truth


def marked_answer(response: Any, grader: Grader) -> str | None:
    """Return the answer after the mark that a data set asks for; None without one or if a box follows it.

    Only the text after the thinking part counts. ``hashes``: the number after the last ``####``; a heading such as
    ``#### Step 2`` is not an answer. ``answer_line``: the rest of the last line with ``Answer:``.
    """
    if grader not in ("hashes", "answer_line") or not isinstance(response, str):
        return None
    tail = answer_of(response)[-LONGEST_TAIL:]
    marks = list((_HASHES if grader == "hashes" else _ANSWER_LINE).finditer(tail))
    last = marks[-1] if marks else None
    if last is None or max(tail.find("\\boxed", last.end()), tail.find("\\fbox", last.end())) >= 0:
        return None
    return _AROUND.sub("", last[1].strip().rstrip("*_ \t"))
