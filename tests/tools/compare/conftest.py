"""A folder with data and a model, where a stand-in is the one-file trainer."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from gcpo.tools.compare import runs

ROOT = Path(__file__).parents[3]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder."""
    (tmp_path / "data/arithmetic").mkdir(parents=True)
    (tmp_path / "data/arithmetic/train.parquet").write_bytes(b"questions")
    (tmp_path / "models/arithmetic-warm").mkdir(parents=True)
    (tmp_path / "models/arithmetic-warm/config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    monkeypatch.setitem(runs.MODULES, "one_file", "tests.tools.compare.standin")
    monkeypatch.setitem(runs.MODULES, "tasks", "tests.tools.compare.maker")
    return tmp_path


@pytest.fixture
def experiment(place: Path) -> Callable[..., Path]:
    """``experiment(key=value)`` writes experiment.yaml with other values."""

    def write(**changes: Any) -> Path:
        content = {
            "title": "Trial",
            "trainer": "one_file",
            "output": "out",
            "tasks": {"arithmetic": {}},
            "methods": {"grpo": {"method": "grpo"}, "gcpo": {"method": "gcpo"}},
            "baseline": "grpo",
            "seeds": [0, 1, 2],
            "steps": 10,
            "quick": {"seeds": [0, 1], "steps": 5},
        }
        path = place / "experiment.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in {**content, **changes}.items()}))
        return path

    return write
