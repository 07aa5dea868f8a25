"""What a run is doing, as far as its log and its metrics tell."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from gcpo.notices import MARK


@dataclass
class Progress:
    """What the run is doing, as far as its log and its metrics tell."""

    phase: str = "importing verl, Ray and torch"
    step: int = 0
    """Last finished step."""
    start_step: int = 0
    """The step of the checkpoint that the run went on from."""
    total: int | None = None
    checkpoint: str | None = None
    validates_first: bool = True
    training: bool = False
    notices: list[str] = field(default_factory=list)
    """Sentences for the user, each once, in the order in which they came."""

    def read(self, line: str) -> None:
        """Take in one line of the log."""
        for pattern, take_in in _PATTERNS:
            if match := pattern.search(line):
                take_in(self, match)
                return
        self.phase = next((phase for marker, phase in _MARKERS if marker in line), self.phase)

    def _notice(self, match: re.Match[str]) -> None:
        if match[1] not in self.notices:
            self.notices.append(match[1])

    def _validation_setting(self, match: re.Match[str]) -> None:
        self.validates_first = match[1] == "True"

    def _total_steps(self, match: re.Match[str]) -> None:
        self.total = int(match[1])
        self.phase = "starting the workers"

    def _resumed(self, match: re.Match[str]) -> None:
        self.start_step = self.step = int(match[2])

    def _bar(self, match: re.Match[str]) -> None:
        self.training = True
        self.step = max(self.step, int(match[1]))
        self.total = int(match[2])

    def _saving(self, match: re.Match[str]) -> None:
        self.checkpoint = match[1]

    def _validated(self, match: re.Match[str]) -> None:
        self.training = match[1] == "Initial"
        if not self.training:
            self.phase = "finishing"

    def _ready(self, _: re.Match[str]) -> None:
        self.training = not self.validates_first
        self.phase = "validating before the first step"

    def finished_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take in the metrics of one step."""
        self.step = max(self.step, step)
        if "training/global_step" in metrics:
            self.training = True

    @property
    def label(self) -> str:
        """What to show."""
        if self.training:
            return f"step {self.step + 1}" if self.total is None or self.step < self.total else "finishing"
        return self.phase


_PATTERNS = (
    (re.compile(f"{MARK}(.+)"), Progress._notice),
    (re.compile(r"'val_before_train': (True|False)"), Progress._validation_setting),
    (re.compile(r"Total training steps: (\d+)"), Progress._total_steps),
    (re.compile(r"Resuming from (\S+), setting global step to (\d+)"), Progress._resumed),
    (re.compile(r"Training Progress:.*?(\d+)/(\d+)"), Progress._bar),
    (re.compile(r"Saving checkpoint to (\S+)"), Progress._saving),
    (re.compile(r"(Initial|Final) validation metrics"), Progress._validated),
    (re.compile(r"Creating file logger at"), Progress._ready),
)
"""What is read from the log, the first that matches."""

_MARKERS = (
    ("ray init kwargs", "starting Ray"),
    ("Started a local Ray instance", "importing again in the trainer's process"),
    ("train and validate dataloader initialized", "starting the workers"),
    ("worker group kwargs", "starting the workers"),
    ("create worker group", "loading the model"),
    ("actor and ref model engine initialized", "starting vLLM"),
    ("reward loop manager initialized", "starting vLLM"),
    ("checkpoint engine manager initialized", "vLLM is up"),
    ("all initialize finished, ready to fit", "syncing weights to vLLM"),
)
"""What verl 0.9.1 logs, and what it does from then on."""
