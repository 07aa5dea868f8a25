"""Checks of a whole run: everything that can be checked before the first process starts.

``check_run`` needs neither Ray nor a GPU. ``recipe.gcpo.main_gcpo`` calls it before Ray starts; under
``verl.trainer.main_ppo`` the trainer calls it before it creates a worker. The cheap checks come first, and modules that
take seconds to import (transformers, torch) are imported where they are used, so that a refusal is fast.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

from omegaconf import DictConfig

from gcpo.checks.data import Table, check_filtered_steps, check_steps, read_tables
from gcpo.checks.devices import check_batches, check_devices
from gcpo.checks.lengths import check_lengths, longest_prompt
from gcpo.checks.model import check_head_size, check_model, model_config
from gcpo.checks.packages import check_packages
from gcpo.checks.resume import check_resume
from gcpo.checks.reward import check_reward
from gcpo.checks.supported import MANAGER, check_supported
from gcpo.checks.values import check_values
from gcpo.methods import method_class, method_names, own_method_names
from gcpo.methods.gcpo.settings import GCPOConfig
from gcpo.reading import get, group
from gcpo.settings import ConfigError

__all__ = [
    "MANAGER",
    "ConfigError",
    "check_run",
    "longest_prompt",
    "model_config",
]


def check_run(config: DictConfig) -> Any:
    """Check the configuration of a run of the method that ``algorithm.adv_estimator`` names.

    ``actor_rollout_ref.rollout.max_model_len`` is set to the tokens of the longest prompt and its response where it is
    ``null``.

    Returns:
        The resolved settings of the method.

    Raises:
        ConfigError: a setting cannot work; the sentence names the setting and the remedy.
    """
    for module in filter(None, os.environ.get("VERL_USE_EXTERNAL_MODULES", "").split(",")):
        importlib.import_module(module)  # verl does the same; it may register the method
    name = get(config, "algorithm.adv_estimator")
    # An unknown name is refused together with the settings of GCPO.
    name = name if name in method_names() else "gcpo"
    check_values(config)
    gcpo = _gcpo(config, name)
    check_supported(config, gcpo, name)
    check_batches(config)
    check_model(config)
    # The cheap checks come first: the module of a method imports torch.
    settings = gcpo if name == "gcpo" else _parse(config, name)
    train = _check_inputs(config)
    check_devices(config)
    model = model_config(config)
    check_head_size(config, model)
    check_lengths(config, gcpo, model)
    if name != "gcpo":
        method_class(name).check(config, settings, model)
    check_filtered_steps(config, train)
    return settings


def _gcpo(config: DictConfig, name: str) -> GCPOConfig:
    """Return the ``gcpo`` group, which every method has; GCPO's own parts are off for other methods."""
    n, length = get(config, "actor_rollout_ref.rollout.n"), get(config, "data.max_response_length")
    settings = group(config, "gcpo")
    gcpo = GCPOConfig.from_config(settings, n=n, response_length=length)
    if name == "gcpo" or gcpo.is_grpo:
        return gcpo
    if name in own_method_names():
        raise ConfigError(
            f"gcpo.kappa and gcpo.weighting belong to GCPO: set ++gcpo.kappa=0 ++gcpo.weighting.target=off for {name}"
        )
    off = {"kappa": 0, "weighting": {"target": "off"}}
    return GCPOConfig.from_config({**settings, **off}, n=n, response_length=length)


def _parse(config: DictConfig, name: str) -> Any:
    from gcpo.methods.base import Run

    return method_class(name).parse(group(config, name), Run.of(config))


def _check_inputs(config: DictConfig) -> list[Table]:
    """Check data, reward function, checkpoint and packages, and return the training files."""
    train, validation = (read_tables(config, key) for key in ("data.train_files", "data.val_files"))
    check_reward(config, [*train, *validation])
    check_resume(config)
    check_packages(config)
    check_steps(config, train)
    return train
