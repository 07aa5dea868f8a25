"""Grading on real answers and real responses, where they are on the machine."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gcpo.rewards import boxed_answer, compute_score, normalize, same_answer

SHARED = Path(os.environ.get("GCPO_SHARED_DATA", Path(__file__).resolve().parents[2].parent / "shared" / "data"))


def rows(name: str) -> list[dict[str, Any]]:
    """Rows of a json or jsonl file."""
    file = SHARED / name
    if not file.is_file():
        pytest.skip(f"{file} is not on this machine (GCPO_SHARED_DATA names another place)")
    text = file.read_text()
    return json.loads(text) if file.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


def forms(answer: Any) -> Iterator[str]:
    """How a response would write a gold answer."""
    for form in answer if isinstance(answer, list) else [answer]:
        yield "80" if str(form).startswith("080 or") else str(form)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("deepscaler/train/aime.json", 975),
        ("deepscaler/test/aime.json", 30),
        ("deepscaler/test/amc.json", 83),
        ("deepscaler/test/minerva.json", 272),
        ("aime25/test2025-I.jsonl", 15),
        ("aime25/test2025-II.jsonl", 15),
        ("amc23/test.jsonl", 40),
        ("math500/test.jsonl", 500),
        ("minerva/test.jsonl", 272),
        ("gsm8k/train.jsonl", 7473),
        ("gsm8k/test.jsonl", 1319),
        ("numina/numinamath_cot_3rows.jsonl", 3),
    ],
)
def test_gold_answers_are_right(name, count):
    """Every gold answer in a box is right, as the set has it and with a word after it."""
    graded = 0
    for row in rows(name):
        if name.startswith("gsm8k"):
            answer = row["answer"].rpartition("####")[2].strip()
        else:
            answer = row["answer"] if "answer" in row else boxed_answer(row["solution"])
        for form in forms(answer):
            assert same_answer(form, answer), form
            assert normalize(normalize(form)) == normalize(form)
            result = compute_score(name, f"<think>0</think> So $\\boxed{{ {form} }}$.", answer, require_think=True)
            assert result == {"score": 1.0, "acc": 1.0, "format": 1.0}, form
        graded += 1
    assert graded == count


def test_answers_are_those_of_the_solutions():
    for row in rows("math500/test.jsonl"):
        assert same_answer(boxed_answer(row["solution"]), row["answer"]), row["answer"]


def disagreements(name: str, responses: str, labels: str) -> tuple[int, list[tuple[str, str | None, bool]]]:
    """How many responses there are, and where a label is not our grade: gold answer, boxed answer, label."""
    pairs = [
        (row["answer"], response, bool(label))
        for row in rows(name)
        for response, label in zip(row[responses], row[labels], strict=True)
    ]
    found = [
        (answer, boxed_answer(response), label)
        for answer, response, label in pairs
        if (compute_score(name, response, answer)["acc"] == 1.0) != label
    ]
    return len(pairs), found


def test_math_responses():
    """All nine labels that are not our grade are wrong, see docs/grading.md."""
    count, found = disagreements("rollouts/qwen25math_math_cot_100.jsonl", "response", "score")
    assert count == 800
    assert sorted(found) == [("10{,}000", "10000", False)] + [(r"\text{4:30 p.m.}", r"4:30 \text{ p.m.}", False)] * 8


def test_gsm8k_responses():
    """One response never boxes an answer; its label is for a number that it happens to end with."""
    count, found = disagreements("rollouts/gsm8k_groups_200.jsonl", "responses", "correct")
    assert count == 4400
    assert found == [("5", None, True)]
