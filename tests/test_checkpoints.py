"""Which checkpoints are whole: damage of every kind to folders as verl writes them."""

from __future__ import annotations

import errno
import json

import pytest
import torch

from gcpo import checkpoints
from gcpo.checkpoints import MANIFEST, TRACKER, CheckpointError, Needs

NEEDS = Needs(ranks=2)


def save(root, step, ranks=2, manifest=True, data=True):
    """A checkpoint with verl's file names."""
    folder = root / f"global_step_{step}"
    actor = folder / "actor"
    (actor / "huggingface").mkdir(parents=True)
    for rank in range(ranks):
        for kind in ("model", "optim", "extra_state"):
            torch.save({"x": torch.arange(50) + step}, actor / f"{kind}_world_size_{ranks}_rank_{rank}.pt")
    (actor / "fsdp_config.json").write_text(json.dumps({"world_size": ranks}))
    (actor / "huggingface" / "config.json").write_text("{}")
    if data:
        torch.save({"position": step}, folder / "data.pt")
    (root / TRACKER).write_text(str(step))
    if manifest:
        checkpoints.finish(folder, Needs(ranks))
    return folder


@pytest.fixture
def root(tmp_path):
    """Two whole checkpoints."""
    save(tmp_path, 2)
    save(tmp_path, 4)
    return tmp_path


def test_the_newest_whole_one_is_chosen(root):
    choice = checkpoints.choose(root, NEEDS)
    assert choice.path == root / "global_step_4" and choice.rejected == [] and choice.notes == []


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def zeros(path):
    """What is left where a power failure came before the content: the size is right."""
    path.write_bytes(bytes(path.stat().st_size))


MODEL = "actor/model_world_size_2_rank_1.pt"
OPTIMIZER = "actor/optim_world_size_2_rank_0.pt"
EXTRA = "actor/extra_state_world_size_2_rank_1.pt"


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        (MODEL, truncate, f"{MODEL} has "),
        (MODEL, lambda path: path.unlink(), f"{MODEL} is missing"),
        (MODEL, zeros, f"{MODEL} is cut off or overwritten"),
        (OPTIMIZER, truncate, f"{OPTIMIZER} has "),
        (OPTIMIZER, lambda path: path.write_bytes(b""), f"{OPTIMIZER} has 0 bytes instead of "),
        (EXTRA, lambda path: path.unlink(), f"{EXTRA} is missing"),
        ("actor/fsdp_config.json", lambda path: path.unlink(), "actor/fsdp_config.json is missing"),
        (
            "actor/huggingface/config.json",
            lambda path: path.write_text(""),
            "actor/huggingface/config.json has 0 bytes",
        ),
        ("data.pt", truncate, "data.pt has "),
        (MANIFEST, lambda path: path.write_text(""), f"{MANIFEST} cannot be read"),
        (MANIFEST, lambda path: path.write_text('{"step": 3, "files": {}}'), f"{MANIFEST} is of step 3"),
        (MANIFEST, lambda path: path.write_text('{"step": 4, "files": []}'), f"{MANIFEST} cannot be read"),
    ],
)
def test_a_damaged_one_is_rejected_with_its_reason(root, name, damage, reason):
    damage(root / "global_step_4" / name)
    choice = checkpoints.choose(root, NEEDS)
    assert choice.path == root / "global_step_2"
    ((folder, said),) = choice.rejected
    assert folder == root / "global_step_4" and said.startswith(reason) and "\n" not in said


@pytest.mark.parametrize(
    ("text", "note"),
    [("", "is empty"), ("four", "holds 'four', which is no step"), ("7", "names step 7, and there is no folder")],
)
def test_a_wrong_tracker_file_is_said_and_the_newest_is_used(root, text, note):
    (root / TRACKER).write_text(text)
    choice = checkpoints.choose(root, NEEDS)
    assert choice.path == root / "global_step_4" and note in choice.notes[0]


def test_without_a_tracker_file(root):
    (root / TRACKER).unlink()
    assert checkpoints.choose(root, NEEDS).path == root / "global_step_4"


def test_a_tracker_file_that_was_changed_to_go_back_is_followed(root):
    (root / TRACKER).write_text("2")
    choice = checkpoints.choose(root, NEEDS)
    assert choice.path == root / "global_step_2"
    assert choice.rejected == [(root / "global_step_4", f"it is newer than step 2, which {TRACKER} names")]


def test_a_missing_data_state_is_said(root):
    (root / "global_step_4" / "data.pt").unlink()
    choice = checkpoints.choose(root, NEEDS)
    assert choice.path == root / "global_step_4"
    assert len(choice.notes) == 1 and "reads the training data from the beginning" in choice.notes[0]


def test_one_of_an_earlier_version_is_used_and_that_is_said(tmp_path):
    folder = save(tmp_path, 3, manifest=False)
    choice = checkpoints.choose(tmp_path, NEEDS)
    assert choice.path == folder and "saved by an earlier version" in choice.notes[0]


@pytest.mark.parametrize("damage", [truncate, zeros, lambda path: path.unlink()])
@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, EXTRA])
def test_a_damaged_one_of_an_earlier_version_is_rejected(tmp_path, name, damage):
    save(tmp_path, 2, manifest=False)
    damage(save(tmp_path, 3, manifest=False) / name)
    choice = checkpoints.choose(tmp_path, NEEDS)
    assert choice.path == tmp_path / "global_step_2" and choice.rejected[0][1].startswith(name)


