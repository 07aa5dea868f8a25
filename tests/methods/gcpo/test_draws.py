"""The collider stage of one group, with a scripted server."""

from __future__ import annotations

import asyncio
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from examples.arithmetic.warm_start import Recipe, make_tokenizer
from gcpo.collider.prompts import CandidatePrompts
from gcpo.methods.gcpo.draws import ColliderSampler, GroupResult, _mean_common_prefix
from gcpo.methods.gcpo.method import check_layout
from gcpo.methods.gcpo.settings import GCPOConfig

RESPONSES = [[31, 32, 2], [33, 2], [34, 35, 36, 2], [37, 2]]
END = 2
GENERATED = {"preset": "balanced", "collider": {"num_draws": 2}, "features": {"source": "response"}}
"""L = 2, L' = 1, M = 1."""


class Server:
    """Answers with ``reply(prompt, params)`` and remembers what it was asked."""

    def __init__(self, reply: Any = None) -> None:
        self.reply = reply or (lambda prompt, params: [60 + params["seed"] % 50, END])
        self.asked: list[tuple[list[int], dict]] = []

    async def __call__(self, prompt: list[int], params: dict) -> Any:
        self.asked.append((prompt, params))
        ids = self.reply(prompt, params)
        if isinstance(ids, Exception):
            raise ids
        return SimpleNamespace(token_ids=ids, stop_reason="completed", extra_fields={"num_cached_tokens": 1})


def run(
    server: Server,
    *,
    equal: bool = False,
    key: tuple = (1, "q"),
    limit: int = 2048,
    **config: Any,
) -> GroupResult:
    tokenizer = make_tokenizer(Recipe())
    gcpo = GCPOConfig.from_config(config, n=4, response_length=16)
    prompts, ends = CandidatePrompts(tokenizer), frozenset({END})
    stage = ColliderSampler(gcpo, prompts, server, {"temperature": 1.0}, limit, ends)
    messages = [{"role": "user", "content": "What is 12 + 39?"}]
    return asyncio.run(stage.run(messages, RESPONSES, seed_parts=key, equal_rewards=equal))


@pytest.mark.parametrize(
    ("config", "counts"),
    [
        ({"preset": "paper"}, (4, 0, 4 * 4 * 4)),
        ({"preset": "balanced"}, (1, 4, 0)),
        ({"preset": "light"}, (1, 1, 0)),
        (GENERATED, (2, 4, 4 * 3)),
        ({**GENERATED, "weighting": "off"}, (2, 2, 0)),
        ({**GENERATED, "weighting": "off", "reference": {"subsample": 1.0}}, (2, 4, 0)),
        (
            {**GENERATED, "collider": {"num_draws": 2, "num_generations": 2, "num_leave_one_out_draws": 3}},
            (2, 12, 4 * 5 * 2),
        ),
    ],
)
def test_numbers_of_requests(config: dict, counts: tuple[int, int, int]) -> None:
    """L shared draws, n L' leave-one-out draws, and M generations for every context, where Upsilon needs them."""
    server = Server()
    result = run(server, **config)
    kinds = [draw.kind for draw in result.draws]
    assert tuple(kinds.count(kind) for kind in ("collider", "leave_one_out", "regenerated")) == counts
    assert len(server.asked) == sum(counts)


def test_equal_rewards_skip_what_cannot_matter() -> None:
    """A = 0: no regenerated response, and no context of a response without a kappa term; with kappa = 0 nothing at
    all, and the group is counted."""
    server = Server()
    result = run(server, equal=True, **GENERATED)
    kinds = [draw.kind for draw in result.draws]
    assert {kind: kinds.count(kind) for kind in kinds} == {"collider": 2, "leave_one_out": 2}
    assert [all(row) for row in result.contexts] == [weight > 0 for weight in result.kl_weight]
    silent = Server()
    result = run(silent, equal=True, **GENERATED, kappa=0.0)
    assert silent.asked == [] and result.stats["skipped"] == 1
    assert all(context == [] for row in result.contexts for context in row)


def test_seeds_are_repeatable_and_all_different() -> None:
    """Every request has a seed of its own, the same in another run, another for another question."""
    first, second, other = Server(), Server(), Server()
    run(first, **GENERATED)
    run(second, **GENERATED)
    run(other, **GENERATED, key=(1, "other"))
    seeds = [params["seed"] for _, params in first.asked]
    assert len(set(seeds)) == len(seeds)
    assert seeds == [params["seed"] for _, params in second.asked]
    assert not set(seeds) & {params["seed"] for _, params in other.asked}


