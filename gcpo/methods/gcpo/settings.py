"""The ``gcpo:`` group of the configuration: the fields.

`GCPOSettings` holds the user's settings: a field that is ``None`` takes the value of ``preset``, and a given value
always wins. The code reads `GCPOConfig`: `GCPOConfig.from_config` fills in and checks every value. Neither
needs torch or verl, so that a wrong value is refused before anything starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from gcpo.methods.gcpo.presets import check, fill
from gcpo.settings import (
    Count,
    Fraction,
    NotNegative,
    Positive,
    PositiveFraction,
    Seed,
    Settings,
    Switch,
)
from gcpo.stability import StabilityConfig

Scheme = Literal["shared", "leave_one_out"]
Projection = Literal["inclusive", "exclusive"]
Source = Literal["response", "prompt"]
Target = Literal["projection", "group_mean", "conditioned", "off"]


class ColliderSettings(Settings):
    """The collider draws y_{n,l}: the old policy answers again with the group's responses in the prompt."""

    renamed = {"draws": "scheme", "num_marginal_draws": "num_leave_one_out_draws"}
    removed = {"cache_tokens": "groups that take turns had no more prefix-cache hits; leave it out"}

    scheme: Scheme | None = None
    """Draws that Phi averages over. ``shared``: every response uses the same L draws, made from all n responses (the
    paper as printed). ``leave_one_out``: for each i also L' draws made from only the other responses (Eq. 2)."""
    num_draws: Count | None = None
    """L, shared draws per group. ``null`` in preset ``paper``: L = n."""
    num_leave_one_out_draws: Annotated[int, Field(ge=0)] | None = None
    """L', draws per response if ``scheme`` is ``leave_one_out``."""
    num_generations: Count | None = None
    """M, regenerated responses O_{i,l,m} per context. ``null`` in preset ``paper``: M = n."""
    projection: Projection | None = None
    """Whether the mean over the shared draws includes l = 0 (the paper) or runs over l >= 1."""
    max_tokens: Count | None = None
    """Longest collider draw in tokens; ``null``: ``rollout.response_length``. A cut draw is excluded."""


class RegeneratedSettings(Settings):
    """The regenerated responses O_{i,l,m}."""

    max_tokens: Count | None = None
    """Longest regenerated response in tokens; ``null``: ``rollout.response_length``. A cut one is excluded."""


class BlocksSettings(Settings):
    """The form of a response as a candidate block in a prompt."""

    max_tokens: Count | None = None
    """Largest number of response tokens in a block; ``null``: ``rollout.response_length``, so that nothing is cut."""
    truncation: Literal["keep_end", "keep_start", "answer"] = "keep_end"
    """The part of a longer response that stays; the end contains the answer. ``answer``: of every response, even a
    short one, the text from its last ``\\boxed{`` on (its end if it has none)."""
    drop_think: Switch = True
    """Drop ``<think>...</think>`` first if a response does not fit."""
    intro: str = "\n\nOther answers to this question:"
    """Text between the question and the blocks."""
    candidate: str = "\n[Answer {label}]\n"
    """Label of a candidate block; ``{label}`` is the number of the response in its group."""
    collider: str = "\n[Joint answer]\n"
    """Label of the block of a collider draw."""
    outro: str = "\n\nWrite your own answer."
    """Text after the blocks."""

    @field_validator("candidate")
    @classmethod
    def _has_a_label(cls, text: str) -> str:
        if "{label}" not in text:
            raise ValueError("the label of a block must contain {label}, or all responses look the same")
        return text


class FeaturesSettings(Settings):
    """The hidden states z and Z of Steps 1 to 4."""

    renamed = {"context": "input"}

    source: Source | None = None
    """Definition of Z: the state at the end of a regenerated response (the paper), or of the prompt x_{i,l},
    which needs no regenerated response."""
    input: Literal["response", "prompt_response"] = "response"
    """The input that gives a response's state: only the response, or its prompt and the response."""
    token: Literal["last", "last_content"] = "last"
    """The final token (the end token if there is one), or the last token before it."""
    layer: int = -1
    """-1: after the final norm. Otherwise an index into the model's hidden states (0: embeddings, k: after layer k)."""
    center: Literal["none", "batch"] = "none"
    """``batch``: the mean state of the batch is subtracted first; Upsilon is then clamped at 0."""


