"""The interface of a method: its hooks in the five stages of a step.

A step samples responses, scores them in the actor's engine, gives credit on the driver, computes advantages and
updates the actor. `Method` has hooks for each of them, which do nothing by default, so a method defines only
those that it needs. A method imports neither verl nor another method: `gcpo.adapters` calls the hooks.

Every process of a run creates the same method object from its resolved settings and the `Run`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from gcpo.methods.fields import Field
from gcpo.methods.stations import (
    GROUPS_AT_ONCE,
    Batch,
    Credit,
    Dump,
    Engine,
    Generate,
    Outcome,
    RowFields,
    Run,
    SampledGroup,
    Sampling,
    Term,
)

__all__ = [
    "GROUPS_AT_ONCE",
    "Batch",
    "Credit",
    "Dump",
    "Engine",
    "Generate",
    "Method",
    "Outcome",
    "RowFields",
    "Run",
    "SampledGroup",
    "Sampling",
    "Term",
]


class Method:
    """A training method. A subclass sets `name` and `settings_class`, and overrides the hooks that it needs."""

    name: ClassVar[str]
    """The value of ``trainer.v1.trainer_mode`` and ``algorithm.adv_estimator``, and the prefix of its metrics."""
    settings_class: ClassVar[Any] = None
    """The class of its resolved settings, which `parse` makes."""
    fields: ClassVar[Sequence[Field]] = ()
    """The batch fields that the method writes."""

    def __init__(self, settings: Any, run: Run) -> None:
        self.settings, self.run = settings, run

    @classmethod
    def parse(cls, settings: Any, run: Run) -> Any:
        """Resolve the settings in the group of the configuration that has the method's name.

        They are a dictionary, or an object with ``to_dict()`` whose result can be parsed again.

        Raises:
            ConfigError: a value does not work.
        """
        return cls.settings_class.from_config(settings, n=run.n, response_length=run.response_length)

    @classmethod
    def check(cls, config: Any, settings: Any, model: Any) -> None:
        """Refuse settings of verl that do not work with the method, before Ray starts; `gcpo.reading.get` reads them.

        Args:
            config: verl's whole configuration, which the checks of all methods have passed.
            settings: the resolved settings of the method.
            model: transformers' configuration of the model, or ``None`` if it is unknown.

        Raises:
            ConfigError: a setting does not work; the sentence names the remedy.
        """

    # sample

    @property
    def samples(self) -> bool:
        """Whether `on_group` is to be called."""
        return False

    def start_rollout(self, sampling: Sampling) -> None:
        """Prepare the sampling; called once in every rollout worker, before the first group."""

    async def on_group(self, group: SampledGroup, generate: Generate) -> list[RowFields]:
        """Return the fields of every response; called when a group of at least two responses is complete."""
        raise TypeError(f"{type(self).__name__} has samples=True and no on_group")

    def on_group_failed(self, group: SampledGroup, error: Exception) -> list[RowFields]:
        """Return the fields of a group for which `on_group` raised an error.

        By default the error is logged, the rows have no fields, and the step that reads them stops the run.
        """
        raise error

    def empty_fields(self, count: int) -> list[RowFields]:
        """Return the fields of rows that `on_group` does not get: groups of one response, and padding rows."""
        return [{} for _ in range(count)]

    # score

    @property
    def score_inputs(self) -> tuple[Field, ...]:
        """The fields that `score` reads; empty: it is not called."""
        return ()

    def start_actor(self, engine: Engine) -> None:
        """Prepare the scoring; called once in every actor worker, when the model is loaded."""

    def before_score(self, batch: Batch, tokenizer: Any, metrics: dict[str, float]) -> None:
        """Prepare a batch on the driver before `score`, for example write fields that need a whole group."""

    def score(self, rows: Mapping[Field, Sequence[Tensor]], engine: Engine) -> Mapping[Field, Sequence[Tensor]]:
        """Return new fields with one value per row; called in the actor's workers with the rows of a rank."""
        raise TypeError(f"{type(self).__name__} has score_inputs and no score")

    # credit

    def credit(self, batch: Batch, metrics: dict[str, float]) -> Credit | None:
        """Return the credit of the batch, or ``None`` for GRPO's advantages; called on the driver after `score`."""
        return None

    # update

    def term(self) -> Term | None:
        """Return the method's additional term of the loss, or ``None``."""
        return None

    def measures_gradients(self, step: int) -> bool:
        """Return whether this step measures the gradient norm of each part of the loss, in separate passes."""
        return False

    @property
    def mini_batch_inputs(self) -> tuple[Field, ...]:
        """The fields that `before_mini_batch` reads; empty: it is not called."""
        return ()

    def before_mini_batch(
        self,
        rows: Mapping[Field, Sequence[Tensor]],
        log_probs: Sequence[Tensor] | None,
        engine: Engine,
        metrics: dict[str, float],
    ) -> Mapping[Field, Sequence[Tensor]]:
        """Return new values of fields that the loss reads; called in the actor's workers before every mini-batch.

        Args:
            rows: `mini_batch_inputs` of the rows of this rank.
            log_probs: log-probabilities [T] of every response under the current weights; ``None`` before the first
                mini-batch of a batch, where they are the old ones.
            engine: its ``gather`` reaches the rows of the other ranks.
            metrics: equal on all ranks; a step reports the means over its mini-batches.
        """
        raise TypeError(f"{type(self).__name__} has mini_batch_inputs and no before_mini_batch")

    # layout

    @property
    def whole_groups(self) -> bool:
        """Whether the rows of a group should be in one mini-batch on one rank, if the batch allows it."""
        return False

    @property
    def whole_mini_batches(self) -> bool:
        """Whether every mini-batch must hold whole groups, on any ranks; a batch that does not allow it is an error."""
        return False

    # report

    def dump(self, batch: Batch, credit: Any, tokenizer: Any) -> Dump:
        """Return the method's keys of the rollout dump and its auxiliary generations; called only if there is a dump.

        Args:
            batch: the rows after the update, with all fields.
            credit: the result of `credit`.
            tokenizer: tokenizer of the model.
        """
        return Dump()
