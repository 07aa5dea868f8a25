"""Checks of types and ranges of verl's settings, so that a wrong value is refused before a process starts.

verl reads most of them only in a worker, after starting Ray, the model and vLLM.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from gcpo.reading import ACTOR, MODEL, ROLLOUT, get
from gcpo.settings import ConfigError


@dataclass(frozen=True)
class Number:
    """The valid values of a numeric setting."""

    least: float = 0
    most: float = math.inf
    whole: bool = True
    open: bool = False
    """Whether ``least`` itself is excluded."""
    null: bool = False
    also: tuple[float, ...] = ()
    """Values outside the range that have a special meaning."""
    hint: str = ""

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        bound = f"{'greater than' if self.open else 'of at least'} {self.least:g}"
        if self.most < math.inf:
            bound += f" and at most {self.most:g}"
        also = "".join(f", or {value:g}" for value in self.also)
        return f"{kind} {bound}{also}{', or null' if self.null else ''}{self.hint}"

    def accepts(self, value: Any) -> bool:
        """Return whether ``value`` is a number of this kind."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return False
        if self.whole and value != int(value):
            return False
        if value in self.also:
            return True
        return (value > self.least if self.open else value >= self.least) and value <= self.most


COUNT = Number(1)
MAYBE_COUNT = Number(1, null=True)
SEED = Number(0, 2**32 - 1)
POSITIVE = Number(0, whole=False, open=True)
NOT_NEGATIVE = Number(0, whole=False)
FRACTION = Number(0, 1, whole=False)
TOP_P = Number(0, 1, whole=False, open=True)
TOP_K = Number(1, also=(-1, 0))
NEVER = Number(1, also=(-1,), hint=" (-1: never)")
ALL = Number(1, also=(-1,), hint=" (-1: all rows)")

NUMBERS: dict[str, Number] = {
    "data.train_batch_size": COUNT,
    "data.gen_batch_size": MAYBE_COUNT,
    "data.val_batch_size": MAYBE_COUNT,
    "data.max_prompt_length": COUNT,
    "data.max_response_length": COUNT,
    "data.train_max_samples": ALL,
    "data.val_max_samples": ALL,
    "data.seed": Number(0, 2**32 - 1, null=True),
    "data.dataloader_num_workers": Number(0),
    "data.filter_overlong_prompts_workers": MAYBE_COUNT,
    "trainer.total_epochs": COUNT,
    "trainer.total_training_steps": MAYBE_COUNT,
    "trainer.save_freq": NEVER,
    "trainer.test_freq": NEVER,
    "trainer.n_gpus_per_node": COUNT,
    "trainer.nnodes": COUNT,
    "trainer.max_actor_ckpt_to_keep": MAYBE_COUNT,
    "trainer.log_val_generations": Number(0),
    f"{ACTOR}.ppo_mini_batch_size": COUNT,
    f"{ACTOR}.ppo_micro_batch_size_per_gpu": MAYBE_COUNT,
    f"{ACTOR}.ppo_max_token_len_per_gpu": COUNT,
    f"{ACTOR}.ppo_epochs": COUNT,
    f"{ACTOR}.clip_ratio": POSITIVE,
    f"{ACTOR}.clip_ratio_low": Number(0, whole=False, open=True, null=True),
    f"{ACTOR}.clip_ratio_high": Number(0, whole=False, open=True, null=True),
    f"{ACTOR}.clip_ratio_c": Number(1, whole=False, open=True),
    f"{ACTOR}.loss_scale_factor": Number(0, whole=False, open=True, null=True),
    f"{ACTOR}.entropy_coeff": Number(-math.inf, whole=False),
    f"{ACTOR}.kl_loss_coef": NOT_NEGATIVE,
    f"{ACTOR}.data_loader_seed": SEED,
    f"{ACTOR}.ulysses_sequence_parallel_size": COUNT,
    f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size": COUNT,
    f"{ACTOR}.fsdp_config.fsdp_size": Number(1, also=(-1,), hint=" (-1: all ranks)"),
    f"{ACTOR}.optim.lr": NOT_NEGATIVE,
    f"{ACTOR}.optim.weight_decay": NOT_NEGATIVE,
    f"{ACTOR}.optim.clip_grad": POSITIVE,
    f"{ACTOR}.optim.lr_warmup_steps": Number(0, also=(-1,)),
    f"{ACTOR}.optim.lr_warmup_steps_ratio": FRACTION,
    f"{ACTOR}.optim.min_lr_ratio": Number(0, 1, whole=False, null=True),
    f"{ROLLOUT}.n": COUNT,
    f"{ROLLOUT}.temperature": POSITIVE,
    f"{ROLLOUT}.top_p": TOP_P,
    f"{ROLLOUT}.top_k": TOP_K,
    f"{ROLLOUT}.seed": SEED,
    f"{ROLLOUT}.gpu_memory_utilization": TOP_P,
    f"{ROLLOUT}.max_model_len": MAYBE_COUNT,
    f"{ROLLOUT}.max_num_seqs": COUNT,
    f"{ROLLOUT}.max_num_batched_tokens": COUNT,
    f"{ROLLOUT}.tensor_model_parallel_size": COUNT,
    f"{ROLLOUT}.data_parallel_size": COUNT,
    f"{ROLLOUT}.pipeline_model_parallel_size": Number(1, 1),
    f"{ROLLOUT}.log_prob_max_token_len_per_gpu": MAYBE_COUNT,
    f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu": MAYBE_COUNT,
    f"{ROLLOUT}.agent.num_workers": COUNT,
    f"{ROLLOUT}.checkpoint_engine.update_weights_bucket_megabytes": COUNT,
    f"{ROLLOUT}.val_kwargs.n": COUNT,
    f"{ROLLOUT}.val_kwargs.temperature": NOT_NEGATIVE,
    f"{ROLLOUT}.val_kwargs.top_p": TOP_P,
    f"{ROLLOUT}.val_kwargs.top_k": TOP_K,
    f"{MODEL}.lora_rank": Number(0),
    f"{MODEL}.lora_alpha": COUNT,
    "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu": MAYBE_COUNT,
    "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": MAYBE_COUNT,
    "reward.num_workers": COUNT,
}

