"""What a person sees while a command runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from gcpo.tools.launch.progress import Progress

HEARTBEAT_SECONDS = 60.0
"""Without a terminal, a line at least this often."""


class Display(Protocol):
    """Shows progress: on a terminal, or as plain lines."""

    def note(self, text: str) -> None:
        """Print a line that stays."""

    def refresh(self, progress: Progress) -> None:
        """Show what is going on now."""

    def close(self) -> None:
        """Stop showing."""


class PlainDisplay:
    """Plain lines: every change of phase, every step, and a sign of life in between."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started = self._last = clock()
        self._shown = ""

    def note(self, text: str) -> None:
        self._last = self._clock()
        print(f"[{duration(self._last - self._started):>9}] {text}", flush=True)

    def refresh(self, progress: Progress) -> None:
        label = "training" if progress.training else progress.label
        if label != self._shown:
            self._shown = label
            self.note(label)
        elif self._clock() - self._last > HEARTBEAT_SECONDS:
            self.note(f"still at it: {progress.label}")

    def close(self) -> None:
        pass


class TerminalDisplay:
    """Shows a spinner, the current phase, a bar and the time left below the lines that stay."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
        )
        from rich.progress import Progress as Bar

        self._bar = Bar(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=Console(highlight=False),
            transient=True,
        )
        self._task = self._bar.add_task("", total=None, left="")
        self._eta = Eta()
        self._bar.start()

    def note(self, text: str) -> None:
        self._bar.console.print(text, markup=False, soft_wrap=True)

    def refresh(self, progress: Progress) -> None:
        left = self._eta.left(progress)
        self._bar.update(
            self._task,
            description=progress.label,
            completed=progress.step,
            total=progress.total,
            left=f"about {duration(left)} left" if left is not None else "",
        )

    def close(self) -> None:
        self._bar.stop()


class Guarded:
    """A display that is given up once it cannot be written to: a terminal was closed, a disk is full."""

    def __init__(self, make: Callable[[], Display]) -> None:
        self._display: Display | None = None
        self._call(lambda: setattr(self, "_display", make()))

    def _call(self, action: Callable[[], None]) -> None:
        try:
            action()
        except (OSError, ValueError):
            self._display = None

    def note(self, text: str) -> None:
        if (display := self._display) is not None:
            self._call(lambda: display.note(text))

    def refresh(self, progress: Progress) -> None:
        if (display := self._display) is not None:
            self._call(lambda: display.refresh(progress))

    def close(self) -> None:
        if (display := self._display) is not None:
            self._call(display.close)


class Eta:
    """Estimates the time left from the steps of this start; the first, a warm-up, counts until the second ends."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._finished: list[tuple[int, float]] = []

    def left(self, progress: Progress) -> float | None:
        """Seconds, None while nothing is known."""
        if progress.training and (not self._finished or progress.step > self._finished[-1][0]):
            self._finished.append((progress.step, self._clock()))
        if progress.total is None or len(self._finished) < 2:
            return None
        first, last = self._finished[1 if len(self._finished) > 2 else 0], self._finished[-1]
        pace = (last[1] - first[1]) / (last[0] - first[0])
        return max(0.0, pace * (progress.total - progress.step) - (self._clock() - last[1]))


def duration(seconds: float) -> str:
    """Seconds for people: ``48 s``, ``3 min 20 s``, ``2 h 05 min``."""
    seconds = int(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
