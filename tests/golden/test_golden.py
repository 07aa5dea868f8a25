"""The stored runs are still what the code gives.

Numbers are compared within rounding, because another processor rounds differently; ``python -m tests.golden check``
compares bit for bit.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.golden.runs import RUNS, differences, file_of, make_model, run_here

TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def golden_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("golden") / "model")


@pytest.mark.parametrize("name", RUNS)
def test_golden(name: str, golden_model: Path) -> None:
    expected = json.loads(file_of(name).read_text())
    assert differences(expected, run_here(name, golden_model), tolerance=TOLERANCE) == []


def test_runs_differ_from_each_other() -> None:
    """Every run measures something of its own: no two give the same weights."""
    digests = {
        name: json.loads(file_of(name).read_text())["weights"]["model.embed_tokens.weight"]["sha256"] for name in RUNS
    }
    assert len(set(digests.values())) == len(RUNS), digests


def test_differences_are_found() -> None:
    expected = {"a": [1.0, 2.0], "sha256": "x", "b": {"c": 1}}
    assert differences(expected, expected) == []
    assert differences(expected, {**expected, "a": [1.0, 2.0001]}, tolerance=1e-3) == []
    assert differences(expected, {**expected, "a": [1.0, 2.01]}, tolerance=1e-3) == [".a[1]: 2.0 became 2.01"]
    assert differences(expected, {**expected, "a": [1.0, 2.0001]}) == [".a[1]: 2.0 became 2.0001"]
    assert differences(expected, {"a": [1.0], "sha256": "x", "b": {}}) == [
        ".a: [1.0, 2.0] became [1.0]",
        ".b.c is only in one of them",
    ]