def test_seeds_of_another_step_are_others() -> None:
    """The same question with the same responses at the next step: no request has a seed of the step before."""
    steps = [Server(), Server()]
    results = [run(server, preset="paper", key=(step, "q")) for step, server in enumerate(steps)]
    first, second = ({params["seed"] for _, params in server.asked} for server in steps)
    assert len(first) == len(second) == len(results[0].draws) and not first & second


def test_without_a_seed() -> None:
    """``gcpo.seed=null``: no request has a seed, and the choices made here still can be repeated."""
    servers = [Server(lambda prompt, params: [60, END]) for _ in range(2)]
    results = [run(server, **GENERATED, weighting="off", seed=None) for server in servers]
    assert all("seed" not in params for server in servers for _, params in server.asked) and servers[0].asked
    assert results[0].plan == results[1].plan and results[0].kl_weight == results[1].kl_weight
    server = Server(lambda prompt, params: [60, END])
    chosen = [run(server, preset="light", seed=None, key=(step, "q")) for step in range(12)]
    assert len({tuple(result.kl_weight) for result in chosen}) > 1
    orders = [run(server, preset="paper", seed=None, key=(step, "q")).contexts for step in range(4)]
    assert len({str(contexts) for contexts in orders}) > 1


@pytest.mark.parametrize(
    ("reply", "outcome"),
    [
        ([END], "empty"),
        ([], "empty"),
        ([0, 1, END], "empty"),
        ([40] * 16, "cut"),
        (RuntimeError("server gone"), "failed"),
    ],
)
def test_draws_that_are_left_out(reply: Any, outcome: str) -> None:
    """A failed, empty or cut draw leaves an empty context and is counted; nothing is zero-filled. A draw of control
    tokens only is empty too."""
    result = run(Server(lambda prompt, params: reply), preset="paper")
    assert result.stats[f"collider/{outcome}"] == 4
    assert all(context == [] for row in result.contexts for context in row)
    assert all(output == [] for row in result.outputs for output in row)


def test_a_share_of_the_responses_has_a_kappa_term() -> None:
    """m of n, weighted n / m, drawn anew for every group; the others ask for nothing that nobody needs."""
    for fraction, count in ((1.0, 4), (0.5, 2), (0.1, 1)):
        server = Server()
        result = run(server, **GENERATED, weighting="off", reference={"subsample": fraction})
        assert sorted(result.kl_weight) == [0.0] * (4 - count) + [4 / count] * count
        assert len(server.asked) == 2 + count  # two shared draws, and a leave-one-out draw for each of them
        for weight, row in zip(result.kl_weight, result.contexts, strict=True):
            assert all((len(context) > 0) == (weight > 0) for context in row)
    chosen = {tuple(run(Server(), preset="light", key=(k,), reference={"subsample": 0.5}).kl_weight) for k in range(30)}
    assert len(chosen) == 6  # every pair of four is drawn sooner or later
    assert run(Server(), **GENERATED, kappa=0.0).kl_weight == [0.0] * 4
    everything = run(Server(), preset="balanced", reference={"subsample": 0.25})
    assert all(context for row in everything.contexts for context in row)  # Upsilon needs them all


def test_tokens_that_responses_begin_with_in_common() -> None:
    """The mean over pairs: of four responses whose pairs share 2, 1, 1, 1, 1 and 3 tokens."""
    assert _mean_common_prefix([[5, 6, 2], [5, 6, 7, 2], [5, 8, 9, 2], [5, 8, 9]]) == pytest.approx(
        (2 + 1 + 1 + 1 + 1 + 3) / 6
    )
    assert run(Server(), preset="light").stats["common_prefix_tokens"] == 0.0
    same = run(Server(lambda prompt, params: [40, 41, END]), **GENERATED).stats["common_prefix_draw_tokens"]
    assert same == 3.0 and run(Server(), **GENERATED).stats["common_prefix_draw_tokens"] < 1


def test_leave_one_out_draws_hang_on_the_tree_of_the_contexts() -> None:
    """The prompt of a leave-one-out draw, up to its last block, begins both contexts of its response, and the requests
    go out in the order of the tree's leaves."""
    server = Server()
    result = run(server, preset="balanced")
    prompts = [prompt for prompt, _ in server.asked[1:]]
    layout = result.plan
    tail = next(k for k in range(1, 200) if len({tuple(prompt[-k:]) for prompt in prompts}) > 1) - 1
    for i in range(4):
        sharing = [p for p in prompts if all(c[: len(p) - tail] == p[: len(p) - tail] for c in result.contexts[i])]
        assert sharing
    shared = [sum(1 for _ in itertools.takewhile(lambda ab: ab[0] == ab[1], zip(a, b, strict=False)))
              for a, b in itertools.pairwise(prompts)]  # fmt: skip
    best = [sum(1 for _ in itertools.takewhile(lambda ab: ab[0] == ab[1], zip(a, b, strict=False)))
            for a, b in itertools.pairwise(sorted(prompts))]  # fmt: skip
    assert sum(shared) == sum(best)
    check_layout(layout, [torch.tensor([len(c) for c in row]) for row in result.contexts])
    with pytest.raises(ValueError, match="has 4 responses, and its contexts were made for 3"):
        check_layout({**layout, "blocks": layout["blocks"][:3]}, [torch.tensor([99])] * 4)
    with pytest.raises(ValueError, match="response 1 has one of 5 tokens, and the blocks of the other candidates"):
        check_layout(layout, [torch.tensor([0]), torch.tensor([5]), torch.tensor([0]), torch.tensor([0])])


