"""A run of `examples.gcpo_in_one_file`: its settings, batches of questions, evaluations, and the file of metrics."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow.parquet as pq
import torch
from omegaconf import OmegaConf
from pydantic import Field

from gcpo.faults import RunStoppedError
from gcpo.rewards import grade_many
from gcpo.seeding import request_seed
from gcpo.settings import ConfigError, Count, NotNegative, Positive, PositiveFraction, Settings


class RunSettings(Settings):
    """What a run depends on."""

    method: Literal["grpo", "gvpo", "gcpo"]
    model: str
    data: str
    output: str
    seed: Annotated[int, Field(ge=0)] = 0
    steps: Count = 60
    batch: Count = 16  # questions of a step
    n: Annotated[int, Field(ge=2)] = 8  # responses to a question
    mini_batches: Count | None = None  # optimizer steps of a batch; None: 4 for GVPO, else 1
    max_response: Count = 64
    temperature: Positive = 1.0
    lr: Positive = 2e-4
    weight_decay: NotNegative = 0.01
    max_grad_norm: Positive = 1.0
    clip: Positive = 0.2  # epsilon of Eq. 6 and 10
    kl: NotNegative = 0.0  # beta of Eq. 6 and 10, the weight of KL(pi_theta || pi_ref)
    beta: Positive = 0.1  # of GVPO
    eval_every: Count = 10
    eval_temperature: NotNegative = 0.0  # 0: the most likely tokens
    eval_size: Count = 200  # questions of a split that are evaluated during the run; its last step takes all
    # Of GCPO, with the names of the groups ``gcpo.*`` of the verl path; the defaults are those of preset `balanced`.
    alpha: NotNegative = 2.0
    kappa: NotNegative = 0.06
    scheme: Literal["shared", "leave_one_out"] = "leave_one_out"
    num_draws: Count = 1  # L
    num_leave_one_out_draws: Count = 1  # L', where scheme is leave_one_out
    source: Literal["response", "prompt"] = "prompt"  # of Z: the end of a regenerated response O, or of its prompt x
    num_generations: Count = 1  # M, where source is response
    target: Literal["projection", "group_mean", "off"] = "projection"
    similarity: Literal["cosine", "euclidean", "gaussian"] = "cosine"
    ablation: Literal["none", "mean", "shuffled"] = "none"  # replaces every Upsilon by their mean, or by another's
    subsample: PositiveFraction = 0.5  # share of the responses that have a kappa term


def chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Yield stretches of ``size`` items."""
    return (items[start : start + size] for start in range(0, len(items), size))


def question_ids(tokenizer: Any, row: dict[str, Any]) -> tuple[int, ...]:
    """The token ids of the question of a row, as the model is asked."""
    text = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def grade(tokenizer: Any, rows: Sequence[dict[str, Any]], responses: Sequence[Any], key: str) -> torch.Tensor:
    """``score`` or ``acc`` of a response to each row."""
    texts = tokenizer.batch_decode([list(response.ids) for response in responses], skip_special_tokens=True)
    truths = [row["reward_model"]["ground_truth"] for row in rows]
    sources, extras = ([row[name] for row in rows] for name in ("data_source", "extra_info"))
    return torch.tensor([grades[key] for grades in grade_many(texts, truths, sources, extras)])


def means_by_sign(name: str, values: torch.Tensor, advantage: torch.Tensor) -> dict[str, float]:
    """Means of ``values`` [R] where the reward is above and below the mean of its group; none where no reward is."""
    sides = {"above": values[advantage > 0], "below": values[advantage < 0]}
    return {f"{name}_{side}": float(some.mean()) for side, some in sides.items() if len(some)}


def batches(rows: Sequence[dict[str, Any]], settings: RunSettings) -> Iterator[list[dict[str, Any]]]:
    """Questions in random order, epoch after epoch; a rest that fills no batch is left out."""
    if len(rows) < settings.batch:
        raise ConfigError(f"{settings.data} has {len(rows)} training questions; set batch to {len(rows)} or less")
    for epoch in itertools.count():
        order = np.random.default_rng(request_seed(settings.seed, "data", epoch)).permutation(len(rows))
        for start in range(0, len(rows) - settings.batch + 1, settings.batch):
            yield [rows[at] for at in order[start : start + settings.batch]]


def evaluate(trainer: Any, splits: dict[str, list[dict[str, Any]]], size: int | None) -> dict[str, float]:
    """Accuracy of responses to the first ``size`` questions of each split."""
    found, temperature = {}, trainer.settings.eval_temperature
    for split, rows in splits.items():
        rows, right = rows[:size], []
        for at, some in enumerate(chunks(rows, 256)):
            texts = [[question_ids(trainer.tokenizer, row)] for row in some]
            responses = trainer.generate(texts, "evaluate", split, at, temperature=temperature)
            right.append(grade(trainer.tokenizer, some, responses, "acc"))
        name = f"val-core/{rows[0]['data_source']}" if split == "test" else f"val-{split}"
        found |= {f"{name}/acc/mean@1": float(torch.cat(right).mean()), f"val-aux/{split}/questions": len(rows)}
    return found


def train(trainer: Any) -> None:
    """Run the steps of a trainer, and write the metrics of each and the model of the last."""
    settings = trainer.settings
    output, data = Path(settings.output), Path(settings.data)
    paths = {split: data / f"{split}.parquet" for split in ("train", "test", "ood")}
    splits = {
        split: pq.read_table(path).to_pylist() for split, path in paths.items() if split != "ood" or path.exists()
    }
    source = batches(splits.pop("train"), settings)
    output.mkdir(parents=True, exist_ok=True)
    with (output / "metrics.jsonl").open("w") as log:
        for step in range(settings.steps + 1):
            metrics = trainer.step(step, next(source)) if step else {}
            if step % settings.eval_every == 0 or step == settings.steps:
                metrics |= evaluate(trainer, splits, None if step == settings.steps else settings.eval_size)
            print(json.dumps({"step": step, "data": metrics}), file=log, flush=True)
            shown = {name: value for name, value in metrics.items() if "mean" in name or "missing" in name and value}
            print(f"step {step}:", *(f"{name} {value:.3f}" for name, value in shown.items()), flush=True)
    trainer.model.save(output / "model")


def command(make_trainer: Callable[[RunSettings], Any], argv: Sequence[str] | None = None) -> int:
    """Run the command line: options for the method, the folders, the seed and the steps, then ``name=value ...``."""
    parser = argparse.ArgumentParser(description="Train a small model with GRPO, GVPO or GCPO in one process.")
    for name in ("method", "model", "data", "output"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("seed", "steps"):
        parser.add_argument(f"--{name}", type=int, default=RunSettings.model_fields[name].default)
    parser.add_argument("settings", nargs="*", metavar="name=value", help="fields of RunSettings")
    args = vars(parser.parse_args(argv))
    torch.set_num_threads(1)  # the result does not depend on the number of cores
    try:
        named: Any = OmegaConf.to_container(OmegaConf.from_dotlist(args.pop("settings")))
        train(make_trainer(RunSettings.parse({**args, **named}, "settings")))
    except (ConfigError, RunStoppedError, OSError) as error:
        print(f"gcpo_in_one_file: {error}", file=sys.stderr)
        return 2
    return 0
