"""Held-out accuracy of GRPO and GCPO at equal steps, over seeds.

``python -m benchmarks.learning --seeds 0 1 2`` trains every method with every seed on the quick-start configuration,
prints the accuracy on the held-out questions before and after with a 95 % interval over seeds (Student's t), and writes
``learning.json`` and ``learning.png``. Existing runs are not repeated.
"""

from __future__ import annotations

import statistics
from pathlib import Path

from benchmarks.common import METHODS, arguments, interval, print_table, run, save, two_axes

ACCURACY = "val-core/gcpo/arithmetic/acc/mean@1"


def plot(curves: dict[str, list[list[dict]]], path: Path) -> None:
    """Plot the training reward of every step and the held-out accuracy, with a thin line for every seed."""
    figure, axes = two_axes(figsize=(10, 3.6))
    for number, (method, runs) in enumerate(curves.items()):
        for axis, name in zip(axes, ("critic/score/mean", ACCURACY), strict=True):
            for i, steps in enumerate(runs):
                points = [(step["step"], step[name]) for step in steps if name in step]
                axis.plot(
                    *zip(*points, strict=True), color=f"C{number}", lw=1.3, alpha=0.75, label=method if i == 0 else None
                )
    axes[0].set(xlabel="step", ylabel="mean reward of the sampled responses", ylim=(0, 1.02))
    axes[1].set(xlabel="step", ylabel="accuracy on held-out questions (greedy)", ylim=(0, 1.02))
    axes[1].legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    """Command line."""
    parser = arguments(__doc__, "outputs/learning")
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
    results, rows = {}, []
    for method, runs in curves.items():
        tests = [[step[ACCURACY] for step in steps if ACCURACY in step] for steps in runs]
        scores = [[step["critic/score/mean"] for step in steps if "critic/score/mean" in step] for steps in runs]
        gain, half = interval([100 * (values[-1] - values[0]) for values in tests])
        results[method] = {"held-out accuracy": tests, "sampled reward": scores, "gain": gain, "half-width": half}
        ends = [f"{100 * statistics.mean(own[i] for own in values):.1f}" for values in (tests, scores) for i in (0, -1)]
        rows.append([method, *ends[:2], f"{gain:+.1f} ± {half:.1f}", *ends[2:]])
    header = ["method", "before", "after", "gain, 95 % interval over seeds", "sampled reward, first step", "last step"]
    print_table(header, *rows)
    save(args.output / "learning.json", {"runs": results})
    plot(curves, args.output / "learning.png")


if __name__ == "__main__":
    main()
