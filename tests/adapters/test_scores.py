"""Rewards of every type, through verl's reward manager, our agent-loop worker, verl's validation and our trainer."""

from __future__ import annotations

import asyncio
import math
import pickle
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from gcpo.rewards.scores import checked_info, number, score_problem
from tests.adapters.memory_queue import MemoryQueue
from tests.adapters.test_pipeline import Server, make_trainer, questions, real, roll_out, take_step

NUMBERS = [
    (1, 1.0),
    (0.5, 0.5),
    (True, 1.0),
    (np.float32(0.5), 0.5),
    (np.float64(0.25), 0.25),
    (np.int64(2), 2.0),
    (np.bool_(True), 1.0),
    (np.array(0.5), 0.5),
    (np.array([0.5]), 0.5),
    (torch.tensor(0.5), 0.5),
    (torch.tensor([1.0]), 1.0),
    (torch.tensor(True), 1.0),
    (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
    (Fraction(1, 2), 0.5),
    (Decimal("0.5"), 0.5),
]
NO_NUMBERS = [
    None,
    "1.0",
    "right",
    "",
    [1.0],
    [],
    (0.5, 0.5),
    {},
    {"reward": 1.0},
    {"score": None},
    {"score": "1.0", "acc": "yes"},
    {"score": [1.0]},
    math.nan,
    math.inf,
    -math.inf,
    1e39,
    10**400,
    1 + 1j,
    np.array([0.5, 0.5]),
    np.array([]),
    np.array("1.0"),
    np.float32("nan"),
    torch.tensor([0.5, 0.5]),
    torch.tensor(math.nan),
    b"1",
    Decimal("sNaN"),
    object,
]


@pytest.mark.parametrize(("value", "score"), NUMBERS, ids=repr)
def test_numbers(value: Any, score: float) -> None:
    """One number of any library is that number, as a Python float."""
    assert score_problem(value) is None
    assert number(value) == score and type(number(value)) is float


@pytest.mark.parametrize("value", [v for v in NO_NUMBERS if not isinstance(v, dict)], ids=repr)
def test_no_numbers(value: Any) -> None:
    """Everything else is named with its type; a long value is cut."""
    assert "returned" in score_problem(value)
    assert len(score_problem("x" * 10_000)) < 200


class RewardWorker:
    """verl's reward-loop worker over its reward manager, with the results pickled as Ray does."""

    def __init__(self, config: Any, tokenizer: Any, function: Callable[..., Any]) -> None:
        self.config, self.tokenizer, self.function = config, tokenizer, function
        self.compute_score = SimpleNamespace(remote=self._compute)

    async def _compute(self, data: Any) -> dict[str, Any]:
        from verl.experimental.reward_loop.reward_manager.naive import NaiveRewardManager

        result = await NaiveRewardManager(self.config, self.tokenizer, self.function).run_single(data)
        return pickle.loads(pickle.dumps(result))


def test_what_a_reward_function_returns(make_config: Callable, queue: MemoryQueue, tokenizer: Any) -> None:
    """One number is the score; anything else scores 0 and is counted. Every response is stored, with a score."""
    from verl.utils import tensordict_utils as tu

    values = [value for value, _ in NUMBERS] + NO_NUMBERS
    config, batch = make_config("gcpo.preset=light"), questions(len(values))
    tu.assign_non_tensor_stack(batch, "reward_model", [{"ground_truth": i} for i in range(len(values))])
    worker = RewardWorker(config, tokenizer, lambda ground_truth, **kwargs: values[ground_truth])
    roll_out(config, Server(), worker, batch=batch)
    for i, value in enumerate(values):
        assert queue.tags["train"][f"uid{i}"]["status"] == "finished", value
        rows = [queue.fields["train"][f"uid{i}_{session}_0"] for session in range(4)]
        score = NUMBERS[i][1] if i < len(NUMBERS) else 0.0
        for fields in rows:
            info = fields["extra_fields"]["reward_extra_info"]
            assert fields["rm_scores"].sum() == score, value
            assert info["reward_error"] == float(i >= len(NUMBERS)), value
            assert all(math.isfinite(info.get(name, 0.0)) for name in ("score", "acc", "format"))
        # The rewards are equal, and known to be: the group's colliders were drawn for the kappa term only.
        assert sum(bool(fields["gcpo_context_lengths"].any()) for fields in rows) == 1, value


def mixed(solution_str: str, **kwargs: Any) -> Any:
    """Returns something else for every response."""
    values = [1.0, *NO_NUMBERS, {"score": 1.0, "acc": 1, "note": "good", "parts": [1, 2], "level": np.int64(3)}]
    value = values[sum(map(ord, solution_str)) % len(values)]
    if value is object:
        raise RuntimeError("no answer")
    return value


def test_a_step_with_rewards_of_many_types(make_config: Callable, queue: MemoryQueue, tokenizer: Any) -> None:
    """The step goes through; what could not be graded is counted, and the metrics are numbers."""
    config = make_config("gcpo.preset=light")
    batch = questions(8)
    roll_out(config, Server(), RewardWorker(config, tokenizer, mixed), batch=batch)
    trainer = make_trainer(config, queue, tokenizer)
    batch, metrics = take_step(trainer, queue)
    infos = [queue.fields["train"][key]["extra_fields"]["reward_extra_info"] for key in real(batch)]
    errors = sum(info["reward_error"] for info in infos)
    assert 0 < errors < len(infos) == 32 and metrics["gcpo/reward/errors"] == errors
    assert math.isfinite(metrics["gcpo/reward/acc"])


def test_validation_with_rewards_of_many_types(
    make_config: Callable,
    queue: MemoryQueue,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """verl's own validation averages them: responses that could not be graded have accuracy 0 and are counted."""
    import transfer_queue

    config = make_config("gcpo.preset=light", "actor_rollout_ref.rollout.val_kwargs.n=4")
    trainer = make_trainer(config, queue, tokenizer)
    worker = RewardWorker(config, tokenizer, mixed)
    rows = questions(6, validate=True)
    columns = {name: list(rows[name]) for name in ("raw_prompt", "index", "data_source")}
    columns["reward_model"] = [{"style": "rule", "ground_truth": "1"}] * 6
    trainer.val_dataloader = [{name: np.array(values, dtype=object) for name, values in columns.items()}]
    monkeypatch.setattr(transfer_queue, "kv_clear", lambda **kwargs: None, raising=False)
    trainer.agent_loop_manager = SimpleNamespace(
        generate_sequences=lambda batch: roll_out(config, Server(), worker, batch=batch)
    )
    trainer.reward_loop_manager = SimpleNamespace(reward_loop_worker_handles=[worker])
    trainer.replay_buffer = SimpleNamespace(sample=lambda **kwargs: (queue.meta(queue.finished_rows("val"), "val"), {}))
    # Outside of a running loop, as in verl's trainer.
    asyncio.set_event_loop(asyncio.new_event_loop())
    metrics = trainer._validate()
    infos = [fields["extra_fields"]["reward_extra_info"] for fields in queue.fields["val"].values()]
    assert len(infos) == 24 and 0 < sum(info["reward_error"] for info in infos) < 24
    assert metrics["val-core/arithmetic/acc/mean@4"] == pytest.approx(sum(i.get("acc", 0.0) for i in infos) / 24)
    errors = next(value for name, value in metrics.items() if name.endswith("arithmetic/reward_error/mean@4"))
    assert errors == pytest.approx(sum(info["reward_error"] for info in infos) / 24)


def test_a_reward_function_that_counts_its_own_errors(
    make_config: Callable,
    queue: MemoryQueue,
    tokenizer: Any,
) -> None:
    """``gcpo.rewards.guarded`` reports an error under the same name: it stays counted."""
    from gcpo.rewards import guarded

    def broken(**kwargs: Any) -> float:
        raise RuntimeError("no answer")

    config = make_config("gcpo.preset=light")
    roll_out(config, Server(), RewardWorker(config, tokenizer, guarded(broken)), batch=questions(1))
    for fields in queue.fields["train"].values():
        assert fields["extra_fields"]["reward_extra_info"]["reward_error"] == 1.0


def test_extra_information() -> None:
    """Numbers of any library become Python's, texts and None stay, anything else becomes a text."""
    given = {"acc": np.float32(1), "format": None, "level": torch.tensor(3), "ok": True, "pred": "4", "none": None,
             "parts": [1, 2], "path": Path("x"), "loss": math.nan}  # fmt: skip
    checked = checked_info(given)
    assert "format" not in checked and math.isnan(checked.pop("loss"))
    assert checked == {
        "acc": 1.0, "level": 3.0, "ok": True, "pred": "4", "none": None, "parts": "[1, 2]", "path": "x"
    }  # fmt: skip
    assert checked_info(None) == {} and checked_info("acc") == {}
