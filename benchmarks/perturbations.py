"""GC2PO's robustness and effectiveness for several sizes of the perturbation, and their correlation with correctness.

``python -m benchmarks.perturbations`` samples with unchanged weights (learning rate 0) on the quick-start configuration
and prints, for each intervention and distribution, the mean over steps of robustness and effectiveness and of the
correlation of the process reward with correctness. It also writes ``perturbations.json``.
"""

from __future__ import annotations

import itertools
import statistics

from benchmarks.common import UNTRAINED, arguments, print_table, run, save

METRICS = {
    "robustness": "gc2po/robustness/mean",
    "lowest robustness": "gc2po/robustness/min",
    "effectiveness": "gc2po/effectiveness/mean",
    "process reward": "gc2po/reward/process",
    "correlation of the process reward with correctness": "gc2po/reward/process_correctness_correlation",
}


def variants(sigmas: list[float], etas: list[float]) -> dict[str, list[str]]:
    """Return the overrides of every variant by name."""
    sizes = [("sigma", "gaussian", value) for value in sigmas] + [("eta", "group", value) for value in etas]
    return {
        f"{intervention}, {name} = {value:g}": [
            f"gc2po.intervention={intervention}",
            f"gc2po.perturbation.distribution={distribution}",
            f"gc2po.perturbation.{name}={value}",
        ]
        for intervention, (name, distribution, value) in itertools.product(("lm_head", "hidden_state"), sizes)
    }


def main() -> None:
    """Command line."""
    parser = arguments(__doc__, "outputs/perturbations")
    parser.add_argument("--steps", type=int, default=5, help="batches of 16 questions with 8 responses")
    parser.add_argument("--sigmas", type=float, nargs="*", default=[0.1, 0.5, 1.0, 2.0])
    parser.add_argument("--etas", type=float, nargs="*", default=[0.5, 1.0])
    args = parser.parse_args()
    overrides = [f"trainer.total_training_steps={args.steps}", *UNTRAINED]
    results = {}
    for number, (name, changes) in enumerate(variants(args.sigmas, args.etas).items()):
        steps = run(args.output / f"{number}", "gc2po", args.model, args.data, *overrides, *changes)
        values = {line: [step[metric] for step in steps if metric in step] for line, metric in METRICS.items()}
        results[name] = {line: statistics.mean(found) if found else None for line, found in values.items()}
        print(f"{name} done", flush=True)
    rows = [
        [name, *("–" if value is None else f"{value:.3f}" for value in found.values())]
        for name, found in results.items()
    ]
    print_table(["perturbation", *METRICS], *rows)
    save(args.output / "perturbations.json", {"steps": args.steps, "results": results})


if __name__ == "__main__":
    main()
