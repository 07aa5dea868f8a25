"""The ``gvpo:`` group of the configuration, and the settings of verl that GVPO needs.

It needs neither torch nor verl, so that a wrong value is refused before anything starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from gcpo.reading import ACTOR, ROLLOUT, get
from gcpo.settings import ConfigError, Settings

if TYPE_CHECKING:
    from gcpo.methods.base import Run

NEEDED: dict[str, tuple[Any, str]] = {
    "algorithm.norm_adv_by_std_in_grpo": (False, "GVPO does not divide by the standard deviation of the group"),
    "algorithm.rollout_correction.rollout_is": (None, "its weights would change the loss of GVPO"),
    "algorithm.rollout_correction.bypass_mode": (False, "the loss reads log-ratios, and vLLM is another engine"),
    f"{ACTOR}.policy_loss.loss_mode": ("gpg", "GVPO has neither a ratio nor a clip"),
    f"{ACTOR}.loss_agg_mode": ("seq-mean-token-sum", "GVPO reads the log-probability of the whole response"),
    f"{ACTOR}.use_kl_loss": (False, "the loss of GVPO pulls to the old policy by itself"),
    f"{ACTOR}.entropy_coeff": (0, "GVPO has no entropy bonus"),
    f"{ACTOR}.shuffle": (False, "a mini-batch must hold whole groups"),
    f"{ACTOR}.ulysses_sequence_parallel_size": (1, "sequence parallelism is not supported"),
    f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size": (1, "sequence parallelism is not supported"),
}
"""Settings of verl with the value that GVPO needs, and the reason."""


class GVPOConfig(Settings):
    """Everything that GVPO adds to verl's configuration."""

    beta: Annotated[float, Field(gt=0)] = 0.1
    """Weight of the log-ratio; the optimum of the loss is proportional to π_old · exp(R/β)."""
    allow_single_mini_batch: bool = False
    """Accept one mini-batch per batch, where the log-ratios are 0 and the method is REINFORCE with a mean baseline."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | GVPOConfig | None, run: Run) -> GVPOConfig:
        """Build the checked configuration.

        Args:
            config: the ``gvpo`` group as a mapping; missing fields take their defaults.
            run: the settings of verl.

        Raises:
            ConfigError: an unknown key, a value of the wrong type or outside its range, or a run that GVPO cannot have.
        """
        settings = cls.parse(config, "gvpo")
        if run.n < 2:
            raise ConfigError(f"{ROLLOUT}.n is {run.n}: GVPO compares the responses of a group, set n >= 2")
        return settings


def check(config: Any, gvpo: GVPOConfig) -> None:
    """Refuse settings of verl that change GVPO.

    Args:
        config: verl's whole configuration.
        gvpo: the resolved ``gvpo`` group.

    Raises:
        ConfigError: a setting does not work.
    """
    for key, (needed, why) in NEEDED.items():
        value = get(config, key, needed)
        if value != needed:
            raise ConfigError(f"{key} is {value!r}: {why}; set {key}={'null' if needed is None else needed}")
    batch, mini = get(config, "data.train_batch_size"), get(config, f"{ACTOR}.ppo_mini_batch_size")
    if batch == mini and get(config, f"{ACTOR}.ppo_epochs") == 1 and not gvpo.allow_single_mini_batch:
        raise ConfigError(
            f"{ACTOR}.ppo_mini_batch_size is {mini}, the whole batch: all log-ratios are then 0, and gvpo.beta only "
            f"scales the loss; set {ACTOR}.ppo_mini_batch_size={max(1, batch // 4)}, {ACTOR}.ppo_epochs=2, or "
            "++gvpo.allow_single_mini_batch=True"
        )
