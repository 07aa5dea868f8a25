"""Checks of a GC2PO run before Ray starts."""

from __future__ import annotations

from typing import Any, cast

from gcpo.methods.gc2po.settings import GC2POConfig
from gcpo.reading import ACTOR, MODEL, get
from gcpo.scoring.attention import tree_problem
from gcpo.settings import ConfigError


def check(config: Any, gc2po: GC2POConfig, model: Any) -> None:
    """Settings of verl, and the model, that GC2PO needs.

    Args:
        config: verl's whole configuration.
        gc2po: the resolved ``gc2po`` group.
        model: transformers' configuration of the model, or ``None`` where it is not known.

    Raises:
        ConfigError: one of them cannot work.
    """
    deviation = "algorithm.norm_adv_by_std_in_grpo"
    if not get(config, deviation):
        raise ConfigError(f"{deviation} is False: GC2PO divides by the standard deviation; set {deviation}=True")
    if gc2po.counterfactual:
        _check_forward(config)
    if (depth := getattr(model, "num_hidden_layers", None)) is not None:
        gc2po.layer_of(depth)
    if gc2po.counterfactual and model is not None:
        _check_perturbable(model)
    if gc2po.counterfactual:
        _check_branches(config, gc2po)


def _check_forward(config: Any) -> None:
    for key in (f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size", f"{ACTOR}.ulysses_sequence_parallel_size"):
        if get(config, key, 1) > 1:
            raise ConfigError(f"{key} is {get(config, key)}: sequence parallelism is not supported; set {key}=1")
    fused = f"{MODEL}.use_fused_kernels"
    if get(config, fused):
        raise ConfigError(f"{fused} is True and replaces the forward in which states are perturbed; set {fused}=False")


def _check_perturbable(model: Any) -> None:
    """States can be perturbed in packed rows of this model, as far as its class and configuration tell."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(model) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return
    problem = tree_problem(model, cast(Any, MODEL_FOR_CAUSAL_LM_MAPPING[type(model)]))
    if problem is not None:
        raise ConfigError(
            f"{MODEL}.path: GC2PO perturbs states in packed rows, which this model cannot have: {problem}; use another "
            "model, or set ++gc2po.counterfactual=off"
        )


def _check_branches(config: Any, gc2po: GC2POConfig) -> None:
    """A response with the branches of one episode must fit into a forward pass."""
    answers, copies = gc2po.answers, 1 + gc2po.perturbation.draws
    branch = len(answers.prompt)
    if gc2po.intervention == "hidden_state":
        branch = copies * (1 + branch + answers.max_answers * answers.max_tokens)
    need = get(config, "data.max_prompt_length") + get(config, "data.max_response_length") + max(branch, copies)
    budget = gc2po.max_token_len_per_gpu or get(config, f"{ACTOR}.ppo_max_token_len_per_gpu")
    if need > budget:
        raise ConfigError(
            f"a response with the perturbations of one episode can take {need} tokens, a forward pass holds {budget}: "
            "raise gc2po.max_token_len_per_gpu, or lower gc2po.perturbation.draws or gc2po.answers.max_tokens"
        )
