"""The real stack: verl, Ray, FSDP2 and vLLM on the CPU, in three start-ups.

What this does not show is learning; that takes more steps than a test has (docs/results.md).
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.step_time import STAGES
from gcpo.checkpoints import MANIFEST, TRACKER
from tests.test_pages import undocumented

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow

STEPS = [
    "data.max_prompt_length=48",
    "data.max_response_length=40",
    "data.train_batch_size=4",
    "data.val_max_samples=4",
    "actor_rollout_ref.actor.ppo_mini_batch_size=2",
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=2048",
    "actor_rollout_ref.actor.optim.lr=1e-4",
    "actor_rollout_ref.rollout.n=4",
    "actor_rollout_ref.rollout.max_model_len=1024",
    f"reward.custom_reward_function.path={ROOT}/tests/end_to_end/length_reward.py",
    "trainer.test_freq=-1",
    "trainer.val_before_train=False",
]


def train(
    module: str, inputs: Path, output: Path, name: str, *overrides: str, **variables: str
) -> tuple[list[dict], str]:
    """Run a training command with some environment variables; the metrics of its steps and what it printed."""
    output.mkdir(parents=True, exist_ok=True)
    metrics = output / f"{name}.jsonl"
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "PYTHONWARNINGS": "ignore",
        "VERL_FILE_LOGGER_PATH": str(metrics),
        "TENSORBOARD_DIR": str(output / "tensorboard"),
        **variables,
    }
    command = [
        sys.executable,
        "-m",
        module,
        *(one for one in overrides if one.startswith("--")),
        f"hydra.run.dir={output}/hydra",
        f"data.train_files={inputs}/data/train.parquet",
        f"data.val_files={inputs}/data/test.parquet",
        f"actor_rollout_ref.model.path={inputs}/model",
        f"trainer.default_local_dir={output}/checkpoints",
        *STEPS,
        *(one for one in overrides if not one.startswith("--")),
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    log = done.stdout + done.stderr
    (output / f"{name}.log").write_text(log)
    assert done.returncode == 0, log[-6000:]
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert not undocumented(name for line in lines for name in line["data"])
    return [{"step": line["step"], **line["data"]} for line in lines], log


def our_yaml(*overrides: str) -> list[str]:
    return ["device=cpu", *overrides]


def test_two_steps_train(first_run: tuple[Path, list[dict]]) -> None:
    """Both steps report Upsilon, the reference and their costs, and the weights move."""
    _, steps = first_run
    assert [step["step"] for step in steps] == [1, 2]
    for step in steps:
        assert step["actor/grad_norm"] > 0
        assert step["gcpo/rollout/failed_groups"] == 0
        assert step["gcpo/reward/errors"] == 0
        assert step["gcpo/tokens/generated/collider"] > 0
        assert 0 <= step["gcpo/tokens/prefix_cache_hit_frac"] <= 1
        assert all(any(step.get(name, 0) > 0 for name in names) for names in STAGES.values())
        assert 0 < step["gcpo/tokens/scored"] < step["gcpo/tokens/scored_unshared"]
        assert step["gcpo/balance/whole_groups"] == 1
        assert all(math.isfinite(value) for value in step.values() if isinstance(value, float))
    assert any(-2 <= step.get("gcpo/upsilon/mean", math.nan) <= 2 for step in steps)
    assert any(step.get("gcpo/reference/kl_mean", 0) > 0 for step in steps)
    assert {"policy", "beta", "kappa"} == {
        name.rsplit("/", 1)[1] for name in steps[1] if name.startswith("gcpo/grad_norm/")
    }


def test_rollout_and_actor_agree(first_run: tuple[Path, list[dict]]) -> None:
    """vLLM and the actor give the responses the same probability, after the weight sync too."""
    _, steps = first_run
    assert all(step["training/rollout_probs_diff_mean"] < 1e-5 for step in steps)


def test_auxiliary_generations_are_dumped_and_not_trained_on(first_run: tuple[Path, list[dict]]) -> None:
    """verl's dump holds 4 x 4 responses a step; the draws stand in a file of their own, each with its kind."""
    output, _ = first_run
    plain = (output / "rollouts" / "1.jsonl").read_text().splitlines()
    assert len(plain) == 16
    draws = [json.loads(line) for line in (output / "rollouts" / "auxiliary" / "1.jsonl").read_text().splitlines()]
    assert {draw["kind"] for draw in draws} <= {"collider", "regenerated"}
    assert sum(draw["kind"] == "collider" for draw in draws) == 4 * 2
    assert all(draw["outcome"] in ("ok", "cut", "empty", "failed") for draw in draws)


