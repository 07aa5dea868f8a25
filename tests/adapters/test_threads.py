"""The threads of an actor."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.adapters.ranks import build_worker, run_on_ranks


def threads_after_init(rank: int, world: int, config: Any, cores: int) -> int:
    """The number of threads of a worker on a machine of so many cores."""
    os.sched_getaffinity = lambda _: set(range(cores))
    build_worker(config)
    return torch.get_num_threads()


@pytest.mark.parametrize(
    ("asked", "world", "cores", "threads"),
    [(None, 1, 8, 1), (2, 1, 8, 2), (4, 2, 6, 3), (4, 2, 1, 1)],
)
def test_an_actor_has_its_threads(
    make_config: Callable[..., Any], asked: int | None, world: int, cores: int, threads: int
) -> None:
    config = make_config(f"gcpo.actor_threads={'null' if asked is None else asked}")
    assert run_on_ranks(world, threads_after_init, config, cores) == [threads] * world


def test_threads_that_wait_do_not_spin(recipe_config: Any) -> None:
    """Two threads that spin were ten times slower beside other work, and as fast as passive ones on an idle machine."""
    config = recipe_config(name="gcpo_quickstart")
    assert config.ray_kwargs.ray_init.runtime_env.env_vars.OMP_WAIT_POLICY == "passive"
    assert config.gcpo.actor_threads is None
