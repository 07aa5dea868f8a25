"""Base class of all configuration classes, and their errors.

A configuration class is a frozen pydantic model whose fields are documented by the string under each. A value that
cannot work is refused with one sentence: the path of the field, the problem and the remedy. This module does not
import torch or verl, so that a wrong value is refused before anything starts.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self, cast, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails


class ConfigError(ValueError):
    """A setting that cannot work; the message names the setting, the reason and the remedy."""


class Settings(BaseModel):
    """A group of settings."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    renamed: ClassVar[Mapping[str, str]] = {}
    """Former names of fields, each with the new name. Former names are refused."""
    removed: ClassVar[Mapping[str, str]] = {}
    """Former fields, each with the reason for its removal."""

    @model_validator(mode="before")
    @classmethod
    def _empty_group(cls, raw: Any) -> Any:
        return {} if raw is None else raw

    @classmethod
    def parse(cls, raw: Any, where: str) -> Self:
        """Parse and check the mapping at path ``where``.

        Raises:
            ConfigError: an unknown key, or a value of the wrong type or outside its range.
        """
        try:
            return cls.model_validate(plain(raw))
        except ValidationError as error:
            raise ConfigError(_sentence(cls, error.errors()[0], where)) from None

    @classmethod
    def former(cls, where: str, key: str) -> str | None:
        """Return a sentence about a field of an earlier version, or ``None`` if it did not exist.

        Args:
            where: path of this group.
            key: path of the field inside the group, such as ``collider.draws``.
        """
        name, _, rest = key.partition(".")
        path, inner = f"{where}.{key}", group_class(cls, name)
        if name in cls.renamed:
            return f"{path} has a new name: write {'.'.join(filter(None, (where, cls.renamed[name], rest)))}"
        if name in cls.removed:
            return f"{path} has been removed: {cls.removed[name]}"
        return inner.former(f"{where}.{name}", rest) if inner and rest else None

    def to_dict(self) -> dict[str, Any]:
        """Return a plain nested dictionary, for yaml."""
        return self.model_dump()


def plain(raw: Any) -> Any:
    """Convert nested mappings to dictionaries, and models to the dictionaries of their creation."""
    if isinstance(raw, BaseModel):
        return raw.model_dump()
    return {str(key): plain(value) for key, value in raw.items()} if isinstance(raw, Mapping) else raw


def _switch(value: Any) -> Any:
    """Return ``on`` or ``off`` for a value that yaml reads as a boolean and the command line as a string."""
    return {"on": True, "off": False}.get(value, value) if isinstance(value, str) else value


Switch = Annotated[bool, BeforeValidator(_switch)]
Count = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]
Seed = Annotated[int, Field(ge=0)]


# ---- sentences -------------------------------------------------------------------------------------------------------

_CLAUSES = {
    "bool_type": "write true or false",
    "string_type": "it must be a text",
    "string_too_short": "write a text",
    "int_type": "it must be a whole number",
    "float_type": "it must be a number",
    "finite_number": "it must be a finite number",
    "greater_than": "it must be greater than {gt:g}",
    "greater_than_equal": "it must be at least {ge:g}",
    "less_than": "it must be less than {lt:g}",
    "less_than_equal": "it must be at most {le:g}",
}


def _sentence(cls: type[Settings], error: ErrorDetails, where: str) -> str:
    path, value, context = ".".join(map(str, (where, *error["loc"]))), error["input"], error.get("ctx", {})
    if error["type"] == "extra_forbidden":
        return _unknown(cls, [str(name) for name in error["loc"]], where)
    if error["type"] == "value_error":
        return f"{path} is {value!r}: {context['error']}"
    if error["type"] == "literal_error":
        return f"{path} is {value!r}; choose one of {context['expected'].replace(' or ', ', ').replace(chr(39), '')}"
    if error["type"] in _CLAUSES:
        return f"{path} is {value!r}; {_CLAUSES[error['type']].format(**context)}"
    if error["type"].startswith("model"):
        return f"{path} must be a group of settings, not {value!r}"
    return f"{path} is {value!r}: {error['msg']}"


def _unknown(cls: type[Settings], path: list[str], where: str) -> str:
    """Return the sentence about an unknown key."""
    for group in path[:-1]:
        cls, where = cast(type[Settings], group_class(cls, group)), f"{where}.{group}"
    name, known = path[-1], list(cls.model_fields)
    if former := cls.former(where, name):
        return former
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {where}.{close[0]}?" if close else f"known keys: {', '.join(known)}"
    return f"{where}.{name} is not a setting; {hint}"


def group_class(cls: type[Settings], name: str) -> type[Settings] | None:
    """Return the class of the group ``name`` inside ``cls``."""
    field = cls.model_fields.get(name)
    kinds = (field.annotation, *get_args(field.annotation)) if field else ()
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Settings)), None)
