"""Updates that are not finite, through our trainer's update, verl's worker and our engine, on one rank and on two.

What this does not show is that a sentence of a worker reaches the user (``test_liveness.py``).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from gcpo.adapters import stability
from gcpo.adapters.stability import SETTINGS, StableTrainer
from gcpo.adapters.trainer import MethodTrainer
from gcpo.faults import RunStoppedError
from gcpo.notices import TOTAL_STEPS
from gcpo.stability import (
    HELD_OUT_COLLAPSE,
    REWARD_COLLAPSE,
    SKIPPED_UPDATES,
    WEIGHT_CHANGE,
    WEIGHT_COLLAPSE,
)
from tests.adapters import problem
from tests.adapters.ranks import build_worker, pack, run_on_ranks, weights
from tests.adapters.test_objective import OVERRIDES, training_rows, update

ACCURACY = "val-core/gcpo/arithmetic/acc/mean@1"
OFF = ("gcpo.kappa=0", "gcpo.weighting=off")


# ---- on a rank ----------------------------------------------------------------------------------------------------


def attempt(
    config: Any,
    rank: int,
    world: int,
    fields: list[dict[str, torch.Tensor]],
    *,
    lr: float = 1e-3,
    minis: int = 1,
    spoil: Callable[[Any], None] | None = None,
) -> dict[str, Any]:
    """One update: its metrics or its sentence, the weights before and after."""
    worker = build_worker(config, lr=lr)
    engine = worker.actor.engine
    before = weights(engine)
    if spoil is not None:
        spoil(engine)
    found: dict[str, Any] = {"stopped": None}
    try:
        found |= update(config, worker, rank, world, fields, minis=minis)
    except RunStoppedError as stopped:
        found["stopped"] = str(stopped)
    after = weights(engine)
    found["unchanged"] = all(torch.equal(before[name], after[name]) for name in before)
    changed = sum((after[name].double() - before[name]).square().sum() for name in before)
    found["change"] = float((changed / sum(w.double().square().sum() for w in before.values())).sqrt())
    found["losses"] = engine._losses
    return found


def spoil_gradients(value: float) -> Callable[[Any], None]:
    """Gradients of this value under a loss that is finite."""

    def spoil(engine: Any) -> None:
        original = engine.forward_backward_batch

        def forward_backward_batch(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            for weight in engine.module.parameters():
                if weight.grad is not None:
                    weight.grad.fill_(value)
            return output

        engine.forward_backward_batch = forward_backward_batch

    return spoil


def spoil_weights(engine: Any) -> None:
    """An optimizer step after which the last weight of every rank is infinite."""
    original = engine.optimizer.step

    def step(*args: Any, **kwargs: Any) -> Any:
        original(*args, **kwargs)
        with torch.no_grad():
            list(engine.module.parameters())[-1].to_local().view(-1)[-1] = math.inf

    engine.optimizer.step = step


def with_scaler(engine: Any) -> None:
    """As for fp16; the scaler itself does nothing here."""
    engine.scaler = SimpleNamespace(
        scale=lambda loss: loss,
        unscale_=lambda optimizer: None,
        step=lambda optimizer: None,
        update=lambda: None,
    )


def spoiled(fields: list[dict[str, torch.Tensor]], row: int) -> list[dict[str, torch.Tensor]]:
    """The rows with an advantage that is not a number in one of them: a loss that is none."""
    fields = copy.deepcopy(fields)
    fields[row]["advantages"] = torch.full_like(fields[row]["advantages"], math.nan)
    return fields


def cases(rank: int, world: int, config: Any, off: Any, rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    fields = training_rows(rows)
    bad, last = spoiled(fields, 0), spoiled(fields, len(fields) - 1)
    skip = copy.deepcopy(config)
    skip.gcpo.stability.non_finite = "skip"

    def both(engine: Any) -> None:
        with_scaler(engine)
        spoil_gradients(math.inf)(engine)

    return {
        "healthy": attempt(config, rank, world, fields),
        "two updates": attempt(config, rank, world, fields, minis=2),
        "loss": attempt(config, rank, world, bad),
        "loss of the last row": attempt(config, rank, world, last),
        "loss of grpo": attempt(off, rank, world, bad),
        "gradient inf": attempt(config, rank, world, fields, spoil=spoil_gradients(math.inf)),
        "gradient nan": attempt(config, rank, world, fields, spoil=spoil_gradients(math.nan)),
        "weights": attempt(config, rank, world, fields, spoil=spoil_weights),
        "large step": attempt(config, rank, world, fields, lr=1e6),
        "skip": attempt(skip, rank, world, bad),
        "skip weights": attempt(skip, rank, world, fields, spoil=spoil_weights),
        "fp16": attempt(config, rank, world, fields, spoil=both),
    }


# ---- the cases ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def results(request: pytest.FixtureRequest, tiny_model: Path, recipe_config: Any) -> list[dict[str, dict[str, Any]]]:
    """The cases as every rank saw them."""
    path = f"actor_rollout_ref.model.path={tiny_model}"
    rows = problem.make_rows(str(tiny_model))
    configs = recipe_config(*OVERRIDES, path), recipe_config(*OVERRIDES, *OFF, path)
    return run_on_ranks(request.param, cases, *configs, rows)


@pytest.mark.parametrize("name", ["healthy", "two updates", "large step"])
def test_the_change_of_the_weights_is_measured(results: list, name: str) -> None:
    """Over all ranks; of two updates the larger change, and never less than half of the whole."""
    for found in (result[name] for result in results):
        assert found["stopped"] is None and not found["unchanged"] and found["losses"] is None
        measured, whole = found["metrics"][WEIGHT_CHANGE], found["change"]
        assert found["metrics"][SKIPPED_UPDATES] == 0
        if name == "two updates":
            assert 0.4 * whole < measured < whole
        else:
            assert measured == pytest.approx(whole, rel=1e-4)
    assert (measured > 1e4) == (name == "large step")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("loss", "loss"),
        ("loss of the last row", "loss"),
        ("loss of grpo", "loss"),
        ("gradient inf", "gradient norm is inf"),
        ("gradient nan", "gradient norm is nan"),
    ],
)
def test_what_is_not_finite_changes_no_weight(results: list, name: str, words: str) -> None:
    """Every rank stops, also those whose rows are sound: none waits for another."""
    for found in (result[name] for result in results):
        assert words in found["stopped"] and "weights were not updated" in found["stopped"]
        assert "optim.lr" in found["stopped"] and found["unchanged"] and found["losses"] is None


def test_weights_that_are_not_finite_stop_the_run(results: list) -> None:
    """Before they are saved: verl saves after the update."""
    for found in (result["weights"] for result in results):
        assert "weights are not finite" in found["stopped"]


def test_skip_goes_on_and_counts(results: list) -> None:
    for result in results:
        found = result["skip"]
        assert found["stopped"] is None and found["unchanged"] and found["metrics"][SKIPPED_UPDATES] == 1.0
        assert found["metrics"][WEIGHT_CHANGE] == 0.0
        assert not math.isfinite(result["skip weights"]["metrics"][WEIGHT_CHANGE])


def test_a_scaler_skips_by_design(results: list) -> None:
    """With fp16 a scale that overflows is tried now and then; that is counted and no fault."""
    for found in (result["fp16"] for result in results):
        assert found["stopped"] is None and found["metrics"][SKIPPED_UPDATES] == 1.0


def plain_verl(rank: int, world: int, config: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of a run that is not ours, in the environment where our engine is registered."""
    worker = build_worker(config, lr=1e-3)
    batch = pack(spoiled(training_rows(rows), 0), **copy.deepcopy(config_of_verl(rows)))
    output = worker.update_actor(batch)
    from verl.utils import tensordict_utils as tu

    return {"metrics": list(tu.get(output, "metrics"))}


