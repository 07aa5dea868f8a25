"""The run scripts and the locks. Python, nvidia-smi and the training are stand-ins, but for one dry run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.run_inputs import copy_model
from tests.tools.evaluate.made import rows, write_set

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted([*(ROOT / "run_scripts").glob("*.sh"), *(ROOT / "requirements").glob("*.sh"), ROOT / ".ci" / "run"])
PAPER = ["deepscaler", "numinamath_1.5b", "numinamath_7b", "code_qwen2_7b"]
MATHEMATICS = PAPER[:3]
RUNS = [
    "quickstart.sh",
    *(f"{method}_{name}.sh" for name in PAPER for method in ("gcpo", "grpo")),
    *(f"gc2po_{name}.sh" for name in MATHEMATICS),
]
MATH_SETS = ["aime24", "aime25", "amc23", "math500", "minerva"]


class Sandbox:
    """Runs scripts with a stand-in for the environment's Python that writes down what it is called with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls_file = folder / "calls"
        self.bin = folder / "path"
        self.bin.mkdir()
        self.program(
            folder / "venv" / "bin" / "python", f'printf "%s\\n" "$*" >> {self.calls_file}; [ "$3" != --is-prepared ]'
        )

    @staticmethod
    def program(path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)

    def gpus(self, count: int) -> None:
        """As if the machine had so many."""
        lines = "".join(f'echo "GPU {i}: Some GPU (UUID: GPU-{i})";' for i in range(count))
        self.program(self.bin / "nvidia-smi", lines or "exit 9")

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("GCPO_")}
        kept |= {"GCPO_SKIP_SETUP": "1", "GCPO_VENV": str(self.folder / "venv"), "GCPO_DATA": str(self.folder / "sets")}
        kept["PATH"] = f"{self.bin}:{kept['PATH']}"
        return subprocess.run(
            ["bash", str(ROOT / "run_scripts" / script), *arguments],
            env={**kept, **environment},
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )

    @property
    def calls(self) -> list[str]:
        """What Python was called with."""
        return self.calls_file.read_text().splitlines() if self.calls_file.exists() else []


@pytest.fixture
def sandbox(tmp_path):
    box = Sandbox(tmp_path)
    box.gpus(0)
    return box


@pytest.fixture
def tiny_folder(tmp_path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text("{}")
    return tmp_path / "tiny"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_syntax(script):
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    if not script.name.startswith("_"):
        assert os.access(script, os.X_OK) and script.read_text().startswith("#!/usr/bin/env bash\n")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck():
    subprocess.run(["shellcheck", "-x", "-e", "SC1091,SC2034", *map(str, SCRIPTS)], check=True, cwd=ROOT)


def test_ci_runs_the_tests():
    assert "bash run_scripts/test.sh" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("script", [*RUNS, "evaluate.sh"])
def test_help(sandbox, script):
    done = sandbox.run(script, "--help")
    assert done.returncode == 0 and "run_scripts/" in done.stdout and "set -e" not in done.stdout
    assert sandbox.calls == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--bogus"], "unknown option --bogus"),
        (["word"], "word is neither an option nor an override key=value"),
        (["--output"], "--output needs a value"),
        (["--method", "ppo"], "--method is 'ppo'; it must be gcpo, gc2po or grpo"),
    ],
)
@pytest.mark.parametrize("script", ["quickstart.sh", "gcpo_deepscaler.sh"])
def test_wrong_arguments(sandbox, script, arguments, sentence):
    done = sandbox.run(script, *arguments)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {sentence}")
    assert sandbox.calls == []


def test_quickstart(sandbox):
    done = sandbox.run("quickstart.sh", "--preset", "light", "--seed", "3", "--steps", "4", "trainer.save_freq=2")
    assert done.returncode == 0, done.stderr
    data, model, train, shown = sandbox.calls
    assert data == "-m examples.arithmetic.task --output data/arithmetic"
    assert model == "-m examples.arithmetic.warm_start --data data/arithmetic --output models/arithmetic-warm"
    assert train.startswith("-m gcpo.tools.launch --output outputs/quickstart -- ")
    assert "-m recipe.gcpo.main_gcpo --config-name gcpo_quickstart " in train
    assert f"trainer.default_local_dir={ROOT}/outputs/quickstart/checkpoints" in train
    assert train.endswith(
        "gcpo.preset=light gcpo.seed=3 data.seed=3 actor_rollout_ref.actor.data_loader_seed=3 "
        "trainer.total_training_steps=4 trainer.save_freq=2"
    )
    assert shown == "-m gcpo.tools.report outputs/quickstart"


