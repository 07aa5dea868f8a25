"""Checks of a whole run: everything that can be known before the first process starts.

``check_run`` needs neither Ray nor a GPU. ``recipe.gcpo.main_gcpo`` calls it before Ray starts; under
``verl.trainer.main_ppo`` the trainer calls it before it makes a worker. The cheap checks come first, and modules that
take seconds to import (transformers, torch) are imported where they are used, so that a refusal takes no time.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

from omegaconf import DictConfig

from gcpo.checks.data import Table, check_filtered_steps, check_steps, read_tables
from gcpo.checks.devices import check_batches, check_devices
from gcpo.checks.lengths import check_branches, check_lengths, longest_prompt
from gcpo.checks.model import check_model, check_perturbable, model_config
from gcpo.checks.packages import check_packages
from gcpo.checks.reading import ACTOR, MODEL, get, group
from gcpo.checks.resume import check_resume
from gcpo.checks.reward import check_reward
from gcpo.checks.supported import MANAGER, check_supported
from gcpo.checks.values import check_values
from gcpo.methods import method_class, method_names
from gcpo.methods.gc2po.settings import GC2POConfig
from gcpo.methods.gcpo.settings import GCPOConfig
from gcpo.settings import ConfigError

__all__ = [
    "MANAGER",
    "ConfigError",
    "check_any_run",
    "check_gc2po_run",
    "check_run",
    "longest_prompt",
    "model_config",
]


def check_run(config: DictConfig) -> GCPOConfig:
    """Check the configuration of a run and fill in the context length.

    ``actor_rollout_ref.rollout.max_model_len`` is set to the tokens of the longest prompt with candidates and its
    response where it is ``null``.

    Raises:
        ConfigError: something in it cannot work; the sentence says which setting to change.
    """
    check_values(config)
    gcpo = _gcpo(config)
    check_supported(config, gcpo, "gcpo")
    check_batches(config)
    check_model(config)
    train = _check_inputs(config)
    check_devices(config)
    check_lengths(config, gcpo, model_config(config))
    check_filtered_steps(config, train)
    return gcpo


def check_any_run(config: DictConfig) -> Any:
    """Check the configuration of a run of the method that ``algorithm.adv_estimator`` names; its resolved settings.

    Raises:
        ConfigError: something in it cannot work; the sentence says which setting to change.
    """
    name = get(config, "algorithm.adv_estimator")
    if name == "gc2po":
        return check_gc2po_run(config)
    for module in filter(None, os.environ.get("VERL_USE_EXTERNAL_MODULES", "").split(",")):
        importlib.import_module(module)  # verl does the same; it may bring the method
    # A name that no method has is refused with the settings of GCPO.
    return check_other_run(config, name) if name in method_names() and name != "gcpo" else check_run(config)


def check_other_run(config: DictConfig, name: str) -> Any:
    """Check the configuration of a run of a method without checks of its own, as `check_run` does for GCPO.

    Raises:
        ConfigError: something in it cannot work; the sentence says which setting to change.
    """
    check_values(config)
    # The parts of GCPO do not exist in such a run, whatever its group says.
    off = {"kappa": 0, "weighting": {"target": "off"}}
    gcpo = _gcpo(config, {**group(config, "gcpo"), **off})
    check_supported(config, gcpo, name)
    check_batches(config)
    check_model(config)
    from gcpo.methods.base import Run  # imports torch

    settings = method_class(name).parse(group(config, name), Run.of(config))
    train = _check_inputs(config)
    check_devices(config)
    check_lengths(config, gcpo, model_config(config))
    check_filtered_steps(config, train)
    return settings


def check_gc2po_run(config: DictConfig) -> GC2POConfig:
    """Check the configuration of a GC2PO run, as `check_run` does for GCPO.

    Raises:
        ConfigError: something in it cannot work; the sentence says which setting to change.
    """
    check_values(config)
    gcpo = _gcpo(config)
    if not gcpo.is_grpo:
        raise ConfigError(
            "gcpo.kappa and gcpo.weighting belong to GCPO: set ++gcpo.kappa=0 ++gcpo.weighting.target=off for GC2PO"
        )
    check_supported(config, gcpo, "gc2po")
    check_batches(config)
    check_model(config)
    gc2po = GC2POConfig.from_config(group(config, "gc2po"), n=get(config, "actor_rollout_ref.rollout.n"))
    _check_forward(config, gc2po)
    train = _check_inputs(config)
    check_devices(config)
    model = model_config(config)
    if (depth := getattr(model, "num_hidden_layers", None)) is not None:
        gc2po.layer_of(depth)
    if gc2po.counterfactual and model is not None:
        check_perturbable(model)
    check_lengths(config, gcpo, model)
    check_branches(config, gc2po)
    check_filtered_steps(config, train)
    return gc2po


def _gcpo(config: DictConfig, settings: Any = None) -> GCPOConfig:
    return GCPOConfig.from_config(
        group(config, "gcpo") if settings is None else settings,
        n=get(config, "actor_rollout_ref.rollout.n"),
        response_length=get(config, "data.max_response_length"),
    )


def _check_forward(config: DictConfig, gc2po: GC2POConfig) -> None:
    """Settings of the forward pass and the advantage that GC2PO needs."""
    deviation = "algorithm.norm_adv_by_std_in_grpo"
    if not get(config, deviation):
        raise ConfigError(f"{deviation} is False: GC2PO divides by the standard deviation; set {deviation}=True")
    if not gc2po.counterfactual:
        return
    for key in (f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size", f"{ACTOR}.ulysses_sequence_parallel_size"):
        if get(config, key, 1) > 1:
            raise ConfigError(f"{key} is {get(config, key)}: sequence parallelism is not supported; set {key}=1")
    fused = f"{MODEL}.use_fused_kernels"
    if get(config, fused):
        raise ConfigError(f"{fused} is True and replaces the forward in which states are perturbed; set {fused}=False")


def _check_inputs(config: DictConfig) -> list[Table]:
    """Data, reward function, checkpoint and packages; the training files."""
    train, validation = (read_tables(config, key) for key in ("data.train_files", "data.val_files"))
    check_reward(config, [*train, *validation])
    check_resume(config)
    check_packages(config)
    check_steps(config, train)
    return train
