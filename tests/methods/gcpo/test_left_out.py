"""Draws that are left out: the places of the others, the report about them, and a stage that fails as a whole."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from gcpo.methods.gcpo.draws import MAX_CAUSES, ColliderSampler, one_line
from gcpo.methods.gcpo.settings import GCPOConfig
from tests.methods.gcpo.test_draws import END, GENERATED, Server, run

MARK = 1000
"""The k-th request is answered with the token MARK + k, which no text of the prompts holds."""


def numbered(lost: set[int], loss: Any = None) -> Server:
    """Collider draws answer with their number; those in ``lost`` end as ``loss`` says."""
    server = Server()

    def reply(prompt: list[int], params: dict[str, Any]) -> Any:
        number = len(server.asked) - 1
        if number in lost:
            return RuntimeError("gone") if loss is None else loss
        return [MARK + number, END]

    server.reply = reply
    return server


def marks(context: list[int]) -> list[int]:
    return [token - MARK for token in context if MARK <= token < MARK + 40]


@pytest.mark.parametrize("lost", [*map(set, itertools.combinations(range(4), 2)), {0}, {3}, set(), {0, 1, 2, 3}])
@pytest.mark.parametrize("loss", [None, [END], [40] * 16], ids=["failed", "empty", "cut"])
def test_valid_shared_draws_come_first(lost: set[int], loss: Any) -> None:
    """The contexts of every response hold the valid draws in their order, from l = 0 on; the rest are empty."""
    result = run(numbered(lost, loss), preset="paper", weighting="off")
    kept = [k for k in range(4) if k not in lost]
    for row in result.contexts:
        assert [marks(context) for context in row] == [[k] for k in kept] + [[]] * len(lost)
        assert [bool(context) for context in row] == [True] * len(kept) + [False] * len(lost)


@pytest.mark.parametrize("lost", [{0}, {1}, {0, 2}, {0, 1, 2}])
def test_an_appended_draw_stands_after_the_first_valid_one(lost: set[int]) -> None:
    """``reference.collider_context=append``: y_n is the draw at l = 0, which is the first valid one; l = 0 holds it
    once, the others hold it before their own."""
    result = run(
        numbered(lost), preset="paper", weighting="off", reference={"subsample": 1.0, "collider_context": "append"}
    )
    first, *others = [k for k in range(4) if k not in lost]
    for row in result.contexts:
        assert [marks(context) for context in row if context] == [[first], *([first, k] for k in others)]


def test_leave_one_out_draws_keep_their_response() -> None:
    """A leave-one-out draw is made without one response and stands only in that response's contexts; a lost one
    leaves its place empty, and the shared draws before it keep theirs."""
    collider = {"scheme": "leave_one_out", "num_draws": 2, "num_leave_one_out_draws": 2}
    server = numbered({0, 3})
    result = run(server, preset="paper", weighting="off", collider=collider)
    assert all(marks(row[0]) == [1] and row[1] == [] for row in result.contexts)
    leave_one_out = [[marks(context) for context in row[2:]] for row in result.contexts]
    assert sorted(k for row in leave_one_out for one in row for k in one) == [2, 4, 5, 6, 7, 8, 9]
    assert sum([] in row for row in leave_one_out) == 1 and [[2], []] in leave_one_out


def test_requests_of_other_places_keep_their_seeds() -> None:
    """Losing a draw changes no other request's prompt or seed among those that are made before it is known."""
    whole, lossy = numbered(set()), numbered({1})
    run(whole, **GENERATED)
    run(lossy, **GENERATED)
    assert [params["seed"] for _, params in lossy.asked[:6]] == [params["seed"] for _, params in whole.asked[:6]]
    seeds = [params["seed"] for _, params in lossy.asked]
    assert len(set(seeds)) == len(seeds)


def test_causes() -> None:
    """Each way in which a draw ends has a cause in one line; a group reports the first ones with their numbers."""
    ends: list[Any] = [RuntimeError("the server\nis gone"), [END], [40] * 16, [41, END]]
    server = Server(lambda prompt, params: ends[len(server.asked) - 1])
    result = run(server, preset="paper", weighting="off")
    assert list(result.causes.items()) == [
        ("a collider draw failed (RuntimeError: the server is gone)", 1),
        ("a collider draw is empty", 1),
        ("a collider draw was cut (gcpo.collider.max_tokens and the context limit it)", 1),
    ]
    assert [draw.cause is None for draw in result.draws] == [draw.valid for draw in result.draws]
    cut = run(Server(lambda prompt, params: [40] * params["max_tokens"] if params["max_tokens"] == 5 else [41, END]),
              **GENERATED, regenerated={"max_tokens": 5})  # fmt: skip
    assert cut.causes == {
        "a regenerated response was cut (gcpo.regenerated.max_tokens and the context limit it)": 4 * 3
    }
    full = run(Server(), preset="light", limit=10)
    assert "leaves no room for a collider draw in the context of 10 tokens" in next(iter(full.causes))
    many = run(Server(lambda prompt, params: ValueError(str(params["seed"]))), preset="paper", weighting="off")
    assert len(many.causes) == MAX_CAUSES
    assert run(Server(), **GENERATED).causes == {}


def test_a_long_error_is_one_short_line() -> None:
    text = one_line(RuntimeError("lost\n  " * 200))
    assert len(text) == 200 and "\n" not in text and text.startswith("RuntimeError: lost lost") and text.endswith("...")


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize(
    "config",
    [{"preset": "paper"}, {"preset": "balanced"}, {"preset": "light"}, {**GENERATED, "kappa": 0.0}, GENERATED],
    ids=["paper", "balanced", "light", "no kappa", "generated"],
)
def test_a_stage_that_raises_counts_as_draws_that_all_failed(config: dict[str, Any], equal: bool) -> None:
    """The same contexts, weights of the kappa term and numbers of draws as where the server fails every request."""
    lost = run(Server(lambda prompt, params: RuntimeError("gone")), equal=equal, **config)
    gcpo = GCPOConfig.from_config(config, n=4, response_length=16)
    stage = ColliderSampler(gcpo, None, None, {}, None, frozenset())
    failed = stage.failed(4, ValueError("no chat template"), seed_parts=(1, "q"), equal_rewards=equal)
    assert failed.contexts == lost.contexts and failed.outputs == lost.outputs
    assert failed.kl_weight == lost.kl_weight
    for name in (
        "collider/draws",
        "collider/failed",
        "leave_one_out/draws",
        "leave_one_out/failed",
        "regenerated/draws",
    ):
        assert failed.stats.get(name, 0.0) == lost.stats.get(name, 0.0), name
    assert failed.stats["equal_rewards"] == lost.stats["equal_rewards"] and failed.stats["stage_failed"] == 1.0
    assert set(failed.causes) <= {"the collider stage of a group failed (ValueError: no chat template)"}
    assert sum(failed.causes.values()) == len(lost.draws)
