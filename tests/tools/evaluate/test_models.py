"""What is a model, what is a checkpoint, and what is neither. The merge itself is in test_real.py."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gcpo.tools.evaluate import EvaluationError, models
from gcpo.tools.evaluate.models import find_model, weights_digest
from gcpo.tools.evaluate.questions import load_sets
from gcpo.tools.evaluate.sampling import _printing_into, make_prompts
from tests.tools.evaluate.made import rows, write_set


def checkpoint(folder: Path, world: int = 2) -> Path:
    """A checkpoint with empty shards, and what stands beside them."""
    actor = folder / "run" / "checkpoints" / "global_step_3" / "actor"
    (actor / "huggingface").mkdir(parents=True)
    (actor / "huggingface" / "config.json").write_text("{}")
    (actor / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": world}))
    for rank in range(world):
        (actor / f"model_world_size_{world}_rank_{rank}.pt").write_bytes(b"")
    return actor


@pytest.fixture
def merger(monkeypatch):
    """Stands in for verl's merger: counts its calls and writes a model of one weight."""
    calls: list[Path] = []

    def run(actor: Path, target: Path) -> None:
        calls.append(actor)
        (target / "config.json").write_text("{}")
        save_file({"w": torch.full((4,), float(len(calls)))}, target / "model.safetensors")

    monkeypatch.setattr(models, "_run_merger", run)
    return calls


def test_a_model_folder(tiny_model):
    found = find_model(str(tiny_model))
    assert found.path == str(tiny_model) and found.name == "model" and len(found.digest) == 64


