"""The outer loop: iterations of phases, each of which leaves a marker, so that a run that was stopped goes on.

``OUTPUT/iteration-K/PHASE.done.json`` holds the metrics of a phase. `metrics.jsonl` is written from the markers, one
line for each iteration that is done, in the format of verl's file logger; iteration 0 is before any training.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gcpo.faults import RunStoppedError, one_line
from gcpo.files import is_disk_full, sole_user, write_atomically
from gcpo.selftraining.settings import SelfTrainingSettings
from gcpo.settings import ConfigError
from gcpo.tools.metrics import METRICS_FILE

SETTINGS_FILE = "settings.json"
FIRST = {"rest_mcts": ("first_labels", "value", "evaluate"), "rft": ("evaluate",)}
"""Phases of iteration 0, by method."""
LATER = {"rest_mcts": ("search", "sft", "value", "evaluate"), "rft": ("sample", "sft", "evaluate")}
"""Phases of the other iterations."""


@dataclass(frozen=True)
class Place:
    """An iteration of a run."""

    settings: SelfTrainingSettings
    output: Path
    iteration: int

    @property
    def folder(self) -> Path:
        """Where the phases of this iteration write."""
        return self.output / f"iteration-{self.iteration}"

    @property
    def policy(self) -> str:
        """The policy after this iteration."""
        return str(self.folder / "policy") if self.iteration else self.settings.model

    @property
    def value(self) -> Path:
        """The value model after this iteration."""
        return self.folder / "value"

    @property
    def previous(self) -> Place:
        """The iteration before."""
        return Place(self.settings, self.output, self.iteration - 1)

    def marker(self, phase: str) -> Path:
        """The file that says that a phase is done."""
        return self.folder / f"{phase}.done.json"


Phase = Callable[[Place], Mapping[str, float]]
"""Does its work from the beginning, whatever an earlier start has left, and returns its metrics."""


def self_train(
    settings: SelfTrainingSettings, output: Path, phases: Mapping[str, Phase], say: Callable[[str], None] = print
) -> None:
    """Do all phases that are not done yet.

    Args:
        settings: of the run.
        output: its folder, made if need be.
        phases: by the names in `FIRST` and `LATER`.
        say: told the progress.

    Raises:
        ConfigError: ``output`` holds a run with other settings, or another process works in it.
        RunStoppedError: a phase fails; the sentence says which one.
    """
    output.mkdir(parents=True, exist_ok=True)
    try:
        with sole_user(output):
            _check_settings(settings, output)
            for iteration in range(settings.iterations + 1):
                place = Place(settings, output, iteration)
                place.folder.mkdir(exist_ok=True)
                for name in (LATER if iteration else FIRST)[settings.method]:
                    if not place.marker(name).is_file():
                        _do(name, phases[name], place, say)
                _write_metrics(settings, output, iteration)
    except BlockingIOError as error:
        raise ConfigError(f"another run works in {output}; wait for it or give another --output") from error


def _do(name: str, phase: Phase, place: Place, say: Callable[[str], None]) -> None:
    say(f"iteration {place.iteration}: {name}")
    started = time.monotonic()
    try:
        metrics = dict(phase(place))
    except Exception as error:
        where = f"the phase '{name}' of iteration {place.iteration} failed"
        cause = str(error) if isinstance(error, RunStoppedError) else one_line(error)
        cause = f"no space is left in {place.output}" if is_disk_full(error, place.output) else cause.rstrip(".")
        raise RunStoppedError(f"{where}: {cause}; the same command goes on from there") from error
    metrics[f"timing_s/{name}"] = time.monotonic() - started
    write_atomically(place.marker(name), json.dumps(metrics, indent=1) + "\n")
    shown = "  ".join(f"{key} {value:.4g}" for key, value in metrics.items())
    say(f"iteration {place.iteration}: {name}: {shown}")


def _check_settings(settings: SelfTrainingSettings, output: Path) -> None:
    """A run goes on with the settings that it was started with; only the number of iterations may grow."""
    path = output / SETTINGS_FILE
    ours = settings.to_dict()
    if path.is_file():
        try:
            theirs = json.loads(path.read_text())
        except ValueError as error:
            raise ConfigError(f"{path} can't be read ({error}); give another --output") from error
        differing = [key for key in ours if key != "iterations" and ours[key] != theirs.get(key)]
        if differing:
            raise ConfigError(
                f"{output} holds a run with another {differing[0]} ({theirs.get(differing[0])!r}, now "
                f"{ours[differing[0]]!r}); give another --output"
            )
    elif any(output.glob("iteration-*")):
        raise ConfigError(f"{output} holds iterations of an unknown run; give another --output")
    write_atomically(path, json.dumps(ours, indent=1) + "\n")


def _write_metrics(settings: SelfTrainingSettings, output: Path, last: int) -> None:
    lines = []
    for iteration in range(last + 1):
        place = Place(settings, output, iteration)
        metrics: dict[str, Any] = {}
        for name in (LATER if iteration else FIRST)[settings.method]:
            found = json.loads(place.marker(name).read_text())
            # Several phases of an iteration generate; the other metrics have one phase each.
            generated = metrics.get("tokens/generated", 0) + found.get("tokens/generated", 0)
            metrics |= {**found, "tokens/generated": generated}
        metrics["timing_s/step"] = sum(value for key, value in metrics.items() if key.startswith("timing_s/"))
        lines.append(json.dumps({"step": iteration, "data": metrics}))
    write_atomically(output / METRICS_FILE, "\n".join(lines) + "\n")
