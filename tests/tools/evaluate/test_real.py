"""The real thing: two ranks save a checkpoint, verl's merger merges it, vLLM samples it, and the table is printed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from examples.arithmetic.task import prepare
from examples.arithmetic.warm_start import Recipe, warm_start
from tests.adapters.ranks import build_engine, run_on_ranks

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.slow


def save(rank: int, world: int, path: str, folder: str) -> None:
    build_engine(path).save_checkpoint(folder, global_step=2)


def evaluation(*arguments: object) -> str:
    """What the command prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    command = [sys.executable, "-m", "gcpo.tools.evaluate", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


def test_from_a_checkpoint_to_the_table(tmp_path: Path) -> None:
    prepare(tmp_path / "arithmetic", train_size=32, test_size=12)
    model = tmp_path / "model"
    warm_start(tmp_path / "arithmetic", model, Recipe(plain_examples=3000, candidate_examples=300))
    step = tmp_path / "run" / "checkpoints" / "global_step_2"
    run_on_ranks(2, save, str(model), str(step / "actor"))
    assert len(list((step / "actor").glob("model_world_size_2_rank_*.pt"))) == 2

    output = tmp_path / "out"
    options = ["--sets", tmp_path / "arithmetic", "--samples", 3, "--limit", 8, "--max-tokens", 40, "--output", output]
    shown = evaluation(step, *options)

    # Merged once, and to the weights that were saved (verl's merger rounds them to bfloat16).
    assert "with verl's merger" in shown
    merged, saved = load_file(step / "merged" / "model.safetensors"), load_file(model / "model.safetensors")
    assert all(torch.equal(saved[name].bfloat16(), weight) for name, weight in merged.items()) and merged

    lines = [json.loads(line) for line in (output / "arithmetic.jsonl").read_text().splitlines()]
    assert len({(line["row"], line["sample"]) for line in lines}) == len(lines) == 8 * 3
    assert all(0 < line["tokens"] <= 40 for line in lines)
    assert all((line["finish_reason"] == "length") == (line["tokens"] == 40) for line in lines)
    # The model answers column by column, as it was taught: the prompt was the one it knows.
    assert sum(line["answer"] is not None for line in lines) >= len(lines) / 2
    assert len({line["text"] for line in lines}) > 8  # samples of a question differ
    assert "arithmetic  24/24 samples" in shown and "details, %" in shown

    # Stopped in the middle of a line: the missing samples are made again, and are the same.
    whole = (output / "arithmetic.jsonl").read_bytes()
    (output / "arithmetic.jsonl").write_bytes(whole[: whole.index(b"\n", len(whole) // 2) + 20])
    (output / "results.json").unlink()
    shown = evaluation(step, *options)
    assert "samples are there; starting vLLM" in shown and "merger" not in shown
    again = [json.loads(line) for line in (output / "arithmetic.jsonl").read_text().splitlines()]
    key = lambda line: (line["row"], line["sample"])  # noqa: E731
    assert sorted(again, key=key) == sorted(lines, key=key)

    table = evaluation("table", f"first={output}", f"second={output}", "--format", "csv").splitlines()
    right = sum(line["scores"]["acc"] for line in lines) / len(lines)
    assert [line.split(",")[0] for line in table] == ["run", "first", "second"]
    assert table[1].split(",")[4] == f"{right:.6f}" and table[2].split(",")[7] == "0.000000"
