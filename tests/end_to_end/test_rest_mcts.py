"""The real stack: vLLM's offline engine, verl's SFT trainer and the value model, in one small iteration each.

What this does not show is learning; `docs/rest_mcts.md` has a run of the embedded task.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from examples.arithmetic.task import prepare
from examples.arithmetic.warm_start import Recipe, make_model, make_tokenizer
from gcpo.selftraining.value_model import ValueModel
from gcpo.tools.evaluate.questions import load_sets
from gcpo.tools.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight questions, and a model that knows a right and a wrong solution to each by heart."""
    folder = tmp_path_factory.mktemp("rest_mcts")
    prepare(folder / "data", train_size=8, test_size=4)
    recipe = Recipe(hidden_size=64, intermediate_size=96, layers=2, heads=2)  # vLLM wants 32 numbers in a head
    tokenizer = make_tokenizer(recipe)
    model = make_model(recipe, tokenizer)
    (found,) = load_sets([str(folder / "data" / "train.parquet")])
    rows = []
    for question in found.questions:
        prompt = tokenizer.apply_chat_template(question.prompt, add_generation_prompt=True, tokenize=False)
        for answer in (int(question.ground_truth), int(question.ground_truth) + 1):
            text = f"{prompt}1+1=2 {answer}-0={answer} \\boxed{{{answer}}}"
            rows.append([*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id])
    width = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.eos_token_id] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    settings = {
        "model": str(folder / "model"),
        "train_file": str(folder / "data" / "train.parquet"),
        "test_file": str(folder / "data" / "test.parquet"),
        "ood_file": str(folder / "data" / "test.parquet"),
        "iterations": 1,
        "questions_together": 5,
        "max_response_tokens": 40,
        "steps": {"separator": " ", "reject_repeated": False},
        "search": {"iterations": 6, "temperature": 1.0},
        "test_search": {"iterations": 3},
        "filter": {"min_value": 0.0, "min_characters": 0},
        "first_value": {"questions": 4, "samples": 2, "rollouts": 2},
        "sampling": {"n": 4},
        "sft": {"epochs": 2, "batch_size": 4, "learning_rate": 1e-3},
        "value": {"batch_size": 8},
        "evaluation": {"search_questions": 2},
    }
    (folder / "small.yaml").write_text(yaml.safe_dump(settings))
    return folder


def self_training(inputs: Path, *arguments: str) -> str:
    """What the command prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    command = [sys.executable, "-m", "recipe.rest_mcts", str(inputs / "small.yaml"), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


def test_one_iteration(inputs: Path, tmp_path: Path) -> None:
    """Search in two groups, fine-tuning, regression and evaluation; a second start finds everything done."""
    output = tmp_path / "run"
    self_training(inputs, "--output", str(output))
    metrics = read_metrics(output)
    assert list(metrics) == [0, 1]
    assert {"val-core/gcpo/arithmetic/acc/mean@1", "val-ood/acc/mean@1", "rest_mcts/test_search/acc"} <= set(metrics[0])
    last = metrics[1]
    assert last["rest_mcts/search/solved_frac"] > 0 and last["rest_mcts/samples/policy"] > 0
    assert last["tokens/generated"] > 0 and last["rest_mcts/value/loss"] > 0 and last["rest_mcts/sft/loss"] > 0

    parts = sorted((output / "iteration-1" / "search").glob("*.json"))
    assert [part.name for part in parts] == ["000000.json", "000005.json"]
    solutions = [one for part in parts for one in json.loads(part.read_text())["solutions"]]
    assert {one["right"] for one in solutions} == {True, False}
    assert all("\\boxed{" in one["text"] for one in solutions if one["right"])

    value = ValueModel.load(output / "iteration-1" / "value", 900)
    assert not torch.equal(value.head.weight, ValueModel.load(output / "iteration-0" / "value", 900).head.weight)
    changed = ValueModel.load(output / "iteration-1" / "policy", 900).body.state_dict()
    before = ValueModel.load(inputs / "model", 900).body.state_dict()
    assert changed.keys() == before.keys() and any(not torch.equal(changed[name], before[name]) for name in before)
    assert changed["model.embed_tokens.weight"].dtype == torch.float32
    assert not (output / "iteration-1" / "sft").exists()

    shown = self_training(inputs, "--output", str(output))
    assert "iteration" not in shown and read_metrics(output) == metrics


def test_rft(inputs: Path, tmp_path: Path) -> None:
    self_training(inputs, "method=rft", "--output", str(tmp_path / "run"))
    metrics = read_metrics(tmp_path / "run")
    assert 0 < metrics[1]["critic/score/mean"] < 1 and metrics[1]["rest_mcts/samples/policy"] > 0
    assert not (tmp_path / "run" / "iteration-1" / "value").exists()
