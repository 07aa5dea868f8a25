"""The arguments and results of a method's hooks in each stage of a step.

A step samples responses, scores them in the actor's engine, gives credit on the driver, computes advantages and
updates the actor. `gcpo.methods.base` exports everything.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from gcpo.methods.fields import Field
from gcpo.scoring.requests import Scorer

GROUPS_AT_ONCE = 16
"""Groups whose fields the driver holds at a time. For 256 groups of 8 with 8 contexts and 16,384 tokens the conditioned
log-probabilities of a whole batch are 1.1 GB."""


@dataclass(frozen=True)
class Run:
    """The settings of verl that methods read.

    Attributes:
        n: number of responses per question.
        response_length: longest response in tokens.
        prompt_length: longest prompt in tokens.
        temperature: temperature of the rollout.
        norm_by_std: whether GRPO's advantage is divided by the standard deviation of the group.
        max_tokens: largest number of tokens of a micro-batch of the actor.
        use_kl_loss: whether the loss has verl's KL term to the reference policy.
        dumps: whether rollouts are dumped.
        chat_template_kwargs: options of ``apply_chat_template``.
        seed: seed of the sampling requests; ``None``: no seeds.
        actor_threads: threads of PyTorch in every process of the actor; ``None``: those of the environment.
        padding_free: whether the rows of a micro-batch are packed into one.
    """

    n: int
    response_length: int
    prompt_length: int = 0
    temperature: float = 1.0
    norm_by_std: bool = True
    max_tokens: int = 16384
    use_kl_loss: bool = False
    dumps: bool = False
    chat_template_kwargs: Mapping[str, Any] | None = None
    seed: int | None = 0
    actor_threads: int | None = None
    padding_free: bool = False

    @classmethod
    def of(cls, config: Any) -> Run:
        """Create the settings from verl's whole configuration."""
        actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
        common = config.get("gcpo") or {}
        return cls(
            n=rollout.n,
            response_length=rollout.response_length,
            prompt_length=config.data.max_prompt_length,
            temperature=rollout.temperature,
            norm_by_std=config.algorithm.get("norm_adv_by_std_in_grpo", True),
            max_tokens=actor.ppo_max_token_len_per_gpu,
            use_kl_loss=actor.use_kl_loss,
            dumps=bool(config.trainer.get("rollout_data_dir")),
            chat_template_kwargs=dict(config.data.get("apply_chat_template_kwargs") or {}),
            seed=common.get("seed", 0),
            actor_threads=common.get("actor_threads"),
            padding_free=common.get("padding_free", False),
        )


