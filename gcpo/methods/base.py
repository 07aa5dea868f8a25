"""The interface of a method: what it can say at each of the five stations of a step.

A step samples responses, scores them in the actor's engine, gives credit on the driver, computes advantages and
updates the actor. `Method` has a hook for each of them, and every hook does nothing by default, so a method writes only
those that it needs. A method imports neither verl nor another method: `gcpo.adapters` calls the hooks.

The same method object is made in every process of a run from its resolved settings and the `Run`.
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
    """The value of ``trainer.v1.trainer_mode`` and ``algorithm.adv_estimator``, and what its metrics begin with."""
    settings_class: ClassVar[Any] = None
    """The class of its resolved settings, which `parse` makes."""
    fields: ClassVar[Sequence[Field]] = ()
    """The batch fields that it writes."""

    def __init__(self, settings: Any, run: Run) -> None:
        self.settings, self.run = settings, run

    @classmethod
    def parse(cls, settings: Any, run: Run) -> Any:
        """The resolved settings, from the group of the configuration that has the method's name.

        They are a dictionary, or an object with ``to_dict()`` whose result can be parsed again.

        Raises:
            ConfigError: a value that cannot work.
        """
        return cls.settings_class.from_config(settings, n=run.n, response_length=run.response_length)

    @classmethod
    def check(cls, config: Any, settings: Any, model: Any) -> None:
        """Refuse settings of verl that the method cannot work with, before Ray starts; `gcpo.reading.get` reads them.

        Args:
            config: verl's whole configuration, which the checks of all methods have passed.
            settings: the resolved settings of the method.
            model: transformers' configuration of the model, or ``None`` where it is not known.

        Raises:
            ConfigError: one of them cannot work; the sentence says what to set.
        """

    # sample

    @property
    def samples(self) -> bool:
        """Whether `on_group` is to be called."""
        return False

    def start_rollout(self, sampling: Sampling) -> None:
        """Called once in every rollout worker, before the first group."""

    async def on_group(self, group: SampledGroup, generate: Generate) -> list[RowFields]:
        """Called when a group of at least two responses is complete; the fields of every response."""
        raise TypeError(f"{type(self).__name__} has samples=True and no on_group")

    def on_group_failed(self, group: SampledGroup, error: Exception) -> list[RowFields]:
        """The fields of a group for which `on_group` raised.

        By default the error is said, the rows have none, and the step that reads them stops the run.
        """
        raise error

    def empty_fields(self, count: int) -> list[RowFields]:
        """The fields of rows that `on_group` does not see: a group of one response, and rows that pad a batch."""
        return [{} for _ in range(count)]

    # score

    @property
    def score_inputs(self) -> tuple[Field, ...]:
        """The fields that `score` reads; empty: it is not called."""
        return ()

    def start_actor(self, engine: Engine) -> None:
        """Called once in every actor worker, when the model is loaded."""

    def before_score(self, batch: Batch, tokenizer: Any, metrics: dict[str, float]) -> None:
        """Called on the driver before `score`, for example to write fields that need a whole group."""

    def score(self, rows: Mapping[Field, Sequence[Tensor]], engine: Engine) -> Mapping[Field, Sequence[Tensor]]:
        """Called in the actor's workers with the rows of a rank; new fields, a value for each row."""
        raise TypeError(f"{type(self).__name__} has score_inputs and no score")

    # credit

    def credit(self, batch: Batch, metrics: dict[str, float]) -> Credit | None:
        """Called on the driver after `score`; ``None``: GRPO's advantage stays as it is."""
        return None

    # update

    def term(self) -> Term | None:
        """A term of its own in the loss."""
        return None

    def measures_gradients(self, step: int) -> bool:
        """Whether the gradient norm of each part of the loss is measured in this step, in passes of their own."""
        return False

    # layout

    @property
    def whole_groups(self) -> bool:
        """Whether the rows of a group are to meet in one mini-batch on one rank."""
        return False

    # report

    def dump(self, batch: Batch) -> list[dict[str, Any]]:
        """Auxiliary generations for the rollout dump.

        Each has its group ``uid``, a ``row`` of the group, ``kind``, ``outcome``, ``reward`` and ``token_ids``.
        """
        return []
