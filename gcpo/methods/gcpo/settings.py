"""The ``gcpo:`` group of the configuration: fields, presets and checks.

Every field is documented where it is defined. A field that is ``None`` takes the value of ``preset``; a value that is
given always wins. ``GCPOConfig.from_config`` builds the resolved, checked object; it needs neither torch nor verl, so
that a wrong value is refused before anything starts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass
from typing import Any, Literal

from gcpo.settings import ConfigError, parse_settings
from gcpo.stability import StabilityConfig


@dataclass(frozen=True)
class ColliderConfig:
    """The collider draws y_{n,l}: the old policy answers again with the group's responses in the prompt."""

    scheme: Literal["shared", "leave_one_out"] | None = None
    """Which draws Phi averages over. ``shared``: every response uses the same L draws, made from all n responses (the
    paper as printed). ``leave_one_out``: for each i also L' draws made from the other responses alone (Eq. 2)."""
    num_draws: int | None = None
    """L, shared draws per group. ``null`` in preset ``paper``: L = n."""
    num_leave_one_out_draws: int | None = None
    """L', draws per response where ``scheme`` is ``leave_one_out``."""
    num_generations: int | None = None
    """M, regenerated responses O_{i,l,m} per context. ``null`` in preset ``paper``: M = n."""
    projection: Literal["inclusive", "exclusive"] | None = None
    """Whether the mean over the shared draws includes l = 0 (the paper) or runs over l >= 1."""
    max_tokens: int | None = None
    """Longest collider draw in tokens; ``null``: ``rollout.response_length``. A draw that is cut is left out."""


@dataclass(frozen=True)
class RegeneratedConfig:
    """The regenerated responses O_{i,l,m}."""

    max_tokens: int | None = None
    """Longest regenerated response in tokens; ``null``: ``rollout.response_length``. One that is cut is left out."""


@dataclass(frozen=True)
class BlocksConfig:
    """How a response is put into a prompt as a candidate block."""

    max_tokens: int | None = None
    """Tokens of a response that a block holds; ``null``: ``rollout.response_length``, so that nothing is cut."""
    truncation: Literal["keep_end", "keep_start", "answer"] = "keep_end"
    """Which part of a longer response stays; the end is where the answer is. ``answer``: of every response, however
    short, what stands from its last ``\\boxed{`` on (its end where it has none)."""
    drop_think: bool = True
    """Leave out ``<think>...</think>`` first when a response does not fit."""
    intro: str = "\n\nOther answers to this question:"
    """Text between the question and the blocks."""
    candidate: str = "\n[Answer {label}]\n"
    """Label of a candidate block; ``{label}`` is the number of the response in its group."""
    collider: str = "\n[Joint answer]\n"
    """Label of the block of a collider draw."""
    outro: str = "\n\nWrite your own answer."
    """Text after the blocks."""


@dataclass(frozen=True)
class FeaturesConfig:
    """The hidden states z and Z of Steps 1 to 4."""

    source: Literal["response", "prompt"] | None = None
    """What Z is: the state at the end of a regenerated response (the paper), or at the end of the prompt x_{i,l},
    which needs no regenerated response."""
    input: Literal["response", "prompt_response"] = "response"
    """What is fed back to get a response's state: the response alone, or its prompt and the response."""
    token: Literal["last", "last_content"] = "last"
    """The final token (the end token if there is one), or the last token before it."""
    layer: int = -1
    """-1: after the final norm. Otherwise an index into the model's hidden states (0: embeddings, k: after layer k)."""
    center: Literal["none", "batch"] = "none"
    """``batch``: the mean state of the batch is subtracted first; Upsilon is then clamped at 0."""


@dataclass(frozen=True)
class WeightingConfig:
    """Upsilon, the causal weight (Eq. 11)."""

    target: Literal["projection", "group_mean", "conditioned", "off"] | None = None
    """What a response is compared with: the projection of Step 4 (the paper), the mean of the group (no extra
    generation), the conditioned mean, or nothing (Upsilon = 1). ``gcpo.weighting=off`` is short for ``off``."""
    similarity: Literal["cosine", "euclidean", "gaussian"] = "cosine"
    """How they are compared."""
    missing: Literal["mean", "one"] = "mean"
    """Upsilon of a response without a target. ``mean``: the mean Upsilon of the batch's responses that have one, 1 if
    none has. ``one``: 1, which with alpha = 2 and cosines near 0.9 halves the step of the responses whose draws were
    cut."""
    ablation: Literal["none", "mean", "shuffled"] = "none"
    """For experiments that ask whether Upsilon is more than a step size, after ``missing`` has filled in. ``mean``:
    every response gets the mean of the batch; ``shuffled``: the weights are permuted among the responses of a group
    that have a target."""