def test_the_digest_is_that_of_the_weights(tiny_model, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    assert weights_digest(copy) == weights_digest(tiny_model)
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    assert weights_digest(copy) != weights_digest(tiny_model)


def test_a_name_on_the_hub():
    found = find_model("owner/Some-Model-1.5B")
    assert (found.name, found.path, found.digest) == ("Some-Model-1.5B", "owner/Some-Model-1.5B", None)


def test_a_checkpoint_is_merged_once(tmp_path, merger):
    actor = checkpoint(tmp_path)
    said: list[str] = []
    first = find_model(str(actor), said.append)
    assert first.path == str(actor.parent / "merged") and first.name == "run-step-3"
    assert find_model(str(actor.parent), said.append) == first
    assert merger == [actor] and len(said) == 1
    assert sorted(path.name for path in actor.parent.iterdir()) == ["actor", "merged"]


def test_a_checkpoint_that_was_written_again_is_merged_again(tmp_path, merger):
    actor = checkpoint(tmp_path)
    first = find_model(str(actor), lambda line: None)
    os.utime(actor / "model_world_size_2_rank_1.pt", ns=(1, 1))
    second = find_model(str(actor), lambda line: None)
    assert len(merger) == 2 and second.path == first.path and second.digest != first.digest


def test_a_merge_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    actor = checkpoint(tmp_path)

    def run(actor: Path, target: Path) -> None:
        (target / "config.json").write_text("{}")
        raise EvaluationError("no")

    monkeypatch.setattr(models, "_run_merger", run)
    with pytest.raises(EvaluationError, match="no"):
        find_model(str(actor), lambda line: None)
    assert [path.name for path in actor.parent.iterdir()] == ["actor"]


def test_a_merge_that_was_killed_is_in_nobody_s_way(tmp_path, merger):
    actor = checkpoint(tmp_path)
    (actor.parent / ".merged.unfinished").mkdir()
    (actor.parent / ".merged.unfinished" / "half").write_text("")
    find_model(str(actor), lambda line: None)
    assert sorted(path.name for path in actor.parent.iterdir()) == ["actor", "merged"]
    assert not (actor.parent / "merged" / "half").exists()


def test_a_folder_called_merged_that_is_not_ours_stays(tmp_path, merger):
    actor = checkpoint(tmp_path)
    (actor.parent / "merged").mkdir()
    (actor.parent / "merged" / "mine").write_text("")
    with pytest.raises(EvaluationError, match="is in the way"):
        find_model(str(actor), lambda line: None)
    assert (actor.parent / "merged" / "mine").exists() and merger == []


def no_shard(actor: Path) -> Path:
    (actor / "model_world_size_2_rank_1.pt").unlink()
    return actor


def no_configuration(actor: Path) -> Path:
    (actor / "huggingface" / "config.json").unlink()
    return actor


def broken_description(actor: Path) -> Path:
    (actor / "fsdp_config.json").write_text("{")
    return actor.parent


def no_description(actor: Path) -> Path:
    (actor / "fsdp_config.json").unlink()
    return actor.parent


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (no_shard, "is not whole: model_world_size_2_rank_1.pt is missing"),
        (no_configuration, "is not whole: huggingface/config.json is missing"),
        (broken_description, r"fsdp_config.json can't be read"),
        (no_description, r"is no model \(no config.json\) and no FSDP checkpoint"),
        (lambda actor: actor.parents[2], "it holds checkpoints, for example .*global_step_3$"),
        (lambda actor: actor / "fsdp_config.json", "is a file; give the folder"),
        (lambda actor: actor / "nothing", "there is no folder"),
    ],
)
def test_what_is_no_checkpoint(tmp_path, merger, damage, sentence):
    path = damage(checkpoint(tmp_path))
    with pytest.raises(EvaluationError, match=sentence) as error:
        find_model(str(path))
    assert "\n" not in str(error.value) and merger == []
    assert not list(tmp_path.rglob("*merged*"))


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def only_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-2.safetensors"}}))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (cut, "model.safetensors is no whole safetensors file"),
        (only_index, "is not whole: model-2.safetensors is missing"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has a config.json and no weights"),
    ],
)
def test_models_that_are_not_whole(tiny_model, tmp_path, damage, sentence):
    shutil.copytree(tiny_model, tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(EvaluationError, match=sentence) as error:
        find_model(str(tmp_path / "model"))
    assert "\n" not in str(error.value)


# ---- the engine's log ------------------------------------------------------------------------------------------------


def test_what_an_engine_prints_goes_into_its_log(tmp_path, capfd):
    log = tmp_path / "vllm.log"
    log.write_text("earlier\n")
    with pytest.raises(ValueError), _printing_into(log):
        os.write(1, b"from here\n")
        subprocess.run(["bash", "-c", "echo from a process; echo and its errors >&2"], check=True)
        child = subprocess.Popen(["bash", "-c", "read; echo later"], stdin=subprocess.PIPE)
        raise ValueError
    print("to the terminal")
    child.communicate(b"\n")
    assert log.read_text().splitlines() == ["earlier", "from here", "from a process", "and its errors", "later"]
    assert capfd.readouterr() == ("to the terminal\n", "")


# ---- prompts ---------------------------------------------------------------------------------------------------------


def test_prompts_are_those_of_training(tiny_model, tokenizer, tmp_path):
    """verl renders a chat with the template and a generation prompt, and encodes it in one go."""
    sets = load_sets([str(write_set(tmp_path / "sums.parquet", rows(2)))])
    prompts = make_prompts(find_model(str(tiny_model)), sets)
    first = prompts.ids[sets[0].questions[0].id]
    expected = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 0 + 0?"}], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert first == list(expected) and tokenizer.decode(first).endswith("<|im_start|>assistant\n")
    assert prompts.context == 2048 and prompts.room(sets[0].questions[0].id, 9999) == 2048 - len(first)


def test_a_prompt_longer_than_the_context(tiny_model, tmp_path):
    long = [{"role": "user", "content": "1 + " * 2000}]
    sets = load_sets([str(write_set(tmp_path / "sums.parquet", [*rows(1), *rows(1, prompt=long)]))])
    with pytest.raises(EvaluationError, match=r"the prompt in row 1 of .*sums.parquet has \d+ tokens .* is 2048"):
        make_prompts(find_model(str(tiny_model)), sets)


def test_a_model_without_a_chat_template(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    sets = load_sets([str(write_set(tmp_path / "sums.parquet", rows(1)))])
    with pytest.raises(EvaluationError, match="has no chat template"):
        make_prompts(find_model(str(tmp_path / "model")), sets)


def test_a_model_that_can_not_be_loaded(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "no-such-type"}')
    sets = load_sets([str(write_set(tmp_path / "sums.parquet", rows(1)))])
    with pytest.raises(EvaluationError, match="can't be loaded") as error:
        make_prompts(find_model(str(tmp_path / "model")), sets)
    assert "\n" not in str(error.value)


def test_no_network(monkeypatch, tmp_path):
    sets = load_sets([str(write_set(tmp_path / "sums.parquet", rows(1)))])
    with pytest.raises(EvaluationError, match="owner/no-such-model can't be loaded") as error:
        make_prompts(find_model("owner/no-such-model"), sets)
    assert "\n" not in str(error.value)
