"""Access to settings by dotted key, with one-sentence errors for unreadable values."""

from __future__ import annotations

from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import gcpo.config  # noqa: F401  (registers the resolver of the yaml)
from gcpo.settings import ConfigError

ACTOR = "actor_rollout_ref.actor"
ROLLOUT = "actor_rollout_ref.rollout"
MODEL = "actor_rollout_ref.model"
OUR_REWARD = "pkg://gcpo.rewards"
"""Our reward function, as ``reward.custom_reward_function.path`` names it."""


def get(config: DictConfig, key: str, default: Any = None) -> Any:
    """Return the resolved value of a dotted key, or ``default`` if the key is absent or null.

    Raises:
        ConfigError: the value refers to another key that does not exist.
    """
    try:
        value = OmegaConf.select(config, key, default=None)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{key} cannot be resolved: {first_line(error)}") from error
    return default if value is None else value


def group(config: DictConfig, key: str) -> dict[str, Any]:
    """Return a group of settings as a plain dictionary, empty if it is absent.

    Raises:
        ConfigError: the key holds a single value, or refers to a key that does not exist.
    """
    try:
        found = OmegaConf.select(config, key, default=None)
        if found is None:
            return {}
        if not OmegaConf.is_dict(found):
            raise ConfigError(f"{key} is {found!r}; it must be a group of settings")
        return cast(dict[str, Any], OmegaConf.to_container(found, resolve=True))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{key} cannot be resolved: {first_line(error)}") from error


def files_of(config: DictConfig, key: str) -> list[str]:
    """Return the file names that ``data.train_files`` or ``data.val_files`` holds: one name or a list."""
    value = get(config, key)
    if value is None:
        return []
    return [str(value)] if not OmegaConf.is_list(value) else [str(name) for name in value]


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, without the full stop."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")


def plural(count: int, noun: str) -> str:
    """Return the count with the noun, such as ``1 row`` or ``2 rows``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