def config_of_verl(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "calculate_entropy": False,
        "distillation_use_topk": False,
        "distillation_only": False,
        "global_batch_size": len(rows),
        "mini_batch_size": len(rows),
        "epochs": 1,
        "seed": 1,
        "dataloader_kwargs": {"shuffle": False},
        "temperature": 1.0,
    }


def test_other_runs_keep_verls_behaviour(tiny_model: Path, recipe_config: Any) -> None:
    config = recipe_config(*OVERRIDES, *OFF, f"actor_rollout_ref.model.path={tiny_model}")
    (found,) = run_on_ranks(1, plain_verl, config, problem.make_rows(str(tiny_model)))
    assert not any(name.startswith("stability/") for name in found["metrics"])


# ---- the trainer -----------------------------------------------------------------------------------------------------


def test_every_mode_is_checked() -> None:
    """All modes have one trainer; plain GRPO is the mode gcpo with its parts off (``loss of grpo`` above)."""
    for name in ("_update_actor", "_compute_metrics", "_validate"):
        order = [cls for cls in MethodTrainer.__mro__ if name in vars(cls)]
        assert StableTrainer in order and order.index(StableTrainer) < order.index(PPOTrainerSync.__mro__[1])


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> StableTrainer:
    """Without verl's set-up; verl's stages give the metrics that stand in ``given``."""
    made = object.__new__(StableTrainer)
    made.config = OmegaConf.create(
        {
            "actor_rollout_ref": {
                "rollout": {"n": 8, "response_length": 64},
                "actor": {"loss_agg_mode": "token-mean", "loss_scale_factor": None},
            },
            "data": {"train_batch_size": 16},
            "gcpo": {"stability": {"non_finite": "skip"}},
        }
    )
    made.tokenizer, made.global_steps, made.given, made.settings = range(326), 2, {}, []
    made.total_training_steps = 9

    def verls_update(self: Any, batch: Any, metrics: dict) -> Any:
        made.settings.append(dict(batch.extra_info))
        metrics.update(made.given)
        return batch

    def verls_metrics(self: Any, batch: Any, metrics: dict, *args: Any, **kwargs: Any) -> None:
        metrics.update(made.given)

    monkeypatch.setattr(PPOTrainerSync, "_update_actor", verls_update)
    monkeypatch.setattr(PPOTrainerSync, "_compute_metrics", verls_metrics)
    monkeypatch.setattr(PPOTrainerSync, "_validate", lambda self: dict(made.given))
    return made