@dataclass(frozen=True)
class AdvantageConfig:
    """How Upsilon enters the advantage."""

    form: Literal["product", "signed"] = "product"
    """``product``: B = A * Upsilon (the paper). ``signed``: A * (1 + sign(A) * (Upsilon - mean Upsilon))."""


@dataclass(frozen=True)
class ReferenceConfig:
    """The causal reference pi'_ref and its KL term (Eq. 12, 13)."""

    reduction: Literal["mean", "sum"] = "mean"
    """How the l contexts are reduced: Phi is an expectation, so a mean; the paper prints a sum."""
    collider_context: Literal["replace", "append"] = "replace"
    """Whether y_{n,l} stands in the place of y_n in x_{i,l}, or after it."""
    policy_condition: Literal["collider", "query"] = "collider"
    """What pi_theta in the denominator of rho is conditioned on: x_i (Eq. 12) or the question alone."""
    floor: float = 1e-6
    """Smallest value of pi'_ref."""
    relative_floor: float = 0.01
    """Smallest value of pi'_ref as a share of pi_old(y|q)."""
    max_kl: float = 10.0
    """KL' of a token is cut here, and has no gradient beyond."""
    subsample: float | None = None
    """Share of a group's responses that have a kappa term, drawn anew for every group (at least one of them). Their
    terms are weighted by the inverse share, so that the gradient is the same in expectation. ``null``: the preset's."""


@dataclass(frozen=True)
class ScoringConfig:
    """Forward passes over the contexts in the actor's engine."""

    max_token_len_per_gpu: int | None = None
    """Tokens in a micro-batch, without and with gradient; ``null``: verl's ``ppo_max_token_len_per_gpu``."""
    packing: Literal["tree", "dense"] = "tree"
    """``tree``: what contexts share goes through the model once; ``dense``: every context goes through it by itself.
    A model or setting that ``tree`` cannot serve is scored dense, and the log says so once. ``dense`` has as many
    sequences in a micro-batch as verl's ``ppo_micro_batch_size_per_gpu`` where ``use_dynamic_bsz`` is off."""
    min_shared_tokens: int = 8
    """Shorter stretches are repeated instead of shared: every stretch costs attention calls of its own."""


@dataclass(frozen=True)
class MetricsConfig:
    """What is measured besides training."""

    graded_fraction: float = 0.1
    """Share of the groups whose auxiliary generations are graded, for our metrics alone (0 for code)."""
    grad_norm_every: int = 10
    """The gradient norms of the policy, beta and kappa parts are measured every so many steps; 0: never."""
    dump_fraction: float = 0.05
    """Share of the groups whose auxiliary generations go to the rollout dump (``trainer.rollout_data_dir``). With
    preset ``paper`` and n = 8 a group has up to 528 of them."""
    max_missing: float = 0.25
    """A step warns where a larger share of the draws, targets or references that it asked for is missing
    (``gcpo/missing/*_frac``). A step in which none of them is valid stops the run, whatever this is."""


