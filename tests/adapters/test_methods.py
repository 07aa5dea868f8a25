"""Any method through the one trainer: a toy in one file, hooks that raise, and fields of another kind than declared."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import open_dict

from gcpo.adapters import hooks, schema
from gcpo.faults import RunStoppedError
from gcpo.methods import method_class, method_names
from gcpo.methods.base import Method, Run
from gcpo.methods.fields import PROMPTS, Field, FieldError
from gcpo.methods.gcpo.method import GCPO
from tests.adapters.memory_queue import MemoryQueue
from tests.adapters.test_pipeline import (
    Grader,
    Server,
    groups_of,
    log_probs_of,
    make_trainer,
    real,
    roll_out,
    take_step,
)

ROOT = Path(__file__).parents[2]
NUMBER = Field("number", torch.float32, "[1]", writer="score", readers="credit", meaning="A number.")


def as_method(config: Any, name: str) -> Any:
    with open_dict(config):
        config.trainer.v1.trainer_mode = config.algorithm.adv_estimator = name
    return config


# ---- a toy -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_a_method_in_one_file(make_config: Callable, queue: MemoryQueue, tokenizer: Any, power: float) -> None:
    """Its advantages are GRPO's times what it scored, with the setting of its own group; padding rows are scored too,
    and have none."""
    from tests.toy import confidence

    assert method_class("confidence") is confidence.Confidence and "confidence" in method_names()
    config = as_method(make_config(), "confidence")
    with open_dict(config):
        config.confidence = {"power": power}
    roll_out(config, Server(), Grader(lambda ids: float(ids[0] % 3)))
    trainer = make_trainer(config, queue, tokenizer)
    batch, metrics = take_step(trainer, queue)
    for keys in groups_of(real(batch)).values():
        rows = [queue.fields["train"][key] for key in keys]
        rewards = torch.tensor([float(row["responses"][0] % 3) for row in rows])
        grpo = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        for row, advantage in zip(rows, grpo, strict=True):
            weight = log_probs_of(row["prompts"], row["responses"]).mean().exp() ** power
            torch.testing.assert_close(row["advantages"], (advantage * weight).expand(len(row["responses"])))
    assert 0 < metrics["confidence/mean"] < 1
    assert trainer.actor_rollout_wg.calls == ["compute_log_prob", "score", "update_actor"]
    assert "confidence" not in trainer.actor_rollout_wg.update


def test_the_documentation_shows_the_toy() -> None:
    page = (ROOT / "docs" / "new_method.md").read_text()
    assert (ROOT / "tests" / "toy" / "confidence.py").read_text() in page


# ---- hooks that raise ------------------------------------------------------------------------------------------------


def failing(hook: str, error: Exception | None = None) -> Any:
    """GCPO with a hook that raises."""

    error = error or KeyError("no such token")

    def broken(self: Any, *args: Any) -> Any:
        raise error

    async def broken_on_group(self: Any, *args: Any) -> Any:
        raise error

    changes: dict[str, Any] = {hook: broken_on_group if hook == "on_group" else broken}
    if hook == "on_group":
        changes["on_group_failed"] = Method.on_group_failed
    return type("Broken", (GCPO,), changes)


@pytest.mark.parametrize("hook", ["before_score", "score", "credit", "term", "empty_fields", "dump"])
def test_a_hook_that_raises_names_itself(
    make_config: Callable, queue: MemoryQueue, tokenizer: Any, hook: str, tmp_path: Path
) -> None:
    """One sentence with the method, the hook and the cause, from whichever process calls it."""
    config = make_config("gcpo.preset=light", f"trainer.rollout_data_dir={tmp_path}")
    roll_out(config, Server())
    trainer = make_trainer(config, queue, tokenizer)
    broken = failing(hook)(trainer.method.settings, trainer.method.run)
    trainer.method = broken
    trainer.actor_rollout_wg.method = broken
    with pytest.raises(RunStoppedError) as stopped:
        if hook == "score":
            hooks.call(broken, "score", {}, None)
        batch, _ = take_step(trainer, queue)
        trainer._init_dump_executor()
        trainer._log_rollout_data(batch, {}, str(tmp_path))
    assert str(stopped.value) == f"the method gcpo failed in its hook {hook} (KeyError: 'no such token')"


def test_an_error_on_a_group_stops_by_default(
    make_config: Callable,
    queue: MemoryQueue,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The launcher shows the sentence; verl goes on with the rows, and the step that needs their fields stops."""
    broken = failing("on_group")
    monkeypatch.setattr(hooks, "method_class", lambda name: broken)
    config = make_config("gcpo.preset=light")
    roll_out(config, Server())
    assert {tag["status"] for key, tag in queue.tags["train"].items() if "_" not in key} == {"failure"}
    assert "gcpo notice: the method gcpo failed in its hook on_group (KeyError: 'no such token')" in caplog.text
    with pytest.raises(RunStoppedError, match="the batch lacks collider draws"):
        take_step(make_trainer(config, queue, tokenizer), queue, list(queue.fields["train"]))


