"""Check of the checkpoint for ``trainer.resume_mode=resume_path``."""

from __future__ import annotations

import os
import re
from pathlib import Path

from omegaconf import DictConfig

from gcpo.reading import get
from gcpo.settings import ConfigError

PATH, MODE = "trainer.resume_from_path", "trainer.resume_mode"


def check_resume(config: DictConfig) -> None:
    """Check that the folder to resume from is a checkpoint of verl, and that checkpoints can be written.

    Raises:
        ConfigError: the path is not set, does not exist, or is not a folder ``global_step_N`` with an actor; or
            ``trainer.default_local_dir`` is not a folder.
    """
    _check_output(config)
    path = get(config, PATH)
    if get(config, MODE) != "resume_path":
        if path is not None:
            raise ConfigError(f"{PATH} is {path!r}, and {MODE} is {get(config, MODE)}, so that it is not read: set "
                              f"{MODE}=resume_path")  # fmt: skip
        return
    if not isinstance(path, str) or not path.strip():
        raise ConfigError(f"{MODE} is resume_path, and {PATH} is {path!r}: name a folder global_step_N")
    if not re.search(r"global_step_\d+$", path):
        # verl reads everything after the name as the number of the step.
        raise ConfigError(f"{PATH} is {path!r}: its last part must be global_step_N, without a slash behind it")
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(f"{PATH}: there is no folder {path}")
    if not (folder / "actor").is_dir() or not any((folder / "actor").iterdir()):
        raise ConfigError(f"{PATH}: {path} is no checkpoint, since it has no folder actor with files in it")


def _check_output(config: DictConfig) -> None:
    for key in ("trainer.default_local_dir", "trainer.rollout_data_dir", "trainer.validation_data_dir"):
        name = get(config, key)
        if name is None:
            continue
        if not isinstance(name, str) or not name.strip():
            raise ConfigError(f"{key} is {name!r}; it must be the name of a folder")
        path = Path(name)
        blocked = next((part for part in (path, *path.parents) if part.exists()), None)
        if "://" in name or blocked is None:
            continue
        if not blocked.is_dir():
            raise ConfigError(f"{key} is {name}, and {blocked} is a file; name another folder")
        if not os.access(blocked, os.W_OK | os.X_OK):
            raise ConfigError(f"{key} is {name}, and nothing can be written in {blocked}; name another folder")
