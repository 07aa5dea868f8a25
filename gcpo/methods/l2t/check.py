"""Checks of an L2T run before Ray starts: settings of verl and models that a penalty cannot work with."""

from __future__ import annotations

from typing import Any

from gcpo.methods.l2t.settings import L2TConfig
from gcpo.reading import ACTOR, MODEL, get
from gcpo.settings import ConfigError

FLOAT32 = ("fp32", "float32", "32", 32)
"""The names of verl for this type."""
SCALED_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Settings of models whose logits are not the product of the language-model head and the final states."""


def check(config: Any, l2t: L2TConfig, model: Any) -> None:
    """Refuse what the penalty of the settings cannot work with.

    Args:
        config: verl's whole configuration.
        l2t: the resolved ``l2t`` group.
        model: transformers' configuration of the model, or ``None`` if it is unknown.

    Raises:
        ConfigError: the penalty cannot be computed; the sentence names the remedy.
    """
    if l2t.penalty == "one_step":
        _check_head(config, model)
    if l2t.penalty == "released":
        _check_float32(config)


def _check_head(config: Any, model: Any) -> None:
    need = "l2t.penalty=one_step needs the logits and the final states of whole rows"
    for key in (f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size", f"{ACTOR}.ulysses_sequence_parallel_size"):
        if get(config, key, 1) > 1:
            raise ConfigError(f"{key} is {get(config, key)}: {need}; set {key}=1")
    if get(config, f"{MODEL}.use_fused_kernels"):
        raise ConfigError(f"{MODEL}.use_fused_kernels is True: {need}; set {MODEL}.use_fused_kernels=False")
    for name in SCALED_LOGITS:
        if getattr(model, name, None) not in (None, 1):
            raise ConfigError(
                f"{MODEL}.path: l2t.penalty=one_step needs logits that are linear in the final states, and this model "
                f"has {name}={getattr(model, name)}; set l2t.penalty=off or l2t.penalty=released"
            )


def _check_float32(config: Any) -> None:
    group = f"{ACTOR}.fsdp_config"
    for key, default in ((f"{group}.model_dtype", "fp32"), (f"{group}.mixed_precision.param_dtype", "bf16")):
        if (value := get(config, key, default)) not in FLOAT32:
            raise ConfigError(
                f"{key} is {value}: l2t.penalty=released compares passes under weights that differ by 0.3 %, which "
                f"only float32 resolves; set ++{key}=fp32, or l2t.penalty=one_step"
            )
