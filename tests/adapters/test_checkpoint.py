"""A resumed engine has the weights of its checkpoint and hands them to the rollout; damaged ones are rejected."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from verl.trainer.ppo.checkpoint_callback import CheckpointCallback
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from gcpo import checkpoints
from gcpo.adapters import checkpoints as adapter
from gcpo.adapters.checkpoints import WholeCheckpoints
from gcpo.checkpoints import CheckpointError
from gcpo.notices import MARK
from tests.adapters.ranks import build_engine, full, run_on_ranks


def save_and_load(rank: int, world: int, path: str, folder: str) -> tuple[bool, bool, bool]:
    trained = build_engine(path)
    with torch.no_grad():
        for parameter in trained.module.parameters():
            parameter.add_(0.25)
    trained.save_checkpoint(folder, global_step=3)
    resumed = build_engine(path)
    before = {n: full(p.detach()) for n, p in resumed.module.named_parameters()}
    resumed.load_checkpoint(folder)
    after = {n: full(p.detach()) for n, p in resumed.module.named_parameters()}
    wanted = {n: full(p.detach()) for n, p in trained.module.named_parameters()}
    sent = dict(resumed.get_per_tensor_param()[0])
    tied = {n: t for n, t in sent.items() if n in wanted}
    return (
        any(not torch.equal(before[n], wanted[n]) for n in wanted),
        all(torch.equal(after[n], wanted[n]) for n in wanted),
        bool(tied) and all(torch.equal(full(t), wanted[n].to(t.dtype)) for n, t in tied.items()),
    )


def test_weights_survive_a_resume(tiny_model: Path, tmp_path: Path) -> None:
    """Save, build anew, load: the weights are the saved ones, and so is what goes to vLLM."""
    assert run_on_ranks(1, save_and_load, str(tiny_model), str(tmp_path / "actor")) == [(True, True, True)]


# ---- verl's trainer with whole checkpoints: its own save and load code over stand-ins for the workers --------------


class Actors:
    """Writes and reads shards as the FSDP ranks do."""

    world_size = 2

    def __init__(self) -> None:
        self.loaded: str | None = None
        self.kept: list[object] = []
        self.content = torch.zeros(10)

    def shards(self, folder: str) -> list[Path]:
        kinds = ("model", "optim", "extra_state")
        return [Path(folder) / f"{kind}_world_size_2_rank_{rank}.pt" for kind in kinds for rank in range(2)]

    def save_checkpoint(self, path: str, remote: object, step: int, max_ckpt_to_keep: object = None) -> None:
        self.kept.append(max_ckpt_to_keep)
        Path(path).mkdir(parents=True, exist_ok=True)
        for shard in self.shards(path):
            torch.save({"weight": self.content}, shard)

    def load_checkpoint(self, local_path: str, del_local_after_load: bool = False) -> None:
        for shard in self.shards(local_path):
            torch.load(shard, weights_only=False)
        self.loaded = Path(local_path).parent.name


class Loader:
    def __init__(self) -> None:
        self.state: dict | None = None

    def state_dict(self) -> dict:
        return {"position": 3}

    def load_state_dict(self, state: dict) -> None:
        self.state = state


def make_trainer(root: Path, **settings: object) -> Any:
    class Trainer(WholeCheckpoints, PPOTrainerSync):
        def __init__(self) -> None:
            self.config = OmegaConf.create(
                {
                    "trainer": {
                        "default_local_dir": str(root),
                        "default_hdfs_dir": None,
                        "resume_mode": "auto",
                        "resume_from_path": None,
                        "del_local_ckpt_after_load": False,
                        "max_actor_ckpt_to_keep": None,
                        **settings,
                    },
                    "actor_rollout_ref": {
                        "actor": {
                            "checkpoint": {
                                "save_contents": ["model", "optimizer", "extra"],
                                "load_contents": ["model", "optimizer", "extra"],
                            }
                        }
                    },
                }
            )
            OmegaConf.set_struct(self.config, True)
            self.trainer_mode = "sync"
            self.use_critic = False
            self.actor_rollout_wg = Actors()
            self.train_dataloader = Loader()
            self.checkpoint_callback = CheckpointCallback()

    return Trainer()


def save_steps(trainer: Any, *steps: int) -> None:
    for step in steps:
        trainer.global_steps = step
        trainer._save_checkpoint()


@pytest.fixture(autouse=True)
def one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "survey_machines", checkpoints.survey)


def test_the_newest_whole_checkpoint_is_loaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_steps(make_trainer(tmp_path), 1, 2, 3)
    shard = tmp_path / "global_step_3" / "actor" / "model_world_size_2_rank_1.pt"
    shard.write_bytes(shard.read_bytes()[:100])
    (tmp_path / "global_step_2" / "data.pt").unlink()
    (tmp_path / checkpoints.TRACKER).write_text("")
    trainer = make_trainer(tmp_path)
    trainer._load_checkpoint()
    assert trainer.actor_rollout_wg.loaded == "global_step_2" and trainer.global_steps == 2
    said = [record.getMessage() for record in caplog.records if MARK in record.getMessage()]
    assert len(said) == 3 and "global_step_3 is rejected: actor/model_world_size_2_rank_1.pt has 100 bytes" in said[0]
    assert "is empty" in said[1] and "no state of the data loader" in said[2]
    # What the user set is as it was.
    assert (trainer.config.trainer.resume_mode, trainer.config.trainer.resume_from_path) == ("auto", None)


def test_the_data_loader_goes_on(tmp_path: Path) -> None:
    save_steps(make_trainer(tmp_path), 2)
    trainer = make_trainer(tmp_path)
    trainer._load_checkpoint()
    assert trainer.train_dataloader.state == {"position": 3}


def test_modes_of_resuming(tmp_path: Path) -> None:
    save_steps(make_trainer(tmp_path), 1, 2)
    named = make_trainer(tmp_path, resume_mode="resume_path", resume_from_path=str(tmp_path / "global_step_1"))
    named._load_checkpoint()
    assert named.actor_rollout_wg.loaded == "global_step_1"
    for settings in ({"resume_mode": "disable"}, {"default_local_dir": str(tmp_path / "new")}):
        anew = make_trainer(tmp_path, **settings)
        anew._load_checkpoint()
        assert anew.actor_rollout_wg.loaded is None and anew.global_steps == 0
    missing = make_trainer(tmp_path, resume_mode="resume_path", resume_from_path=str(tmp_path / "global_step_7"))
    with pytest.raises(CheckpointError, match="global_step_7 cannot be used: there is no such folder"):
        missing._load_checkpoint()


def test_damage_that_only_loading_shows_is_one_sentence(tmp_path: Path) -> None:
    save_steps(make_trainer(tmp_path), 2)
    shard = tmp_path / "global_step_2" / "actor" / "model_world_size_2_rank_0.pt"
    data = bytearray(shard.read_bytes())
    at = data.index(b"weight")
    data[at - 8 : at + 8] = bytes(16)  # inside the pickle: size and directory are right
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match="global_step_2 has all its files and cannot be loaded"):
        make_trainer(tmp_path)._load_checkpoint()


@pytest.mark.parametrize("settings", [{"max_actor_ckpt_to_keep": 1}, {"remove_previous_ckpt_in_save": True}])
def test_the_last_whole_one_stays_until_the_next_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict
) -> None:
    """verl's manager would remove the old shards while the new ones are written: it is told to keep all."""
    trainer = make_trainer(tmp_path, **settings)
    save_steps(trainer, 1, 2)
    assert [folder.name for folder in checkpoints.checkpoints_in(tmp_path)] == ["global_step_2"]

    def full() -> dict:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(trainer.train_dataloader, "state_dict", full)
    with pytest.raises(CheckpointError) as caught:
        save_steps(trainer, 3)
    said = str(caught.value)
    assert "step 3 could not be written" in said and "no space is left on the disk" in said and "\n" not in said
    assert f"the last whole checkpoint is {tmp_path}/global_step_2" in said
    assert trainer.actor_rollout_wg.kept == [None, None, None]
    assert {name: trainer.config.trainer[name] for name in settings} == settings
    again = make_trainer(tmp_path)
    again._load_checkpoint()
    assert again.actor_rollout_wg.loaded == "global_step_2" and not (tmp_path / "global_step_3").exists()


