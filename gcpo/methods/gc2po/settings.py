"""The ``gc2po:`` group of the configuration: fields and checks, in the style of ``gcpo.methods.gcpo.settings``.

It needs neither torch nor verl, so that a wrong value is refused before anything starts.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass
from typing import Any, Literal

from gcpo.settings import ConfigError, parse_settings

BLANK_LINES = r"\n\s*\n"


@dataclass(frozen=True)
class EpisodesConfig:
    """How a response is split."""

    separator: str = BLANK_LINES
    """Regular expression of what stands between two episodes where a response has no tags: blank lines."""
    max_episodes: int = 30
    """A response with more has the rest in its last one."""
    max_perturbed: int | None = None
    """So many episodes of a response, drawn at random, are perturbed; the others get the mean robustness of those.
    ``null``: all are."""


@dataclass(frozen=True)
class PerturbationConfig:
    """How the state h at an episode's last token is perturbed."""

    distribution: Literal["gaussian", "group"] = "gaussian"
    """``gaussian``: g = sigma * |h| * eps / sqrt(d). ``group``: eta * (h of another candidate of the group - h); where
    that candidate has fewer episodes, the state of its last one."""
    sigma: float = 0.1
    """Size of a Gaussian perturbation relative to the state; 0: none, so that every robustness is 1."""
    draws: int = 8
    """M, perturbations of a state; with ``group`` at most one for every other candidate."""
    eta: float = 0.5
    """Share of the way to the other candidate's state."""


@dataclass(frozen=True)
class AnswersConfig:
    """What the answer distribution is over."""

    prompt: str = "\n\nFinal answer: \\boxed{"
    """The answer prompt, put after the episode."""
    suffix: str = "}"
    """Scored behind every answer, so that 8 is not favoured over 80 for being its beginning."""
    max_answers: int = 4
    """The gold answer and the most frequent ones of the group, so many in all (``intervention: hidden_state``)."""
    max_tokens: int = 32
    """A longer answer is left out."""


@dataclass(frozen=True)
class RewardConfig:
    """``gcpo.algorithms.episode_reward`` and ``gcpo.algorithms.token_advantage``."""

    robustness_weight: float = 0.9
    """Weight of the process part."""
    effectiveness_weight: float = 0.8
    """Weight of effectiveness inside it."""
    trim: float = 0.05
    """Share of the tokens that the truncated mean leaves out, half of it on each side."""
    length_correction: bool = True
    """Whether a response's reward is its sum over tokens; without, a mean, which falls with the length."""
    max_ratio: float = 10.0
    """Bound on a token's share of its response's reward relative to the mean."""


