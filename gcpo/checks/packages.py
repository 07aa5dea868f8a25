"""Checks of packages and classes in the settings that verl imports only after loading the models."""

from __future__ import annotations

import importlib
import importlib.util

from omegaconf import DictConfig

from gcpo.reading import ACTOR, first_line, get
from gcpo.settings import ConfigError

_PACKAGES = {
    "tracking": "wandb",
    "wandb": "wandb",
    "vemlp_wandb": "wandb",
    "mlflow": "mlflow",
    "swanlab": "swanlab",
    "tensorboard": "tensorboard",
    "clearml": "clearml",
    "trackio": "trackio",
}


def check_packages(config: DictConfig) -> None:
    """Check that the packages of the loggers are installed, and that the optimizer exists.

    Raises:
        ConfigError: a package or the optimizer is missing.
    """
    loggers = get(config, "trainer.logger", [])
    for name in [loggers] if isinstance(loggers, str) else loggers:
        package = _PACKAGES.get(name)
        if package is not None and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"trainer.logger names {name}, and the package {package} is not installed: leave {name} out, or run "
                f"pip install {package}"
            )
    _check_optimizer(get(config, f"{ACTOR}.optim.optimizer"), get(config, f"{ACTOR}.optim.optimizer_impl"))


def _check_optimizer(name: str | None, module: str | None) -> None:
    if name is None or module is None or (module, name) == ("torch.optim", "AdamW"):
        return
    try:
        found = importlib.import_module(str(module))
    except ImportError as error:
        raise ConfigError(
            f"{ACTOR}.optim.optimizer_impl is {module!r} and cannot be imported ({first_line(error)})"
        ) from error
    if not hasattr(found, str(name)):
        raise ConfigError(
            f"{ACTOR}.optim.optimizer is {name!r}, which {module} does not have; it has for example AdamW"
        )
