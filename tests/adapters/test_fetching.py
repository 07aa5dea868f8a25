"""Which fields each stage of a step fetches: ours are large, and most stages read none of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from gcpo.adapters.schema import method_fields
from gcpo.adapters.stability import StableTrainer
from gcpo.adapters.trainer import MethodTrainer, OwnFieldsTrainer
from gcpo.methods import method_class
from gcpo.methods.gcpo.draws import Draw
from gcpo.methods.gcpo.fields import DUMP as DUMP_FIELDS
from gcpo.methods.gcpo.rollout import dump_fields, dumped_draws
from tests.adapters.conftest import N
from tests.adapters.memory_queue import MemoryQueue
from tests.adapters.test_pipeline import GENERATED, QUESTIONS, Server, make_trainer, real, roll_out, take_step

KAPPA = {"gcpo_log_ref", "gcpo_kl_mask", "gcpo_kl_weight"}


class Stop(Exception):
    """Ends a stage of verl where it has called its worker."""


class Workers:
    """A worker group that remembers the fields that a call would fetch."""

    def __init__(self, queue: MemoryQueue) -> None:
        self.queue = queue
        self.fetched: set[str] = set()
        self._dispatch_info = {"actor": [0]}

    def __getattr__(self, name: str) -> Callable:
        def call(batch: Any) -> Any:
            known = batch.fields or list(self.queue.kv_batch_get(batch.keys, batch.partition_id).keys())
            self.fetched = set(known)
            raise Stop

        return call


def own(names: set[str]) -> set[str]:
    return names & method_fields()


STAGES = ("_compute_old_log_prob", "_compute_ref_log_prob", "_compute_values", "_update_critic", "_update_actor")


@pytest.mark.parametrize("ref_in_actor", [True, False])
@pytest.mark.parametrize(
    ("overrides", "kept"),
    [
        (("gcpo.preset=paper",), KAPPA | {"gcpo_contexts", "gcpo_context_lengths"}),
        ((*GENERATED, "gcpo.reference.policy_condition=query"), KAPPA),
        ((*GENERATED, "gcpo.kappa=0"), set()),
    ],
    ids=["collider", "query", "kappa 0"],
)
def test_stages_fetch_what_they_read(
    make_config: Callable,
    queue: MemoryQueue,
    tokenizer: Any,
    overrides: tuple[str, ...],
    kept: set[str],
    ref_in_actor: bool,
) -> None:
    """After a step, with every field that it leaves in the queue: verl's stages fetch all of verl's and none of ours,
    the update those of the kappa term that it reads."""
    config = make_config(*overrides, "trainer.rollout_data_dir=somewhere", "gcpo.metrics.dump_fraction=1")
    roll_out(config, Server())
    trainer = make_trainer(config, queue, tokenizer)
    batch, _ = take_step(trainer, queue)
    rows = set(queue.fields["train"][batch.keys[0]])
    assert {"gcpo_outputs", "gcpo_group", "gcpo_z_regenerated", *DUMP_FIELDS} <= rows
    trainer.ref_in_actor = ref_in_actor
    trainer.actor_rollout_wg = trainer.ref_policy_wg = trainer.critic_wg = workers = Workers(queue)
    for stage in STAGES:
        for fields in (None, sorted(rows)):
            batch.fields, workers.fetched = fields, set()
            with pytest.raises(Stop):
                getattr(trainer, stage)(batch, {})
            assert batch.fields == fields, stage
            assert own(workers.fetched) == (kept if stage == "_update_actor" else set()), stage
            assert workers.fetched - own(workers.fetched) == rows - own(rows), stage


def test_every_stage_goes_through_the_selection() -> None:
    """No class in front of it replaces a stage without calling it; GC2PO's update reads no field of its own."""
    assert "term" not in vars(method_class("gc2po"))
    for stage in ("_compute_ref_log_prob", "_compute_values", "_update_critic"):
        before = MethodTrainer.__mro__[: MethodTrainer.__mro__.index(OwnFieldsTrainer)]
        assert not [cls for cls in before if stage in vars(cls)]
    # The check of the updates wraps the update, and calls it.
    assert "_update_actor" in vars(StableTrainer)
    assert all(name in vars(OwnFieldsTrainer) for name in STAGES)


@contextmanager
def selections(queue: MemoryQueue, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[set[str]]]:
    """The field names of every reading of the driver."""
    import transfer_queue

    seen: list[set[str]] = []

    def get(keys: list[str], partition_id: str, select_fields: list[str] | None = None) -> Any:
        data = queue.kv_batch_get(keys, partition_id, select_fields)
        # One row tells the names; more rows without a selection would be the whole batch.
        seen.append(set(data.keys()) if len(keys) > 1 else set())
        return data

    with monkeypatch.context() as patch:
        patch.setattr(transfer_queue, "kv_batch_get", get)
        yield seen


