"""Checks of settings that conflict with the additions of GCPO and GC2PO to verl.

docs/verl_settings.md lists verl's settings with a verdict for each.
"""

from __future__ import annotations

import logging
from typing import Any

from omegaconf import DictConfig, OmegaConf

from gcpo.methods.gcpo.settings import GCPOConfig
from gcpo.reading import ACTOR, MODEL, ROLLOUT, get
from gcpo.settings import ConfigError

logger = logging.getLogger(__name__)

MANAGER = "gcpo.adapters.rollout.GCPOAgentLoopManager"

_MULTI_TURN = "multi-turn and tool use are not supported"

REFUSED: dict[str, tuple[str, str]] = {
    # key: (reason, the correct assignment)
    f"{ROLLOUT}.multi_turn.enable": (_MULTI_TURN, "False"),
    f"{ROLLOUT}.multi_turn.tool_config_path": (_MULTI_TURN, "null"),
    f"{ROLLOUT}.multi_turn.function_tool_path": (_MULTI_TURN, "null"),
    f"{ROLLOUT}.full_determinism": ("it gives every request the same seed; GCPO seeds each request", "False"),
    f"{ROLLOUT}.disaggregation.enabled": ("the requests of a group must reach one server", "False"),
    f"{ROLLOUT}.enable_rollout_routing_replay": ("packed rows do not replay the routes of experts", "False"),
    f"{ACTOR}.use_prefix_grouper": ("it does not know the rows of the kappa term", "False"),
    f"{ACTOR}.checkpoint.async_save": ("verl then writes no tracker file, so that no run can resume", "False"),
    f"{MODEL}.mtp.enable": ("the heads for several tokens have no causal term", "False"),
    f"{MODEL}.lora.rank": (f"the FSDP engine reads {MODEL}.lora_rank instead", "0"),
    "algorithm.filter_groups.enable": ("group filtering is not supported", "False"),
    "critic.enable": ("the advantages come from groups, so that a critic is trained for nothing", "null"),
    "trainer.critic_warmup": ("there is no critic, so that the actor would not be trained in these steps", "0"),
    "reward.reward_model.enable": ("rewards must be known when a group completes; use a reward function", "False"),
    "distillation.enabled": ("distillation is not supported", "False"),
    "skip.rollout_tq.enable": ("a skipped rollout holds no collider draws", "False"),
    "skip.rollout.enable": ("verl's V1 trainer does not read it", "False"),
    "skip.async_rollout.enable": ("verl's V1 trainer does not read it", "False"),
    "algorithm.use_pf_ppo": ("verl reads it with the estimator gae only", "False"),
}

LEGACY = ("custom_reward_function", "reward_model", "sandbox_fusion")
"""Groups that verl's V1 trainer keeps in its yaml and never reads; it reads that group in ``reward`` instead."""


def check_supported(config: DictConfig, gcpo: GCPOConfig, mode: str) -> None:
    """Refuse settings that the trainer mode does not support, and settings that have no effect.

    Args:
        config: the run's configuration.
        gcpo: the resolved ``gcpo`` group.
        mode: ``gcpo`` or ``gc2po``.

    Raises:
        ConfigError: such a setting is used; the sentence gives the correct assignment.
    """
    _check_required(config, mode)
    for key, (why, right) in REFUSED.items():
        if get(config, key):
            raise ConfigError(f"{key} is {get(config, key)!r}: {why}; set {key}={right}")
    _check_without_effect(config)
    _check_loss(config)
    _check_lora(config)
    _check_bypass(config)
    _check_objective(config, gcpo, mode)
    _check_engine(config, gcpo)
    _check_rollout(config, gcpo)


