"""Progress lines of a command, with a bar below them on a terminal."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

HEARTBEAT_SECONDS = 60.0
"""Without a terminal, the largest number of seconds between lines."""


class Display:
    """A printer of lasting lines. Below them a terminal shows a bar; otherwise a line reports each change of the phase.

    The display is closed once it cannot be written to, so that a closed terminal, or a full disk of redirected output,
    does not end the command.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started = self._last = clock()
        self._phase = ""
        self._lost = False
        self._console = Console(highlight=False, soft_wrap=True)
        self.is_live = self._console.is_terminal and not self._console.is_dumb_terminal
        self.bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            # A refreshing thread could not be stopped after an error.
            auto_refresh=False,
            # The pace is the mean over all steps of this start except the first, which warms up.
            speed_estimate_period=float("inf"),
            get_time=clock,
            disable=not self.is_live,
        )
        self._task = self.bar.add_task("", total=None)
        self._try(self.bar.start)

    def _try(self, action: Callable[[], object]) -> None:
        if not self._lost:
            try:
                action()
            except (OSError, ValueError):
                self._lost = True

    def note(self, text: str) -> None:
        """Print a lasting line."""
        self._last = self._clock()
        prefix = "" if self.is_live else f"[{duration(self._last - self._started):>9}] "
        self._try(lambda: self._console.print(prefix + text, markup=False))

    def refresh(self, phase: str, detail: str = "", completed: int = 0, total: int | None = None) -> None:
        """Show the current activity.

        Args:
            phase: one or two words.
            detail: a text that changes often; without a terminal it is shown from time to time.
            completed: number of finished steps or samples.
            total: their total number, or None if it is unknown.
        """
        text = f"{phase}: {detail}"[:100] if detail else phase
        if self.is_live:
            self.bar.update(self._task, description=text, completed=completed, total=total)
            self._try(self.bar.refresh)
        elif phase != self._phase:
            self.note(phase)
        elif self._clock() - self._last > HEARTBEAT_SECONDS:
            self.note(f"still at it: {text}")
        self._phase = phase

    def close(self) -> None:
        """Stop showing."""
        self._try(self.bar.stop)


def duration(seconds: float) -> str:
    """Format seconds for people: ``48 s``, ``3 min 20 s``, ``2 h 05 min``."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line; a closed terminal, or a full disk of a redirected output, must not end the run."""
    target: TextIO = sys.stdout if stream is None else stream
    try:
        print(text, file=target, flush=True)
    except (OSError, ValueError):
        # Python would flush again at exit, and then return another exit code.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), target.fileno())
