"""Seconds of a training step: GRPO beside GCPO ``light``, ``balanced`` and ``paper``, split by stage.

``python -m benchmarks.step_time --model models/arithmetic-warm --data data/arithmetic --output outputs/bench`` runs the
four methods one after another, in rounds (so that a machine that slows down slows all of them down), on the quick-start
configuration at n = 8, and prints medians over all steps but the first of each run. It also writes ``step_time.json``.

``--methods paper paper-batched paper-unshared --batch 4`` sets ``paper`` beside itself with nothing shared, the prefix
cache off: every context is a row of its own, in micro-batches of the same token budget (``batched``), or one at a time.
``--methods generated crowded`` generates under every context (L = 2, L' = 1, M = 1): with room for all prompts in
the prefix cache, and with little.
``--methods grpo gvpo --mini-batch 4`` gives both methods four mini-batches per batch; GVPO refuses a single one.
"""

from __future__ import annotations

import statistics

from benchmarks.common import METHODS, UNTRAINED, arguments, print_table, run, save
from gcpo.methods import method_names

STAGES = {
    "generation": ("timing_s/gen",),
    "old log-prob": ("timing_s/old_log_prob",),
    "of that: scoring": tuple(f"timing_s/{method}_score" for method in method_names()),
    "of that: weights and reference": tuple(f"timing_s/{method}_credit" for method in method_names()),
    "update": ("timing_s/update_actor",),
    "whole step": ("timing_s/step",),
}


def total(step: dict[str, float], names: tuple[str, ...]) -> float:
    """The sum of the metrics that a step has of these names."""
    return sum(step.get(name, 0.0) for name in names)


def by_kind(step: dict[str, float], name: str) -> float:
    """A counter of auxiliary generations, over their kinds."""
    return sum(value for key, value in step.items() if key.startswith(f"gcpo/tokens/{name}/"))


# Each takes the metrics of a step and the number of questions of a batch.
TOKENS = {
    "generated": lambda step, batch: by_kind(step, "generated") or step["response_length/mean"] * batch * 8,
    "scored": lambda step, batch: total(step, ("gcpo/tokens/scored", "gc2po/tokens/scored", "l2t/tokens/scored")),
    "scored, without sharing": lambda step, batch: step.get("gcpo/tokens/scored_unshared", 0.0),
    "prompts of extra generations": lambda step, batch: by_kind(step, "prefilled"),
    "cached": lambda step, batch: by_kind(step, "cached"),
}


def main() -> None:
    """Command line."""
    parser = arguments(__doc__, "outputs/step_time")
    parser.add_argument("--steps", type=int, default=5, help="steps of a run; the first is not counted")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["grpo", "light", "balanced", "paper"])
    parser.add_argument("--batch", type=int, default=16, help="questions of a step")
    parser.add_argument("--mini-batch", type=int, help="questions of a mini-batch; all of the step if it is not given")
    args = parser.parse_args()
    overrides = [
        f"trainer.total_training_steps={args.steps}",
        f"data.train_batch_size={args.batch}",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={args.mini_batch or args.batch}",
        *UNTRAINED,
    ]
    steps: dict[str, list[dict[str, float]]] = {method: [] for method in args.methods}
    for attempt in range(args.rounds):
        for method in args.methods:
            output = args.output / f"{method}-{attempt}"
            found = run(output, method, args.model, args.data, *overrides)
            steps[method] += found[1:]
            print(f"round {attempt + 1}: {method} done", flush=True)
    medians = {
        method: {stage: statistics.median(total(s, names) for s in found) for stage, names in STAGES.items()}
        for method, found in steps.items()
    }
    tokens = {
        method: {name: statistics.median(count(step, args.batch) for step in found) for name, count in TOKENS.items()}
        for method, found in steps.items()
    }
    first = medians[args.methods[0]]["whole step"]
    rows = [[stage, *(f"{medians[m][stage]:.2f}" for m in args.methods)] for stage in STAGES]
    rows.append(["ratio", *(f"{medians[m]['whole step'] / first:.2f}" for m in args.methods)])
    rows += [[f"tokens {name}", *(f"{tokens[m][name]:,.0f}" for m in args.methods)] for name in TOKENS]
    hits = [tokens[m]["cached"] / (tokens[m]["prompts of extra generations"] or 1) for m in args.methods]
    rows.append(["prefix-cache hits", *(f"{100 * hit:.0f} %" for hit in hits)])
    print_table(["seconds", *args.methods], *rows)
    counted = {method: len(entries) for method, entries in steps.items()}
    results = {"steps counted per method": counted, "median seconds": medians, "median tokens": tokens}
    save(args.output / "step_time.json", results)


if __name__ == "__main__":
    main()