def test_quickstart_with_grpo_runs_beside(sandbox):
    assert sandbox.run("quickstart.sh", "--method", "grpo").returncode == 0
    assert "--output outputs/quickstart-grpo " in sandbox.calls[2]
    assert sandbox.calls[2].endswith("gcpo.kappa=0 gcpo.weighting=off")


def test_quickstart_with_gc2po(sandbox):
    assert sandbox.run("quickstart.sh", "--method", "gc2po").returncode == 0
    assert "--output outputs/quickstart-gc2po " in sandbox.calls[2]
    assert "-m recipe.gcpo.main_gcpo --config-name gc2po_quickstart " in sandbox.calls[2]


def test_quickstart_stops_where_a_step_fails(sandbox):
    sandbox.program(sandbox.folder / "venv" / "bin" / "python", f'echo "$*" >> {sandbox.calls_file}; exit 7')
    assert sandbox.run("quickstart.sh").returncode == 7
    assert len(sandbox.calls) == 1


def test_deepscaler_without_a_gpu_stops(sandbox):
    done = sandbox.run("gcpo_deepscaler.sh")
    assert done.returncode == 1 and done.stdout == "" and sandbox.calls == []
    assert done.stderr.startswith("error: no NVIDIA GPU here, and agentica-org/DeepScaleR-1.5B-Preview needs one; try")
    assert done.stderr.count("\n") == 1