def test_a_full_length_answer_that_ends_is_whole() -> None:
    """A draw of exactly max_tokens whose last token is the end token was not cut."""
    result = run(Server(lambda prompt, params: [40] * 15 + [END]), preset="light")
    assert result.stats["collider/ok"] == 1


def test_lengths_by_kind_and_the_context_limit() -> None:
    """Each kind has its own max_tokens; a prompt that leaves no room counts as failed and asks nothing."""
    server = Server()
    run(server, **{**GENERATED, "collider": {"max_tokens": 9}}, regenerated={"max_tokens": 5})
    assert {params["max_tokens"] for _, params in server.asked} == {9, 5}
    assert all(params["logprobs"] is False for _, params in server.asked)
    full = Server()
    result = run(full, preset="light", limit=10)
    assert full.asked == [] and result.stats["collider/failed"] == 1


def test_generations_stand_beside_their_context() -> None:
    """outputs[i][slot * M + m] was generated from contexts[i][slot]."""
    server = Server(lambda prompt, params: [sum(prompt) % 250 + 3, END])
    result = run(server, preset="paper", collider={"num_draws": 2, "num_generations": 3})
    for contexts, outputs in zip(result.contexts, result.outputs, strict=True):
        for slot, context in enumerate(contexts):
            for m in range(3):
                assert outputs[slot * 3 + m][0] == sum(context) % 250 + 3


def test_draws_stop_at_the_end_of_the_context() -> None:
    """A prompt that leaves less room than ``max_tokens`` asks for what is left, and a draw that takes it all is cut."""
    roomy = Server()
    run(roomy, preset="light")
    longest = max(len(prompt) for prompt, _ in roomy.asked)
    server = Server(lambda prompt, params: [40] * params["max_tokens"])
    result = run(server, preset="light", limit=longest + 5)
    assert all(params["max_tokens"] == min(16, longest + 5 - len(prompt)) for prompt, params in server.asked)
    assert min(params["max_tokens"] for _, params in server.asked) == 5
    assert {draw.outcome for draw in result.draws} == {"cut"}


def test_an_aborted_draw_has_failed() -> None:
    """What the server gave up is no answer, however it looks."""

    class Aborting(Server):
        async def __call__(self, prompt: list[int], params: dict) -> Any:
            output = await super().__call__(prompt, params)
            return SimpleNamespace(**{**vars(output), "stop_reason": "aborted"})

    result = run(Aborting(), preset="paper")
    assert {draw.outcome for draw in result.draws} == {"failed"} and result.stats["collider/failed"] == 4
    assert all(context == [] for row in result.contexts for context in row)


def test_append_puts_a_draw_behind_the_first_one() -> None:
    """y_{n,l} stands behind y_n in the contexts of the shared draws only, and by itself where y_n was lost."""
    tokenizer = make_tokenizer(Recipe())
    label = CandidatePrompts(tokenizer).collider_block([])

    def labels(context: list[int]) -> int:
        return sum(context[k : k + len(label)] == label for k in range(len(context)))

    append = {**GENERATED, "weighting": "off", "reference": {"collider_context": "append", "subsample": 1.0}}
    whole = run(Server(), **append)
    assert [[labels(context) for context in row] for row in whole.contexts] == [[1, 2, 1]] * 4
    lost = Server(lambda prompt, params: [END] if len(lost.asked) == 1 else [60, END])
    first_lost = run(lost, **append)
    assert [draw.outcome for draw in first_lost.draws[:2]] == ["empty", "ok"]
    kept = [sorted(labels(context) for context in row if context) for row in first_lost.contexts]
    assert kept == [[1, 1]] * 4


def test_how_ragged_a_group_is() -> None:
    """Mean and unbiased variance of the responses' lengths 3, 2, 4 and 2."""
    stats = run(Server(), preset="light").stats
    assert stats["responses"] == 4 and stats["response_tokens"] == 2.75
    assert stats["response_variance"] == pytest.approx((0.25**2 + 0.75**2 + 1.25**2 + 0.75**2) / 3)
