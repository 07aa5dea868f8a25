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


FIRST = (
    "gcpo.preset=paper",
    "gcpo.collider.num_draws=2",
    "gcpo.collider.num_generations=1",
    "gcpo.metrics.grad_norm_every=2",
    "gcpo.metrics.graded_fraction=1.0",
    "actor_rollout_ref.actor.ppo_mini_batch_size=4",
)
"""Everything of GCPO: O, reference, beta, parts measured. A step is one update, since two ranks have other mini-batches
than one."""


@pytest.fixture(scope="session")
def first_run(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    """Two steps of GCPO with the settings `FIRST`: the folder and the metrics."""
    from tests.end_to_end.test_training import our_yaml, train

    output = tmp_path_factory.mktemp("first")
    steps, _ = train(
        "recipe.gcpo.main_gcpo",
        inputs,
        output,
        "first",
        *our_yaml(
            *FIRST,
            "gcpo.metrics.dump_fraction=1.0",
            "trainer.total_training_steps=2",
            "trainer.save_freq=2",
            f"trainer.rollout_data_dir={output}/rollouts",
        ),
    )
    return output, steps
