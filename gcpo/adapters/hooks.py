"""Access to a method: its object in every process, and calls of its hooks with errors that name the hook."""

from __future__ import annotations

import dataclasses
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from gcpo.faults import RunStoppedError, ServerLostError, one_line
from gcpo.methods import method_class
from gcpo.methods.base import Method, Run

_KEY = "gcpo_method"
"""A key in ``actor_rollout_ref``, the only part of the configuration that the actor's workers get."""


def call(method: Method, hook: str, *args: Any) -> Any:
    """Call a hook.

    Raises:
        RunStoppedError: the hook raised; the sentence names the method and the hook.
    """
    try:
        return getattr(method, hook)(*args)
    except (RunStoppedError, ServerLostError):
        raise
    except Exception as error:
        raise hook_error(method, hook, error) from error


def hook_error(method: Method, hook: str, error: Exception) -> RunStoppedError:
    """Return the error of a hook that raised."""
    return RunStoppedError(f"the method {method.name} failed in its hook {hook} ({one_line(error)})")


def make_method(config: DictConfig) -> Method:
    """Return the method of a run, from verl's whole configuration."""
    method, run = method_class(config.trainer.v1.trainer_mode), Run.of(config)
    settings = OmegaConf.to_container(config[method.name], resolve=True) if method.name in config else {}
    return method(method.parse(settings, run), run)


def send_to_workers(method: Method, config: DictConfig) -> None:
    """Put the method into the configuration of the actor's workers."""
    sent = {"name": method.name, "settings": _as_dict(method.settings), "run": dataclasses.asdict(method.run)}
    with open_dict(config):
        config.actor_rollout_ref[_KEY] = OmegaConf.create(sent)


def _as_dict(settings: Any) -> dict[str, Any]:
    return dict(settings) if isinstance(settings, dict) else settings.to_dict()


def received(config: DictConfig) -> Method:
    """Return the method from a worker's configuration ``actor_rollout_ref``."""
    sent: Any = OmegaConf.to_container(config[_KEY])
    method, run = method_class(sent["name"]), Run(**sent["run"])
    return method(method.parse(sent["settings"], run), run)
