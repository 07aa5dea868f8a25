"""A run of three questions with four responses each, and the queue that it goes through."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.adapters.memory_queue import MemoryQueue

N = 4


@pytest.fixture
def make_config(recipe_config: Callable, tiny_model: Path) -> Callable:
    """A run of 3 questions x 4 responses, which verl pads to 16 rows for its mini-batches of 8."""

    def make(*overrides: str) -> Any:
        return recipe_config(
            "device=cpu",
            f"actor_rollout_ref.model.path={tiny_model}",
            f"actor_rollout_ref.rollout.n={N}",
            "actor_rollout_ref.rollout.max_model_len=1024",
            "actor_rollout_ref.actor.ppo_mini_batch_size=2",
            "data.max_prompt_length=64",
            "data.max_response_length=12",
            "gcpo.metrics.graded_fraction=1.0",
            *overrides,
        )

    return make


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> MemoryQueue:
    return MemoryQueue().install(monkeypatch)
