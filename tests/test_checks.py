"""What a run is refused for before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from data_prep.arithmetic import prepare
from gcpo.checks import check_gc2po_run, check_run, longest_prompt, plugin_problem
from gcpo.config import ConfigError

MODEL = {"model_type": "qwen2", "max_position_embeddings": 2048, "num_hidden_layers": 3}
CONFIG = Path(__file__).parents[1] / "recipe" / "gcpo" / "config"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    prepare(folder, train_size=6, test_size=6)
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(MODEL))
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    return folder


def config_of(inputs: Path, *overrides: str, name: str = "gcpo_quickstart") -> DictConfig:
    with initialize_config_dir(str(CONFIG), version_base=None):
        return compose(
            name,
            overrides=[
                f"data.train_files={inputs}/train.parquet",
                f"data.val_files={inputs}/test.parquet",
                f"actor_rollout_ref.model.path={inputs}/model",
                *overrides,
            ],
        )


@pytest.mark.parametrize("preset", ["paper", "balanced", "light"])
def test_the_quick_start_passes(inputs: Path, preset: str) -> None:
    """The shipped configuration is accepted, and the context is set to what its longest prompt needs."""
    config = config_of(inputs, f"gcpo.preset={preset}")
    gcpo = check_run(config)
    assert config.actor_rollout_ref.rollout.max_model_len >= longest_prompt(config, gcpo) + 64


REFUSED = [
    ("trainer.v1.trainer_mode=colocate_async", "asynchronous"),
    ("algorithm.adv_estimator=grpo", "algorithm.adv_estimator"),
    ("actor_rollout_ref.actor.strategy=fsdp", "other engines"),
    ("actor_rollout_ref.rollout.name=sglang", "other rollout engines"),
    ("actor_rollout_ref.rollout.multi_turn.enable=True", "multi-turn"),
    ("actor_rollout_ref.rollout.full_determinism=True", "same seed"),
    ("actor_rollout_ref.rollout.agent.default_agent_loop=tool_agent", "tool use"),
    ("actor_rollout_ref.actor.use_prefix_grouper=True", "prefix_grouper"),
    ("algorithm.filter_groups.enable=True", "group filtering"),
    ("algorithm.rollout_correction.bypass_mode=True", "old log-probabilities"),
    ("reward.reward_model.enable=True", "reward function"),
    ("actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size=2", "sequence parallelism"),
    ("actor_rollout_ref.model.use_fused_kernels=True", "hidden states"),
    ("actor_rollout_ref.model.lora_rank=4", "lora.merge"),
    ("actor_rollout_ref.rollout.agent.agent_loop_manager_class=null", "agent_loop_manager_class"),
    ("actor_rollout_ref.rollout.enable_chunked_prefill=True", "chunk"),
    ("actor_rollout_ref.model.path=/no/such/model", "no folder"),
    ("actor_rollout_ref.model.path=no-such/model", "no-such/model is no folder here and cannot be read from the hub"),
    ("data.train_files=/no/such/file.parquet", "no file"),
    ("data.max_prompt_length=2040", "the model's context 2048"),
    ("gcpo.blocks.max_tokens=300", "gcpo.blocks.max_tokens .now 300"),
    ("gcpo.scoring.max_token_len_per_gpu=200", "a micro-batch holds 200"),
    ("actor_rollout_ref.rollout.n=1", "rollout.n is 1"),
]


@pytest.mark.parametrize(("override", "message"), REFUSED, ids=[o for o, _ in REFUSED])
def test_refused_by_name(inputs: Path, override: str, message: str) -> None:
    """Each gives one sentence, without Ray and without a model."""
    with pytest.raises(ConfigError, match=message):
        check_run(config_of(inputs, override))


GC2PO_REFUSED = [
    ("gc2po.perturbation.draws=0", "gc2po.perturbation.draws: 0 is too small"),
    ("gc2po.perturbation.sigma=-1", "gc2po.perturbation.sigma: -1.0 is not"),
    ("gc2po.layer=9", "the model has hidden states 0 to 3"),
    ("gc2po.draws=3", "gc2po.draws is not a setting"),
    ("gcpo.kappa=0.1", "belong to GCPO"),
    ("gcpo.weighting.target=projection", "belong to GCPO"),
    ("algorithm.norm_adv_by_std_in_grpo=False", "standard deviation"),
    ("trainer.v1.trainer_mode=gcpo", "set trainer.v1.trainer_mode=gc2po"),
    ("actor_rollout_ref.model.use_fused_kernels=True", "states are perturbed"),
    ("actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size=2", "sequence parallelism"),
    ("gc2po.max_token_len_per_gpu=120", "a forward pass holds 120"),
    ("actor_rollout_ref.rollout.n=1", "rollout.n is 1"),
]


@pytest.mark.parametrize(("override", "message"), GC2PO_REFUSED, ids=[o for o, _ in GC2PO_REFUSED])
def test_gc2po_refused_by_name(inputs: Path, override: str, message: str) -> None:
    """Each gives one sentence, without Ray; the model of this test has three layers."""
    override = f"+{override}" if override.startswith("gc2po.draws") else override
    with pytest.raises(ConfigError, match=message):
        check_gc2po_run(config_of(inputs, override, name="gc2po_quickstart"))


def test_the_gc2po_quick_start_passes(inputs: Path) -> None:
    """In both forms; the context is set to what a response needs."""
    for form in ("head", "inject"):
        config = config_of(inputs, f"gc2po.form={form}", name="gc2po_quickstart")
        assert check_gc2po_run(config).form == form
        assert config.actor_rollout_ref.rollout.max_model_len == 48 + 64


def test_a_model_on_a_hub(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its layers and context are known before it is loaded."""
    snapshot = tmp_path / "models--someone--small" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(MODEL))
    (tmp_path / "models--someone--small" / "refs").mkdir()
    (tmp_path / "models--someone--small" / "refs" / "main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    hub = "actor_rollout_ref.model.path=someone/small"
    check_gc2po_run(config_of(inputs, hub, name="gc2po_quickstart"))
    with pytest.raises(ConfigError, match="the model has hidden states 0 to 3"):
        check_gc2po_run(config_of(inputs, hub, "gc2po.layer=9", name="gc2po_quickstart"))
    with pytest.raises(ConfigError, match="the model's context 2048"):
        check_run(config_of(inputs, hub, "data.max_prompt_length=2040"))


def test_a_model_whose_states_cannot_be_perturbed(inputs: Path, tmp_path: Path) -> None:
    """Before anything starts; without perturbations such a model will do."""
    (tmp_path / "config.json").write_text(json.dumps({**MODEL, "model_type": "gemma2"}))
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    path = f"actor_rollout_ref.model.path={tmp_path}"
    with pytest.raises(ConfigError, match="Gemma2ForCausalLM has layers that are not full attention"):
        check_gc2po_run(config_of(inputs, path, name="gc2po_quickstart"))
    check_gc2po_run(config_of(inputs, path, "gc2po.counterfactual=off", name="gc2po_quickstart"))


def table(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


ROW = {"data_source": "x", "prompt": [{"role": "user", "content": "?"}], "reward_model": {"ground_truth": "1"}}


def test_data_files(inputs: Path, tmp_path: Path) -> None:
    """Unreadable, without columns, empty, with images or with an empty prompt: the file and the place are named."""
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    cases = {
        tmp_path / "broken.parquet": "not a readable parquet file",
        table(tmp_path / "columns.parquet", [{"prompt": ROW["prompt"]}]): "lacks the columns data_source, reward_model",
        table(tmp_path / "image.parquet", [{**ROW, "images": ["a"]}]): "has images",
        table(tmp_path / "text.parquet", [{**ROW, "prompt": "a text"}]): "row 0",
        table(
            tmp_path / "empty.parquet", [ROW, {**ROW, "prompt": [{"role": "user", "content": " "}]}]
        ): "prompt in row 1 of .* is empty",
    }
    for path, message in cases.items():
        with pytest.raises(ConfigError, match=message):
            check_run(config_of(inputs, f"data.train_files={path}"))


def test_a_model_without_chat_template(inputs: Path, tmp_path: Path) -> None:
    """The candidates go into the user's message, so a model must have a template, or one must be given."""
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    with pytest.raises(ConfigError, match="no chat template"):
        check_run(config_of(inputs, f"actor_rollout_ref.model.path={tmp_path}"))


def test_the_plugin_is_loaded() -> None:
    """What ``gcpo doctor`` and the entry point look at first."""
    assert plugin_problem() is None


def test_a_misspelt_reward_option(inputs: Path) -> None:
    """verl passes options on unread, so ours are checked by name."""
    known = "+reward.custom_reward_function.reward_kwargs.format_weight=0.1"
    check_run(config_of(inputs, known))
    with pytest.raises(ConfigError, match="reward_kwargs.fromat_weight is no option of pkg://gcpo.rewards"):
        check_run(config_of(inputs, known.replace("format_weight", "fromat_weight")))


def test_programs_need_a_sandbox(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data with programs are refused where nothing can confine them; other data never ask."""
    from gcpo.rewards import sandbox

    def refuse(**settings: Any) -> str:
        raise sandbox.SandboxError("no sandbox works here: install bubblewrap")

    monkeypatch.setattr(sandbox, "check", refuse)
    check_run(config_of(inputs))
    rows = pq.read_table(inputs / "train.parquet").to_pylist()
    pq.write_table(
        pa.Table.from_pylist([{**row, "data_source": "gcpo/mbpp"} for row in rows]), tmp_path / "code.parquet"
    )
    with pytest.raises(ConfigError, match="reward_kwargs: no sandbox works here: install bubblewrap"):
        check_run(config_of(inputs, f"data.val_files={tmp_path}/code.parquet"))