def test_the_dump_is_read_by_the_dump(
    make_config: Callable, queue: MemoryQueue, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No stage of a step reads the draws of the dump; they are tensors, in the first row of a group."""
    config = make_config(*GENERATED, f"trainer.rollout_data_dir={tmp_path}", "gcpo.metrics.dump_fraction=1")
    roll_out(config, Server())
    trainer = make_trainer(config, queue, tokenizer)
    with selections(queue, monkeypatch) as seen:
        batch, _ = take_step(trainer, queue)
    assert seen and not any(names & set(DUMP_FIELDS) for names in seen)
    with selections(queue, monkeypatch) as seen:
        trainer._init_dump_executor()
        trainer._log_rollout_data(batch, {}, str(tmp_path))
        trainer._shutdown_dump_executor()
    assert sum(bool(names & set(DUMP_FIELDS)) for names in seen) == 1
    first = {min(keys, key=lambda key: int(key.split("_")[1])) for keys in by_group(real(batch)).values()}
    for key in batch.keys:
        row = queue.fields["train"][key]
        assert row["gcpo_dump_tokens"].dtype == row["gcpo_dump_draws"].dtype == torch.int32
        assert bool(dumped_draws(*(row[name] for name in DUMP_FIELDS))) == (key in first)
        assert "draws" not in (row["gcpo_group"] or {})


def by_group(keys: list[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for key in keys:
        groups.setdefault(key.split("_")[0], []).append(key)
    return groups


def test_a_dump_of_few_groups(
    make_config: Callable, queue: MemoryQueue, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By default few groups are dumped. A step without any dumps nothing, and every row has the fields all the same:
    TransferQueue drops a field that one row lacks."""
    config = make_config(*GENERATED, f"trainer.rollout_data_dir={tmp_path}")
    assert config.gcpo.metrics.dump_fraction <= 0.1
    config.gcpo.metrics.dump_fraction = 1e-9
    roll_out(config, Server())
    assert all(set(DUMP_FIELDS) <= set(row) for row in queue.fields["train"].values())
    trainer = make_trainer(config, queue, tokenizer)
    batch, _ = take_step(trainer, queue)
    assert len(real(batch)) == N * QUESTIONS
    dumped: list[Any] = []
    monkeypatch.setattr(PPOTrainerSync.__mro__[1], "_log_rollout_data", lambda *args: None)
    monkeypatch.setattr(trainer, "_dump_generations", lambda **kwargs: dumped.append(kwargs), raising=False)
    trainer._log_rollout_data(batch, {}, str(tmp_path))
    assert dumped == []


def test_dump_fields() -> None:
    """Draws come back as they were, those without tokens and without a reward too."""
    draws = [
        Draw([5, 6, 7], "collider", "ok", reward=0.25, prompt=(2, 0, 1)),
        Draw([], "leave_one_out", "failed", left_out=1, prompt=(2, 0)),
        Draw([8], "regenerated", "cut", left_out=0),
    ]
    draws[2].prompt = [2, 1, draws[0]]
    fields = dump_fields(draws)
    assert tuple(fields) == DUMP_FIELDS
    names = ("draw", "kind", "outcome", "left_out", "prompt", "reward", "token_ids")
    assert dumped_draws(*fields.values()) == [
        dict(zip(names, values, strict=True))
        for values in (
            (0, "collider", "ok", None, ["response 2", "response 0", "response 1"], 0.25, [5, 6, 7]),
            (1, "leave_one_out", "failed", 1, ["response 2", "response 0"], None, []),
            (2, "regenerated", "cut", 0, ["response 2", "response 1", "draw 0"], None, [8]),
        )
    ]
    empty = dump_fields([])
    assert dumped_draws(*empty.values()) == [] and all(len(value) == 1 for value in empty.values())
    assert dumped_draws(*dump_fields([Draw([], "collider", "empty")]).values())[0]["token_ids"] == []


def test_fields_of_other_methods() -> None:
    """The fields of every method are hidden, those that are kept are not."""
    trainer = object.__new__(MethodTrainer)
    names = ["prompts", "gcpo_z", "gc2po_index", "gcpo_kl_mask"]
    batch = SimpleNamespace(fields=names)
    with trainer._only_verls_fields(batch, ("gcpo_kl_mask",)):
        assert batch.fields == ["prompts", "gcpo_kl_mask"]
    assert batch.fields == names
