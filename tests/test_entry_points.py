"""``python -m recipe.gcpo.main_gcpo`` as a process, and its configuration against that of verl's entry point."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from gcpo.checks.overrides import dotted_keys, nearest, override_problem
from gcpo.methods.gcpo.settings import GCPOConfig
from recipe.gcpo import main_gcpo
from tests.run_inputs import ROOT, composed

PROCESSOR_SECONDS = 15
"""A refusal takes less than this, also where importing transformers belongs to it."""


# ---- the process -----------------------------------------------------------------------------------------------------


def run_main(
    *arguments: str, config: str = "gcpo_quickstart", folder: Path, full_error: bool = False
) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "HYDRA_FULL_ERROR"}
    environment |= {"HYDRA_FULL_ERROR": "1"} if full_error else {}
    command = [sys.executable, "-m", "recipe.gcpo.main_gcpo", "--config-name", config, f"hydra.run.dir={folder}/hydra"]
    return subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


REFUSED = [
    ("actor_rollout_ref.actor.optim.lr=fast", "actor_rollout_ref.actor.optim.lr is 'fast'; it must be a number"),
    ("actor_rollout_ref.rollout.n=two", "actor_rollout_ref.rollout.n is 'two'"),
    ("data.train_batch_size=100000", "data.train_batch_size is 100000, and data.train_files has 64 rows"),
    ("gcpo.collider.draws=shared", "gcpo.collider.draws has a new name: write gcpo.collider.scheme"),
    ("+gcpo.conditioned.max_tokens=9", "gcpo.conditioned has a new name: write gcpo.regenerated"),
    ("gcpo.collider.cache_tokens=6400", "gcpo.collider.cache_tokens has been removed: groups that take turns"),
    ("data.train_batchsize=4", "data.train_batchsize is not a setting; did you mean data.train_batch_size?"),
    ("+actor_rollout_ref.model.lora.merge=True", "is in the configuration already: leave out the + before it"),
    ("experiment=[arithmetic,paper]", "experiment names more than one experiment: name one"),
    ("method=gcop", "method has no option gcop: set method=gcpo"),
    ("device=cpux", "device has no option cpux: set device=cpu"),
    ("data.train_batch_size=[4", "the override data.train_batch_size=[4 cannot be read"),
    ("train_batch_size", "the override train_batch_size cannot be read"),
    ("data=4", "the configuration cannot be composed"),
    ("actor_rollout_ref.rollout.n=${data.nothing}", "actor_rollout_ref.rollout.n cannot be resolved"),
    ("actor_rollout_ref.model.path=/no/such/model", "there is no folder /no/such/model"),
]


@pytest.mark.parametrize(("override", "says"), REFUSED, ids=[o for o, _ in REFUSED])
def test_one_line_and_status_2(run_inputs: Path, tmp_path: Path, override: str, says: str) -> None:
    """No traceback, no Ray, and little processor time: verl and torch are not imported."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run_main(
        f"data.train_files={run_inputs}/train.parquet",
        f"data.val_files={run_inputs}/test.parquet",
        f"actor_rollout_ref.model.path={run_inputs}/model",
        *(["actor_rollout_ref.actor.ppo_mini_batch_size=16"]),
        override,
        folder=tmp_path,
        full_error=len(override) % 2 == 0,  # as the launcher sets it
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("gcpo: ") and done.stderr.count("\n") == 1
    assert says in done.stderr and "Traceback" not in done.stdout
    assert "Started a local Ray instance" not in done.stdout
    assert after.ru_utime - before.ru_utime < PROCESSOR_SECONDS / 3


def test_a_refusal_that_needs_the_tokenizer(run_inputs: Path, tmp_path: Path) -> None:
    """The slowest refusal: transformers is imported and prompts are encoded."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run_main(
        f"data.train_files={run_inputs}/train.parquet",
        f"data.val_files={run_inputs}/test.parquet",
        f"actor_rollout_ref.model.path={run_inputs}/model",
        "data.max_prompt_length=2",
        folder=tmp_path,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 2 and "prompts have at most 2 tokens" in done.stderr, done.stderr
    assert after.ru_utime - before.ru_utime < PROCESSOR_SECONDS


def test_the_configuration_is_composed_without_verl() -> None:
    """hydra imports the package that a search path names, and verl takes many seconds."""
    code = (
        "import sys; from recipe.gcpo import main_gcpo as m; m.compose_defaults(m.with_search_path(['x'])); "
        "import gcpo.checks; print([n for n in ('verl', 'torch', 'transformers', 'ray', 'vllm') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize(
    "arguments",
    [["a=1", "--cfg", "job"], ["--config-name", "x", "a=1", "b=2", "--resolve"], ["--config-name=x", "a=1"], []],
)
def test_the_search_path_stands_beside_the_overrides(arguments: list[str]) -> None:
    """argparse takes overrides only where they stand together."""
    found = main_gcpo.with_search_path(["main", *arguments])
    assert [argument for argument in found if "searchpath" not in argument] == ["main", *arguments]
    at = next(i for i, argument in enumerate(found) if "searchpath" in argument)
    first = next((i for i, argument in enumerate(found) if argument == "a=1"), at + 1)
    assert at == first - 1
    assert main_gcpo.with_search_path(found) == found


def test_verl_s_own_checks_are_said_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What only verl knows is said as ours is."""

    def fail(**kwargs: object) -> None:
        raise AssertionError("first line\nsecond line")

    monkeypatch.setattr("verl.utils.config.validate_config", fail)
    with pytest.raises(SystemExit) as stopped:
        main_gcpo.check_with_verl(composed("gcpo_quickstart"))
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "gcpo: verl refuses the configuration: first line\n"