def test_the_checkpoint_is_evaluated(first_run: tuple[Path, list[dict]], inputs: Path, tmp_path: Path) -> None:
    """The user's way: merge, sample, grade, and print the table."""
    step = first_run[0] / "checkpoints" / "global_step_2"
    environment = {**os.environ, "GCPO_SKIP_SETUP": "1", "GCPO_VENV": sys.prefix, "GCPO_PROFILE": "cpu"}

    def evaluate(*arguments: object) -> str:
        command = ["bash", f"{ROOT}/run_scripts/evaluate.sh", *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
        return done.stdout

    options = ("--sets", inputs / "data", "--samples", 2, "--max-tokens", 40, "--output", tmp_path / "out")
    assert "with verl's merger" in evaluate(step, *options)
    assert len((tmp_path / "out" / "data.jsonl").read_text().splitlines()) == 6 * 2
    table = evaluate("table", "--format", "markdown", f"trained={tmp_path}/out")
    assert re.search(r"^\| trained \| \d+\.\d .*\|$", table, re.MULTILINE)


def add_damaged_checkpoint(root: Path) -> str:
    """A newer checkpoint with a truncated shard, whose name is returned, and an empty tracker file."""
    shard, folder = "actor/model_world_size_1_rank_0.pt", root / "global_step_3"
    shutil.copytree(root / "global_step_2", folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "step": 3}))
    (folder / shard).write_bytes((folder / shard).read_bytes()[:100])
    (root / TRACKER).write_text("")
    return shard


def test_resume_through_verls_entry_point(first_run: tuple[Path, list[dict]], inputs: Path) -> None:
    """`verl.trainer.main_ppo` with `+gcpo.` overrides goes on from the whole checkpoint and names a damaged one."""
    output, _ = first_run
    damaged = add_damaged_checkpoint(output / "checkpoints")
    steps, log = train(
        "verl.trainer.main_ppo",
        inputs,
        output,
        "resumed",
        *verl_overrides(),
        *STEPS,
        "trainer.total_training_steps=3",
        "+gcpo.preset=light",
        "+gcpo.kappa=0.02",
    )
    assert [step["step"] for step in steps] == [3]
    assert re.search(r"Resuming from .*global_step_2", log)
    assert re.search(rf"gcpo notice: checkpoint .*global_step_3 is rejected: {damaged} has 100 bytes instead of", log)
    assert re.search(r"gcpo notice: .*latest_checkpointed_iteration.txt is empty", log)
    assert steps[0]["gcpo/tokens/generated/regenerated"] == 0
    assert steps[0]["gcpo/tokens/generated/leave_one_out"] > 0


def verl_overrides() -> list[str]:
    """What the README names for `verl.trainer.main_ppo` on a CPU, without our yaml."""
    text = (ROOT / "docs" / "verl_overrides.txt").read_text()
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def test_a_method_of_another_module_trains(inputs: Path, tmp_path: Path) -> None:
    """The example of docs/new_method.md takes a real step: it is found in every process by verl's own variable, it
    scores in the actor, and no part of GCPO runs. No pass of the actor makes the old log-probabilities."""
    (step,), _ = train(
        "recipe.gcpo.main_gcpo",
        inputs,
        tmp_path,
        "toy",
        *our_yaml(
            "trainer.v1.trainer_mode=confidence",
            "algorithm.adv_estimator=confidence",
            "+confidence.power=0.5",
            "trainer.total_training_steps=1",
            "trainer.save_freq=-1",
            "algorithm.rollout_correction.bypass_mode=True",
        ),
        VERL_USE_EXTERNAL_MODULES="tests.toy.confidence",
    )
    assert 0 < step["confidence/mean"] < 1 and step["actor/grad_norm"] > 0
    assert step["timing_s/confidence_score"] > 0
    assert "actor/entropy" not in step  # vLLM's log-probabilities are the old ones
    assert not [name for name in step if name.startswith(("gcpo/tokens", "gcpo/upsilon", "gcpo/reference"))]
