"""``python -m recipe.rest_mcts CONFIG --output DIR [key=value ...]``: self-training with ReST-MCTS* or RFT.

CONFIG names a yaml file of ``recipe/rest_mcts/config``, or is the path of one. Run the same command again and it goes
on where it was stopped.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from gcpo.faults import RunStoppedError
from gcpo.selftraining.settings import SelfTrainingSettings
from gcpo.settings import ConfigError
from gcpo.tools.evaluate import EvaluationError

CONFIGS = Path(__file__).parent / "config"


def read_settings(config: str, overrides: Sequence[str]) -> SelfTrainingSettings:
    """The settings of a yaml file with overrides ``key=value``.

    Raises:
        ConfigError: there is no such file, or a setting is wrong.
    """
    path = Path(config) if config.endswith(".yaml") else CONFIGS / f"{config}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(one.stem for one in CONFIGS.glob("*.yaml")))
        raise ConfigError(f"there is no configuration {config}; choose one of {known}, or give the path of a yaml file")
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"{override} is no setting; write key=value")
    try:
        merged = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
        raw = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(f"{path} with {' '.join(overrides)} can't be read: {str(error).splitlines()[0]}") from error
    return SelfTrainingSettings.parse(raw, "self_training")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m recipe.rest_mcts", description="Self-training.")
    parser.add_argument("config", metavar="CONFIG", help="name or path of a yaml file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings")
    parser.add_argument("--output", type=Path, help="folder of the run (default: outputs/METHOD)")
    parser.add_argument("--dry-run", action="store_true", help="print the settings and end")
    options, rest = parser.parse_known_args(arguments)
    if any(one.startswith("-") for one in rest):
        parser.error(f"unknown option {rest[0]}")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        settings = read_settings(options.config, [*options.overrides, *rest])
        if options.dry_run:
            print(OmegaConf.to_yaml(OmegaConf.create(settings.to_dict())), end="")
            return 0
        run(settings, options.output or Path("outputs") / settings.method.replace("_", "-"))
    except (ConfigError, EvaluationError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunStoppedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on with the phase that was stopped", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def run(settings: SelfTrainingSettings, output: Path) -> None:
    """Self-train on the real stack; the errors are those of `recipe.rest_mcts.loop.self_train`."""
    from transformers.utils.logging import disable_progress_bar

    from recipe.rest_mcts.loop import self_train
    from recipe.rest_mcts.phases import Phases

    disable_progress_bar()
    phases = Phases(settings)
    try:
        self_train(settings, output, phases.all(), say=lambda line: print(line, flush=True))
    finally:
        phases.close()


if __name__ == "__main__":
    sys.exit(main())
