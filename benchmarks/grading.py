"""Grades per second on real responses, of gcpo and of bare math-verify, and the agreement of both with the labels.

``python -m benchmarks.grading --rollouts FOLDER --output outputs/grading`` reads every ``.jsonl`` file of the folder. A
row has the right ``answer``, ``response`` or ``responses`` (a list of texts), and their labels as ``score`` or
``correct``. Five ways to grade are measured in turn, in several rounds:

* bare: ``verify(parse(truth), parse(response))`` of math-verify with its own time limits, in the main thread;
* one caller: ``compute_score``, one response after another;
* all cores: ``grade_many``;
* workers, one caller, and workers, all cores: the same, except that no answer is decided as a text or a number: every
  boxed answer is compared by math-verify in a worker. This is the cost of a set of hard answers.

All caches are cleared before every measurement. The command prints medians over the rounds, every
response whose label and grade differ, and writes ``grading.json``.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gcpo.rewards.math as grader
from benchmarks.common import arguments, print_table, save
from gcpo.rewards import boxed_answer, compute_score, grade_many, normalize
from gcpo.rewards.math_verify_pool import shared, size

Row = tuple[str, str, bool]
"""The right answer, the response and its label."""


def read(file: Path) -> list[Row]:
    """Return the responses of a file."""
    found: list[Row] = []
    for row in map(json.loads, file.read_text().splitlines()):
        responses = row["responses"] if "responses" in row else row["response"]
        labels = row["correct"] if "correct" in row else row["score"]
        found += [(row["answer"], r, bool(label)) for r, label in zip(responses, labels, strict=True)]
    return found


def bare(rows: list[Row]) -> list[bool]:
    """Grade with math-verify as in its documentation."""
    from math_verify import parse, verify

    return [bool(verify(parse(f"${truth}$"), parse(response))) for truth, response, _ in rows]


def one_caller(rows: list[Row]) -> list[bool]:
    """Return one response after another."""
    return [compute_score("", response, truth)["acc"] == 1 for truth, response, _ in rows]


def all_cores(rows: list[Row]) -> list[bool]:
    """Return all at once."""
    results = grade_many([response for _, response, _ in rows], [truth for truth, _, _ in rows])
    return [result["acc"] == 1 for result in results]


def _in_worker(row: Row) -> bool:
    truth, response, _ = row
    answer = boxed_answer(response)
    return answer is not None and shared().same(normalize(truth), normalize(answer))


def workers_all_cores(rows: list[Row]) -> list[bool]:
    """Return all at once, each compared by math-verify in a worker."""
    with ThreadPoolExecutor(size()) as threads:
        return list(threads.map(_in_worker, rows))


WAYS: dict[str, Callable[[list[Row]], list[bool]]] = {
    "bare": bare,
    "one caller": one_caller,
    "all cores": all_cores,
    "workers, one caller": lambda rows: [_in_worker(row) for row in rows],
    "workers, all cores": workers_all_cores,
}


def forget() -> None:
    """Clear all caches, and restart the workers."""
    normalize.cache_clear()
    grader._same_mathematics.cache_clear()
    shared().close()
    with ThreadPoolExecutor(size()) as threads:
        list(threads.map(lambda n: shared().same(f"x+{n}", f"{n}+x"), range(size())))


def main() -> None:
    """Command line."""
    parser = arguments(__doc__, "outputs/grading", model=False)
    parser.add_argument("--rollouts", type=Path, required=True, help="folder of .jsonl files with responses and labels")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    files = sorted(args.rollouts.glob("*.jsonl"))
    if not files:
        sys.exit(f"grading: there is no .jsonl file in {args.rollouts}; give a folder with responses and labels")
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    sets = {file.stem: read(file) for file in files}
    bare(next(iter(sets.values()))[:20])  # loads what it needs
    found: dict[str, dict[str, object]] = {}
    for name, rows in sets.items():
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        grades: dict[str, list[bool]] = {}
        for attempt in range(args.rounds):
            for way, grade in WAYS.items():
                forget()
                started = time.perf_counter()
                grades[way] = grade(rows)
                seconds[way].append(time.perf_counter() - started)
            print(f"{name}: round {attempt + 1} of {args.rounds}", file=sys.stderr, flush=True)
        found[name] = {
            "responses": len(rows),
            "grades per second": {way: round(len(rows) / statistics.median(s)) for way, s in seconds.items()},
            "times bare": {
                way: round(statistics.median(b / s for b, s in zip(seconds["bare"], own, strict=True)), 2)
                for way, own in seconds.items()
            },
            "agree with the label": {
                way: sum(grade == label for grade, (_, _, label) in zip(grades[way], rows, strict=True))
                for way in ("bare", "one caller")
            },
            "differ": [
                {"truth": truth, "answer": boxed_answer(response), "label": label, "bare": theirs, "ours": ours}
                for (truth, response, label), theirs, ours in zip(
                    rows, grades["bare"], grades["one caller"], strict=True
                )
                if not theirs == ours == label
            ],
        }
        if grades["one caller"] != grades["all cores"]:
            sys.exit(f"grading: on {name} grade_many does not give what compute_score gives")
    speeds = [
        [name, one["responses"], *(f"{one['grades per second'][w]} ({one['times bare'][w]:.2f}x)" for w in WAYS)]
        for name, one in found.items()
    ]
    print_table(["grades per second", "responses", *WAYS], *speeds)
    agree = ([name, *one["agree with the label"].values()] for name, one in found.items())
    print_table(["agree with the label", "bare", "ours"], *agree)
    for name, result in found.items():
        for difference in result["differ"]:
            print(f"{name}: {difference}")
    versions = {package: importlib.metadata.version(package) for package in ("math-verify", "sympy")}
    save(args.output / "grading.json", {"math": versions, "rounds": args.rounds, "sets": found})


if __name__ == "__main__":
    main()
