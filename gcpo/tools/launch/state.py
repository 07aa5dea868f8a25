"""What is known about a run when it is started again: ``run.json``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from gcpo.files import write_atomically
from gcpo.tools.launch.leftovers import LaunchRecord

STATE_FILE = "run.json"

MAY_CHANGE = (
    "trainer.total_training_steps",
    "trainer.total_epochs",
    "trainer.save_freq",
    "trainer.test_freq",
    "trainer.logger",
    "trainer.resume_mode",
    "trainer.resume_from_path",
    "ray_kwargs.",
)
"""Settings that a run may have other values of when it goes on."""


class LaunchError(Exception):
    """A command that can't be started; the message is one sentence for the user."""


@dataclass
class RunState:
    """The state of a run."""

    command: list[str]
    status: str = "new"
    """``running``, ``complete``, ``failed`` or ``stopped``."""
    starts: int = 0
    seconds: float = 0.0
    exit_code: int | None = None
    launch: LaunchRecord | None = None
    """What the last start left to find it by."""

    @classmethod
    def load(cls, directory: Path) -> RunState | None:
        """The state in ``directory``, None where there is none or it can't be read."""
        try:
            data = json.loads((directory / STATE_FILE).read_text())
            state = cls(**{key: data[key] for key in ("command", "status", "starts", "seconds", "exit_code")})
        except (OSError, ValueError, KeyError, TypeError):
            return None
        state.launch = LaunchRecord.load(data.get("launch"))
        return state

    def save(self, directory: Path) -> None:
        """Write the state.

        Raises:
            OSError: it cannot be written; the state on the disk is then unchanged.
        """
        write_atomically(directory / STATE_FILE, json.dumps(asdict(self), indent=1) + "\n")


def settings_that_differ(before: Sequence[str], now: Sequence[str]) -> list[str]:
    """The arguments that are in one command and not in the other, those in `MAY_CHANGE` left out."""

    def matters(argument: str) -> bool:
        return not argument.lstrip("+~").startswith(MAY_CHANGE)

    # The interpreter's path is no setting.
    old, new = ([argument for argument in command[1:] if matters(argument)] for command in (before, now))
    return [argument for argument in [*old, *new] if (argument in old) != (argument in new)]


def wanted_steps(command: Sequence[str]) -> int | None:
    """The number of steps that the command asks for, None where it leaves that to the configuration."""
    values = [a.split("=", 1)[1] for a in command if a.lstrip("+").startswith("trainer.total_training_steps=")]
    return int(values[-1]) if values and values[-1].isdigit() else None
