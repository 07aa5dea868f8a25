"""The state of a run that is kept for its next start: ``run.json``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from gcpo.files import write_atomically
from gcpo.tools.launch.leftovers import LaunchRecord

STATE_FILE = "run.json"

_LENGTH = ("trainer.total_training_steps", "trainer.total_epochs", "trainer.save_freq", "trainer.test_freq")
MAY_CHANGE = (*_LENGTH, "trainer.logger", "trainer.resume_mode", "trainer.resume_from_path", "ray_kwargs.")
"""Settings that may change when a run is resumed."""


@dataclass
class RunState:
    """The state of a run.

    Attributes:
        command: the program and its arguments.
        status: ``new``, ``running``, ``complete``, ``failed`` or ``stopped``.
        starts: number of starts.
        seconds: total seconds of all starts.
        exit_code: exit code of the last start.
        launch: the record of the last start.
    """

    command: list[str]
    status: str = "new"
    starts: int = 0
    seconds: float = 0.0
    exit_code: int | None = None
    launch: LaunchRecord | None = None

    @classmethod
    def load(cls, directory: Path) -> RunState | None:
        """Return the state in ``directory``, or None if it is missing or unreadable."""
        try:
            data = json.loads((directory / STATE_FILE).read_text())
            return cls(**{**data, "launch": LaunchRecord.load(data.get("launch"))})
        except (OSError, ValueError, AttributeError, TypeError):
            return None

    def save(self, directory: Path) -> None:
        """Write the state.

        Raises:
            OSError: the state cannot be written; the file on the disk is then unchanged.
        """
        write_atomically(directory / STATE_FILE, json.dumps(asdict(self), indent=1) + "\n")


def settings_that_differ(before: Sequence[str], now: Sequence[str]) -> list[str]:
    """Return the arguments that are in only one of the commands, except those in `MAY_CHANGE`."""

    def matters(argument: str) -> bool:
        return not argument.lstrip("+~").startswith(MAY_CHANGE)

    # The interpreter's path is not a setting.
    old, new = (list(filter(matters, command[1:])) for command in (before, now))
    return [argument for argument in [*old, *new] if (argument in old) != (argument in new)]


def wanted_steps(command: Sequence[str]) -> int | None:
    """Return the number of steps that the command asks for, or None if the configuration decides."""
    values = [a.split("=", 1)[1] for a in command if a.lstrip("+").startswith("trainer.total_training_steps=")]
    return int(values[-1]) if values and values[-1].isdigit() else None
