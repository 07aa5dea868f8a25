"""The run scripts and the locks. Python, nvidia-smi and the training are stand-ins, but for one dry run."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from examples.tasks.recipes import TASKS
from gcpo.methods import method_names
from tests.run_inputs import copy_model
from tests.tools.evaluate.made import rows, write_set

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(
    [path for folder in ("run_scripts", "requirements", "recipe/gcpo") for path in (ROOT / folder).glob("*.sh")]
    + [ROOT / ".ci" / "run"]
)
PAPER = ["deepscaler", "numinamath_1.5b", "numinamath_7b", "code_qwen2_7b"]
MATHEMATICS = PAPER[:3]
RUNS = [
    "quickstart.sh",
    *(f"{method}_{name}.sh" for name in PAPER for method in ("gcpo", "grpo")),
    *(f"gc2po_{name}.sh" for name in MATHEMATICS),
]
MATH_SETS = ["aime24", "aime25", "amc23", "math500", "minerva"]
EXPERIMENTS = ROOT / "gcpo" / "config" / "experiment"
METHODS = sorted(path.stem for path in (ROOT / "gcpo" / "config" / "method").glob("*.yaml"))


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

    def start(self, script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("GCPO_")}
        kept |= {"GCPO_SKIP_SETUP": "1", "GCPO_VENV": str(self.folder / "venv"), "GCPO_DATA": str(self.folder / "sets")}
        kept["PATH"] = f"{self.bin}:{kept['PATH']}"
        return subprocess.Popen(
            ["bash", str(ROOT / "run_scripts" / script), *arguments],
            env={**kept, **environment},
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        process = self.start(script, *arguments, **environment)
        out, error = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, out, error)

    def train(self, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """As `run`, for a run whose output is in the sandbox."""
        return self.run(script, "--output", str(self.folder / "o"), *arguments)

    def overrides(self) -> list[str]:
        """The hydra overrides of the training command, which is the last call."""
        words = self.calls[-1].partition(" -m recipe.gcpo.main_gcpo --config-name ")[2].split()
        return [word for word in words[1:] if not word.startswith("hydra.")]

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


@pytest.mark.parametrize("script", [*RUNS, "evaluate.sh", "export_recipe.sh"])
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
        (["--method", "ppo"], f"--method is 'ppo'; it must be one of {' '.join(METHODS)}"),
    ],
)
@pytest.mark.parametrize("script", ["quickstart.sh", "gcpo_deepscaler.sh"])
def test_wrong_arguments(sandbox, script, arguments, sentence):
    done = sandbox.run(script, *arguments)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {sentence}")
    assert sandbox.calls == []


def test_quickstart(sandbox):
    done = sandbox.train("quickstart.sh", "--preset", "light", "--seed", "3", "--steps", "4", "trainer.save_freq=2")
    assert done.returncode == 0, done.stderr
    output = sandbox.folder / "o"
    make, train = sandbox.calls
    assert make == "-m examples.tasks arithmetic"
    assert train.startswith(f"-m gcpo.tools.launch --report --output {output} -- ")
    assert "-m recipe.gcpo.main_gcpo --config-name gcpo_quickstart " in train
    assert f"trainer.default_local_dir={output}/checkpoints" in train
    assert train.endswith(
        "gcpo.preset=light gcpo.seed=3 data.seed=3 actor_rollout_ref.actor.data_loader_seed=3 "
        "trainer.total_training_steps=4 trainer.save_freq=2"
    )


@pytest.mark.parametrize("task", TASKS)
def test_a_task_is_made_before_it_is_trained(sandbox, recipe_config, task):
    done = sandbox.run("train.sh", task, "--method", "grpo", "--output", str(sandbox.folder / "o"))
    assert done.returncode == 0, done.stderr
    make, train = sandbox.calls
    assert make == f"-m examples.tasks {task}" and "-m recipe.gcpo.main_gcpo --config-name gcpo_quickstart " in train
    config = recipe_config(*sandbox.overrides(), name="gcpo_quickstart")
    assert config.data.train_files == f"data/{task}/train.parquet"
    assert config.data.val_files == f"data/{task}/test.parquet"
    assert config.actor_rollout_ref.model.path == f"models/{task}-warm" and config.trainer.device == "cpu"


def test_the_quick_starts_run_beside_each_other(sandbox):
    """Dry runs: the folders of the real ones are not touched."""
    for method, name in (("gcpo", "quickstart"), ("grpo", "quickstart-grpo"), ("gc2po", "quickstart-gc2po")):
        done = sandbox.run("quickstart.sh", "--method", method, "--dry-run")
        assert done.returncode == 0, done.stderr
        assert f" trainer.default_local_dir={ROOT}/outputs/{name}/checkpoints " in sandbox.calls[-1]
        assert f"-m recipe.gcpo.main_gcpo --config-name gcpo_quickstart method={method} " in sandbox.calls[-1]
    assert len(sandbox.calls) == 3


def test_nothing_is_trained_if_the_task_can_not_be_made(sandbox):
    sandbox.program(sandbox.folder / "venv" / "bin" / "python", f'echo "$*" >> {sandbox.calls_file}; exit 7')
    assert sandbox.run("train.sh", "complement", "--output", str(sandbox.folder / "o")).returncode == 7
    assert sandbox.calls == ["-m examples.tasks complement"]


def test_an_experiment_that_does_not_exist(sandbox):
    done = sandbox.run("train.sh", "deepscale")
    names = " ".join(sorted(path.stem for path in EXPERIMENTS.glob("*.yaml")))
    assert done.returncode == 2 and f"'deepscale' is none of {names}" in done.stderr


def test_a_signal_to_the_script_reaches_the_launcher(sandbox):
    """The chain of scripts has become the launcher, so nobody is left who could swallow the signal."""
    sandbox.program(
        sandbox.folder / "venv" / "bin" / "python",
        f'[ "$2" = gcpo.tools.launch ] || exit 0; trap "echo told >> {sandbox.calls_file}; exit 143" TERM; '
        f"echo launcher >> {sandbox.calls_file}; for i in {{1..300}}; do sleep 0.1; done",
    )
    process = sandbox.start("quickstart.sh", "--output", str(sandbox.folder / "o"))
    wait_for(lambda: sandbox.calls == ["launcher"])
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 143 and sandbox.calls == ["launcher", "told"]
    process.communicate()


def test_of_two_starts_the_second_prepares_nothing(sandbox, tiny_folder):
    """Neither while the first one prepares nor while it trains."""
    sandbox.program(
        sandbox.folder / "venv" / "bin" / "python",
        f'echo "$2" >> {sandbox.calls_file}; for i in {{1..300}}; do [ -e {sandbox.folder}/go-$2 ] || sleep 0.1; done',
    )
    arguments = ("gcpo_deepscaler.sh", "--output", str(sandbox.folder / "o"), "--model", "tiny", "--data", "my/set")
    first = sandbox.start(*arguments)
    for calls in (["data_prep"], ["data_prep", "gcpo.tools.launch"]):
        wait_for(lambda calls=calls: sandbox.calls == calls)
        second = sandbox.run(*arguments)
        sentence = f"error: a run is going on in {sandbox.folder}/o; wait for it or give another --output\n"
        assert second.returncode == 2 and second.stderr == sentence and sandbox.calls == calls
        (sandbox.folder / f"go-{calls[-1]}").touch()
    first.communicate()
    assert first.returncode == 0 and sandbox.run(*arguments).returncode == 0


def wait_for(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_deepscaler_without_a_gpu_stops(sandbox):
    done = sandbox.run("gcpo_deepscaler.sh")
    assert done.returncode == 1 and done.stdout == "" and sandbox.calls == []
    assert done.stderr.startswith("error: no NVIDIA GPU here, and agentica-org/DeepScaleR-1.5B-Preview needs one; try")
    assert done.stderr.count("\n") == 1


def test_deepscaler_with_a_tiny_model_goes_on(sandbox, tiny_folder, recipe_config):
    (sandbox.folder / "aime.json").write_text("[]")
    done = sandbox.train("gcpo_deepscaler.sh", "--model", "tiny", "--data", "aime.json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == f"no NVIDIA GPU here: two steps on the CPU, since {tiny_folder} is small"
    prepare, train = sandbox.calls
    home = sandbox.folder
    assert prepare == f"-m data_prep aime --source {home}/aime.json --data {home}/sets --output {home}/o/data"
    assert f"data.train_files={home}/o/data/train.parquet" in train
    config = recipe_config(*sandbox.overrides())
    assert config.trainer.device == "cpu" and config.trainer.total_training_steps == 2
    assert not config.trainer.val_before_train and config.data.max_response_length == 64


@pytest.mark.parametrize(
    ("name", "model", "data_set"),
    [
        ("deepscaler", "agentica-org/DeepScaleR-1.5B-Preview", "aime"),
        ("numinamath_1.5b", "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "numinamath"),
        ("numinamath_7b", "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "numinamath"),
        ("code_qwen2_7b", "Qwen/Qwen2-7B-Instruct", "mbpp"),
    ],
)
def test_with_gpus_it_is_the_paper_s_run(sandbox, recipe_config, name, model, data_set):
    sandbox.gpus(4)
    done = sandbox.train(f"gcpo_{name}.sh", "gcpo.alpha=1")
    assert done.returncode == 0, done.stderr
    *prepared, train = sandbox.calls
    sets = ["humaneval"] if data_set == "mbpp" else MATH_SETS
    output = sandbox.folder / "o"
    assert prepared == [
        *(f"-m data_prep {one} --data {sandbox.folder}/sets" for one in sets),
        f"-m data_prep {data_set} --data {sandbox.folder}/sets --output {output}/data",
    ]
    assert train.endswith(" gcpo.alpha=1")
    config = recipe_config(*sandbox.overrides())
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    assert config.actor_rollout_ref.model.path == model and config.trainer.device == "cuda"
    assert config.data.max_response_length == (2048 if data_set == "mbpp" else 16384)
    assert (config.data.train_batch_size, actor.ppo_mini_batch_size, rollout.n) == (256, 256, 8)
    assert (actor.optim.lr, actor.optim.weight_decay) == (1e-6, 0.01)
    assert (config.gcpo.kappa, config.gcpo.alpha, config.gcpo.preset) == (0.06, 1, "paper")
    assert (config.trainer.n_gpus_per_node, config.trainer.nnodes) == (4, 1)


def test_validation_is_on_a_prepared_set(sandbox):
    sandbox.gpus(1)
    for name in MATH_SETS:
        (sandbox.folder / "sets" / name).mkdir(parents=True)
        (sandbox.folder / "sets" / name / "test.parquet").write_text("")
    assert sandbox.train("gcpo_numinamath_7b.sh").returncode == 0
    prepare, train = sandbox.calls
    assert prepare.startswith("-m data_prep numinamath ")
    assert f" data.val_files={sandbox.folder}/sets/aime24/test.parquet " in train and "test_freq=-1" not in train


def test_validation_on_what_the_data_holds_out(sandbox, tiny_folder):
    """No evaluation set is prepared here, so that is what is left; without it nothing is validated on."""
    arguments = ["gcpo_numinamath_1.5b.sh", "--model", "tiny", "--data", "my/set"]
    assert sandbox.train(*arguments).returncode == 0
    assert f"data.val_files={sandbox.folder}/o/data/train.parquet" in sandbox.calls[-1]
    assert "trainer.test_freq=-1" in sandbox.calls[-1]
    (sandbox.folder / "o" / "data").mkdir(parents=True)
    (sandbox.folder / "o" / "data" / "test.parquet").write_text("")
    assert sandbox.train(*arguments).returncode == 0
    assert f"data.val_files={sandbox.folder}/o/data/test.parquet" in sandbox.calls[-1]
    assert "trainer.test_freq=-1" not in sandbox.calls[-1]


def test_a_set_that_can_not_be_prepared_stops_the_run(sandbox):
    sandbox.gpus(1)
    sandbox.program(sandbox.folder / "venv" / "bin" / "python", f'echo "$*" >> {sandbox.calls_file}; exit 2')
    assert sandbox.train("gcpo_deepscaler.sh").returncode == 2
    assert sandbox.calls == [f"-m data_prep aime24 --data {sandbox.folder}/sets"]


def test_deepscaler_uses_a_parquet_that_is_ready(sandbox):
    sandbox.gpus(1)
    sandbox.program(sandbox.folder / "venv" / "bin" / "python", f'echo "$*" >> {sandbox.calls_file}')
    (sandbox.folder / "mine.parquet").write_text("")
    done = sandbox.train(
        "gcpo_deepscaler.sh", "--data", "mine.parquet", "--val", "mine.parquet", "--nodes", "2", "--gpus", "8"
    )
    assert done.returncode == 0, done.stderr
    assert len(sandbox.calls) == 2 and f"data.train_files={sandbox.folder}/mine.parquet" in sandbox.calls[1]
    assert "test_freq=-1" not in sandbox.calls[1]
    assert "trainer.nnodes=2" in sandbox.calls[1] and "++ray_kwargs.ray_init.address=auto" in sandbox.calls[1]


@pytest.mark.parametrize("name", PAPER)
def test_grpo_is_the_same_run_without_gcpo(sandbox, name):
    sandbox.gpus(4)
    trained = []
    for method in ("gcpo", "grpo"):
        done = sandbox.train(f"{method}_{name}.sh", "--data", "some/set")
        assert done.returncode == 0, done.stderr
        trained.append(set(sandbox.calls[-1].split()))
    gcpo, grpo = trained
    assert gcpo - grpo == {"method=gcpo"} and grpo - gcpo == {"method=grpo"}


@pytest.mark.parametrize(("name", "context"), zip(PAPER, (131072, 131072, 131072, 32768), strict=True))
def test_context_of_the_paper_s_runs(recipe_config, name, context):
    """The longest prompt with candidates and a response fit the context, and the comments have the right numbers."""
    from gcpo.methods.gcpo.settings import BlocksSettings

    config = recipe_config(f"experiment={name}")
    response, length = config.data.max_response_length, config.actor_rollout_ref.rollout.max_model_len
    blocks = BlocksSettings()
    label = max(len(blocks.candidate.format(label=8)), len(blocks.collider))
    prompt = config.data.max_prompt_length + len(blocks.intro + blocks.outro)
    prompt += 9 * (config.gcpo.blocks.max_tokens + label)
    # The comment counts a label as 16 tokens.
    stated = prompt + 9 * (16 - label) + response
    text = (EXPERIMENTS / ("code_qwen2_7b.yaml" if "code" in name else "deepscaler.yaml")).read_text()
    assert f"= {stated:,} " in text and f"-> a context of {length:,}" in text
    for tokens in (response, config.gcpo.collider.max_tokens, config.gcpo.regenerated.max_tokens):
        assert prompt + tokens <= length <= context
    assert length <= config.actor_rollout_ref.actor.ppo_max_token_len_per_gpu


@pytest.mark.parametrize("name", PAPER)
def test_draws_are_cut_no_earlier_than_responses(recipe_config, name):
    """A draw that is cut is left out; with a shorter limit these would be the long answers."""
    config = recipe_config(f"experiment={name}")
    limits = {config.data.max_response_length, config.gcpo.collider.max_tokens, config.gcpo.regenerated.max_tokens}
    assert len(limits) == 1 and config.gcpo.blocks.max_tokens <= 2048


@pytest.mark.parametrize("name", PAPER)
@pytest.mark.parametrize("method", METHODS)
def test_an_experiment_without_the_scripts(recipe_config, method, name):
    """``python -m recipe.gcpo.main_gcpo experiment=NAME``: a method's own settings win over the experiment's."""
    config = recipe_config(f"experiment={name}", f"method={method}")
    assert config.gcpo.kappa == (0.06 if method == "gcpo" else 0) and config.data.train_batch_size == 256
    assert config.trainer.v1.trainer_mode == config.algorithm.adv_estimator in method_names()
    assert config.trainer.experiment_name == method


def test_the_embedded_task_has_settings_of_its_own_for_gc2po(recipe_config):
    """Those of method_on win over the method's, with both yaml files; an experiment without such a file has none."""
    quickstart = recipe_config("method=gc2po", name="gcpo_quickstart")
    for config in (quickstart, recipe_config("method=gc2po", "experiment=arithmetic", "device=cpu")):
        assert (config.gc2po.intervention, config.gc2po.episodes.separator) == ("lm_head", " ")
        assert config.data.episode_prompt is None
    for task in ("contradict", "arithmetic_hard"):
        config = recipe_config("method=gc2po", f"experiment={task}", name="gcpo_quickstart")
        assert config.gc2po == quickstart.gc2po and config.data.episode_prompt is None
        l2t = recipe_config("method=l2t", f"experiment={task}", name="gcpo_quickstart")
        assert l2t.l2t.probe.text == " \\boxed{" and l2t.data.episode_prompt is None
    assert quickstart.trainer.default_local_dir == "outputs/quickstart-gc2po/checkpoints"
    assert recipe_config("method=gc2po", "experiment=deepscaler").gc2po.intervention == "hidden_state"


