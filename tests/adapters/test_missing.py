"""Draws, targets and references that are missing: what a step counts, when it warns, and when it stops."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from gcpo.methods.gcpo.draws import ColliderSampler
from gcpo.methods.gcpo.missing import Count, Missing, NothingValidError
from tests.adapters.conftest import N
from tests.adapters.memory_queue import MemoryQueue
from tests.adapters.test_pipeline import (
    GENERATED,
    QUESTIONS,
    Grader,
    Server,
    make_trainer,
    real,
    roll_out,
    take_step,
)


def auxiliary(params: dict[str, Any]) -> bool:
    return params.get("max_tokens") is not None


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (GENERATED, "none of the 18 draws, none of the 12 targets and none of the 6 references"),
        ((*GENERATED, "gcpo.weighting=off"), "none of the 12 draws and none of the 6 references"),
        ((*GENERATED, "gcpo.kappa=0"), "none of the 18 draws and none of the 12 targets"),
        (("gcpo.preset=light",), "none of the 6 draws and none of the 3 references"),
        (("gcpo.preset=paper",), "none of the 12 draws, none of the 12 targets and none of the 12 references"),
    ],
)
def test_a_step_without_any_causal_part_stops(
    make_config: Callable, queue: MemoryQueue, tokenizer: Any, overrides: tuple[str, ...], parts: str
) -> None:
    """With every auxiliary request lost the step would be plain GRPO: one sentence says what is missing, and why."""
    config = make_config(*overrides)
    roll_out(config, Server(fails=auxiliary), Grader(lambda ids: float(sum(ids))))
    with pytest.raises(NothingValidError) as stopped:
        take_step(make_trainer(config, queue, tokenizer), queue)
    message = str(stopped.value)
    assert message.startswith(f"{parts} that step 1 asked for is valid") and "\n" not in message
    assert "a collider draw failed (RuntimeError: the server lost the request)" in message


@pytest.mark.parametrize(
    ("overrides", "parts", "cause"),
    [
        # Regenerated responses of one token cannot end: no target, while the kappa term has all it needs.
        (("gcpo.preset=paper", "gcpo.regenerated.max_tokens=1"), "none of the 12 targets that", "regenerated response"),
        # With the collider draw lost in every group the leave-one-out draws make neither by themselves.
        (
            ("gcpo.preset=balanced", "lost=collider"),
            "none of the 12 targets and none of the 6 references",
            "collider draw",
        ),
        (("gcpo.preset=light", "lost=leave_one_out"), "none of the 3 references that", "leave-one-out draw"),
    ],
    ids=["targets", "targets and references", "references"],
)
def test_each_part_is_judged_by_itself(
    make_config: Callable,
    queue: MemoryQueue,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    overrides: tuple[str, ...],
    parts: str,
    cause: str,
) -> None:
    """The run stops where only one part is missing altogether; the other parts are valid."""
    lost = [one.removeprefix("lost=") for one in overrides if one.startswith("lost=")]
    lose_draws(monkeypatch, lambda kind, at: kind in lost)
    config = make_config(*(one for one in overrides if not one.startswith("lost=")))
    roll_out(config, Server(), Grader(lambda ids: float(sum(ids))))
    with pytest.raises(NothingValidError, match=f"{parts}.*first causes: a {cause} "):
        take_step(make_trainer(config, queue, tokenizer), queue)


def lose_draws(monkeypatch: pytest.MonkeyPatch, loses: Callable[[str, int], bool]) -> None:
    """Let the server lose the draws for which ``loses(kind, number of the kind's draw in its group)``."""
    draw = ColliderSampler.draw

    async def losing(self: ColliderSampler, kind: str, *args: Any, **kwargs: Any) -> Any:
        counts = self.__dict__.setdefault("drawn", Counter())
        counts[kind] += 1
        if not loses(kind, counts[kind] - 1):
            return await draw(self, kind, *args, **kwargs)
        whole, self.generate = self.generate, lost_request
        try:
            return await draw(self, kind, *args, **kwargs)
        finally:
            self.generate = whole

    async def lost_request(*args: Any) -> Any:
        raise RuntimeError("the server lost the request")

    monkeypatch.setattr(ColliderSampler, "draw", losing)


@pytest.mark.parametrize("lost", [0, 1, N - 1])
@pytest.mark.parametrize("projection", ["inclusive", "exclusive"])
def test_a_lost_shared_draw_costs_no_response_its_part(
    make_config: Callable,
    queue: MemoryQueue,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    lost: int,
    projection: str,
) -> None:
    """Shared draws are exchangeable: whichever is lost, the first valid one stands at l = 0 of every response, in
    which p_c and the policy's context are, and all have a target and a reference."""
    lose_draws(monkeypatch, lambda kind, at: kind == "collider" and at == lost)
    config = make_config(
        "gcpo.preset=paper", "gcpo.collider.num_generations=2", f"gcpo.collider.projection={projection}"
    )
    roll_out(config, Server())
    batch, metrics = take_step(make_trainer(config, queue, tokenizer), queue)
    assert metrics["gcpo/rollout/collider/failed"] == QUESTIONS
    assert metrics["gcpo/missing/draws_frac"] == pytest.approx(1 / N)
    assert metrics["gcpo/missing/references_frac"] == metrics["gcpo/missing/targets_frac"] == 0.0
    for key in real(batch):
        fields = queue.fields["train"][key]
        assert (fields["gcpo_context_lengths"] > 0).tolist() == [True] * (N - 1) + [False]
        assert (fields["gcpo_output_lengths"].view(N, 2) > 0).all(1).tolist() == [True] * (N - 1) + [False]
        assert fields["gcpo_kl_mask"].all()


def test_a_missing_share_warns(
    make_config: Callable,
    queue: MemoryQueue,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Above the bound one sentence per step names the shares and the causes; at the bound nothing is said."""
    lose_draws(monkeypatch, lambda kind, at: kind == "leave_one_out" and at == 0)
    config = make_config("gcpo.preset=balanced", "gcpo.reference.subsample=1")
    roll_out(config, Server(), Grader(lambda ids: float(sum(ids))))
    trainer = make_trainer(config, queue, tokenizer)
    _, metrics = take_step(trainer, queue)
    assert [metrics[f"gcpo/missing/{part}_frac"] for part in ("draws", "targets", "references")] == [0.25] * 3
    assert "lacks" not in caplog.text
    settings = trainer.method.settings
    metrics_of = settings.metrics.model_copy(update={"max_missing": 0.2})
    trainer.method.settings = settings.model_copy(update={"metrics": metrics_of})
    take_step(trainer, queue)
    (said,) = [record.getMessage() for record in caplog.records if "lacks" in record.getMessage()]
    assert "step 1 lacks 25 % of the draws, 25 % of the targets and 25 % of the references" in said
    assert "a leave-one-out draw failed (RuntimeError: the server lost the request), 3 x" in said


def test_groups_that_are_left_out_on_purpose(make_config: Callable, queue: MemoryQueue, tokenizer: Any) -> None:
    """Equal rewards in every group, without a kappa term: nothing is asked for, and the step goes on."""
    config = make_config(*GENERATED, "gcpo.kappa=0")
    roll_out(config, Server(fails=auxiliary), Grader(lambda ids: 1.0))
    batch, metrics = take_step(make_trainer(config, queue, tokenizer), queue)
    assert not [name for name in metrics if name.startswith("gcpo/missing/")]
    assert metrics["gcpo/rollout/skipped_groups_frac"] == 1.0
    assert all(queue.fields["train"][key]["advantages"].sum() == 0 for key in real(batch))


def test_a_stage_that_fails_counts(
    make_config: Callable, queue: MemoryQueue, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a group whose stage raises every draw, target and reference that it needed is missing; in all groups: stop."""
    run, failing = ColliderSampler.run, {"42"}

    async def fails(self: ColliderSampler, messages: list[dict], *args: Any, **kwargs: Any) -> Any:
        if any(word in messages[0]["content"] for word in failing):
            raise ValueError("the chat template drops the user's text")
        return await run(self, messages, *args, **kwargs)

    monkeypatch.setattr(ColliderSampler, "run", fails)
    config = make_config("gcpo.preset=balanced")
    failing = {"12 +"}
    roll_out(config, Server(), Grader(lambda ids: float(sum(ids))))
    batch, metrics = take_step(make_trainer(config, queue, tokenizer), queue)
    for part in ("draws", "targets", "references"):
        assert metrics[f"gcpo/missing/{part}_frac"] == pytest.approx(1 / QUESTIONS)
    assert metrics["gcpo/rollout/failed_groups"] == 1 and metrics["gcpo/rollout/skipped_groups_frac"] == 0
    assert metrics["gcpo/rollout/leave_one_out/failed"] == N
    other = MemoryQueue()
    with pytest.MonkeyPatch.context() as patch:
        other.install(patch)
        failing = {"What"}
        roll_out(config, Server(), Grader(lambda ids: float(sum(ids))))
        with pytest.raises(NothingValidError, match=r"stage of a group failed \(ValueError: the chat template drops"):
            take_step(make_trainer(config, other, tokenizer), other)


# ---- the counts by hand --------------------------------------------------------------------------------------------


def entry(causes: dict[str, int] | None = None, **stats: int) -> dict[str, Any]:
    return {
        "stats": {"/".join(name.rsplit("_", 1)): float(value) for name, value in stats.items()},
        "causes": causes or {},
    }


def test_shares_by_hand() -> None:
    """The draws' share is that of the kind that lost the most; what was not asked for has none."""
    missing = Missing()
    missing.add_draws(entry({"cut": 3}, collider_draws=8, collider_ok=5, regenerated_draws=40, regenerated_ok=40))
    missing.add_draws(entry({"lost": 1, "cut": 1}, collider_draws=8, collider_ok=6))
    missing.add_draws(entry())
    missing.targets = Count(16, 2)
    assert missing.metrics() == {"gcpo/missing/draws_frac": 5 / 16, "gcpo/missing/targets_frac": 1 / 8}
    assert missing.parts["draws"] == Count(56, 5)
    missing.check(3)
    assert missing.warning(3, 0.4) is None
    assert missing.warning(3, 0.3) == (
        "gcpo: step 3 lacks 31 % of the draws that it asked for, more than gcpo.metrics.max_missing=0.3; first causes: "
        "cut, 4 x; lost, 1 x"
    )
    assert Missing().metrics() == {} and Missing().warning(1, 0.0) is None
    Missing().check(1)


def test_three_causes_are_named() -> None:
    """The sentence stays short whatever the number of causes."""
    missing = Missing()
    missing.add_draws(entry({f"cause {k}": 1 for k in range(9)}, leave_one_out_draws=9))
    with pytest.raises(
        NothingValidError, match=r"none of the 9 draws that step 7 .*: cause 0, 1 x; cause 1, 1 x; cause 2, 1 x$"
    ):
        missing.check(7)
