"""One-sentence forms of hydra's errors about the command line, with the nearest existing key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from typing import Any

from omegaconf import DictConfig, OmegaConf

from gcpo.checks.supported import LEGACY
from gcpo.methods import method_class, method_names
from gcpo.reading import first_line

_UNREAD = ("critic", *LEGACY)
"""Groups of verl's yaml that our runs never read; their keys are not suggested."""


def override_problem(error: Exception, compose: Callable[[], DictConfig]) -> str:
    """Return one sentence for an error that hydra or omegaconf raised while it composed the configuration.

    Args:
        error: the error.
        compose: composes the configuration without the overrides of the command line, to find the existing keys.
    """
    text = str(error).strip()
    override = getattr(error, "override", None)
    if override is not None:
        return f"the override {override} cannot be read: {first_line(error)}; write key=value"
    if found := re.match(r"Could not append to config\. An item is already at '([^']+)'", text):
        return f"{found[1]} is in the configuration already: leave out the + before it"
    if found := re.match(r"Could not (?:override|delete from config)[^']*'([^']+)'", text):
        return _unknown_key(found[1], compose)
    if found := re.search(r"Could not find '([^'/]+)/([^']+)'", text):
        return _unknown_option(found[1], found[2], text)
    if "Error resolving interpolation '${experiment}_" in text:
        return "experiment names more than one experiment: name one, and size=tiny for the lengths of a small model"
    if found := re.search(r"Cannot find primary config '([^']+)'", text):
        return (
            f"there is no configuration {found[1]}: name gcpo_trainer or gcpo_quickstart, with method=NAME for a method"
        )
    return f"the configuration cannot be composed: {' '.join(text.split()) or type(error).__name__}"


def _unknown_key(key: str, compose: Callable[[], DictConfig]) -> str:
    group, _, rest = key.partition(".")
    settings = method_class(group).settings_class if group in method_names() else None
    if settings is not None and (former := settings.former(group, rest)):
        return former
    keys = list(dotted_keys(compose()))
    if key in keys:
        return f"{key} is a group of settings: set one of the settings in it"
    near = nearest(key, (other for other in keys if other.partition(".")[0] not in _UNREAD))
    advice = f"did you mean {near}? " if near else ""
    return f"{key} is not a setting; {advice}A new one is added with a + before it"


def _unknown_option(group: str, option: str, text: str) -> str:
    listed = re.search(rf"Available options in '{re.escape(group)}':\n((?:\t.*\n?)*)", text)
    options = listed[1].split() if listed else []
    near = difflib.get_close_matches(option, options, n=1)
    advice = f"set {group}={near[0]}" if near else f"choose one of {', '.join(options)}" if options else "leave it out"
    return f"{group} has no option {option}: {advice}"


def nearest(key: str, keys: Iterable[str]) -> str | None:
    """Return the key most similar to ``key``: as a whole, or with the same last name in another group."""
    known = list(keys)
    if close := difflib.get_close_matches(key, known, n=1, cutoff=0.75):
        return close[0]
    last = key.rpartition(".")[2]
    same = [other for other in known if other.rpartition(".")[2] == last]
    if not same:
        names = {other.rpartition(".")[2] for other in known}
        like = difflib.get_close_matches(last, names, n=1, cutoff=0.8)
        same = [other for other in known if like and other.rpartition(".")[2] == like[0]]
    return max(same, key=lambda other: difflib.SequenceMatcher(None, key, other).ratio(), default=None)


def dotted_keys(node: Any, prefix: str = "") -> Iterable[str]:
    """Return every key of a configuration, groups included; interpolations are not resolved."""
    if not OmegaConf.is_dict(node):
        return
    for name in node:
        key = f"{prefix}{name}"
        yield key
        if not OmegaConf.is_interpolation(node, name) and not OmegaConf.is_missing(node, name):
            yield from dotted_keys(node[name], f"{key}.")