class WeightingSettings(Settings):
    """Upsilon, the causal weight (Eq. 11)."""

    renamed = {"control": "ablation"}

    target: Target | None = None
    """The target of a response: the projection of Step 4 (the paper), the mean of the group (no extra
    generation), the conditioned mean, or nothing (Upsilon = 1). ``gcpo.weighting=off`` is short for ``off``."""
    similarity: Literal["cosine", "euclidean", "gaussian"] = "cosine"
    """Similarity of a response to its target."""
    missing: Literal["mean", "one"] = "mean"
    """Upsilon of a response without a target. ``mean``: the mean Upsilon of the batch's responses with a target, 1 if
    none has. ``one``: 1, which with alpha = 2 and cosines near 0.9 halves the step of the responses whose draws were
    cut."""
    ablation: Literal["none", "mean", "shuffled"] = "none"
    """For experiments on whether Upsilon only changes the step size; applied after ``missing``. ``mean``:
    every response gets the mean of the batch; ``shuffled``: the weights are permuted among the responses of a group
    that have a target."""


class AdvantageConfig(Settings):
    """The use of Upsilon in the advantage."""

    form: Literal["product", "signed"] = "product"
    """``product``: B = A * Upsilon (the paper). ``signed``: A * (1 + sign(A) * (Upsilon - mean Upsilon))."""


class ReferenceSettings(Settings):
    """The causal reference pi'_ref and its KL term (Eq. 12, 13)."""

    renamed = {"policy_context": "policy_condition", "fraction": "subsample"}

    reduction: Literal["mean", "sum"] = "mean"
    """Reduction over the contexts l: Phi is an expectation, so a mean; the paper prints a sum."""
    collider_context: Literal["replace", "append"] = "replace"
    """Whether y_{n,l} replaces y_n in x_{i,l}, or follows it."""
    policy_condition: Literal["collider", "query"] = "collider"
    """The condition of pi_theta in the denominator of rho: x_i (Eq. 12), or only the question."""
    floor: Annotated[float, Field(gt=0, lt=1)] = 1e-6
    """Smallest value of pi'_ref."""
    relative_floor: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Smallest value of pi'_ref as a fraction of pi_old(y|q)."""
    max_kl: Positive = 10.0
    """Upper bound of a token's KL', beyond which it has no gradient."""
    subsample: PositiveFraction | None = None
    """Fraction of a group's responses that have a kappa term, drawn for every group (at least one response). Their
    terms are weighted by the inverse fraction, which keeps the gradient's expectation. ``null``: the preset's."""


class ScoringConfig(Settings):
    """Forward passes over the contexts in the actor's engine."""

    max_token_len_per_gpu: Count | None = None
    """Tokens in a micro-batch, without and with gradient; ``null``: verl's ``ppo_max_token_len_per_gpu``."""
    packing: Literal["tree", "dense"] = "tree"
    """``tree``: a shared prefix goes through the model once; ``dense``: every context goes through it separately.
    A model or setting that ``tree`` does not support is scored dense, which is logged once. ``dense`` has as many
    sequences in a micro-batch as verl's ``ppo_micro_batch_size_per_gpu`` if ``use_dynamic_bsz`` is off."""
    min_shared_tokens: Count = 8
    """Shorter stretches are repeated instead of shared: every stretch needs separate attention calls."""


class MetricsConfig(Settings):
    """Measurements besides training."""

    graded_fraction: Fraction = 0.1
    """Fraction of the groups whose auxiliary generations are graded, only for the metrics ``gcpo/reward/*`` (0 for
    code)."""
    grad_norm_every: Annotated[int, Field(ge=0)] = 10
    """The gradient norms of the policy, beta and kappa parts are measured every this many steps; 0: never."""
    dump_fraction: Fraction = 0.05
    """Fraction of the groups whose auxiliary generations go to the rollout dump (``trainer.rollout_data_dir``). With
    preset ``paper`` and n = 8 a group has up to 528 of them."""
    max_missing: Fraction = 0.25
    """A step warns if a larger fraction of its requested draws, targets or references is missing
    (``gcpo/missing/*_frac``). A step in which none is valid stops the run, whatever this value."""


