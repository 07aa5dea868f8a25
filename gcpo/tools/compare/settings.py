"""The yaml file of a comparison."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from yaml import YAMLError, safe_load

import gcpo.config
from gcpo.settings import ConfigError, Count, Seed, Settings

CONFIG = Path(gcpo.config.__file__).parent
ONE_FILE_METHODS = ("grpo", "gvpo", "gcpo")
"""Methods of examples/gcpo_in_one_file.py."""
TRAINER_NAMES = {"one_file": "the one-file trainer (only torch)", "verl": "verl"}

NotEmpty = Annotated[list[Any], Field(min_length=1)]


class Arm(Settings):
    """What is compared: a method with its settings."""

    method: str
    """A file of ``gcpo/config/method``; for the one-file trainer one of `ONE_FILE_METHODS`."""
    overrides: dict[str, Any] = {}
    """Settings of this arm: hydra's overrides through verl, ``name=value`` for the one-file trainer."""


class Size(Settings):
    """How much is run."""

    seeds: Annotated[list[Seed], Field(min_length=1)]
    """Of the data order and of everything that is sampled. Differences are paired by seed."""
    steps: Count
    """Training steps of a run."""


class Comparison(Size):
    """A comparison as a user writes it."""

    title: str
    """Heading of the tables."""
    trainer: Literal["one_file", "verl"]
    """``verl``, or ``one_file``: examples/gcpo_in_one_file.py."""
    output: str
    """Folder of the runs, tables and figures. ``--quick`` adds ``-quick``."""
    tasks: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    """File of ``gcpo/config/experiment`` -> settings of its runs."""
    methods: dict[str, Any]
    """Name in the tables -> `Arm`."""
    baseline: str
    """The arm that the others are compared with."""
    varied: str = ""
    """The arm whose settings ``vary`` changes, one at a time."""
    vary: dict[str, NotEmpty] = {}
    """Setting -> its values; each is an arm ``setting=value``, or ``varied`` itself where that has the value."""
    overrides: dict[str, Any] = {}
    """Settings of every run; those of a task come before them, and those of an arm before both."""
    quick: Size
    """What ``--quick`` runs instead."""

    @classmethod
    def load(cls, path: Path, *, quick: bool = False) -> Comparison:
        """Read and check a file; with ``quick`` its ``seeds``, ``steps`` and ``output`` are those of the quick run.

        Raises:
            ConfigError: the file cannot be read, or a value in it cannot work.
        """
        try:
            raw = safe_load(path.read_text())
        except (OSError, UnicodeDecodeError, YAMLError) as error:
            raise ConfigError(f"{path} can't be read as yaml: {' '.join(str(error).split())}") from None
        try:
            found = cls.parse(raw, "comparison")
            found.check()
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
        if quick:
            found = found.model_copy(update={**dict(found.quick), "output": f"{found.output}-quick"})
        return found

    def arms(self) -> dict[str, Arm]:
        """The arms by name, those of ``vary`` last."""
        arms = {name: Arm.parse(raw, f"comparison.methods.{name}") for name, raw in self.methods.items()}
        for setting, value, name in self.varied_arms():
            base = arms[self.varied]
            arms.setdefault(name, base.model_copy(update={"overrides": {**base.overrides, setting: value}}))
        return arms

    def varied_arms(self) -> list[tuple[str, Any, str]]:
        """Setting, value and name of the arm of every value of ``vary``."""
        raw = self.methods.get(self.varied)
        given = raw.get("overrides") if isinstance(raw, dict) else None
        return [
            (setting, value, f"{setting}={text_of(value)}" if (given or {}).get(setting, ...) != value else self.varied)
            for setting, values in self.vary.items()
            for value in values
        ]

    def check(self) -> None:
        """Refuse names that nothing has.

        Raises:
            ConfigError: an unknown task, method or arm, a name that cannot be one of a folder, or one that comes twice.
        """
        for key, values in (("seeds", self.seeds), ("quick.seeds", self.quick.seeds)):
            if len(set(values)) < len(values):
                raise ConfigError(f"comparison.{key} is {values}; name each only once")
        for task in self.tasks:
            _choose("comparison.tasks", task, yaml_names("experiment"))
        _choose("comparison.baseline", self.baseline, list(self.methods))
        if self.vary:
            _choose("comparison.varied", self.varied, list(self.methods))
        known = ONE_FILE_METHODS if self.trainer == "one_file" else yaml_names("method")
        for name, arm in self.arms().items():
            _choose(f"comparison.methods.{name}.method", arm.method, known)
            if not re.fullmatch(r"[^\s/|.][^\n/|]*", name):
                raise ConfigError(f"comparison.methods has {name!r}; a name begins with a letter and has no / and no |")


def _choose(where: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{where} has {value!r}, which is unknown; choose one of {', '.join(choices)}")


def yaml_names(group: str) -> list[str]:
    """The choices of a group of hydra."""
    return sorted(path.stem for path in (CONFIG / group).glob("*.yaml"))


def text_of(value: Any) -> str:
    """A value as the tables and figures show it."""
    return value if isinstance(value, str) else json.dumps(value)