def _check_required(config: DictConfig, mode: str) -> None:
    required = {
        "trainer.use_v1": (True, "GCPO is built on verl's V1 trainer"),
        "trainer.v1.trainer_mode": (mode, "asynchronous modes are not supported"),
        "algorithm.adv_estimator": (mode, f"other estimators know nothing of what {mode} adds"),
        f"{ACTOR}.strategy": ("fsdp2", "other engines are not supported"),
        f"{ROLLOUT}.name": ("vllm", "other rollout engines are not supported"),
        f"{ROLLOUT}.mode": ("async", "verl has no other rollout mode"),
        f"{ROLLOUT}.agent.default_agent_loop": ("single_turn_agent", _MULTI_TURN),
        "actor_rollout_ref.hybrid_engine": (True, "trainer and rollout share their devices"),
    }
    for key, (value, why) in required.items():
        if get(config, key) != value:
            raise ConfigError(f"{key} is {get(config, key)!r}: {why}; set {key}={value}")


def _check_without_effect(config: DictConfig) -> None:
    """Refuse values of settings that verl has and does not read in this trainer."""
    for name in LEGACY:
        found = OmegaConf.select(config, name, default=None)
        for key, value in _leaves(found, name):
            if value is not None:
                raise ConfigError(f"{key} is {value!r}: verl's V1 trainer does not read it; set reward.{key} instead")
    actor = f"{ACTOR}.clip_ratio"
    low, high = get(config, f"{actor}_low"), get(config, f"{actor}_high")
    clip = get(config, actor)
    if low is not None and high is not None and clip not in (None, low, high):
        raise ConfigError(
            f"{actor} is {clip}, and {actor}_low ({low}) and {actor}_high ({high}) are read instead of it: set "
            f"{actor}_low={clip} {actor}_high={clip}"
        )
    clip_grad, grad_clip = get(config, f"{ACTOR}.optim.clip_grad"), get(config, f"{ACTOR}.grad_clip")
    if grad_clip is not None and grad_clip not in (1.0, clip_grad):
        raise ConfigError(
            f"{ACTOR}.grad_clip is {grad_clip}: verl's V1 trainer does not read it; set "
            f"{ACTOR}.optim.clip_grad={grad_clip}"
        )
    for key, value in ((f"{ROLLOUT}.do_sample", True), ("data.reward_fn_key", "data_source")):
        if get(config, key, value) != value:
            raise ConfigError(
                f"{key} is {get(config, key)!r}: verl's V1 trainer does not read it and goes on as with {value}; set "
                f"{key}={value}"
            )
    for ours, verls in ((f"{ROLLOUT}.prompt_length", "data.max_prompt_length"),
                        (f"{ROLLOUT}.response_length", "data.max_response_length")):  # fmt: skip
        if get(config, ours) not in (None, get(config, verls)):
            raise ConfigError(
                f"{ours} is {get(config, ours)} and {verls} is {get(config, verls)}: both name the same length; set "
                f"{ours}={get(config, verls)}"
            )


def _leaves(node: Any, prefix: str) -> list[tuple[str, Any]]:
    if not OmegaConf.is_dict(node):
        return [(prefix, node)]
    return [leaf for name in node for leaf in _leaves(node[name], f"{prefix}.{name}")]


def _check_loss(config: DictConfig) -> None:
    mode, factor = get(config, f"{ACTOR}.loss_agg_mode"), get(config, f"{ACTOR}.loss_scale_factor")
    if mode == "seq-mean-token-sum-norm" and factor is None:
        raise ConfigError(
            f"{ACTOR}.loss_agg_mode is {mode} without {ACTOR}.loss_scale_factor: verl then divides by the longest row "
            "of each micro-batch, so that the weight of a term depends on the packing; set "
            f"{ACTOR}.loss_scale_factor={get(config, 'data.max_response_length')}"
        )
    if get(config, f"{ACTOR}.policy_loss.loss_mode") == "dro" and get(config, f"{ACTOR}.policy_loss.dro_beta") is None:
        raise ConfigError(
            f"{ACTOR}.policy_loss.loss_mode is dro without a beta; set {ACTOR}.policy_loss.dro_beta=0.1 or another one"
        )


