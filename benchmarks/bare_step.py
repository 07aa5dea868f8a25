"""Where the seconds of a step go: a step through verl beside a step of the one-file trainer.

``python -m benchmarks.bare_step --model models/arithmetic-warm --data data/arithmetic --output outputs/bare_step`` runs
GRPO and GCPO `balanced` in turn, on both paths, with the same model, questions and sizes. The one-file trainer is one
process with one thread: only torch, no server, no queue between processes. Its numbers are what the arithmetic of a
step costs on the machine; the rest of a step through verl is moving data, starting calls and waiting.

The one-file trainer takes the old log-probabilities from its sampler. So that the pass of verl has a counterpart, the
same pass is timed on its own, outside the step.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from benchmarks.common import UNTRAINED, arguments, print_table, run, save
from benchmarks.step_time import STAGES, TOKENS, total
from examples.gcpo_in_one_file import Group, Trainer
from examples.small_transformer import log_probs
from examples.training_run import RunSettings, batches, chunks

METHODS = {"grpo": "grpo", "balanced": "gcpo"}
"""Name of `benchmarks.common.METHODS` -> method of the one-file trainer."""
PARTS = ("generation", "old log-prob", "scoring", "weights and reference", "update", "rest", "whole step")
LEARNING_RATE = 1e-12
"""As good as none, so that every step has responses of the same kind."""


class TimedTrainer(Trainer):
    """Adds the seconds of every station to ``seconds``, under the names of `PARTS`."""

    def __init__(self, settings: RunSettings) -> None:
        super().__init__(settings)
        self.seconds: Counter[str] = Counter()

    def sample(self, step: int, rows: Sequence[dict[str, Any]]) -> list[Group]:
        with _Clock(self.seconds, "generation"):
            groups = super().sample(step, rows)
        with _Clock(self.seconds, "old log-prob"):
            self.old_log_probs(groups)
        return groups

    def draw(self, groups: Sequence[Group]) -> None:
        with _Clock(self.seconds, "generation"):
            super().draw(groups)

    def score(self, groups: Sequence[Group]) -> None:
        with _Clock(self.seconds, "scoring"):
            super().score(groups)

    def credit(self, groups: Sequence[Group]) -> None:
        with _Clock(self.seconds, "weights and reference"):
            super().credit(groups)

    def update(self, groups: Sequence[Group]) -> None:
        with _Clock(self.seconds, "update"):
            super().update(groups)

    @torch.no_grad()
    def old_log_probs(self, groups: Sequence[Group]) -> None:
        """The pass that verl makes over the responses before an update; its result is not used."""
        for some in chunks(groups, 4):
            texts = [[group.prompt] for group in some for _ in group.responses]
            log_probs(self.model, texts, [y.ids for group in some for y in group.responses], self.settings.temperature)


class _Clock:
    """Adds the seconds of a block to a counter."""

    def __init__(self, seconds: Counter[str], name: str) -> None:
        self.seconds, self.name = seconds, name

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.name] += time.perf_counter() - self.started


def bare_steps(method: str, model: str, data: str, output: Path, steps: int) -> list[dict[str, float]]:
    """Seconds of every part and the tokens of ``steps`` steps of the one-file trainer."""
    settings = RunSettings(
        method=METHODS[method], model=model, data=data, output=str(output), lr=LEARNING_RATE, steps=steps
    )
    trainer = TimedTrainer(settings)
    source, found = batches(pq.read_table(Path(data) / "train.parquet").to_pylist(), settings), []
    for step in range(1, steps + 1):
        trainer.seconds.clear()
        metrics = trainer.step(step, next(source))
        # The extra pass belongs to no step of the one-file trainer.
        whole = metrics["timing_s/step"] - trainer.seconds["old log-prob"]
        parts = {part: trainer.seconds[part] for part in PARTS}
        rest = whole - sum(parts.values()) + parts["old log-prob"]
        found.append({**parts, "rest": rest, "whole step": whole, "generated": metrics["tokens/generated"]})
    return found


def verl_parts(step: dict[str, float], batch: int) -> dict[str, float]:
    """Seconds of every part and the generated tokens of a step through verl."""
    stages = {stage: total(step, names) for stage, names in STAGES.items()}
    scoring, credit = stages["of that: scoring"], stages["of that: weights and reference"]
    parts = {
        "generation": stages["generation"],
        "old log-prob": stages["old log-prob"] - scoring - credit,
        "scoring": scoring,
        "weights and reference": credit,
        "update": stages["update"],
    }
    whole = stages["whole step"]
    rest = whole - sum(parts.values())
    return {**parts, "rest": rest, "whole step": whole, "generated": TOKENS["generated"](step, batch)}


def medians(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median of every part over steps."""
    return {name: statistics.median(step[name] for step in steps) for name in steps[0]}


def table(found: dict[str, dict[str, dict[str, float]]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: seconds through verl, bare, and their ratio, for every method."""
    header = ["seconds", *(f"{method}, {name}" for method in found for name in ("verl", "one file", "ratio"))]
    rows = []
    for part in (*PARTS, "generated"):
        cells = [part]
        for paths in found.values():
            verl, bare = paths["verl"][part], paths["one file"][part]
            form = ",.0f" if part == "generated" else ".2f"
            cells += [format(verl, form), format(bare, form), f"{verl / bare:.1f} ×" if bare > 0.005 else "–"]
        rows.append(cells)
    return header, rows


def main() -> None:
    """Command line."""
    parser = arguments(__doc__, "outputs/bare_step")
    parser.add_argument("--steps", type=int, default=4, help="steps of a run; the first is not counted")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    sizes = [f"trainer.total_training_steps={args.steps}", "data.train_batch_size=16"]
    steps: dict[str, dict[str, list[dict[str, float]]]] = {m: {"verl": [], "one file": []} for m in args.methods}
    for attempt in range(args.rounds):
        for method in args.methods:
            output = args.output / f"{method}-{attempt}"
            through_verl = run(output, method, args.model, args.data, *sizes, *UNTRAINED)[1:]
            steps[method]["verl"] += [verl_parts(step, 16) for step in through_verl]
            steps[method]["one file"] += bare_steps(method, args.model, args.data, output, args.steps)[1:]
            print(f"round {attempt + 1}: {method} done", flush=True)
    found = {method: {path: medians(some) for path, some in paths.items()} for method, paths in steps.items()}
    header, rows = table(found)
    print_table(header, *rows)
    save(args.output / "bare_step.json", {"medians": found})


if __name__ == "__main__":
    main()
