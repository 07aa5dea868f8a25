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
        _, is_notice, sentence = line.partition(MARK)
        if is_notice:
            if sentence not in self.notices:
                self.notices.append(sentence)
        elif match := re.search(r"'val_before_train': (True|False)", line):
            self.validates_first = match[1] == "True"
        elif match := re.search(r"Total training steps: (\d+)", line):
            self.total = int(match[1])
            self.phase = "starting the workers"
        elif match := re.search(r"Resuming from (\S+), setting global step to (\d+)", line):
            self.start_step = self.step = int(match[2])
        elif match := re.search(r"Training Progress:.*?(\d+)/(\d+)", line):
            self.training = True
            self.step = max(self.step, int(match[1]))
            self.total = int(match[2])
        elif match := re.search(r"Saving checkpoint to (\S+)", line):
            self.checkpoint = match[1]
        elif "Initial validation metrics" in line:
            self.training = True
        elif "Final validation metrics" in line:
            self.training = False
            self.phase = "finishing"
        elif "Creating file logger at" in line:
            self.training = not self.validates_first
            self.phase = "validating before the first step"
        else:
            for marker, phase in _MARKERS:
                if marker in line:
                    self.phase = phase
                    break

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
