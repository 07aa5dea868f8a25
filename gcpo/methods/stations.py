"""What a method is given, and what it gives back, at each station of a step.

A step samples responses, scores them in the actor's engine, gives credit on the driver, computes advantages and
updates the actor. `gcpo.methods.base` exports all of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
        n: responses per question.
        response_length: longest response in tokens.
        temperature: of the rollout.
        norm_by_std: whether GRPO's advantage is divided by the standard deviation of the group.
        max_tokens: tokens of a micro-batch of the actor.
        use_kl_loss: whether the loss has verl's KL term to the reference policy.
        dumps: whether rollouts are dumped.
        chat_template_kwargs: for ``apply_chat_template``.
        seed: of the sampling requests; ``None``: they have none.
    """

    n: int
    response_length: int
    temperature: float = 1.0
    norm_by_std: bool = True
    max_tokens: int = 16384
    use_kl_loss: bool = False
    dumps: bool = False
    chat_template_kwargs: Mapping[str, Any] | None = None
    seed: int | None = 0

    @classmethod
    def of(cls, config: Any) -> Run:
        """From verl's whole configuration."""
        actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
        return cls(
            n=rollout.n,
            response_length=rollout.response_length,
            temperature=rollout.temperature,
            norm_by_std=config.algorithm.get("norm_adv_by_std_in_grpo", True),
            max_tokens=actor.ppo_max_token_len_per_gpu,
            use_kl_loss=actor.use_kl_loss,
            dumps=bool(config.trainer.get("rollout_data_dir")),
            chat_template_kwargs=dict(config.data.get("apply_chat_template_kwargs") or {}),
            seed=(config.get("gcpo") or {}).get("seed", 0),
        )


# ---- sample ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """What a rollout worker samples with.

    Attributes:
        tokenizer: of the model.
        params: sampling parameters of the plain responses (temperature, top-p, top-k).
        max_model_len: longest sequence that the server takes.
        end_ids: tokens that end a response.
    """

    tokenizer: Any
    params: dict[str, Any]
    max_model_len: int | None
    end_ids: frozenset[int]


@dataclass(frozen=True)
class SampledGroup:
    """The responses to one question, as soon as all are there.

    Attributes:
        messages: the question as chat messages.
        responses: token ids of every response.
        rewards: ``None`` where a response is graded later.
        key: names the question and the step, the same in every run: for seeds.
        ability: column of the data set.
        grade: the reward of other token ids as an answer to this question.
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
"""``await generate(prompt_ids, sampling_params)`` gives verl's ``TokenOutput``; all requests of a group go to one
server. It raises ``ServerLostError`` where the server is gone."""
RowFields = dict[Field, Any]
"""Values of one row."""


# ---- score -----------------------------------------------------------------------------------------------------------


class Engine(ABC):
    """The actor's engine as a method sees it, under the weights that sampled; all ranks call it together.

    Attributes:
        tokenizer: of the model.
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
        """Log-probabilities and hidden states of ``layer``.

        Args:
            layer: -1: after the final norm; otherwise an index into the model's hidden states.
            packing: ``tree``: what requests share goes through the model once; ``dense``: each is a row of its own.
            max_tokens: tokens of a packed row.
            min_shared: shorter stretches are repeated instead of shared.
        """

    @abstractmethod
    def perturbed_scorer(self, layer: int, **options: Any) -> Any:
        """Answer distributions under perturbed states of ``layer``."""

    @abstractmethod
    def gather(self, values: list[Any]) -> list[Any]:
        """The lists of all ranks as one."""

    @abstractmethod
    def tree_problem(self) -> str | None:
        """Why the model cannot be run on packed prefix trees, ``None`` if it can."""


# ---- credit ----------------------------------------------------------------------------------------------------------


class Batch(ABC):
    """The rows of a step on the driver.

    Attributes:
        step: number of the step.
        groups: rows of every group by its id, in the order of their sessions; padding rows are in none.
        size: number of rows, padding included.
        response_lengths: tokens of every row's response.
    """

    step: int
    groups: dict[str, list[int]]
    size: int
    response_lengths: list[int]

    @abstractmethod
    def fetch(self, rows: Sequence[int], fields: Sequence[Field]) -> dict[Field, list[Any]]:
        """Some fields of some rows, a list with an entry for each row; a `FieldError` where a row lacks one."""

    @abstractmethod
    def put(self, rows: Sequence[int], fields: Mapping[Field, Sequence[Any]]) -> None:
        """Store fields of some rows, for the update or a later station."""

    def by_group(self, *fields: Field) -> Iterator[dict[Field, list[Any]]]:
        """Fields of one group after another; those of `GROUPS_AT_ONCE` groups are held together."""
        for groups in self._pieces():
            data = self.fetch([row for rows in groups for row in rows], fields)
            start = 0
            for rows in groups:
                yield {name: values[start : start + len(rows)] for name, values in data.items()}
                start += len(rows)

    def row_pieces(self) -> Iterator[list[int]]:
        """All rows, those of a few whole groups at a time; padding rows come last."""
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
    """What verl computes advantages from.

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
    """What a method found out about a batch; verl's advantage stage asks it for advantages."""

    @abstractmethod
    def advantages(self, outcome: Outcome) -> Tensor:
        """Token advantages [B, T]."""

    def metrics(self) -> dict[str, float]:
        """Metrics that are known after `advantages`."""
        return {}


# ---- update ----------------------------------------------------------------------------------------------------------


class Term(ABC):
    """A method's own term of the loss, which is added to verl's before each optimizer step.

    Attributes:
        name: of the part, for its gradient norm.
        weight: factor of the term.
        loss_metric: name of the metric that holds the term before its factor.
        tokens_metric: name of the metric that counts the tokens of the second pass.
        inputs: fields that `context` reads.
        columns: fields that `loss` reads; one of shape ``[T]`` has a value for every token of the response, others one
            value for the response.
        on_plain_rows: whether the term is over verl's own rows; then there is no second pass.
        packing: ``tree`` or ``dense``, of the second pass.
        max_tokens: tokens of a packed row of the second pass.
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
        """Token ids that the response stands behind in the second pass; ``None``: the row has no term."""

    @abstractmethod
    def loss(self, log_prob: Tensor, columns: Mapping[Field, Tensor]) -> tuple[Tensor, Tensor]:
        """The term of every token and its mask, both [R, T].

        Args:
            log_prob: [R, T] of the current policy, with gradient.
            columns: [R, T] or [R, 1].
        """


def parts_of(term: Term | None, use_kl_loss: bool) -> Sequence[str]:
    """The parts of the loss whose gradient norms can be measured."""
    return ["policy", *["beta"] * use_kl_loss, *([term.name] if term is not None else [])]