def _check_lora(config: DictConfig) -> None:
    adapter = get(config, f"{MODEL}.lora_adapter_path")
    if not get(config, f"{MODEL}.lora_rank"):
        if adapter is not None:
            raise ConfigError(
                f"{MODEL}.lora_adapter_path is set and {MODEL}.lora_rank is 0, so that the adapter is not loaded: set "
                f"{MODEL}.lora_rank=8, or the rank of the adapter"
            )
        return
    if not get(config, f"{MODEL}.lora.merge"):
        raise ConfigError(
            f"{MODEL}.lora_rank is set without merging: set {MODEL}.lora.merge=True, so that vLLM is given whole "
            "weights"
        )


def _check_bypass(config: DictConfig) -> None:
    """Check verl's option to take the rollout's log-probabilities as those of pi_old, without a pass of the actor."""
    correction = "algorithm.rollout_correction"
    if not get(config, f"{correction}.bypass_mode"):
        return
    if not get(config, f"{ROLLOUT}.calculate_log_probs"):
        raise ConfigError(
            f"{correction}.bypass_mode is True without the rollout's log-probabilities, which it takes as the old "
            f"ones; set {ROLLOUT}.calculate_log_probs=True"
        )
    if get(config, f"{correction}.rollout_is"):
        raise ConfigError(
            f"{correction}.rollout_is is {get(config, f'{correction}.rollout_is')}: with {correction}.bypass_mode=True "
            f"verl corrects nothing; set {correction}.rollout_is=null"
        )
    logger.warning(
        "gcpo: the log-probabilities of vLLM are those of pi_old (%s.bypass_mode=True): verl then reports no entropy, "
        "and in bfloat16 the two engines differ by more than the causal reference may",
        correction,
    )


def _check_objective(config: DictConfig, gcpo: GCPOConfig, mode: str) -> None:
    """Refuse settings that change rewards or the response mask after the causal stage, which GRPO does not have."""
    if mode == "gcpo" and gcpo.is_grpo:
        return
    if get(config, "algorithm.use_kl_in_reward"):
        raise ConfigError(
            "algorithm.use_kl_in_reward is True: the causal stage reads the rewards without the KL penalty, and skips "
            "groups whose rewards are equal although they then have advantages; set "
            f"algorithm.use_kl_in_reward=False {ACTOR}.use_kl_loss=True"
        )
    correction = "algorithm.rollout_correction"
    if get(config, f"{correction}.rollout_rs"):
        raise ConfigError(
            f"{correction}.rollout_rs is {get(config, f'{correction}.rollout_rs')!r}: a rejected token leaves the "
            f"policy term only, and the causal stage has read it already; set {correction}.rollout_rs=null"
        )
    threshold = get(config, f"{correction}.rollout_is_threshold")
    weights = get(config, f"{correction}.rollout_is")
    if weights and not get(config, f"{ROLLOUT}.calculate_log_probs"):
        raise ConfigError(
            f"{correction}.rollout_is is {weights}, and without the rollout's log-probabilities verl corrects nothing; "
            f"set {ROLLOUT}.calculate_log_probs=True"
        )
    if weights and "_" in str(threshold):
        raise ConfigError(
            f"{correction}.rollout_is_threshold is {threshold!r}: with two bounds verl gives the tokens outside of "
            "them the weight 0 in the policy term only; set one bound, for example "
            f"{correction}.rollout_is_threshold={str(threshold).split('_')[-1]}"
        )
    if mode == "gcpo" and get(config, f"{ACTOR}.loss_agg_mode") != "seq-mean-token-mean":
        logger.warning(
            "gcpo: %s.loss_agg_mode is %s; Eq. 10 is seq-mean-token-mean", ACTOR, get(config, f"{ACTOR}.loss_agg_mode")
        )


