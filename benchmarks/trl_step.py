"""Seconds of a GRPO step of TRL with the generation of transformers, beside `benchmarks.bare_step`.

TRL is not among the packages of this project. It is put beside them for this measurement alone::

    .venv/bin/python -m pip install --target outputs/trl --no-deps trl==1.16.0
    PYTHONPATH=outputs/trl OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.trl_step

Model, questions, sizes, temperature and reward are those of the quick start; the learning rate is as good as none.
"""

from __future__ import annotations

import importlib.metadata
import statistics
import sys
import time
from typing import Any

import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from benchmarks.bare_step import LEARNING_RATE
from benchmarks.common import arguments, print_table, save
from benchmarks.packing import resident
from gcpo.rewards import grade_many

QUESTIONS, N = 16, 8


class Clock(TrainerCallback):
    """The seconds of every step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self.started)


def reward(completions: list[Any], reward_model: list[dict], data_source: list[str], **_: Any) -> list[float]:
    """The score of the project's grader."""
    texts = [completion[0]["content"] for completion in completions]
    truths = [entry["ground_truth"] for entry in reward_model]
    return [grades["score"] for grades in grade_many(texts, truths, data_source)]


def main() -> None:
    """Command line."""
    parser = arguments(__doc__, "outputs/trl_step")
    parser.add_argument("--steps", type=int, default=7, help="the first is not counted")
    args = parser.parse_args()
    try:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        sys.exit(f"trl_step: {error}; benchmarks/trl_step.py has the command that installs trl")
    rows = pq.read_table(f"{args.data}/train.parquet").slice(0, QUESTIONS * args.steps).to_pylist()
    columns = ("prompt", "reward_model", "data_source")
    settings = GRPOConfig(
        output_dir=str(args.output),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=QUESTIONS * N,
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        num_generations=N,
        max_completion_length=64,
        temperature=1.0,
        beta=0.0,
        loss_type="grpo",
        learning_rate=LEARNING_RATE,
        max_steps=args.steps,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        seed=0,
    )
    clock = Clock()
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(args.model),
        reward_funcs=reward,
        args=settings,
        train_dataset=Dataset.from_list([{name: row[name] for name in columns} for row in rows]),
        callbacks=[clock],
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "reward" in entry][1:]
    found = {
        "seconds": statistics.median(clock.seconds[1:]),
        "tokens generated": statistics.median(entry["completions/mean_length"] * QUESTIONS * N for entry in logs),
        "reward": statistics.mean(entry["reward"] for entry in logs),
        "peak GB": resident("VmHWM") / 1e9,
    }
    print_table([*found], [f"{value:,.2f}" for value in found.values()])
    save(args.output / "trl_step.json", {"trl": importlib.metadata.version("trl"), "medians": found})


if __name__ == "__main__":
    main()
