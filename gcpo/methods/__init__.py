"""The methods, each in one folder, which implement the interface in `gcpo.methods.base`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gcpo.methods.base import Method

_registered: dict[str, type[Method]] = {}
_registers: list[Callable[[str], None]] = []


def register_method(method: type[Method]) -> type[Method]:
    """Register a method of another package by its name; use it as a decorator."""
    _registered[method.name] = method
    for register in _registers:
        register(method.name)
    return method


def for_each_method(register: Callable[[str], None]) -> None:
    """Call ``register`` with the name of every method, and later with the name of each added method."""
    _registers.append(register)
    for name in method_names():
        register(name)


def method_names() -> list[str]:
    """Return the folders of this package, and the registered methods."""
    return sorted({*own_method_names(), *_registered})


def own_method_names() -> list[str]:
    """Return the folders of this package."""
    return [entry.name for entry in pkgutil.iter_modules(__path__) if entry.ispkg]


def method_class(name: str) -> type[Method]:
    """Return the method with that name: ``METHOD`` in the module ``method`` of its folder.

    Raises:
        ValueError: there is no such method.
    """
    if name in _registered:
        return _registered[name]
    if name not in method_names():
        raise ValueError(f"there is no method {name!r}; the methods are {', '.join(method_names())}")
    return importlib.import_module(f"{__name__}.{name}.method").METHOD