def _check_engine(config: DictConfig, gcpo: GCPOConfig) -> None:
    for key in (f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size", f"{ACTOR}.ulysses_sequence_parallel_size"):
        if get(config, key, 1) > 1 and not gcpo.is_grpo:
            raise ConfigError(f"{key} is {get(config, key)}: sequence parallelism is not supported; set {key}=1")
    if get(config, f"{MODEL}.use_fused_kernels") and gcpo.weighting_on:
        raise ConfigError(
            f"{MODEL}.use_fused_kernels is True and replaces the forward that hidden states are read from; set "
            f"{MODEL}.use_fused_kernels=False"
        )
    _check_micro_batches(config)


def _check_micro_batches(config: DictConfig) -> None:
    """Check the sizes that verl asserts only in a worker, after loading the model."""
    dynamic = bool(get(config, f"{ACTOR}.use_dynamic_bsz"))
    if bool(get(config, f"{ROLLOUT}.log_prob_use_dynamic_bsz")) != dynamic:
        raise ConfigError(
            f"{ROLLOUT}.log_prob_use_dynamic_bsz must be as {ACTOR}.use_dynamic_bsz; set "
            f"{ROLLOUT}.log_prob_use_dynamic_bsz={dynamic}"
        )
    needed = [f"{ACTOR}.ppo_micro_batch_size_per_gpu", f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu"]
    if get(config, f"{ACTOR}.use_kl_loss") or get(config, "algorithm.use_kl_in_reward"):
        needed.append("actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu")
    for key in [] if dynamic else needed:
        if get(config, key) is None:
            raise ConfigError(f"{key} is null and {ACTOR}.use_dynamic_bsz is False: set {ACTOR}.use_dynamic_bsz=True "
                              f"{ROLLOUT}.log_prob_use_dynamic_bsz=True, or {key}=1 or more")  # fmt: skip


def _check_rollout(config: DictConfig, gcpo: GCPOConfig) -> None:
    chunked = f"{ROLLOUT}.enable_chunked_prefill"
    if get(config, "trainer.device") == "cpu" and get(config, chunked) and gcpo.seed is not None:
        raise ConfigError(
            f"{chunked} is True: on the CPU vLLM cannot chunk the prompt of a request that has a seed; set "
            f"{chunked}=False, or ++gcpo.seed=null"
        )
    if get(config, "trainer.val_only") and not get(config, "trainer.val_before_train", True):
        raise ConfigError(
            "trainer.val_only is True and trainer.val_before_train is False, so that verl trains instead of "
            "validating; set trainer.val_before_train=True"
        )
    penalty = get(config, f"{ROLLOUT}.repetition_penalty", 1.0)
    if penalty != 1.0:
        raise ConfigError(
            f"{ROLLOUT}.repetition_penalty is {penalty!r}: vLLM then samples from another distribution than the one "
            f"whose log-probabilities are trained; set ++{ROLLOUT}.repetition_penalty=1.0"
        )
    if not gcpo.needs_rollout:
        return
    if not get(config, f"{ROLLOUT}.agent.agent_loop_manager_class"):
        raise ConfigError(f"nothing makes the collider draws; set ++{ROLLOUT}.agent.agent_loop_manager_class={MANAGER}")
    if get(config, f"{ROLLOUT}.ignore_eos"):
        raise ConfigError(
            f"{ROLLOUT}.ignore_eos is True: every draw is then cut at its limit, and a cut draw is left out; set "
            f"{ROLLOUT}.ignore_eos=False"
        )
    if not get(config, "data.filter_overlong_prompts"):
        raise ConfigError(
            "data.filter_overlong_prompts is False: a prompt longer than data.max_prompt_length leaves no room for "
            "the candidates, and the run would stop in the middle; set data.filter_overlong_prompts=True"
        )
    for name, tokens in _drawn(gcpo):
        if tokens < 2:
            raise ConfigError(
                f"gcpo.{name}.max_tokens is {tokens}: a draw of one token is empty or cut, so that none is valid; set "
                f"++gcpo.{name}.max_tokens=2 or more"
            )


def _drawn(gcpo: GCPOConfig) -> list[tuple[str, int]]:
    drawn = [("collider", gcpo.collider.max_tokens)]
    return [*drawn, ("regenerated", gcpo.regenerated.max_tokens)] if gcpo.needs_generations else drawn
