"""What the configuration classes share: their errors, and the way from a mapping to a checked class."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal


class ConfigError(ValueError):
    """A setting that cannot work; the message says which one, why, and what to change."""


def parse_settings(cls: type, raw: Any, where: str) -> Any:
    """A dataclass from a mapping, with every key and type checked."""
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{where} must be a group of settings, not {raw!r}")
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}
    values = {}
    for key, value in raw.items():
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {where}.{close[0]}?" if close else f"known keys: {', '.join(known)}"
            raise ConfigError(f"{where}.{key} is not a setting; {hint}")
        if is_dataclass(hints[key]):
            values[key] = parse_settings(hints[key], value if value is not None else {}, f"{where}.{key}")
        else:
            values[key] = _convert(hints[key], value, f"{where}.{key}")
    return cls(**values)


def _convert(hint: Any, value: Any, where: str) -> Any:
    """``value`` as the type that ``hint`` names."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        if value is None:
            return None
        (hint,) = [arg for arg in typing.get_args(hint) if arg is not type(None)]
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if value not in choices or isinstance(value, bool):
            raise ConfigError(f"{where} is {value!r}; choose one of {', '.join(map(str, choices))}")
        return value
    if hint is bool:
        if not isinstance(value, bool):
            raise ConfigError(f"{where} is {value!r}; write true or false")
        return value
    if hint is str:
        if not isinstance(value, str):
            raise ConfigError(f"{where} is {value!r}; it must be a text")
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{where} is {value!r}; it must be a number")
    if hint is int:
        if value != int(value):
            raise ConfigError(f"{where} is {value!r}; it must be a whole number")
        return int(value)
    return float(value)