def test_an_error_that_stops_the_run_keeps_its_own_sentence() -> None:
    method = failing("credit", RunStoppedError("the batch is empty"))(None, None)
    with pytest.raises(RunStoppedError, match="^the batch is empty$"):
        hooks.call(method, "credit", None, {})


def test_the_start_of_a_worker(make_config: Callable, monkeypatch: pytest.MonkeyPatch, queue: MemoryQueue) -> None:
    monkeypatch.setattr(hooks, "method_class", lambda name: failing("start_rollout"))
    with pytest.raises(RunStoppedError, match="the method gcpo failed in its hook start_rollout"):
        roll_out(make_config("gcpo.preset=light"), Server())


# ---- the way of a method to the workers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [("gcpo.preset=paper", "gcpo.seed=null"), ("gcpo.preset=light", "gcpo.weighting=off"), ("gcpo.alpha=0.5",)],
)
def test_a_worker_has_the_method_of_the_driver(make_config: Callable, overrides: tuple[str, ...]) -> None:
    config = make_config(*overrides)
    method = hooks.make_method(config)
    hooks.send_to_workers(method, config)
    received = hooks.received(config.actor_rollout_ref)
    assert type(received) is type(method) and received.settings == method.settings and received.run == method.run


def test_an_unknown_method() -> None:
    with pytest.raises(ValueError, match="there is no method 'grop'; the methods are .*gc2po, gcpo"):
        method_class("grop")


# ---- fields ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(1, dtype=torch.float64), "holds torch.float64 of shape [1], and should hold torch.float32 [1]"),
        (torch.zeros(1, 2), "holds torch.float32 of shape [1, 2], and should hold torch.float32 [1]"),
        (torch.tensor(1.0), "holds torch.float32 of shape [], and should"),
        (1.0, "holds a float, and should hold torch.float32 [1]"),
    ],
)
def test_a_value_of_another_kind(value: Any, message: str) -> None:
    """Whichever way it goes into the batch: the error has the field's name."""
    for write in (
        lambda: schema.to_columns({NUMBER: [value]}, 1),
        lambda: schema.to_batch([{NUMBER: value}]),
    ):
        with pytest.raises(FieldError, match=re.escape(f"the batch field number {message}")):
            write()


def test_fields_that_are_missing() -> None:
    with pytest.raises(FieldError, match="the batch lacks the field number, which score should have written"):
        schema.from_data(schema.to_columns({PROMPTS: [torch.tensor([1])]}, 1), [PROMPTS, NUMBER])
    with pytest.raises(FieldError, match="the batch field number has 1 values for 2 rows"):
        schema.to_columns({NUMBER: [torch.zeros(1)]}, 2)
    with pytest.raises(FieldError, match="a row of a group lacks the batch field number"):
        schema.to_batch([{NUMBER: torch.zeros(1)}, {}])


def test_a_wrong_field_of_a_method(make_config: Callable, queue: MemoryQueue, tokenizer: Any) -> None:
    """A method that stores states in float64 learns the field's name before the queue has it."""
    config = make_config("gcpo.preset=light")
    roll_out(config, Server())
    trainer = make_trainer(config, queue, tokenizer)
    score = trainer.method.score
    trainer.method.score = lambda *args: {name: [v.double() for v in values] for name, values in score(*args).items()}
    with pytest.raises(FieldError, match="the batch field gcpo_scored_tokens holds torch.float64"):
        take_step(trainer, queue)


def test_every_field_is_declared_once() -> None:
    """No two have the same name, what a method reads is declared, and no module holds a name as a literal."""
    fields = schema.all_fields()
    assert len(set(map(str, fields))) == len(fields) and all(field.meaning and field.readers for field in fields)
    run = Run(n=4, response_length=8)
    for name in ("gcpo", "gc2po"):
        method = method_class(name)(method_class(name).parse({}, run), run)
        term = method.term()
        assert {*method.score_inputs, *(term.inputs + term.columns if term else ())} <= set(fields)
    names = {str(field) for field in fields if str(field).startswith(("gcpo_", "gc2po_"))}
    for path in (ROOT / "gcpo").rglob("*.py"):
        if path.name != "fields.py":
            found = names & set(re.findall(r"[\"']([a-z0-9_]+)[\"']", path.read_text()))
            assert not found, f"{path} holds {found}"
