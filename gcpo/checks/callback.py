"""The checks of a run under ``verl.trainer.main_ppo``, before Ray starts."""

from __future__ import annotations

import sys
from typing import Any, ClassVar, NoReturn

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from gcpo.checks import check_run
from gcpo.settings import ConfigError


class CheckBeforeRay(Callback):
    """A check of the configuration before hydra calls the main function, set in ``hydra.callbacks`` of our yaml."""

    enabled: ClassVar[bool] = True
    """False if the main function makes the checks itself."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check the configuration.

        Raises:
            SystemExit: status 2, after one sentence on the standard error. hydra turns any other exception of a
                callback into a warning.
        """
        if not self.enabled:
            return
        try:
            check_run(config)
        except ConfigError as error:
            refuse(str(error))


def refuse(sentence: str) -> NoReturn:
    """End the process with status 2 and one line on the standard error."""
    print(f"gcpo: {' '.join(sentence.split())}", file=sys.stderr, flush=True)
    sys.exit(2)
