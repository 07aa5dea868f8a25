"""The ``gc2po:`` group of the configuration: fields and checks.

It needs neither torch nor verl, so that a wrong value is refused before anything starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from gcpo import episodes
from gcpo.settings import ConfigError, Count, NotNegative, Seed, Settings, Switch


class EpisodesConfig(episodes.EpisodesConfig):
    """How a response is split, and which episodes are perturbed."""

    renamed = {"scored": "max_perturbed"}

    max_perturbed: Count | None = None
    """So many episodes of a response, drawn at random, are perturbed; the others get the mean robustness of those.
    ``null``: all are."""


class PerturbationConfig(Settings):
    """How the state h at an episode's last token is perturbed."""

    renamed = {"law": "distribution"}

    distribution: Literal["gaussian", "group"] = "gaussian"
    """``gaussian``: g = sigma * |h| * eps / sqrt(d). ``group``: eta * (h of another candidate of the group - h); where
    that candidate has fewer episodes, the state of its last one."""
    sigma: NotNegative = 0.1
    """Size of a Gaussian perturbation relative to the state; 0: none, so that every robustness is 1."""
    draws: Count = 8
    """M, perturbations of a state; with ``group`` at most one for every other candidate."""
    eta: NotNegative = 0.5
    """Share of the way to the other candidate's state."""


class AnswersConfig(Settings):
    """What the answer distribution is over."""

    prompt: Annotated[str, Field(min_length=1)] = "\n\nFinal answer: \\boxed{"
    """The answer prompt, put after the episode."""
    suffix: str = "}"
    """Scored behind every answer, so that 8 is not favoured over 80 for being its beginning."""
    max_answers: Annotated[int, Field(ge=2)] = 4
    """The gold answer and the most frequent ones of the group, so many in all (``intervention: hidden_state``)."""
    max_tokens: Count = 32
    """A longer answer is left out."""


class RewardConfig(Settings):
    """``gcpo.algorithms.episode_reward`` and ``gcpo.algorithms.token_advantage``."""

    robustness_weight: NotNegative = 0.9
    """Weight of the process part."""
    effectiveness_weight: NotNegative = 0.8
    """Weight of effectiveness inside it."""
    trim: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the tokens that the truncated mean leaves out, half of it on each side."""
    length_correction: Switch = True
    """Whether a response's reward is its sum over tokens; without, a mean, which falls with the length."""
    max_ratio: NotNegative = 10.0
    """Bound on a token's share of its response's reward relative to the mean."""


class GC2POConfig(Settings):
    """Everything that GC2PO adds to verl's configuration.

    No value follows from a preset or from the run, except the layer, which `layer_of` gives where the model is known.
    """

    renamed = {"form": "intervention"}

    intervention: Literal["hidden_state", "lm_head"] = "hidden_state"
    """Where the answer distribution is read. ``hidden_state``: the state in a middle layer is replaced and the group's
    answers are scored from there. ``lm_head``: the last-layer state after the answer prompt is perturbed and the
    distribution is the next token's, over the vocabulary."""
    counterfactual: Switch = True
    """``off``: nothing is perturbed; robustness is the sum of squares of the group's empirical answer distribution and
    effectiveness its entropy over the logarithm of their number, everything else equal."""
    layer: int | None = None
    """Whose states are h (0: embeddings, k: after layer k, -1: after the final norm). ``null``: two thirds of the depth
    with ``hidden_state``, -1 with ``lm_head``."""
    seed: Seed | None = 0
    """Seed of the perturbations and of the choice of episodes. ``null`` (the value of ``gcpo.seed=null``): they follow
    from the step and the response's tokens only."""
    episodes: EpisodesConfig = EpisodesConfig()
    perturbation: PerturbationConfig = PerturbationConfig()
    answers: AnswersConfig = AnswersConfig()
    reward: RewardConfig = RewardConfig()
    max_token_len_per_gpu: Count | None = None
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
        settings = cls.parse(config, "gc2po")
        if n < 2:
            raise ConfigError(
                f"actor_rollout_ref.rollout.n is {n}: GC2PO compares the responses of a group, set n >= 2"
            )
        if depth is not None:
            settings.layer_of(depth)
        return settings