CHOICES: dict[str, tuple[Any, ...]] = {
    f"{ACTOR}.loss_agg_mode": (
        "token-mean",
        "token-sum",
        "seq-mean-token-sum",
        "seq-mean-token-mean",
        "seq-mean-token-sum-norm",
    ),
    f"{ACTOR}.kl_loss_type": ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3", "kl+", "k1+", "abs+", "k3+",
                              "low_var_kl+"),
    f"{ACTOR}.policy_loss.loss_mode": ("gcpo", "vanilla", "dppo_tv", "dppo_kl", "gspo", "sapo", "gpg", "clip_cov",
                                       "kl_cov", "geo_mean", "dro", "cispo"),
    f"{ACTOR}.optim.lr_scheduler_type": ("constant", "cosine"),
    f"{ROLLOUT}.dtype": ("auto", "float16", "half", "bfloat16", "float32", "float"),
    "algorithm.rollout_correction.rollout_is": ("token", "sequence"),
    "trainer.resume_mode": ("auto", "disable", "resume_path"),
    "trainer.device": ("cuda", "cpu", "npu"),
    "reward.reward_manager.source": ("register", "importlib"),
}  # fmt: skip
"""A test compares the lists of names with verl's registries."""

LOGGERS = ("wandb", "mlflow", "swanlab", "vemlp_wandb", "tensorboard", "console", "clearml", "trackio", "file",
           "rl_insight", "tracking")  # fmt: skip
REWARD_MANAGERS = ("naive", "dapo", "gdpo", "rate_limited", "remote")
SAVED = ("model", "optimizer", "extra", "hf_model")

SWITCHES = (
    "data.filter_overlong_prompts",
    "data.shuffle",
    "trainer.val_before_train",
    "trainer.val_only",
    "trainer.balance_batch",
    "trainer.del_local_ckpt_after_load",
    "algorithm.use_kl_in_reward",
    "algorithm.norm_adv_by_std_in_grpo",
    f"{ACTOR}.use_kl_loss",
    f"{ACTOR}.use_dynamic_bsz",
    f"{ACTOR}.shuffle",
    f"{MODEL}.use_remove_padding",
    f"{MODEL}.enable_gradient_checkpointing",
    f"{MODEL}.trust_remote_code",
    f"{MODEL}.lora.merge",
    f"{ROLLOUT}.enforce_eager",
    f"{ROLLOUT}.free_cache_engine",
    f"{ROLLOUT}.enable_prefix_caching",
    f"{ROLLOUT}.enable_chunked_prefill",
    f"{ROLLOUT}.calculate_log_probs",
    f"{ROLLOUT}.val_kwargs.do_sample",
)


def check_values(config: DictConfig) -> None:
    """Check that every number, name and switch that verl or gcpo reads has the right type and range.

    Raises:
        ConfigError: one does not; the sentence names the key and its valid values.
    """
    for key, number in NUMBERS.items():
        value = get(config, key)
        if value is None and (number.null or not _present(config, key)):
            continue
        if not number.accepts(value):
            raise ConfigError(f"{key} is {value!r}; it must be {number}")
    for key, choices in CHOICES.items():
        value = get(config, key)
        if value is not None and value not in choices:
            raise ConfigError(f"{key} is {value!r}; choose one of {', '.join(choices)}")
    for key in SWITCHES:
        value = get(config, key)
        if value is not None and not isinstance(value, bool):
            raise ConfigError(f"{key} is {value!r}; write True or False")
    _check_names(config, "trainer.logger", LOGGERS)
    _check_names(config, f"{ACTOR}.checkpoint.save_contents", SAVED)
    if get(config, "reward.reward_manager.source") == "register":
        _check_names(config, "reward.reward_manager.name", REWARD_MANAGERS)


def _present(config: DictConfig, key: str) -> bool:
    parent, _, name = key.rpartition(".")
    found = OmegaConf.select(config, parent, default=None)
    return found is not None and OmegaConf.is_dict(found) and name in found


def _check_names(config: DictConfig, key: str, known: tuple[str, ...]) -> None:
    value = get(config, key)
    for name in [] if value is None else [value] if isinstance(value, str) else list(value):
        if name not in known:
            raise ConfigError(f"{key} names {name!r}, which verl does not have; it has {', '.join(known)}")
