"""Rows without padding: the objective, the log-probabilities and the entropy of padded rows, from fewer tokens.

The problem and its reference in float64 are those of ``test_objective.py``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from gcpo.scoring.tree import PrefixForest
from tests.adapters import problem
from tests.adapters.ranks import build_worker, pack, run_on_ranks, with_changes
from tests.adapters.test_objective import OVERRIDES, THREE, assert_equal, training_rows, update

PROMPT = list(range(40, 52))
LENGTHS = (9, 1, 5, 9, 12)
"""Of responses to one prompt; the first and the fourth are equal."""


@pytest.fixture(scope="module")
def config(tiny_model: Path, recipe_config: Any) -> Any:
    return recipe_config(*OVERRIDES, f"actor_rollout_ref.model.path={tiny_model}", "gcpo.padding_free=True")


def plain_rows() -> list[dict[str, torch.Tensor]]:
    """Five responses to one prompt, and one to another."""
    generator = torch.Generator().manual_seed(5)
    responses = [torch.randint(3, 320, (length,), generator=generator) for length in (*LENGTHS, 4)]
    responses[3] = responses[0].clone()
    prompts = [torch.tensor(PROMPT)] * len(LENGTHS) + [torch.tensor([99, 98, 97])]
    rows = []
    for prompt, response in zip(prompts, responses, strict=True):
        mask, ids = torch.ones_like(response), torch.cat([prompt, response])
        rows.append(
            {"prompts": prompt, "responses": response, "response_mask": mask, "loss_mask": mask, "input_ids": ids}
        )
        rows[-1]["position_ids"] = torch.arange(len(ids))
    return rows


@contextmanager
def read_by(module: torch.nn.Module) -> Iterator[list[tuple[int, ...]]]:
    """Shapes of the input of every forward pass."""
    shapes: list[tuple[int, ...]] = []
    hook = module.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        yield shapes
    finally:
        hook.remove()


def outputs(worker: Any, temperature: float) -> tuple[list[torch.Tensor], list[tuple[int, ...]]]:
    """Log-probabilities and entropies of the responses, row after row, and the shapes that the model read."""
    from verl.workers.utils.padding import response_from_nested

    data = pack(plain_rows(), temperature=temperature, calculate_entropy=True, compute_loss=False)
    is_actor = worker.actor is not None
    engine = (worker.actor if is_actor else worker.ref).engine
    with read_by(engine.module) as shapes:
        found = (worker.compute_log_prob if is_actor else worker.compute_ref_log_prob)(data)
    names = [name for name in ("log_probs", "entropy") if name in found.keys()]
    return [row for name in names for row in response_from_nested(found[name], data["response_mask"]).unbind()], shapes


# ---- values ----------------------------------------------------------------------------------------------------------


def packed_and_padded(rank: int, world: int, config: Any, role: str, temperature: float) -> Any:
    worker = build_worker(config, role)
    engine = (worker.actor or worker.ref).engine
    assert engine.padding_free
    packed = outputs(worker, temperature)
    engine.padding_free = False
    return packed, outputs(worker, temperature)


@pytest.mark.parametrize(("role", "temperature"), [("actor", 1.0), ("actor", 0.7), ("ref", 1.0)])
def test_values_of_padded_rows(config: Any, role: str, temperature: float) -> None:
    """Also with equal rows, which share all their tokens."""
    ((packed, shapes), (padded, wide)) = run_on_ranks(1, packed_and_padded, config, role, temperature)[0]
    assert len(packed) == len(padded) >= 6
    for ours, right in zip(packed, padded, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-5)
    assert wide == [(6, len(PROMPT) + max(LENGTHS))]
    ids = [row["input_ids"] for row in plain_rows()]
    assert shapes == [(1, PrefixForest(ids).tree_tokens)]
    assert shapes[0][1] == len(PROMPT) + sum(LENGTHS) - LENGTHS[3] + len(ids[-1])


# ---- the objective ---------------------------------------------------------------------------------------------------


def one_update(rank: int, world: int, config: Any, changes: dict[str, Any]) -> Any:
    changed = with_changes(config, changes)
    worker = build_worker(changed)
    rows = training_rows(problem.make_rows(config.actor_rollout_ref.model.path))
    with read_by(worker.actor.engine.module) as shapes:
        return update(changed, worker, rank, world, rows, micro=THREE), shapes


@pytest.mark.parametrize(
    ("world", "packing", "changes"),
    [
        (1, "tree", {}),
        (2, "tree", {}),
        (1, "dense", {}),
        (1, "tree", {"model.enable_gradient_checkpointing": True}),
        (1, "tree", {"model.use_remove_padding": True}),
    ],
    ids=["one rank", "two ranks", "dense contexts", "checkpointing", "verl packs too"],
)
def test_eq_10(config: Any, tiny_model: Path, world: int, packing: str, changes: dict[str, Any]) -> None:
    config = config.copy()
    config.gcpo.scoring.packing = packing
    (result, shapes), *_ = run_on_ranks(world, one_update, config, changes)
    rows = problem.make_rows(str(tiny_model))
    assert_equal(result, problem.objective(str(tiny_model), rows))
    assert {shape[0] for shape in shapes} == {1}
    assert result["micro_batches"][:THREE] != [1] * THREE  # several rows in one


# ---- models that cannot be packed ------------------------------------------------------------------------------------


def not_packed(rank: int, world: int, config: Any, problem: str | None) -> Any:
    """Outputs of a worker that cannot pack, of one that is not asked to, and what was logged."""
    from gcpo.adapters import engine

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("gcpo").addHandler(handler)
    if problem is not None:
        engine.tree_problem = lambda *_: problem
    found = outputs(build_worker(config), 1.0)
    config.gcpo.padding_free = False
    return found, outputs(build_worker(config), 1.0), [line for line in lines if "padding_free" in line]


@pytest.mark.parametrize(
    ("changes", "problem", "reason"),
    [
        ({"actor.fsdp_config.pad_to_length": True}, None, "rows are padded to a fixed length (pad_to_length)"),
        ({}, "layer 0 has a window", "layer 0 has a window"),
    ],
)
def test_a_model_that_cannot_pack(config: Any, changes: dict[str, Any], problem: str | None, reason: str) -> None:
    """It is said once, with the reason, and the rows are verl's."""
    (found, shapes), (right, wide), lines = run_on_ranks(1, not_packed, with_changes(config, changes), problem)[0]
    assert lines == [f"gcpo notice: gcpo.padding_free is not used, the actor keeps verl's rows: {reason}"]
    assert shapes == wide
    assert all(torch.equal(ours, wanted) for ours, wanted in zip(found, right, strict=True))


def test_it_is_off_unless_asked_for(recipe_config: Any) -> None:
    """The rows of a run are verl's, bit for bit."""
    assert recipe_config().gcpo.padding_free is False
