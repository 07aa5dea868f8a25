"""Lines for a person who follows a command, and on a terminal a bar below them."""

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
"""Without a terminal, a line at least this often."""


class Display:
    """Prints lines that stay. Below them a terminal shows a bar; elsewhere a line says when the phase changes.

    It is given up once it cannot be written to, so that a closed terminal, or a full disk under a redirected output,
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
            # A thread that refreshes could not be given up.
            auto_refresh=False,
            # The pace is that of all steps of this start but the first, which warms up.
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
        """Print a line that stays."""
        self._last = self._clock()
        prefix = "" if self.is_live else f"[{duration(self._last - self._started):>9}] "
        self._try(lambda: self._console.print(prefix + text, markup=False))

    def refresh(self, phase: str, detail: str = "", completed: int = 0, total: int | None = None) -> None:
        """Show what is going on now.

        Args:
            phase: in a word or two.
            detail: changes often; shown on a terminal, and without one as a sign of life.
            completed: steps or samples that are done.
            total: how many there will be, None where that is not known.
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
    """Seconds for people: ``48 s``, ``3 min 20 s``, ``2 h 05 min``."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line; a terminal that was closed, or a full disk under a redirected output, must not end the run."""
    target: TextIO = sys.stdout if stream is None else stream
    try:
        print(text, file=target, flush=True)
    except (OSError, ValueError):
        # Python would try again at its end, and then exit with another code.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), target.fileno())