def test_a_full_disk_while_shards_are_written(small_disk: Path) -> None:
    trainer = make_trainer(small_disk)
    save_steps(trainer, 1)
    trainer.actor_rollout_wg.content = torch.zeros(2**19)
    with pytest.raises(CheckpointError, match="step 2 .*no space is left .*last whole checkpoint is .*step_1"):
        save_steps(trainer, 2)
    again = make_trainer(small_disk)
    again._load_checkpoint()
    assert again.actor_rollout_wg.loaded == "global_step_1"


def test_an_error_that_is_not_of_the_disk_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path)
    save_steps(trainer, 1)

    def died(*_: object, **__: object) -> None:
        raise ConnectionResetError("the worker is gone")

    monkeypatch.setattr(trainer.actor_rollout_wg, "save_checkpoint", died)
    with pytest.raises(ConnectionResetError):
        save_steps(trainer, 2)
    again = make_trainer(tmp_path)
    again._load_checkpoint()
    assert again.actor_rollout_wg.loaded == "global_step_1"


def test_a_full_disk_under_the_metrics_ends_the_run_in_a_sentence(tmp_path: Path) -> None:
    class Failing:
        global_steps = 5

        def fit(self, agent_loop_manager: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    class Trainer(WholeCheckpoints, Failing):
        config = OmegaConf.create({"trainer": {"default_local_dir": str(tmp_path)}})

    with pytest.raises(CheckpointError, match="step 5 could not write a file: no space is left .*no checkpoint yet"):
        Trainer().fit(None)


def test_files_of_all_machines_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two machines with local disks: the other one's answer is added to what is found here."""
    save_steps(make_trainer(tmp_path), 2)
    folder = tmp_path / "global_step_2"
    there = checkpoints.survey(folder)
    for shard in (folder / "actor").glob("*_rank_1.pt"):
        shard.unlink()
    asked: list[str] = []

    class Remote:
        def options(self, scheduling_strategy: Any) -> Remote:
            asked.append(scheduling_strategy.node_id)
            return self

        def remote(self, path: Path) -> dict:
            return there

    nodes = [{"NodeID": f"{i}" * 56, "Alive": i != 3} for i in range(1, 4)]
    context = SimpleNamespace(get_node_id=lambda: nodes[0]["NodeID"])
    stand_in = SimpleNamespace(
        get_runtime_context=lambda: context,
        nodes=lambda: nodes,
        remote=lambda **_: lambda function: Remote(),
        get=lambda answers: answers,
    )
    monkeypatch.undo()
    monkeypatch.setattr(adapter, "ray", stand_in)
    assert set(adapter.survey_machines(folder)) == set(there) and asked == [nodes[1]["NodeID"]]
