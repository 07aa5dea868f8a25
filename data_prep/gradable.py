"""Check that the grader can grade the right answers of a set.

An answer is useless if the grader rejects a response that has exactly this answer in its box. An answer that
math-verify cannot parse as mathematics is compared only as text; such rows are counted.

A separate program, ``python -m data_prep.gradable``, parses the answers: sympy evaluates while parsing, which does not
end for some answers, in code that no exception interrupts. A signal ends the program at such an answer.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_prep.schema import DataSet, Drop, Row
from gcpo.rewards import GraderError, boxed_answer, grader_of, same_answer

UNGRADABLE = "an answer that the grader cannot take for right, such as unclosed braces"
TEXT_ONLY = "an answer that math-verify cannot read, which is compared as text only"
SECONDS = 5.0
"""Processor time per answer in seconds."""
MEMORY = 2**30
"""Address space in bytes."""
_PLAIN = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)")


def checked(dataset: DataSet, row: Row) -> Row:
    """Return the row; in an evaluation set, which keeps all rows, with a note if it cannot be graded.

    Raises:
        Drop: the row cannot be graded, and the set is a training set.
    """
    if dataset.ability != "math" or is_gradable(row.ground_truth):
        return row
    if dataset.kind == "train":
        raise Drop(UNGRADABLE)
    return replace(row, note=f"{row.note}; {UNGRADABLE}" if row.note else UNGRADABLE)


def is_gradable(ground_truth: str) -> bool:
    """Return whether the grader accepts each of the right answers in the box of a response."""
    try:
        if grader_of("", ground_truth) != "boxed":
            return False
    except ValueError:  # it has the form of a program's tests
        return False
    boxes = [boxed_answer(rf"\boxed{{{answer}}}") for answer in forms_of(ground_truth)]
    return all(box is not None and same_answer(box, ground_truth) for box in boxes)


def forms_of(ground_truth: str) -> list[str]:
    """Return all right answers in a ``ground_truth`` that ``data_prep.answers.encode`` wrote."""
    return json.loads(ground_truth) if ground_truth.startswith('["') else [ground_truth]


def compared_as_text(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the numbers (in the source) of prepared rows with a right answer that math-verify cannot read."""
    answers = {row["extra_info"]["source_row"]: forms_of(row["reward_model"]["ground_truth"]) for row in rows}
    not_read = unreadable(answer for forms in answers.values() for answer in forms)
    return [number for number, forms in answers.items() if not_read.intersection(forms)]


def unreadable(answers: Iterable[str]) -> set[str]:
    """Return the answers that math-verify cannot parse within the limits. Plain numbers need no parser."""
    left = [answer for answer in dict.fromkeys(answers) if not _PLAIN.fullmatch(answer)]
    found: set[str] = set()
    while left:
        replies = _read(left)
        found |= {answer for answer, reply in zip(left, replies, strict=False) if reply == "0"}
        if len(replies) < len(left):  # the program ended at an answer that takes too long
            found.add(left[len(replies)])
        left = left[len(replies) + 1 :]
    return found


def _read(answers: list[str]) -> str:
    """Return one digit per answer, up to the answer at which the program ended."""
    folder = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([folder, *filter(None, sys.path)])}
    command = [sys.executable, "-m", "data_prep.gradable"]
    done = subprocess.run(command, input=json.dumps(answers).encode(), stdout=subprocess.PIPE, env=environment)
    replies = done.stdout.decode()
    if not replies.startswith("r"):
        raise GraderError("math-verify does not start (its error is above), so answers cannot be checked")
    return replies[1:]


def main() -> None:
    """Read a JSON list of answers; write ``r`` and then ``1`` or ``0`` for every answer."""
    answers = json.load(sys.stdin)
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # output of a library must not look like a reply
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    import logging

    from math_verify import LatexExtractionConfig, parse

    logging.disable(logging.CRITICAL)  # suppresses math-verify's warning about a missing time limit
    config = LatexExtractionConfig(boxed_match_priority=0)
    no_limit: Any = None  # declared as a number
    replies.write(b"r")
    for answer in answers:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # the signal ends this process
        try:
            read = parse(f"\\boxed{{{answer}}}", [config], fallback_mode="no_fallback", parsing_timeout=no_limit)
        except Exception:  # sympy raises many kinds of errors on unreadable texts
            read = []
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(b"1" if read else b"0")


if __name__ == "__main__":
    main()