def test_an_unfinished_first_one_means_the_beginning(tmp_path):
    """A run that was stopped while it saved for the first time: there is nothing to lose."""
    save(tmp_path, 2, manifest=False)
    (tmp_path / "global_step_2" / MODEL).unlink()
    (tmp_path / TRACKER).unlink()
    choice = checkpoints.choose(tmp_path, NEEDS)
    assert choice.path is None and choice.rejected[0][1] == f"{MODEL} is missing"
    assert checkpoints.choose(tmp_path / "nothing", NEEDS) == checkpoints.Choice()


def test_a_run_does_not_start_over_where_finished_ones_are_damaged(root):
    for step in (2, 4):
        (root / f"global_step_{step}" / MODEL).unlink()
    with pytest.raises(CheckpointError, match=f"no checkpoint in .*global_step_4: {MODEL} is missing.*resume_mode=dis"):
        checkpoints.choose(root, NEEDS)


def test_a_run_does_not_start_over_where_only_the_tracker_file_is_left(tmp_path):
    (tmp_path / TRACKER).write_text("40")
    with pytest.raises(CheckpointError, match="names step 40, and there is no folder"):
        checkpoints.choose(tmp_path, NEEDS)


def test_another_number_of_ranks(root):
    with pytest.raises(CheckpointError, match="it was saved by 2 ranks and this run has 1"):
        checkpoints.choose(root, Needs(1))


def test_contents_that_were_not_saved(root):
    folder = root / "global_step_4"
    for rank in range(2):
        (folder / f"actor/optim_world_size_2_rank_{rank}.pt").unlink()
    (folder / MANIFEST).unlink()
    assert checkpoints.choose(root, Needs(2, ("model",))).path == folder
    assert checkpoints.choose(root, NEEDS).path == root / "global_step_2"


def test_the_checkpoint_that_the_user_names(root):
    assert checkpoints.check_named(root / "global_step_2", NEEDS) == []
    truncate(root / "global_step_2" / MODEL)
    for name, reason in (("global_step_2", "bytes instead of"), ("global_step_9", "there is no such folder")):
        with pytest.raises(CheckpointError, match=f"{name} cannot be used: .*{reason}"):
            checkpoints.check_named(root / name, NEEDS)


def test_merged_weights_do_not_belong_to_a_checkpoint(root):
    merged = root / "global_step_4" / "merged"
    merged.mkdir()
    (merged / "model.safetensors").write_bytes(b"cut off")
    assert checkpoints.choose(root, NEEDS).path == root / "global_step_4"
    checkpoints.remove(root / "global_step_4")
    assert [path.name for path in (root / "global_step_4").iterdir()] == ["merged"]


def test_the_manifest_is_written_last(tmp_path):
    folder = save(tmp_path, 2, manifest=False)
    (folder / MODEL).unlink()
    with pytest.raises(CheckpointError, match=f"is not whole: {MODEL} is missing"):
        checkpoints.finish(folder, NEEDS)
    assert not (folder / MANIFEST).exists()


def test_saving_a_step_again_marks_it_as_not_whole_first(root):
    folder = root / "global_step_4"
    checkpoints.begin(folder)
    (folder / MODEL).unlink()
    assert checkpoints.choose(root, NEEDS).path == root / "global_step_2"


def test_files_on_several_machines(root):
    """Each machine has the shards of its own ranks: the union counts."""
    local = checkpoints.survey(root / "global_step_4")
    first = {name: state for name, state in local.items() if "rank_1" not in name}
    second = {name: state for name, state in local.items() if "rank_1" in name}
    assert checkpoints.examine(root / "global_step_4", NEEDS, lambda _: {**first, **second})[0] is None
    reason, _ = checkpoints.examine(root / "global_step_4", NEEDS, lambda _: first)
    assert reason.endswith("rank_1.pt is missing")


def test_a_failed_save_leaves_the_last_whole_one(root):
    folder = root / "global_step_6"
    (folder / "actor").mkdir(parents=True)
    (folder / "actor" / "part").write_text("x")
    (root / TRACKER).write_text("")  # verl had opened it when the disk was full
    assert checkpoints.abandon(folder) == root / "global_step_4"
    assert not folder.exists() and (root / TRACKER).read_text() == "4"
    assert checkpoints.choose(root, NEEDS).path == root / "global_step_4"


def test_a_failed_save_on_a_disk_that_stays_full(root, monkeypatch):
    (root / TRACKER).write_text("")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "write_atomically", full)
    assert checkpoints.abandon(root / "global_step_6") == root / "global_step_4"
    assert checkpoints.choose(root, NEEDS).path == root / "global_step_4"


def test_old_ones_go_when_the_new_one_is_whole(root):
    save(root, 6)
    save(root, 8, manifest=False)
    assert checkpoints.retire(root, 6, 2) == [root / "global_step_2"]
    # That of step 8 is of another run or unfinished: it is not counted, and not removed.
    assert [path.name for path in checkpoints.checkpoints_in(root)] == [f"global_step_{n}" for n in (8, 6, 4)]
    assert checkpoints.retire(root, 6, 1) == [root / "global_step_4"]