@pytest.mark.parametrize(("name", "context"), zip(PAPER, (131072, 131072, 131072, 32768), strict=True))
def test_settings_pass_the_checks_of_a_run(sandbox, recipe_config, tiny_model, monkeypatch, name, context):
    """What the scripts override exists, and all lengths fit a model with the context of the paper's."""
    from gcpo.checks import check_run, devices

    monkeypatch.setattr(devices, "count_gpus", lambda: 8)
    copy_model(tiny_model, sandbox.folder / "model", max_position_embeddings=context)
    data = str(write_set(sandbox.folder / "mine.parquet", rows(256)))
    sandbox.program(sandbox.folder / "venv" / "bin" / "python", f'echo "$*" >> {sandbox.calls_file}')
    sandbox.gpus(8)
    done = sandbox.train(f"gcpo_{name}.sh", "--model", "model", "--data", data, "--val", data)
    assert done.returncode == 0, done.stderr
    config = recipe_config(*sandbox.overrides())
    check_run(config)
    assert config.trainer.n_gpus_per_node % config.actor_rollout_ref.rollout.tensor_model_parallel_size == 0


@pytest.mark.parametrize("name", MATHEMATICS)
def test_gc2po_runs_are_accepted(sandbox, recipe_config, tiny_model, monkeypatch, name):
    """The same for GC2PO, whose own prompt and branches must fit."""
    from gcpo.checks import check_run, devices

    monkeypatch.setattr(devices, "count_gpus", lambda: 8)
    copy_model(tiny_model, sandbox.folder / "model", max_position_embeddings=131072, num_hidden_layers=3)
    data = str(write_set(sandbox.folder / "mine.parquet", rows(256)))
    sandbox.program(sandbox.folder / "venv" / "bin" / "python", f'echo "$*" >> {sandbox.calls_file}')
    sandbox.gpus(8)
    done = sandbox.train(f"gc2po_{name}.sh", "--model", "model", "--data", data, "--val", data)
    assert done.returncode == 0, done.stderr
    config = recipe_config(*sandbox.overrides())
    assert check_run(config).intervention == "hidden_state" and config.data.episode_prompt


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
        f"-m gcpo.tools.evaluate {home}/tiny --sets aime24,{home}/mine.parquet --samples=4 --seed=1 --output {ROOT}/out"
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