# ---- sample ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """The settings with which a rollout worker samples.

    Attributes:
        tokenizer: tokenizer of the model.
        params: sampling parameters of the plain responses (temperature, top-p, top-k).
        max_model_len: longest sequence that the server supports.
        end_ids: tokens that end a response.
    """

    tokenizer: Any
    params: dict[str, Any]
    max_model_len: int | None
    end_ids: frozenset[int]


@dataclass(frozen=True)
class SampledGroup:
    """The complete responses to one question.

    Attributes:
        messages: the question as chat messages.
        responses: token ids of every response.
        rewards: reward of every response; ``None`` if it is graded later.
        key: reproducible name of the question and the step, for seeds.
        ability: value of this column of the data set.
        grade: function that returns the reward of other token ids as an answer to this question.
    """

    messages: Sequence[dict[str, Any]]
    responses: Sequence[Sequence[int]]
    rewards: Sequence[float | None]
    key: tuple[Any, ...]
    ability: str | None
    grade: Callable[[Sequence[int]], Awaitable[float | None]]

    @property
    def equal_rewards(self) -> bool:
        """Whether all advantages are zero."""
        return None not in self.rewards and len(set(self.rewards)) == 1


Generate = Callable[[list[int], dict[str, Any]], Awaitable[Any]]
"""``await generate(prompt_ids, sampling_params)`` returns verl's ``TokenOutput``; all requests of a group go to one
server. It raises ``ServerLostError`` if the server is lost."""
RowFields = dict[Field, Any]
"""The values of one row by field."""


# ---- score -----------------------------------------------------------------------------------------------------------


class Engine(ABC):
    """The interface of the actor's engine for methods, with the weights that sampled; all ranks call it together.

    Attributes:
        tokenizer: tokenizer of the model.
        layers: number of layers of the model.
        hidden_size: d.
        step: number of the step.
    """

    tokenizer: Any
    layers: int
    hidden_size: int
    step: int

    @abstractmethod
    def scorer(self, layer: int, *, packing: str = "tree", max_tokens: int, min_shared: int = 8) -> Scorer:
        """Return a scorer of log-probabilities and hidden states of ``layer``.

        Args:
            layer: -1: after the final norm; otherwise an index into the model's hidden states.
            packing: ``tree``: shared prefixes go through the model once; ``dense``: one row per request.
            max_tokens: largest number of tokens of a packed row.
            min_shared: shorter stretches are repeated instead of shared.
        """

    @abstractmethod
    def perturbed_scorer(self, layer: int, **options: Any) -> Any:
        """Return a scorer of answer distributions under perturbed states of ``layer``."""

    @abstractmethod
    def gather(self, values: list[Any]) -> list[Any]:
        """Return the concatenated lists of all ranks."""

    @abstractmethod
    def keep_last_layer(self) -> None:
        """Keep the weights of the last decoder layer for `moved`; for `Method.start_actor`."""

    @abstractmethod
    def moved(self, sign: int) -> AbstractContextManager[float]:
        """Move the last decoder layer by ``sign * step * D`` inside the ``with`` block, whose value is ``step``.

        D is the change of its weights since `keep_last_layer`. The weights are then restored, bit for bit.
        """

    @abstractmethod
    def tree_problem(self) -> str | None:
        """Return why the model cannot be run on packed prefix trees, or ``None`` if it can."""


# ---- credit ----------------------------------------------------------------------------------------------------------


class Batch(ABC):
    """The rows of a step on the driver.

    Attributes:
        step: number of the step.
        groups: rows of every group by its id, in the order of their sessions; without padding rows.
        size: number of rows, including padding.
        response_lengths: tokens of every row's response.
    """

    step: int
    groups: dict[str, list[int]]
    size: int
    response_lengths: list[int]

    @abstractmethod
    def fetch(self, rows: Sequence[int], fields: Sequence[Field]) -> dict[Field, list[Any]]:
        """Return fields of the given rows, as lists with one entry per row; raise a `FieldError` if one is missing."""

    @abstractmethod
    def put(self, rows: Sequence[int], fields: Mapping[Field, Sequence[Any]]) -> None:
        """Store fields of the given rows, for the update or a later station."""

    def by_group(self, *fields: Field) -> Iterator[dict[Field, list[Any]]]:
        """Yield the fields of one group after another; those of `GROUPS_AT_ONCE` groups are held together."""
        for groups in self._pieces():
            data = self.fetch([row for rows in groups for row in rows], fields)
            start = 0
            for rows in groups:
                yield {name: values[start : start + len(rows)] for name, values in data.items()}
                start += len(rows)

    def row_pieces(self) -> Iterator[list[int]]:
        """Yield all rows in pieces of a few whole groups; padding rows come last."""
        for groups in self._pieces():
            yield [row for rows in groups for row in rows]
        known = {row for rows in self.groups.values() for row in rows}
        padding = [row for row in range(self.size) if row not in known]
        if padding:
            yield padding

    def _pieces(self) -> Iterator[list[list[int]]]:
        groups = list(self.groups.values())
        for start in range(0, len(groups), GROUPS_AT_ONCE):
            yield groups[start : start + GROUPS_AT_ONCE]


@dataclass(frozen=True)
class Outcome:
    """The values from which advantages are computed.

    Attributes:
        grpo: verl's GRPO advantages [B, T].
        rewards: token-level rewards [B, T]; their sum over a row is the outcome reward.
        mask: response mask [B, T].
        groups: the group of every row [B].
    """

    grpo: Tensor
    rewards: Tensor
    mask: Tensor
    groups: Any


class Credit(ABC):
    """A method's assessment of a batch, from which verl's advantage stage gets the advantages."""

    @abstractmethod
    def advantages(self, outcome: Outcome) -> Tensor:
        """Return the token advantages [B, T]."""

    def metrics(self) -> dict[str, float]:
        """Return the metrics that are known after `advantages`."""
        return {}


# ---- update ----------------------------------------------------------------------------------------------------------


class Term(ABC):
    """A method's additional term of the loss, which is added to verl's before each optimizer step.

    Attributes:
        name: name of the part in the metrics of gradient norms.
        weight: factor of the term.
        loss_metric: name of the metric that holds the term before its factor.
        tokens_metric: name of the metric that counts the tokens of the second pass.
        inputs: fields that `context` reads.
        columns: fields that `loss` reads; a field of shape ``[T]`` has a value per response token, others one
            value per response.
        on_plain_rows: whether the term uses verl's rows, without a second pass.
        packing: packing of the second pass, ``tree`` or ``dense``.
        max_tokens: largest number of tokens of a packed row of the second pass.
        min_shared: shorter stretches are repeated instead of shared.
    """

    name: ClassVar[str]
    loss_metric: ClassVar[str]
    tokens_metric: ClassVar[str]
    columns: ClassVar[tuple[Field, ...]]
    inputs: tuple[Field, ...] = ()
    weight: float = 1.0
    on_plain_rows: bool = False
    packing: str = "tree"
    max_tokens: int = 16384
    min_shared: int = 8

    @abstractmethod
    def context(self, row: Mapping[Field, Any]) -> Tensor | None:
        """Return the token ids before the response in the second pass; ``None``: the row has no term."""

    @abstractmethod
    def loss(self, log_prob: Tensor, columns: Mapping[Field, Tensor]) -> tuple[Tensor, Tensor]:
        """Compute the term of every token and its mask, both [R, T].

        Args:
            log_prob: log-probabilities [R, T] of the current policy, with gradient.
            columns: values of the fields, [R, T] or [R, 1].
        """


def parts_of(term: Term | None, use_kl_loss: bool) -> Sequence[str]:
    """Return the parts of the loss whose gradient norms can be measured."""
    return ["policy", *["beta"] * use_kl_loss, *([term.name] if term is not None else [])]


# ---- report ----------------------------------------------------------------------------------------------------------


@dataclass
class Dump:
    """A method's part of the rollout dump.

    Attributes:
        columns: additional keys of the rows, each with one JSON value per row of the batch.
        draws: the auxiliary generations. Each has its group ``uid``, a ``row`` of the group, ``reward``, ``token_ids``
            and more keys, the same for all.
    """

    columns: dict[str, list[Any]] = field(default_factory=dict)
    draws: list[dict[str, Any]] = field(default_factory=list)


def brief(values: Tensor) -> list[float | None]:
    """Return a vector for the dump: four significant digits; ``None`` for a value that is not finite."""
    return [float(f"{value:.4g}") if math.isfinite(value) else None for value in values.tolist()]
