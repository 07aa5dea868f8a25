"""Held-out accuracy of GRPO and GCPO at equal steps, over seeds.

``python -m benchmarks.learning --seeds 0 1 2`` trains every method with every seed on the quick-start configuration,
prints the accuracy on the held-out questions before and after with a 95 % interval over seeds (Student's t), and writes
``learning.json`` and ``learning.png``. Runs that are there already are not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path

from benchmarks.common import METHODS, record, run

ACCURACY = "val-core/gcpo/arithmetic/acc/mean@1"
# Quantile .975 of Student's t by degrees of freedom.
T_QUANTILE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half-width of the 95 % interval over seeds."""
    if len(values) < 2:
        return values[0], math.nan
    spread = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), T_QUANTILE[len(values) - 1] * spread


def plot(curves: dict[str, list[list[dict]]], path: Path) -> None:
    """Training reward of every step and held-out accuracy, a thin line for every seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), dpi=140)
    for (method, runs), color in zip(curves.items(), plt.rcParams["axes.prop_cycle"].by_key()["color"], strict=False):
        for axis, name in zip(axes, ("critic/score/mean", ACCURACY), strict=True):
            for i, steps in enumerate(runs):
                points = [(step["step"], step[name]) for step in steps if name in step]
                axis.plot(*zip(*points, strict=True), color=color, lw=1.3, alpha=0.75, label=method if i == 0 else None)
    axes[0].set(xlabel="step", ylabel="mean reward of the sampled responses", ylim=(0, 1.02))
    axes[1].set(xlabel="step", ylabel="accuracy on held-out questions (greedy)", ylim=(0, 1.02))
    axes[1].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/arithmetic-warm")
    parser.add_argument("--data", default="data/arithmetic")
    parser.add_argument("--output", type=Path, default=Path("outputs/learning"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["grpo", "light"])
    args = parser.parse_args()
    curves: dict[str, list[list[dict]]] = {method: [] for method in args.methods}
    for seed in args.seeds:
        for method in args.methods:
            output = args.output / f"{method}-{seed}"
            seeds = (f"gcpo.seed={seed}", f"data.seed={seed}")
            curves[method].append(run(output, method, args.model, args.data, *seeds))
            print(f"seed {seed}: {method} done", flush=True)
    table = {}
    print("| method | before | after | gain, 95 % interval over seeds | sampled reward, first step | last step |")
    print("|---|---|---|---|---|---|")
    for method, runs in curves.items():
        tests = [[step[ACCURACY] for step in steps if ACCURACY in step] for steps in runs]
        scores = [[step["critic/score/mean"] for step in steps if "critic/score/mean" in step] for steps in runs]
        gain, half = interval([100 * (values[-1] - values[0]) for values in tests])
        table[method] = {"held-out accuracy": tests, "sampled reward": scores, "gain": gain, "half-width": half}
        before, after = (100 * statistics.mean(values[i] for values in tests) for i in (0, -1))
        first, last = (100 * statistics.mean(values[i] for values in scores) for i in (0, -1))
        print(f"| {method} | {before:.1f} | {after:.1f} | {gain:+.1f} ± {half:.1f} | {first:.1f} | {last:.1f} |")
    (args.output / "learning.json").write_text(json.dumps({**record(), "runs": table}, indent=2) + "\n")
    plot(curves, args.output / "learning.png")


if __name__ == "__main__":
    main()
