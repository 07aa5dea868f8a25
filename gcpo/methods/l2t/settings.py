"""The ``l2t:`` group of the configuration: fields and checks.

It needs neither torch nor verl, so that a wrong value is refused before anything starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from gcpo.episodes import EpisodesConfig
from gcpo.settings import ConfigError, Count, Fraction, NotNegative, Settings

if TYPE_CHECKING:
    from gcpo.methods.base import Run


class ProbeConfig(Settings):
    """The text that asks for the final answer after a part of a response; the right answer is scored behind it."""

    close_think: str = "\n</think>\n"
    """Put before ``text`` where the thinking part is open: ``<think>`` stands in the prompt or the response, and no
    ``</think>`` after it."""
    text: Annotated[str, Field(min_length=1)] = (
        "Please output the final answer directly based on the above steps. The final answer is \\boxed{"
    )
    """The probe."""
    suffix: str = "}"
    """Scored behind the answer, so that 8 is not favoured over 80 for being its beginning."""
    max_answer_tokens: Count = 32
    """A longer answer counts as missing."""


class L2TConfig(Settings):
    """Everything that L2T adds to verl's configuration."""

    alpha: NotNegative = 0.8
    """Weight of the process part of an episode's reward."""
    penalty: Annotated[
        Literal["off", "one_step", "released"], BeforeValidator(lambda value: "off" if value is False else value)
    ] = "off"
    """The compression penalty C of an episode, which cannot be computed as the paper prints it (docs/l2t.md).
    ``one_step``: for one imagined step of gradient ascent on the episode, with respect to the language-model head.
    ``released``: as the released code computes it, from the change of the last decoder layer since the start."""
    beta: NotNegative = 0.6
    """Weight of the penalty inside the process part."""
    step_size: NotNegative = 1e-6
    """Size of the imagined step of ``one_step``; the yaml has the learning rate of the actor."""
    episodes: EpisodesConfig = EpisodesConfig()
    probe: ProbeConfig = ProbeConfig()
    trim: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the tokens that the truncated mean leaves out, half of it on each side."""
    max_ratio: NotNegative = 10.0
    """Bound on a token's share of its response's reward relative to the mean."""
    max_missing: Fraction = 0.25
    """A step in which more of the questions have no right answer that can be scored is warned about."""
    max_token_len_per_gpu: Count | None = None
    """Tokens in a forward pass of scoring; ``null``: verl's ``ppo_max_token_len_per_gpu``."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | L2TConfig | None, run: Run) -> L2TConfig:
        """Build the checked configuration.

        Args:
            config: the ``l2t`` group as a mapping; missing groups and fields take their defaults.
            run: the settings of verl.

        Raises:
            ConfigError: an unknown key, a value of the wrong type or outside its range, or a run that L2T cannot have.
        """
        settings = cls.parse(config, "l2t")
        if run.n < 2:
            raise ConfigError(
                f"actor_rollout_ref.rollout.n is {run.n}: L2T compares the responses of a group, set n >= 2"
            )
        if not run.norm_by_std:
            key = "algorithm.norm_adv_by_std_in_grpo"
            raise ConfigError(f"{key} is False: L2T divides by the standard deviation of the group; set {key}=True")
        probe = settings.probe
        added = len(probe.close_think + probe.text) + probe.max_answer_tokens
        need, budget = run.prompt_length + run.response_length + added, settings.budget(run)
        if need > budget:
            raise ConfigError(
                f"a response with a probe can take {need} tokens, a forward pass holds {budget}: set "
                f"l2t.max_token_len_per_gpu={need} or more"
            )
        return settings

    def budget(self, run: Run) -> int:
        """Tokens in a forward pass of scoring."""
        return self.max_token_len_per_gpu or run.max_tokens
