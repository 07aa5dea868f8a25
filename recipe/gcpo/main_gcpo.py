"""Train: ``python -m recipe.gcpo.main_gcpo [method=gc2po] [device=cpu] [key=value ...]``.

verl's entry point with our yaml and our checks, which run before Ray starts. A problem is reported in one line on
the standard error, with exit status 2. The import of verl takes many seconds, so verl is imported
after the checks.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

import gcpo.config
from gcpo.checks import check_run
from gcpo.checks.callback import CheckBeforeRay, refuse
from gcpo.checks.overrides import override_problem
from gcpo.reading import first_line
from gcpo.rewards.sandbox import Fusion
from gcpo.settings import ConfigError

CONFIG = Path(gcpo.config.__file__).parent
_SEARCH_PATH = "hydra.searchpath"
_FULL_ERROR = "HYDRA_FULL_ERROR"


def main() -> None:
    """Compose the configuration, check it, and train."""
    environment = os.environ.get(_FULL_ERROR)
    composed: list[DictConfig] = []

    @hydra.main(config_path=str(CONFIG), config_name="gcpo_trainer", version_base=None)
    def run(config: DictConfig) -> None:
        composed.append(config)
        _set(_FULL_ERROR, environment)
        train(config)

    sys.argv = with_search_path(sys.argv)
    CheckBeforeRay.enabled = False  # `train` makes the checks
    # hydra reads this when an error occurs, and prints a page about the error unless it is set.
    os.environ[_FULL_ERROR] = "1"
    try:
        run()
    except Exception as error:  # hydra may also raise TypeError and others while composing
        if composed:
            raise
        refuse(override_problem(error, lambda: compose_defaults(sys.argv)))
    finally:
        _set(_FULL_ERROR, environment)


def train(config: DictConfig) -> None:
    """Check the configuration, then run verl's trainer.

    Raises:
        SystemExit: status 2, after one sentence on the standard error, if a check refuses the configuration.
    """
    Fusion.client = staticmethod(_fusion)
    try:
        check_run(config)
    except ConfigError as error:
        refuse(str(error))
    from gcpo.adapters.registry import plugin_problem

    problem = plugin_problem()
    if problem:
        refuse(problem)
    from verl.trainer.main_ppo import TaskRunnerV1, run_ppo
    from verl.utils.device import auto_set_device

    from gcpo.adapters.liveness import faults_in_a_sentence

    auto_set_device(config)
    check_with_verl(config)
    with faults_in_a_sentence(config):
        run_ppo(config, task_runner_class=TaskRunnerV1)


def _fusion(**request: Any) -> tuple[Any, str | None]:
    from verl.utils.reward_score.sandbox_fusion.utils import call_sandbox_api

    return call_sandbox_api(**request)


def check_with_verl(config: DictConfig) -> None:
    """Run verl's checks of the configuration, and report their messages as those of our checks.

    Raises:
        SystemExit: status 2, as in `train`.
    """
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            validate_config(
                config=config,
                use_reference_policy=need_reference_policy(config),
                use_critic=need_critic(config),
            )
    except Exception as error:  # assertions, and errors of its dataclasses
        refuse(f"verl refuses the configuration: {first_line(error)}")
    finally:
        sys.stdout.write(said.getvalue())


# ---- composing -------------------------------------------------------------------------------------------------------


def with_search_path(arguments: list[str]) -> list[str]:
    """Return the command line with the folder of verl's yaml files as hydra's search path.

    The yaml files name the package ``verl.trainer.config``, which hydra would import together with all of verl.
    """
    if any(_SEARCH_PATH in argument for argument in arguments):
        return arguments
    found = importlib.util.find_spec("verl")
    if found is None or not found.submodule_search_locations:
        return arguments
    folder = Path(next(iter(found.submodule_search_locations))) / "trainer" / "config"
    override = f"{_SEARCH_PATH}=['file://{folder}']"
    # argparse needs adjacent overrides.
    at = next((i for i, argument in enumerate(arguments) if "=" in argument and not argument.startswith("-")), None)
    at = len(arguments) if at is None else at
    return [*arguments[:at], override, *arguments[at:]]


def compose_defaults(arguments: list[str]) -> DictConfig:
    """Return the configuration named on the command line, without its overrides."""
    name: Any = "gcpo_trainer"
    for before, argument in zip(arguments, [*arguments[1:], ""], strict=True):
        if before in ("--config-name", "-cn"):
            name = argument
        elif before.startswith("--config-name="):
            name = before.partition("=")[2]
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONFIG), version_base=None):
        return hydra.compose(name, [argument for argument in arguments if argument.startswith(f"{_SEARCH_PATH}=")])


def _set(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


if __name__ == "__main__":
    main()
