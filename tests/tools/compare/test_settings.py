"""The yaml of a comparison, and the sentences that refuse it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from examples import gcpo_in_one_file, training_run
from gcpo.settings import ConfigError
from gcpo.tools.compare import runs
from gcpo.tools.compare.runs import plan
from gcpo.tools.compare.settings import ONE_FILE_METHODS, Comparison

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks/comparisons").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_comparisons_of_the_repository_are_accepted(path, recipe_config, monkeypatch):
    """Both trainers accept the settings of every arm."""
    monkeypatch.setattr(runs, "_inputs", lambda *_: "")
    comparison = Comparison.load(path)
    assert len(comparison.seeds) >= (10 if comparison.trainer == "one_file" else 3)
    for run in plan(comparison)[: len(comparison.arms())]:
        if comparison.trainer == "verl":
            assert composed(run, recipe_config).trainer.default_local_dir == f"{run.folder}/checkpoints"
            continue
        found: list[training_run.RunSettings] = []
        monkeypatch.setattr(training_run, "train", found.append)
        assert training_run.command(lambda settings: settings, run.command()[3:]) == 0
        for name, value in run.configuration["overrides"].items():
            assert getattr(found[0], name) == value


def composed(run: runs.Run, recipe_config: Callable[..., Any]) -> Any:
    """The configuration that hydra makes of the command of a run through verl."""
    command = run.command()
    at = command.index("--config-name")
    return recipe_config(*(text for text in command[at + 2 :] if not text.startswith("hydra.")), name=command[at + 1])


def test_methods_of_the_one_file_trainer():
    assert get_args(training_run.RunSettings.model_fields["method"].annotation) == ONE_FILE_METHODS
    assert runs.MODULES["one_file"] == gcpo_in_one_file.__name__


def test_quick(experiment):
    comparison = Comparison.load(experiment(), quick=True)
    assert (comparison.seeds, comparison.steps, comparison.output) == ([0, 1], 5, "out-quick")


def test_varied_arms(experiment):
    gcpo = {"method": "gcpo", "overrides": {"alpha": 2, "kappa": 0.06}}
    path = experiment(
        methods={"grpo": {"method": "grpo"}, "gcpo": gcpo}, varied="gcpo", vary={"alpha": [1, 2], "kappa": [0, 0.06]}
    )
    arms = {name: arm.overrides for name, arm in Comparison.load(path).arms().items()}
    assert arms == {
        "grpo": {},
        "gcpo": {"alpha": 2, "kappa": 0.06},
        "alpha=1": {"alpha": 1, "kappa": 0.06},
        "kappa=0": {"alpha": 2, "kappa": 0},
    }


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tasks": {"arithmetics": {}}}, "comparison.tasks has 'arithmetics', which is unknown; choose one of "),
        (
            {"methods": {"grpo": {"method": "gpro"}}},
            "comparison.methods.grpo.method has 'gpro', which is unknown; choose one of grpo, gvpo, gcpo",
        ),
        ({"trainer": "trl"}, "comparison.trainer is 'trl'; choose one of one_file, verl"),
        ({"baseline": "GRPO"}, "comparison.baseline has 'GRPO', which is unknown; choose one of "),
        ({"vary": {"alpha": [1]}}, "comparison.varied has '', which is unknown; choose one of "),
        ({"steps": 0}, "comparison.steps is 0; it must be at least 1"),
        ({"seeds": [1, 1]}, "comparison.seeds is [1, 1]; name each only once"),
        ({"sedes": [1]}, "comparison.sedes is not a setting; did you mean comparison.seeds?"),
        (
            {"methods": {"grpo": {"method": "grpo", "override": {}}}},
            "comparison.methods.grpo.override is not a setting",
        ),
        ({"methods": {"grpo": {"method": "grpo"}, "a/b": {"method": "grpo"}}}, "comparison.methods has 'a/b'; a name "),
    ],
)
def test_wrong_values(experiment, changes, sentence):
    path = experiment(**changes)
    with pytest.raises(ConfigError) as refused:
        Comparison.load(path)
    assert str(refused.value).startswith(f"{path}: {sentence}")


def test_no_yaml(place):
    with pytest.raises(ConfigError, match="can't be read as yaml"):
        Comparison.load(place / "none.yaml")
    (place / "list.yaml").write_text("[1")
    with pytest.raises(ConfigError, match="can't be read as yaml"):
        Comparison.load(place / "list.yaml")


def test_settings_of_a_task(experiment):
    """An arm goes before its task, and a task before what every run has."""
    path = experiment(
        tasks={"arithmetic": {"lr": 0.02, "alpha": 1}},
        methods={"grpo": {"method": "grpo"}, "gcpo": {"method": "gcpo", "overrides": {"alpha": 2}}},
        overrides={"lr": 0.01, "kl": 0.1},
    )
    found = {run.arm: run.configuration["overrides"] for run in plan(Comparison.load(path))}
    assert found == {"grpo": {"lr": 0.02, "alpha": 1, "kl": 0.1}, "gcpo": {"lr": 0.02, "alpha": 2, "kl": 0.1}}


def test_commands(experiment):
    run = plan(Comparison.load(experiment(overrides={"lr": 0.01})))[0]
    assert run.command()[1:] == [
        *("-m", "tests.tools.compare.standin", "--method", run.configuration["method"]),
        *("--model", "models/arithmetic-warm", "--data", "data/arithmetic", "--seed", "0", "--steps", "10"),
        *("--output", f"out/runs/arithmetic/{run.arm}/seed-0", "lr=0.01"),
    ]


def test_commands_through_verl(experiment, recipe_config):
    """Hydra accepts the settings, and names that its grammar does not know without quotes."""
    settings = {"gcpo.weighting.target": "off", "gcpo.kappa": 0.01, "data.val_files": ["a=1", "b"]}
    methods = {"κ² = 1": {"method": "gcpo", "overrides": settings}}
    comparison = Comparison.load(experiment(trainer="verl", methods=methods, baseline="κ² = 1"))
    command = plan(comparison)[1].command()
    assert command[1:3] == ["-m", "gcpo.tools.launch"] and "recipe.gcpo.main_gcpo" in command
    config = composed(plan(comparison)[1], recipe_config)
    assert (config.gcpo.seed, config.data.seed, config.trainer.total_training_steps) == (1, 1, 10)
    assert (config.gcpo.kappa, config.gcpo.weighting.target, config.trainer.device) == (0.01, "off", "cpu")
    assert config.data.val_files == ["a=1", "b"] and config.trainer.logger == ["file"]
    assert config.trainer.default_local_dir == "out/runs/arithmetic/κ² = 1/seed-1/checkpoints"