class GCPOSettings(Settings):
    """The group ``gcpo`` as written by the user."""

    renamed = {"conditioned": "regenerated"}

    preset: Literal["paper", "balanced", "light"] = "balanced"
    """Values of the fields left ``null``, from the study in docs/estimators.md. ``paper``: L = M = n shared
    draws. ``balanced``: L = L' = 1, states of the prompts, no regenerated response. ``light``: the mean of the group
    as the target of Upsilon; L = L' = 1, only for the kappa term."""
    alpha: NotNegative = 2.0
    """Scale of Upsilon."""
    kappa: NotNegative = 0.06
    """Weight of the KL term to the causal reference; 0 turns it off."""
    seed: Seed | None = 0
    """Seed of the sampling requests, validation included, and of the method's random choices: the block orders, the
    responses with a kappa term, the groups that are graded or dumped, ``weighting.ablation: shuffled``. ``null``: no
    request has a seed. The choices then follow from the step and the question only. Turn the seed off if a server
    samples many requests together on a GPU: for requests with seeds vLLM calls a generator for each of them in Python,
    at every token."""
    actor_threads: Count | None = None
    """Threads of PyTorch in every process of the actor, at most the cores of the machine divided by the number of
    these processes. ``null``: as many as ``OMP_NUM_THREADS`` says. With another number the gradients are rounded in
    another way, so a run is no longer verl's GRPO bit for bit where that runs with one thread."""
    padding_free: bool = False
    """Pack the rows of a micro-batch into one, without padding, and read prompts that are equal once. Losses and
    gradients are those of padded rows up to rounding, so a run is no longer verl's GRPO bit for bit. Models that packed
    trees do not support keep their rows (docs/support.md)."""
    collider: ColliderSettings = ColliderSettings()
    regenerated: RegeneratedSettings = RegeneratedSettings()
    blocks: BlocksSettings = BlocksSettings()
    features: FeaturesSettings = FeaturesSettings()
    weighting: WeightingSettings = WeightingSettings()
    advantage: AdvantageConfig = AdvantageConfig()
    reference: ReferenceSettings = ReferenceSettings()
    scoring: ScoringConfig = ScoringConfig()
    metrics: MetricsConfig = MetricsConfig()
    stability: StabilityConfig = StabilityConfig()

    @field_validator("weighting", mode="before")
    @classmethod
    def _weighting_off(cls, weighting: Any) -> Any:
        # `off` is a string on the command line and False in yaml.
        if weighting in ("off", False):
            return {"target": "off"}
        if isinstance(weighting, Mapping) and weighting.get("target") is False:
            return {**weighting, "target": "off"}
        return weighting


# ---- resolved --------------------------------------------------------------------------------------------------------


class ColliderConfig(ColliderSettings):
    """`ColliderSettings` with every value."""

    scheme: Scheme = Field(...)
    num_draws: Count = Field(...)
    num_leave_one_out_draws: int = Field(...)
    num_generations: Count = Field(...)
    projection: Projection = Field(...)
    max_tokens: Count = Field(...)


class RegeneratedConfig(RegeneratedSettings):
    """`RegeneratedSettings` with every value."""

    max_tokens: Count = Field(...)


class BlocksConfig(BlocksSettings):
    """`BlocksSettings` with every value."""

    max_tokens: Count = Field(...)


class FeaturesConfig(FeaturesSettings):
    """`FeaturesSettings` with every value."""

    source: Source = Field(...)


class WeightingConfig(WeightingSettings):
    """`WeightingSettings` with every value."""

    target: Target = Field(...)


class ReferenceConfig(ReferenceSettings):
    """`ReferenceSettings` with every value."""

    subsample: PositiveFraction = Field(...)


class GCPOConfig(GCPOSettings):
    """The group ``gcpo`` with every value that the code needs."""

    collider: ColliderConfig = Field(...)
    regenerated: RegeneratedConfig = Field(...)
    blocks: BlocksConfig = Field(...)
    features: FeaturesConfig = Field(...)
    weighting: WeightingConfig = Field(...)
    reference: ReferenceConfig = Field(...)

    # ---- derived from the settings -------------------------------------------------------------------------------

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
    def from_config(
        cls, config: Mapping[str, Any] | GCPOSettings | None, *, n: int, response_length: int
    ) -> GCPOConfig:
        """Build the resolved and checked configuration.

        Args:
            config: the ``gcpo`` group as a mapping; missing groups and fields take their defaults.
            n: responses per question (``rollout.n``).
            response_length: longest response (``rollout.response_length``), the default of the extra lengths.

        Raises:
            ConfigError: an unknown key, a value of the wrong type or outside its range.
        """
        written = GCPOSettings.parse(config, "gcpo")
        resolved = cls.parse(fill(written, n=n, response_length=response_length), "gcpo")
        check(resolved, n=n)
        return resolved