@dataclass(frozen=True)
class GCPOConfig:
    """Everything that GCPO adds to verl's configuration."""

    preset: Literal["paper", "balanced", "light"] = "balanced"
    """Values of the fields left ``null``, as the study in docs/estimators.md sets them. ``paper``: L = M = n shared
    draws. ``balanced``: L = L' = 1, states of the prompts, no regenerated response. ``light``: the mean of the group
    as the target of Upsilon; L = L' = 1 for the kappa term alone."""
    alpha: float = 2.0
    """Scale of Upsilon."""
    kappa: float = 0.06
    """Weight of the KL term to the causal reference; 0 turns it off."""
    seed: int | None = 0
    """Seed of the sampling requests, validation included, and of the choices that are made here: the block orders, the
    responses with a kappa term, the groups that are graded or dumped, ``weighting.ablation: shuffled``. ``null``: no
    request has a seed. The choices then follow from the step and the question only. Turn the seed off where a server
    samples many requests together on a GPU: for requests with seeds vLLM calls a generator for each of them in Python,
    at every token."""
    collider: ColliderConfig = field(default_factory=ColliderConfig)
    regenerated: RegeneratedConfig = field(default_factory=RegeneratedConfig)
    blocks: BlocksConfig = field(default_factory=BlocksConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    weighting: WeightingConfig = field(default_factory=WeightingConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    stability: StabilityConfig = field(default_factory=StabilityConfig)

    # ---- what the settings ask for -------------------------------------------------------------------------------

    @property
    def weighting_on(self) -> bool:
        """Whether Upsilon can differ from 1."""
        return self.weighting.target != "off"

    @property
    def reference_on(self) -> bool:
        """Whether the kappa term exists."""
        return self.kappa > 0

    @property
    def causal_target_on(self) -> bool:
        """Whether Upsilon needs the contexts x_{i,l}."""
        return self.weighting.target in ("projection", "conditioned")

    @property
    def needs_rollout(self) -> bool:
        """Whether any collider draw is made."""
        return self.reference_on or self.causal_target_on

    @property
    def needs_generations(self) -> bool:
        """Whether regenerated responses O are made."""
        return self.causal_target_on and self.features.source == "response"

    @property
    def is_grpo(self) -> bool:
        """Whether the run is plain GRPO: no extra generation and no extra forward."""
        return not self.weighting_on and not self.reference_on

    @property
    def leave_one_out_draws(self) -> int:
        """L' where leave-one-out draws are made, else 0."""
        return self.collider.num_leave_one_out_draws if self.collider.scheme == "leave_one_out" else 0

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | GCPOConfig | None, *, n: int, response_length: int) -> GCPOConfig:
        """Build the resolved and checked configuration.

        Args:
            config: the ``gcpo`` group as a mapping; missing groups and fields take their defaults.
            n: responses per question (``rollout.n``).
            response_length: longest response (``rollout.response_length``), the default of the extra lengths.

        Raises:
            ConfigError: an unknown key, a value of the wrong type or outside its range.
        """
        raw = dataclasses.asdict(config) if is_dataclass(config) else dict(config or {})
        # `off` is a string on the command line and False in yaml.
        if raw.get("weighting") in ("off", False):
            raw["weighting"] = {"target": "off"}
        if isinstance(raw.get("weighting"), Mapping) and raw["weighting"].get("target") is False:
            raw["weighting"] = {**raw["weighting"], "target": "off"}
        parsed = parse_settings(cls, raw, "gcpo")
        resolved = _fill(parsed, n=n, response_length=response_length)
        _check(resolved, n=n)
        return resolved

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dictionary, for yaml."""
        return dataclasses.asdict(self)


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"scheme": "shared", "num_draws": None, "num_leave_one_out_draws": 0, "num_generations": None,
              "projection": "inclusive", "source": "response", "target": "projection", "subsample": 1.0},
    "balanced": {"scheme": "leave_one_out", "num_draws": 1, "num_leave_one_out_draws": 1, "num_generations": 1,
                 "projection": "inclusive", "source": "prompt", "target": "projection", "subsample": 0.5},
    "light": {"scheme": "leave_one_out", "num_draws": 1, "num_leave_one_out_draws": 1, "num_generations": 1,
              "projection": "inclusive", "source": "prompt", "target": "group_mean", "subsample": 0.25},
}  # fmt: skip


def _fill(config: GCPOConfig, *, n: int, response_length: int) -> GCPOConfig:
    """Put the preset's values where a field is ``None``."""
    preset = PRESETS[config.preset]

    def pick(value: Any, name: str) -> Any:
        if value is None:
            value = preset[name]
        return n if value is None else value

    collider = config.collider
    scheme = pick(collider.scheme, "scheme")
    leave_one_out = pick(collider.num_leave_one_out_draws, "num_leave_one_out_draws")
    if scheme == "leave_one_out" and collider.num_leave_one_out_draws is None:
        leave_one_out = max(leave_one_out, 1)
    if scheme == "shared" and collider.num_leave_one_out_draws is None:
        leave_one_out = 0
    return dataclasses.replace(
        config,
        collider=dataclasses.replace(
            collider,
            scheme=scheme,
            num_draws=pick(collider.num_draws, "num_draws"),
            num_leave_one_out_draws=leave_one_out,
            num_generations=pick(collider.num_generations, "num_generations"),
            projection=pick(collider.projection, "projection"),
            max_tokens=collider.max_tokens if collider.max_tokens is not None else response_length,
        ),
        regenerated=dataclasses.replace(
            config.regenerated,
            max_tokens=config.regenerated.max_tokens if config.regenerated.max_tokens is not None else response_length,
        ),
        blocks=dataclasses.replace(
            config.blocks,
            max_tokens=config.blocks.max_tokens if config.blocks.max_tokens is not None else response_length,
        ),
        features=dataclasses.replace(config.features, source=pick(config.features.source, "source")),
        weighting=dataclasses.replace(config.weighting, target=pick(config.weighting.target, "target")),
        reference=dataclasses.replace(config.reference, subsample=pick(config.reference.subsample, "subsample")),
    )


def _check(config: GCPOConfig, *, n: int) -> None:
    """Refuse values that cannot work."""

    def refuse(where: str, why: str) -> None:
        raise ConfigError(f"gcpo.{where}: {why}")

    if not config.is_grpo and n < 2:
        raise ConfigError(f"actor_rollout_ref.rollout.n is {n}: GCPO compares the responses of a group, set n >= 2")
    for name in ("alpha", "kappa"):
        value = getattr(config, name)
        if not (math.isfinite(value) and value >= 0):
            refuse(name, f"{value} is not a finite number >= 0")
    collider = config.collider
    for name, value, least in (
        ("collider.num_draws", collider.num_draws, 1),
        ("collider.num_generations", collider.num_generations, 1),
        ("collider.max_tokens", collider.max_tokens, 1),
        ("regenerated.max_tokens", config.regenerated.max_tokens, 1),
        ("blocks.max_tokens", config.blocks.max_tokens, 1),
        ("collider.num_leave_one_out_draws", collider.num_leave_one_out_draws, 0),
        ("scoring.min_shared_tokens", config.scoring.min_shared_tokens, 1),
        ("metrics.grad_norm_every", config.metrics.grad_norm_every, 0),
    ):
        if value < least:
            refuse(name, f"{value} is too small, set it to {least} or more")
    if config.needs_rollout:
        if collider.scheme == "shared" and collider.num_draws < 2:
            refuse(
                "collider.num_draws",
                "L = 1 with shared draws makes the causal part zero by construction; set num_draws >= 2, or "
                "++gcpo.collider.scheme=leave_one_out",
            )
        if collider.scheme == "leave_one_out" and collider.num_leave_one_out_draws < 1:
            refuse(
                "collider.num_leave_one_out_draws", "leave_one_out needs at least one draw per response, set it to 1"
            )
        if collider.num_draws > n:
            refuse(
                "collider.num_draws",
                f"L = {collider.num_draws} is more than the {n} responses of a group; set it to {n} or less",
            )
        if config.preset == "paper" and config.features.source != "response":
            refuse("features.source", "preset paper takes Z from regenerated responses; use another preset")
    for name, why in config.stability.problems():
        refuse(f"stability.{name}", why)
    if not config.reference.max_kl > 0:
        refuse("reference.max_kl", f"{config.reference.max_kl} must be greater than 0")
    if not 0 < config.reference.floor < 1:
        refuse("reference.floor", f"{config.reference.floor} must lie between 0 and 1")
    if not 0 <= config.reference.relative_floor < 1:
        refuse("reference.relative_floor", f"{config.reference.relative_floor} must be at least 0 and less than 1")
    if not 0 < config.reference.subsample <= 1:
        refuse("reference.subsample", f"{config.reference.subsample} must be greater than 0 and at most 1")
    for name in ("graded_fraction", "dump_fraction", "max_missing"):
        value = getattr(config.metrics, name)
        if not 0 <= value <= 1:
            refuse(f"metrics.{name}", f"{value} must lie between 0 and 1")
    budget = config.scoring.max_token_len_per_gpu
    if budget is not None and budget < 1:
        refuse("scoring.max_token_len_per_gpu", f"{budget} is too small for a single token")
    if "{label}" not in config.blocks.candidate:
        refuse("blocks.candidate", "the label of a block must contain {label}, or the responses look all the same")
