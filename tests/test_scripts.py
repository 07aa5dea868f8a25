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

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted([*(ROOT / "run_scripts").glob("*.sh"), *(ROOT / "requirements").glob("*.sh"), ROOT / ".ci" / "run"])
RUNS = ["quickstart.sh", "gcpo_deepscaler.sh", "grpo_deepscaler.sh"]


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
        kept |= {"GCPO_SKIP_SETUP": "1", "GCPO_VENV": str(self.folder / "venv")}
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
    if script.name != "_common.sh":
        assert os.access(script, os.X_OK) and script.read_text().startswith("#!/usr/bin/env bash\n")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck():
    subprocess.run(["shellcheck", "-x", "-e", "SC1091,SC2034", *map(str, SCRIPTS)], check=True, cwd=ROOT)


def test_ci_runs_the_tests():
    assert "bash run_scripts/test.sh" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("script", RUNS)
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
        (["--method", "ppo"], "--method is 'ppo'; it must be gcpo or grpo"),
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
    assert data == "-m data_prep.arithmetic --output data/arithmetic"
    assert model == "-m data_prep.warm_start --data data/arithmetic --output models/arithmetic-warm"
    assert train.startswith("-m gcpo.launch --output outputs/quickstart -- ")
    assert "-m recipe.gcpo.main_gcpo --config-name gcpo_quickstart " in train
    assert f"trainer.default_local_dir={ROOT}/outputs/quickstart/checkpoints" in train
    assert train.endswith(
        "gcpo.preset=light gcpo.seed=3 data.seed=3 actor_rollout_ref.actor.data_loader_seed=3 "
        "trainer.total_training_steps=4 trainer.save_freq=2"
    )
    assert shown == "-m gcpo.report outputs/quickstart"


def test_quickstart_with_grpo_runs_beside(sandbox):
    assert sandbox.run("quickstart.sh", "--method", "grpo").returncode == 0
    assert "--output outputs/quickstart-grpo " in sandbox.calls[2]
    assert sandbox.calls[2].endswith("gcpo.kappa=0 gcpo.weighting=off")


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
    assert prepare == f"-m data_prep.deepscaler --source {sandbox.folder}/aime.json --output {sandbox.folder}/o/data"
    assert f"data.train_files={sandbox.folder}/o/data/train.parquet" in train and "device=cpu" in train
    assert "trainer.total_training_steps=2" in train and "trainer.val_before_train=False" in train
    assert shown == f"-m gcpo.report {sandbox.folder}/o"


def test_deepscaler_with_gpus_is_the_paper_s_run(sandbox):
    sandbox.gpus(4)
    done = sandbox.run("gcpo_deepscaler.sh", "--data", "some/set", "gcpo.alpha=1")
    assert done.returncode == 0, done.stderr
    train = sandbox.calls[1]
    for setting in (
        "actor_rollout_ref.model.path=agentica-org/DeepScaleR-1.5B-Preview",
        "data.train_batch_size=256",
        "data.max_response_length=16384",
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


def test_grpo_is_the_same_run_without_gcpo(sandbox):
    sandbox.gpus(4)
    for script in ("gcpo_deepscaler.sh", "grpo_deepscaler.sh"):
        done = sandbox.run(script)
        assert done.returncode == 0, done.stderr
    gcpo, grpo = (
        set(call.replace("gcpo-deepscaler", "X").replace("grpo-deepscaler", "X").split())
        for call in (sandbox.calls[1], sandbox.calls[4])
    )
    assert gcpo - grpo == {"gcpo.preset=paper"}
    assert grpo - gcpo == {"gcpo.kappa=0", "gcpo.weighting=off"}


def test_context_of_the_paper_s_run():
    """The numbers in the script's comment: the longest prompt with candidates and a response fit the context."""
    from gcpo.config import BlocksConfig

    text = (ROOT / "run_scripts" / "gcpo_deepscaler.sh").read_text()
    number = lambda key: int(re.search(rf"^    {re.escape(key)}=(\d+)$", text, re.MULTILINE)[1])  # noqa: E731
    blocks = BlocksConfig()
    label = max(len(blocks.candidate.format(label=8)), len(blocks.collider))
    prompt = number("data.max_prompt_length") + len(blocks.intro + blocks.outro)
    prompt += 9 * (number("gcpo.blocks.max_tokens") + label)
    assert prompt + number("data.max_response_length") <= number("actor_rollout_ref.rollout.max_model_len")
    assert number("actor_rollout_ref.rollout.max_model_len") <= number(
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu"
    )


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