def test_deepscaler_with_a_tiny_model_goes_on(sandbox, tiny_folder):
    (sandbox.folder / "aime.json").write_text("[]")
    done = sandbox.run(
        "gcpo_deepscaler.sh", "--model", "tiny", "--data", "aime.json", "--output", str(sandbox.folder / "o")
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == f"no NVIDIA GPU here: two steps on the CPU, since {tiny_folder} is small"
    prepare, train, shown = sandbox.calls
    home = sandbox.folder
    assert prepare == f"-m data_prep aime --source {home}/aime.json --data {home}/sets --output {home}/o/data"
    assert f"data.train_files={home}/o/data/train.parquet" in train and "device=cpu" in train
    assert "trainer.total_training_steps=2" in train and "trainer.val_before_train=False" in train
    assert shown == f"-m gcpo.tools.report {home}/o"


@pytest.mark.parametrize(
    ("name", "model", "data_set"),
    [
        ("deepscaler", "agentica-org/DeepScaleR-1.5B-Preview", "aime"),
        ("numinamath_1.5b", "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "numinamath"),
        ("numinamath_7b", "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "numinamath"),
        ("code_qwen2_7b", "Qwen/Qwen2-7B-Instruct", "mbpp"),
    ],
)
def test_with_gpus_it_is_the_paper_s_run(sandbox, name, model, data_set):
    sandbox.gpus(4)
    done = sandbox.run(f"gcpo_{name}.sh", "gcpo.alpha=1")
    assert done.returncode == 0, done.stderr
    *prepared, train, _ = sandbox.calls
    sets = ["humaneval"] if data_set == "mbpp" else MATH_SETS
    output = f"{ROOT}/outputs/gcpo-{name.replace('_', '-')}"
    assert prepared == [
        *(f"-m data_prep {one} --data {sandbox.folder}/sets" for one in sets),
        f"-m data_prep {data_set} --data {sandbox.folder}/sets --output {output}/data",
    ]
    for setting in (
        f"actor_rollout_ref.model.path={model}",
        "data.train_batch_size=256",
        f"data.max_response_length={2048 if data_set == 'mbpp' else 16384}",
        "actor_rollout_ref.rollout.n=8",
        "actor_rollout_ref.actor.optim.lr=1e-6",
        "actor_rollout_ref.actor.optim.weight_decay=0.01",
        "gcpo.kappa=0.06",
        "gcpo.preset=paper",
        "trainer.n_gpus_per_node=4",
        "trainer.nnodes=1",
    ):
        assert f" {setting} " in train
    assert "device=cpu" not in train and train.endswith(" gcpo.alpha=1")


def test_validation_is_on_a_prepared_set(sandbox):
    sandbox.gpus(1)
    for name in MATH_SETS:
        (sandbox.folder / "sets" / name).mkdir(parents=True)
        (sandbox.folder / "sets" / name / "test.parquet").write_text("")
    assert sandbox.run("gcpo_numinamath_7b.sh").returncode == 0
    prepare, train, _ = sandbox.calls
    assert prepare.startswith("-m data_prep numinamath ")
    assert f" data.val_files={sandbox.folder}/sets/aime24/test.parquet " in train and "test_freq=-1" not in train


def test_validation_on_what_the_data_holds_out(sandbox, tiny_folder):
    """No evaluation set is prepared here, so that is what is left; without it nothing is validated on."""
    arguments = [
        "gcpo_numinamath_1.5b.sh",
        "--model",
        "tiny",
        "--data",
        "my/set",
        "--output",
        str(sandbox.folder / "o"),
    ]
    assert sandbox.run(*arguments).returncode == 0
    assert f"data.val_files={sandbox.folder}/o/data/train.parquet" in sandbox.calls[-2]
    assert "trainer.test_freq=-1" in sandbox.calls[-2]
    (sandbox.folder / "o" / "data").mkdir(parents=True)
    (sandbox.folder / "o" / "data" / "test.parquet").write_text("")
    assert sandbox.run(*arguments).returncode == 0
    assert f"data.val_files={sandbox.folder}/o/data/test.parquet" in sandbox.calls[-2]
    assert "trainer.test_freq=-1" not in sandbox.calls[-2]


def test_a_set_that_can_not_be_prepared_stops_the_run(sandbox):
    sandbox.gpus(1)
    sandbox.program(sandbox.folder / "venv" / "bin" / "python", f'echo "$*" >> {sandbox.calls_file}; exit 2')
    assert sandbox.run("gcpo_deepscaler.sh").returncode == 2
    assert sandbox.calls == [f"-m data_prep aime24 --data {sandbox.folder}/sets"]


def test_deepscaler_uses_a_parquet_that_is_ready(sandbox):
    sandbox.gpus(1)
    sandbox.program(sandbox.folder / "venv" / "bin" / "python", f'echo "$*" >> {sandbox.calls_file}')
    (sandbox.folder / "mine.parquet").write_text("")
    done = sandbox.run(
        "gcpo_deepscaler.sh", "--data", "mine.parquet", "--val", "mine.parquet", "--nodes", "2", "--gpus", "8"
    )
    assert done.returncode == 0, done.stderr
    assert len(sandbox.calls) == 3 and f"data.train_files={sandbox.folder}/mine.parquet" in sandbox.calls[1]
    assert "trainer.test_freq=10" in sandbox.calls[1] and "test_freq=-1" not in sandbox.calls[1]
    assert "trainer.nnodes=2" in sandbox.calls[1] and "+ray_kwargs.ray_init.address=auto" in sandbox.calls[1]


@pytest.mark.parametrize("name", PAPER)
def test_grpo_is_the_same_run_without_gcpo(sandbox, name):
    sandbox.gpus(4)
    trained = []
    for method in ("gcpo", "grpo"):
        done = sandbox.run(f"{method}_{name}.sh", "--data", "some/set")
        assert done.returncode == 0, done.stderr
        trained.append(set(sandbox.calls[-2].replace(f"{method}-", "X-").split()))
    gcpo, grpo = trained
    assert gcpo - grpo == {"gcpo.preset=paper"}
    assert grpo - gcpo == {"gcpo.kappa=0", "gcpo.weighting=off"}


@pytest.mark.parametrize(("name", "context"), zip(PAPER, (131072, 131072, 131072, 32768), strict=True))
def test_context_of_the_paper_s_runs(name, context):
    """The numbers in the scripts' comments: the longest prompt with candidates and a response fit the context."""
    from gcpo.methods.gcpo.settings import BlocksConfig

    text = (ROOT / "run_scripts" / f"gcpo_{name}.sh").read_text()
    number = lambda key: int(re.search(rf"^    {re.escape(key)}=(\d+)$", text, re.MULTILINE)[1])  # noqa: E731
    blocks = BlocksConfig()
    label = max(len(blocks.candidate.format(label=8)), len(blocks.collider))
    prompt = number("data.max_prompt_length") + len(blocks.intro + blocks.outro)
    prompt += 9 * (number("gcpo.blocks.max_tokens") + label)
    # The comment counts a label as 16 tokens.
    stated = prompt + 9 * (16 - label) + number("data.max_response_length")
    assert f"= {stated:,} " in text and f"-> a context of {number('actor_rollout_ref.rollout.max_model_len'):,}" in text
    for key in ("data.max_response_length", "gcpo.collider.max_tokens", "gcpo.regenerated.max_tokens"):
        assert prompt + number(key) <= number("actor_rollout_ref.rollout.max_model_len") <= context
    assert number("actor_rollout_ref.rollout.max_model_len") <= number(
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu"
    )


@pytest.mark.parametrize("name", PAPER)
def test_draws_are_cut_no_earlier_than_responses(name):
    """A draw that is cut is left out; with a shorter limit these would be the long answers."""
    text = (ROOT / "run_scripts" / f"gcpo_{name}.sh").read_text()
    limits = dict(re.findall(r"^    (data\.max_response_length|gcpo\.\w+\.max_tokens)=(\d+)$", text, re.MULTILINE))
    assert len(limits) == 4 and int(limits.pop("gcpo.blocks.max_tokens")) <= 2048
    assert len(set(limits.values())) == 1


@pytest.mark.parametrize(("name", "context"), zip(PAPER, (131072, 131072, 131072, 32768), strict=True))
def test_settings_pass_the_checks_of_a_run(sandbox, recipe_config, tiny_model, monkeypatch, name, context):
    """What the scripts override exists, and all lengths fit a model with the context of the paper's."""
    from gcpo.checks import check_run, devices

    monkeypatch.setattr(devices, "count_gpus", lambda: 8)
    copy_model(tiny_model, sandbox.folder / "model", max_position_embeddings=context)
    data = str(write_set(sandbox.folder / "mine.parquet", rows(256)))
    sandbox.program(sandbox.folder / "venv" / "bin" / "python", f'echo "$*" >> {sandbox.calls_file}')
    sandbox.gpus(8)
    done = sandbox.run(f"gcpo_{name}.sh", "--model", "model", "--data", data, "--val", data)
    assert done.returncode == 0, done.stderr
    overrides = sandbox.calls[-2].partition(" -m recipe.gcpo.main_gcpo ")[2].split()
    config = recipe_config(*(one for one in overrides if not one.startswith("hydra.")))
    check_run(config)
    assert config.trainer.n_gpus_per_node % config.actor_rollout_ref.rollout.tensor_model_parallel_size == 0


@pytest.mark.parametrize("name", MATHEMATICS)
def test_gc2po_runs_are_accepted(sandbox, recipe_config, tiny_model, monkeypatch, name):
    """The same for GC2PO, whose own prompt and branches must fit."""
    from gcpo.checks import check_gc2po_run, devices

    monkeypatch.setattr(devices, "count_gpus", lambda: 8)
    copy_model(tiny_model, sandbox.folder / "model", max_position_embeddings=131072, num_hidden_layers=3)
    data = str(write_set(sandbox.folder / "mine.parquet", rows(256)))
    sandbox.program(sandbox.folder / "venv" / "bin" / "python", f'echo "$*" >> {sandbox.calls_file}')
    sandbox.gpus(8)
    done = sandbox.run(f"gc2po_{name}.sh", "--model", "model", "--data", data, "--val", data)
    assert done.returncode == 0, done.stderr
    module, option, config_name, *overrides = sandbox.calls[-2].partition(" -m ")[2].split()
    assert (module, option, config_name) == ("recipe.gcpo.main_gcpo", "--config-name", "gc2po_trainer")
    config = recipe_config(*(one for one in overrides if not one.startswith("hydra.")), name=config_name)
    assert check_gc2po_run(config).intervention == "hidden_state" and config.data.episode_prompt


def test_dry_run_resolves_the_configuration(sandbox):
    done = sandbox.run("gcpo_deepscaler.sh", "--dry-run", "gcpo.alpha=1.4", GCPO_VENV=sys.prefix)
    assert done.returncode == 0, done.stderr[-2000:]
    command, configuration = done.stdout.split("# resolved configuration\n")
    assert "no NVIDIA GPU here: the dry run needs none" in command and "-m recipe.gcpo.main_gcpo" in command
    import yaml

    resolved = yaml.safe_load(configuration)
    assert resolved["gcpo"]["alpha"] == 1.4 and resolved["gcpo"]["blocks"]["max_tokens"] == 1024
    assert resolved["actor_rollout_ref"]["rollout"]["max_model_len"] == 27648
    assert resolved["trainer"]["v1"]["trainer_mode"] == "gcpo"


@pytest.mark.parametrize("script", RUNS[1:])
def test_dry_run_needs_no_gpu_model_or_data(sandbox, script):
    done = sandbox.run(script, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "no NVIDIA GPU here: the dry run needs none" in done.stdout
    (call,) = sandbox.calls  # the configuration is asked for, and nothing is prepared or trained
    assert call.startswith("-m recipe.gcpo.main_gcpo ") and call.endswith(" --cfg job --resolve")
    held_out = f"{ROOT}/outputs/{script.removesuffix('.sh').replace('_', '-')}/data/test.parquet"
    validation = held_out if "code" in script else f"{sandbox.folder}/sets/aime24/test.parquet"
    assert f" data.val_files={validation} " in call and "test_freq=-1" not in call
    assert not (sandbox.folder / "sets").exists()


def test_evaluate(sandbox, tiny_folder):
    (sandbox.folder / "mine.parquet").write_text("")
    done = sandbox.run(
        "evaluate.sh", "tiny", "--sets", "aime24,mine.parquet", "--samples", "4", "--seed", "1", "--output", "out/"
    )
    assert done.returncode == 0, done.stderr
    home = sandbox.folder
    assert sandbox.calls == [
        f"-m gcpo.tools.evaluate run {home}/tiny --sets aime24,{home}/mine.parquet --samples=4 --seed=1 "
        f"--output {ROOT}/out"
    ]


def test_evaluate_prints_the_table(sandbox, tiny_folder):
    done = sandbox.run("evaluate.sh", "table", "--format", "csv", "tiny", "new=tiny")
    assert done.returncode == 0, done.stderr
    assert sandbox.calls == [
        f"-m gcpo.tools.evaluate table --format=csv {sandbox.folder}/tiny new={sandbox.folder}/tiny"
    ]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [([], "which model?"), (["m", "--bogus"], "unknown option --bogus"), (["m", "--sets"], "--sets needs a value")],
)
def test_evaluate_with_wrong_arguments(sandbox, arguments, sentence):
    done = sandbox.run("evaluate.sh", *arguments)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {sentence}") and sandbox.calls == []


@pytest.mark.parametrize(
    ("environment", "code", "sentence"),
    [
        ({"GCPO_PROFILE": "tpu"}, 2, "GCPO_PROFILE is 'tpu'; it must be cpu or gpu"),
        ({"GCPO_PYTHON": "/no/such/python"}, 1, "GCPO_PYTHON=/no/such/python is no CPython 3.11 or 3.12"),
    ],
)
def test_setup_says_what_is_wrong(sandbox, environment, code, sentence):
    done = sandbox.run("setup.sh", GCPO_VENV=str(sandbox.folder / "fresh"), **environment)
    assert done.returncode == code and f"error: {sentence}" in done.stderr


def test_setup_leaves_foreign_environments_alone(sandbox):
    done = sandbox.run("setup.sh", GCPO_PYTHON=sys.executable)
    assert done.returncode == 1 and "is an environment that this script did not make" in done.stderr
    assert (sandbox.folder / "venv" / "bin" / "python").exists()


def lock(profile: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / f"{profile}.txt").read_text().splitlines()
    pins = [line.split(" ;")[0] for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][A-Za-z0-9.]*", pin) for pin in pins), "no index, URL or local version"
    return dict(pin.split("==") for pin in pins)


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_locks_hold_what_the_project_asks_for(profile):
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    pins = lock(profile)
    for text in [*project["dependencies"], *extras[profile], *extras["test"], *extras["dev"]]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[requirement.name.lower()]), text


def test_cpu_lock_needs_no_accelerator():
    assert not [name for name in lock("cpu") if name.startswith(("nvidia-", "cuda-", "flash")) or name in UNUSED_ON_CPU]


UNUSED_ON_CPU = ("torchvision", "torchaudio", "torchcodec", "vllm")
