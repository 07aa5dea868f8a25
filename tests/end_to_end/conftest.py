"""Data and a model for the runs of the real stack."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.arithmetic.task import prepare
from examples.arithmetic.warm_start import Recipe, warm_start


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Arithmetic questions, and a model trained for seconds: its answers are wrong, but they end."""
    folder = tmp_path_factory.mktemp("inputs")
    prepare(folder / "data", train_size=32, test_size=6)
    warm_start(folder / "data", folder / "model", Recipe(plain_examples=3000, candidate_examples=300))
    return folder