@dataclass(frozen=True)
class GC2POConfig:
    """Everything that GC2PO adds to verl's configuration."""

    intervention: Literal["hidden_state", "lm_head"] = "hidden_state"
    """Where the answer distribution is read. ``hidden_state``: the state in a middle layer is replaced and the group's
    answers are scored from there. ``lm_head``: the last-layer state after the answer prompt is perturbed and the
    distribution is the next token's, over the vocabulary."""
    counterfactual: bool = True
    """``off``: nothing is perturbed; robustness is the sum of squares of the group's empirical answer distribution and
    effectiveness its entropy over the logarithm of their number, everything else equal."""
    layer: int | None = None
    """Whose states are h (0: embeddings, k: after layer k, -1: after the final norm). ``null``: two thirds of the depth
    with ``hidden_state``, -1 with ``lm_head``."""
    seed: int | None = 0
    """Seed of the perturbations and of the choice of episodes. ``null`` (the value of ``gcpo.seed=null``): they follow
    from the step and the response's tokens only."""
    episodes: EpisodesConfig = field(default_factory=EpisodesConfig)
    perturbation: PerturbationConfig = field(default_factory=PerturbationConfig)
    answers: AnswersConfig = field(default_factory=AnswersConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    max_token_len_per_gpu: int | None = None
    """Tokens in a forward pass of scoring; ``null``: verl's ``ppo_max_token_len_per_gpu``."""

    @property
    def needs_answers(self) -> bool:
        """Whether answers are scored by the model."""
        return self.counterfactual and self.intervention == "hidden_state" and self.perturbs

    @property
    def perturbs(self) -> bool:
        """Whether any perturbation differs from none."""
        size = self.perturbation.sigma if self.perturbation.distribution == "gaussian" else self.perturbation.eta
        return size > 0

    def layer_of(self, depth: int) -> int:
        """The layer of h in a model of ``depth`` layers, from 0 to ``depth`` (after the final norm).

        Raises:
            ConfigError: the model has no such layer, or nothing comes after it.
        """
        if self.layer is None:
            index = depth if self.intervention == "lm_head" else min(max(round(2 * depth / 3), 1), depth - 1)
        else:
            index = self.layer if self.layer >= 0 else depth + 1 + self.layer
        if not 0 <= index <= depth:
            raise ConfigError(
                f"gc2po.layer is {self.layer}, the model has hidden states 0 to {depth}; set one of them, or null"
            )
        if self.intervention == "hidden_state" and index == depth:
            raise ConfigError(
                f"gc2po.layer is {self.layer}, the last of the model's hidden states: nothing comes after it that a "
                f"perturbation could change, set it to at most {depth - 1}, or ++gc2po.intervention=lm_head"
            )
        if self.intervention == "lm_head" and self.perturbation.distribution == "group" and index != depth:
            raise ConfigError(
                f"gc2po.layer is {self.layer}: with intervention lm_head and distribution group states of "
                "the last layer are exchanged, set it to null"
            )
        return index

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any] | GC2POConfig | None, *, n: int, depth: int | None = None
    ) -> GC2POConfig:
        """Build the checked configuration.

        Args:
            config: the ``gc2po`` group as a mapping; missing groups and fields take their defaults.
            n: responses per question (``rollout.n``).
            depth: layers of the model, where they are known.

        Raises:
            ConfigError: an unknown key, a value of the wrong type or outside its range.
        """
        raw = dataclasses.asdict(config) if is_dataclass(config) else dict(config or {})
        raw["counterfactual"] = _switch(raw.get("counterfactual", True))
        if isinstance(raw.get("reward"), Mapping) and "length_correction" in raw["reward"]:
            reward = dict(raw["reward"])
            raw["reward"] = {**reward, "length_correction": _switch(reward["length_correction"])}
        parsed = parse_settings(cls, raw, "gc2po")
        _check(parsed, n)
        if depth is not None:
            parsed.layer_of(depth)
        return parsed

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dictionary, for yaml."""
        return dataclasses.asdict(self)


def _switch(value: Any) -> Any:
    """``on`` and ``off`` are strings on the command line and booleans in yaml."""
    return {"on": True, "off": False}.get(value, value) if isinstance(value, str) else value


def _check(config: GC2POConfig, n: int) -> None:
    def refuse(where: str, why: str) -> None:
        raise ConfigError(f"gc2po.{where}: {why}")

    if n < 2:
        raise ConfigError(f"actor_rollout_ref.rollout.n is {n}: GC2PO compares the responses of a group, set n >= 2")
    perturbation, answers, reward = config.perturbation, config.answers, config.reward
    for name, value, least in (
        ("perturbation.draws", perturbation.draws, 1),
        ("episodes.max_episodes", config.episodes.max_episodes, 1),
        ("answers.max_answers", answers.max_answers, 2),
        ("answers.max_tokens", answers.max_tokens, 1),
        ("episodes.max_perturbed", config.episodes.max_perturbed, 1),
        ("max_token_len_per_gpu", config.max_token_len_per_gpu, 1),
    ):
        if value is not None and value < least:
            refuse(name, f"{value} is too small, set it to {least} or more")
    for name, value in (
        ("perturbation.sigma", perturbation.sigma),
        ("perturbation.eta", perturbation.eta),
        ("reward.robustness_weight", reward.robustness_weight),
        ("reward.effectiveness_weight", reward.effectiveness_weight),
        ("reward.max_ratio", reward.max_ratio),
    ):
        if not (math.isfinite(value) and value >= 0):
            refuse(name, f"{value} is not a finite number >= 0")
    if not 0 <= reward.trim < 1:
        refuse("reward.trim", f"{reward.trim} must be at least 0 and less than 1")
    if not answers.prompt:
        refuse("answers.prompt", "it is empty, and the answers have nothing to follow; write a text")
    try:
        matches_nothing = re.compile(config.episodes.separator).match("") is not None
    except re.error as error:
        refuse("episodes.separator", f"{config.episodes.separator!r} is not a regular expression ({error})")
    if matches_nothing:
        refuse("episodes.separator", f"{config.episodes.separator!r} also matches nothing at all; make it longer")
