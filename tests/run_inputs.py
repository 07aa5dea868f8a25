"""A model, data and configurations of a run that the checks accept; tests then break one thing of it."""

from __future__ import annotations

import functools
import importlib.util
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "gcpo" / "config"
VERL_CONFIG = Path(importlib.util.find_spec("verl").submodule_search_locations[0]) / "trainer" / "config"
CONTEXT = 2048
ROWS = 64


def copy_model(model: Path, folder: Path, **changes: Any) -> Path:
    """A copy of a model folder whose config.json has ``changes``; the weights stay as they are."""
    shutil.copytree(model, folder)
    settings = json.loads((folder / "config.json").read_text())
    settings.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps({**settings, "max_position_embeddings": CONTEXT, **changes}))
    return folder


def row(number: int = 0, **changes: Any) -> dict[str, Any]:
    """A row in verl's schema."""
    return {
        "data_source": "gcpo/sums",
        "prompt": [{"role": "user", "content": f"{number}+{number}="}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(2 * number)},
        "extra_info": {"index": number},
        **changes,
    }


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """``rows`` as a parquet file."""
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def make_inputs(folder: Path, model: Path) -> Path:
    """``folder`` with ``model``, ``train.parquet`` and ``test.parquet``."""
    copy_model(model, folder / "model", num_hidden_layers=3, head_dim=32)
    write_rows(folder / "train.parquet", [row(i) for i in range(ROWS)])
    write_rows(folder / "test.parquet", [row(i) for i in range(8)])
    return folder


def verl_overrides() -> list[str]:
    """The overrides of docs/verl_overrides.txt."""
    lines = (ROOT / "docs" / "verl_overrides.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def composed(name: str, *overrides: str) -> DictConfig:
    """A new copy of what hydra composes: ``verl`` is verl's yaml with docs/verl_overrides.txt, other names are ours."""
    return pickle.loads(_composed(name, *overrides))


@functools.cache
def _composed(name: str, *overrides: str) -> bytes:
    """Pickled: to unpickle a configuration takes a third of the time of a deep copy."""
    ours = name != "verl"
    with initialize_config_dir(str(CONFIG if ours else VERL_CONFIG), version_base=None):
        if ours:
            return pickle.dumps(compose(name, [f"hydra.searchpath=['file://{VERL_CONFIG}']", *overrides]))
        return pickle.dumps(compose("ppo_trainer", [*verl_overrides(), *overrides]))


EMBEDDED = (
    "data.max_prompt_length=48",
    "data.max_response_length=64",
    "data.train_batch_size=16",
    "actor_rollout_ref.actor.ppo_mini_batch_size=16",
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=8192",
)
"""The lengths and sizes of the embedded task for verl's entry point."""


def with_overrides(config: DictConfig, *overrides: str) -> DictConfig:
    """Apply overrides to ``config`` as hydra does."""
    parser = OverridesParser.create()
    ConfigLoaderImpl._apply_overrides_to_config([parser.parse_override(text) for text in overrides], config)
    return config


def config_of(inputs: Path, *overrides: str, name: str = "gcpo_quickstart", method: str = "gcpo") -> DictConfig:
    """The configuration ``name`` over the data and model of ``make_inputs``, with overrides."""
    groups = (*EMBEDDED, "+gcpo.preset=balanced") if name == "verl" else (f"method={method}",)
    base = composed(name, *groups)
    return with_overrides(
        base,
        f"data.train_files={inputs}/train.parquet",
        f"data.val_files={inputs}/test.parquet",
        f"actor_rollout_ref.model.path={inputs}/model",
        f"trainer.default_local_dir={inputs}/checkpoints",
        *overrides,
    )