def test_the_setting_travels_with_the_update_alone(trainer: StableTrainer) -> None:
    batch, metrics = SimpleNamespace(extra_info={"temperature": 1.0}), {}
    trainer.given = {f"actor/{WEIGHT_CHANGE}": 0.1, "actor/loss": 1.0}
    trainer._update_actor(batch, metrics)
    assert trainer.settings == [{"temperature": 1.0, SETTINGS: "skip"}] and batch.extra_info == {"temperature": 1.0}
    assert metrics == {WEIGHT_CHANGE: 0.1, "actor/loss": 1.0}


def test_signs_are_logged_with_the_metrics_of_the_step(
    trainer: StableTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    def step(**given: float) -> dict[str, float]:
        trainer.given = {"critic/score/mean": 0.0, "critic/score/max": 0.0, "critic/score/min": 0.0, **given}
        metrics: dict[str, float] = {}
        trainer._compute_metrics(None, metrics, {}, global_steps=2, epoch=0)
        return metrics

    trainer.given = {ACCURACY: 0.5}
    assert trainer._validate() == {ACCURACY: 0.5}
    healthy = step(**{"critic/score/mean": 0.4, "critic/score/max": 1.0, WEIGHT_CHANGE: 0.01, "actor/entropy": 0.05})
    assert not any("collapse" in name for name in healthy) and not caplog.records
    assert healthy[TOTAL_STEPS] == 9
    found = step(**{ACCURACY: 0.0, WEIGHT_CHANGE: 7.0})
    assert {REWARD_COLLAPSE, HELD_OUT_COLLAPSE, WEIGHT_COLLAPSE} <= set(found)
    assert "step 2: collapse: no response has a reward" in caplog.text and caplog.records[0].name == stability.__name__
