"""Whole runs with vLLM: some steps of GRPO and of every preset, with finite losses, and rollout and actor in agreement.

``python -m benchmarks.gpu_smoke.loop`` trains the quick start's model on one GPU; with ``--cpu`` as the quick start
does. It prints medians of the steps after the first, writes ``loop.json`` and ``loop.md``, and ends with status 1 if a
value is not finite, or if vLLM and the actor give the sampled tokens other probabilities.
"""

from __future__ import annotations

import importlib.util
import math
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.common import METHODS, UNTRAINED, arguments, run, save, table_text
from benchmarks.step_time import STAGES, total

FINITE = ("actor/pg_loss", "actor/grad_norm", "gcpo/kl_loss", "gcpo/upsilon/mean", "critic/score/mean")
"""Metrics that must be finite where a step has them."""
MOST = {"cpu": 1e-5, "gpu": 2e-2}
"""Largest mean difference of the probabilities of sampled tokens between vLLM and the actor: float32, and bf16."""


def problems(method: str, steps: Sequence[dict[str, Any]], most: float) -> list[str]:
    """Sentences about what is wrong with the steps of a run."""
    found = []
    for step in steps:
        wrong = [name for name in FINITE if not math.isfinite(step.get(name, 0.0))]
        found += [f"{method}, step {step['step']}: {name} is {step[name]}" for name in wrong]
        difference = step.get("training/rollout_probs_diff_mean", math.nan)
        if not difference <= most:
            found.append(
                f"{method}, step {step['step']}: the probabilities of vLLM and of the actor differ by "
                f"{difference:.1e}, at most {most:.0e} is expected"
            )
    return found


def main() -> int:
    """Command line; returns an exit code."""
    parser = arguments(__doc__, "outputs/gpu_smoke")
    parser.add_argument("--cpu", action="store_true", help="the same on the CPU")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["grpo", "light", "balanced", "paper"])
    args = parser.parse_args()
    if not args.cpu and not torch.cuda.is_available():
        parser.error("no CUDA device answers; --cpu runs the same steps on the CPU")
    if importlib.util.find_spec("vllm") is None:
        parser.error("vllm is not installed; bash run_scripts/setup.sh installs it")
    if args.steps < 2:
        parser.error(f"--steps is {args.steps}; it must be at least 2, since the first is not counted")
    device = "cpu" if args.cpu else "gpu"
    sizes = [f"device={device}", f"trainer.total_training_steps={args.steps}"]
    steps = {
        method: run(args.output / "runs" / method, method, args.model, args.data, *sizes, *UNTRAINED)
        for method in args.methods
    }
    wrong = [line for method, found in steps.items() for line in problems(method, found, MOST[device])]
    medians = {
        method: {stage: statistics.median(total(step, names) for step in found[1:]) for stage, names in STAGES.items()}
        for method, found in steps.items()
    }
    first = medians[args.methods[0]]["whole step"]
    rows = [[stage, *(f"{medians[method][stage]:.2f}" for method in steps)] for stage in STAGES]
    rows.append(["ratio", *(f"{medians[method]['whole step'] / first:.2f}" for method in steps)])
    differences = [max(s["training/rollout_probs_diff_mean"] for s in found) for found in steps.values()]
    rows.append(["largest difference of probabilities", *(f"{value:.1e}" for value in differences)])
    print(text := table_text(["seconds", *steps], *rows))
    name = "CPU" if args.cpu else torch.cuda.get_device_name()
    save(args.output / "loop.json", {"device": name, "median seconds": medians, "problems": wrong})
    (args.output / "loop.md").write_text(text)
    print("\n".join(f"gpu_smoke: {line}" for line in wrong) or "all values are finite, and vLLM and the actor agree")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