@pytest.mark.parametrize("method", ["gcpo", "grpo", "gc2po"])
def test_an_accepted_configuration_reaches_verl(
    run_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """With the context filled in, and hydra's switch as it was; an error while training is not called a refusal."""
    started: list[DictConfig] = []

    def run_ppo(config: DictConfig, task_runner_class: object) -> None:
        started.append(config)
        assert "HYDRA_FULL_ERROR" not in os.environ
        raise RuntimeError("while training")

    monkeypatch.setattr("verl.trainer.main_ppo.run_ppo", run_ppo)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    arguments = [
        "main_gcpo",
        "--config-name",
        "gcpo_quickstart",
        f"method={method}",
        f"hydra.run.dir={tmp_path}",
        f"data.train_files={run_inputs}/train.parquet",
        f"data.val_files={run_inputs}/test.parquet",
        f"actor_rollout_ref.model.path={run_inputs}/model",
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stopped:
        main_gcpo.main()
    assert stopped.value.code == 1  # hydra's report of an error of the program
    assert started[0].actor_rollout_ref.rollout.max_model_len >= 48 + 64


def test_the_nearest_key() -> None:
    keys = list(dotted_keys(composed("gcpo_quickstart")))
    assert nearest("gcpo.kapa", keys) == "gcpo.kappa"
    assert nearest("rollout.n", keys).endswith("rollout.n")
    assert nearest("actor.learning_rat", keys) is None
    assert nearest("trainer.save_frequency", keys) == "trainer.save_freq"


def test_a_group_that_no_run_reads_is_not_suggested() -> None:
    """verl's yaml has settings of a critic under the same names."""
    error = HydraException("Could not override 'optim.lr'.\nTo append to your config use +optim.lr=1")
    said = override_problem(error, lambda: composed("gcpo_quickstart"))
    assert "did you mean actor_rollout_ref.actor.optim.lr?" in said


def test_a_configuration_of_an_earlier_version() -> None:
    """It names the group that replaced it."""
    error = HydraException("Cannot find primary config 'gc2po_trainer'. Check that it's in your config search path.")
    said = override_problem(error, lambda: OmegaConf.create({}))
    assert said.startswith("there is no configuration gc2po_trainer") and "with method=NAME" in said


def test_an_error_of_another_kind_is_one_sentence() -> None:
    said = override_problem(TypeError("a\n  b"), lambda: OmegaConf.create({}))
    assert said == "the configuration cannot be composed: a b"


# ---- the two entry points --------------------------------------------------------------------------------------------

NAMES = {
    "trainer.project_name",
    "trainer.experiment_name",
    "trainer.default_local_dir",
    "actor_rollout_ref.rollout.trace.project_name",
    "actor_rollout_ref.rollout.trace.experiment_name",
}
"""The only differences: how the run is called."""


def resolved(config: DictConfig) -> dict[str, object]:
    """Every single setting by its dotted key, without the group ``gcpo``, whose defaults are compared by themselves."""
    settings = {}
    for key in dotted_keys(config):
        if key == "gcpo" or key.startswith("gcpo."):
            continue
        if OmegaConf.is_missing(config, key):
            settings[key] = "???"
            continue
        value = OmegaConf.select(config, key)
        if not OmegaConf.is_dict(value) or not len(value):
            settings[key] = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    return settings


def test_both_entry_points_have_the_same_configuration() -> None:
    """docs/verl_overrides.txt says the same as our yaml, key by key."""
    ours, verls = resolved(composed("gcpo_trainer", "device=cpu")), resolved(composed("verl"))
    different = {
        key: (ours.get(key, "absent"), verls.get(key, "absent"))
        for key in ours.keys() | verls.keys()
        if ours.get(key, "absent") != verls.get(key, "absent")
    }
    assert different.keys() == NAMES, different


def test_our_yaml_holds_the_defaults_of_gcpo() -> None:
    """With verl's entry point a field that is left out has its default; our yaml says the same."""
    ours = OmegaConf.to_container(composed("gcpo_trainer").gcpo, resolve=True)
    arguments = {"n": 8, "response_length": 512}
    assert GCPOConfig.from_config(ours, **arguments) == GCPOConfig.from_config({}, **arguments)
