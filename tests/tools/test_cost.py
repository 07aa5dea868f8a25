"""The cost model by hand, and the command ``gcpo cost``."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from gcpo.methods.base import Method, Run
from gcpo.methods.gc2po.method import GC2PO
from gcpo.methods.gcpo.method import GCPO
from gcpo.methods.gcpo.settings import GCPOConfig
from gcpo.scoring.tree import common_prefix
from gcpo.tools import cli
from gcpo.tools.cost import command
from gcpo.tools.cost.inputs import compose_config
from gcpo.tools.cost.step import Server, Simulation, Step
from gcpo.tools.cost.texts import END, Lengths, Texts, Tokenizer, drawn

# A question of 7 tokens and 5 behind it, responses of 20, an end token in each. Fixed texts take a token for 4
# characters: "\n[Answer 1]\n" 3, 2 of which all labels share, and "\n[Joint answer]\n" 4.
LENGTHS = Lengths(12, 21, {"collider": 31, "leave_one_out": 31, "regenerated": 41})
BLOCKS = {"intro": "i" * 24, "outro": "o" * 12}
FRAME, TAIL, BLOCK, DRAW = 7 + 6 + 8, 8, 3 + 20, 4 + 30
CONTEXT = FRAME + BLOCK + DRAW
"""Tokens of a context with n = 2."""
GENERATED = {"preset": "balanced", "collider": {"num_draws": 2}, "features": {"source": "response"}}
"""L = 2, L' = 1, M = 1."""


def settings(n: int = 2, **changes: Any) -> GCPOConfig:
    changes = {**changes, "blocks": {**BLOCKS, **changes.get("blocks", {})}}
    return GCPOConfig.from_config({"metrics": {"grad_norm_every": 0}, **changes}, n=n, response_length=64)


def count(config: GCPOConfig | None, n: int = 2, lengths: Lengths = LENGTHS, **changes: Any) -> dict[str, float]:
    """Tokens of three questions."""
    run = Run(n=n, response_length=64, max_tokens=10_000, use_kl_loss=changes.pop("use_kl_loss", False))
    step = Step(run, **{"questions": 3, "cache_block": 0, **changes})
    method = Method(None, run) if config is None else GCPO(config, run)
    found = Simulation(method, step, lengths, Tokenizer(), groups=4).run()
    return {name: value for name, value in found.items() if value}


# ---- lengths, texts, caches ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mean", "spread", "limit"), [(30, 0.3, 64), (60, 0.5, 64), (5, 1.0, 1000), (64, 0.3, 64)])
def test_lengths(mean: float, spread: float, limit: int) -> None:
    """The mean holds whatever is cut off at the limit; the same seed gives the same lengths."""
    lengths = drawn(mean, spread, limit, 640, np.random.default_rng(1))
    assert np.mean(lengths) == pytest.approx(mean, abs=0.05)
    assert 1 <= min(lengths) and max(lengths) <= limit
    if spread == 0.3 and mean == 30:
        assert np.std(lengths) / mean == pytest.approx(spread, abs=0.02)
    assert lengths == drawn(mean, spread, limit, 640, np.random.default_rng(1))
    assert mean == limit or lengths not in (sorted(lengths), sorted(lengths, reverse=True))
    assert drawn(7, 0, 64, 5, np.random.default_rng(0)) == [7] * 5


@pytest.mark.parametrize("common", [0.0, 4.0, 9.0, 20.0, 26.0])
def test_texts_that_begin_alike(common: float) -> None:
    """Two texts of 28 tokens have as many tokens in common as they should, on average."""
    found = []
    for seed in range(300):
        texts = Texts(common, 28, np.random.default_rng(seed))
        ids = [texts.ids(28, 28) for _ in range(8)]
        assert all(len(text) == 28 for text in ids)
        found += [common_prefix(a, b) for a, b in itertools.combinations(ids, 2)]
    assert np.mean(found) == pytest.approx(common, abs=1.0)


def test_texts_that_are_the_same() -> None:
    """Texts without a fork are one text, as long as the first of them; with forks their mean length stays."""
    rng = np.random.default_rng(0)
    texts = Texts(28, 28, rng)
    first = texts.ids(29, 64)
    assert first[-1] == END and texts.ids(20, 64) == texts.ids(40, 64) == first and len(first) == 29
    assert len(texts.ids(64, 64)) == 64 and END not in texts.ids(64, 64)
    lengths = []
    for _ in range(300):
        texts = Texts(15, 28, rng)
        lengths += [len(texts.ids(int(rng.integers(18, 39)), 64)) for _ in range(8)]
    assert np.mean(lengths) == pytest.approx(28, rel=0.03)


def test_prefix_cache() -> None:
    """Whole blocks that an earlier prompt began with, never the last token."""
    run = Run(n=2, response_length=64)
    simulation = Simulation(Method(None, run), Step(run, 1, cache_block=4), LENGTHS, Tokenizer(), 1)
    server, q, x, z = Server(simulation), [1] * 10, [2] * 6, [9]
    assert server.cached(q + x) == 0
    assert server.cached([*q, 3, 3, 3]) == 8
    assert server.cached(q + x) == 12  # 16 are there, and the last one must run
    assert server.cached(q + x + z) == 16
    prompt = [3, 3, 3, 3, 3]
    assert server.cached(prompt) == 0 and server.cached(prompt) == 4
    simulation.step = replace(simulation.step, cache_block=0)
    assert server.cached(prompt) == 0


# ---- a step by hand --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [None, settings(weighting="off", kappa=0.0)], ids=["plain", "switched off"])
def test_grpo(config: GCPOConfig | None) -> None:
    """n = 2, three questions: the tokens of GRPO, and no others."""
    assert count(config, epochs=2, use_kl_loss=True) == {
        "generated/response": 3 * 2 * 21,
        "prefilled/response": 3 * 2 * 12,
        "scored/old": 3 * 2 * 33,
        "scored/reference": 3 * 2 * 33,
        "trained/plain": 3 * 2 * 33 * 2,
    }


def test_plain_prompts_are_cached_on_every_server() -> None:
    """The first response on a server prefills; the last token of a prompt always runs."""
    assert count(None, 8, cache_block=4)["cached/response"] == 3 * 7 * 8
    assert count(None, 8, cache_block=4, servers=3)["cached/response"] == 3 * 5 * 8
    assert "cached/response" not in count(None, 8, cache_block=4, servers=20)


def test_light() -> None:
    """n = 2: a shared draw and one over the other response, for the one response that has a kappa term."""
    found = count(settings(preset="light"))
    assert found["generated/collider"] == found["generated/leave_one_out"] == 3 * 31
    assert found["prefilled/leave_one_out"] == 3 * (FRAME + BLOCK)
    assert found["scored_unshared"] == 3 * (2 * 21 + 2 * (CONTEXT + 21))
    assert found["trained/kappa_rows"] == 3 * (CONTEXT + 21)


def test_balanced() -> None:
    """n = 2: one shared draw over both responses, one over the other one each; states of all four contexts, and one
    response is scored under two of them."""
    found = count(settings(preset="balanced"))
    assert found["generated/collider"] == 3 * 31 and found["generated/leave_one_out"] == 3 * 2 * 31
    assert found["prefilled/collider"] == 3 * (FRAME + 2 * BLOCK)
    assert found["prefilled/leave_one_out"] == 3 * 2 * (FRAME + BLOCK)
    assert "generated/regenerated" not in found
    assert found["scored_unshared"] == 3 * (2 * 21 + 4 * CONTEXT + 2 * 21)
    # All contexts share the head and the beginning of the labels; two of them share each block and the draws' label.
    tree = (FRAME - TAIL + 2) + 2 * (BLOCK - 2 + 4) + 4 * (30 + TAIL) + 2 * 21
    assert found["scored"] == 3 * (2 * 21 + tree)
    assert found["trained/kappa_rows"] == found["trained/kappa_rows_unshared"] == 3 * (CONTEXT + 21)


def test_generated() -> None:
    """n = 2, L = 2, L' = 1, M = 1: six contexts, one generation under each, scored without its context."""
    found = count(settings(**GENERATED))
    assert found["prefilled/regenerated"] == 3 * 6 * CONTEXT and found["generated/regenerated"] == 3 * 6 * 41
    assert found["scored_unshared"] == 3 * (2 * 21 + 6 * 41 + 3 * (CONTEXT + 21))  # half of the responses have kappa
    dense = count(settings(**GENERATED, scoring={"packing": "dense"}))
    assert dense["scored"] == dense["scored_unshared"] == found["scored_unshared"] > found["scored"]
    both = count(settings(**{**GENERATED, "features": {"source": "response", "input": "prompt_response"}}))
    assert both["scored_unshared"] == 3 * (2 * 33 + 6 * (CONTEXT + 41) + 3 * (CONTEXT + 21))


def test_paper() -> None:
    """n = L = M = 2: only shared draws, two generations under each of four contexts, every response scored."""
    found = count(settings(preset="paper"))
    assert found["generated/collider"] == 3 * 2 * 31 and "generated/leave_one_out" not in found
    assert found["generated/regenerated"] == 3 * 8 * 41
    assert found["scored_unshared"] == 3 * (2 * 21 + 8 * 41 + 4 * (CONTEXT + 21))
    assert found["trained/kappa_rows"] < found["trained/kappa_rows_unshared"] == 3 * 2 * (CONTEXT + 21)


def test_equal_rewards() -> None:
    """A group with A = 0 has no regenerated response, and leave-one-out draws only for its kappa term."""
    equal = replace(LENGTHS, equal_rewards=0.5)
    full, half = count(settings(**GENERATED)), count(settings(**GENERATED), lengths=equal)
    assert half["generated/regenerated"] == full["generated/regenerated"] / 2
    assert half["generated/collider"] == full["generated/collider"]
    assert half["generated/leave_one_out"] == full["generated/leave_one_out"] * 3 / 4
    assert half["trained/kappa_rows_unshared"] == full["trained/kappa_rows_unshared"]
    half = count(settings(**GENERATED, kappa=0.0), lengths=equal)
    assert half["generated/leave_one_out"] == full["generated/leave_one_out"] / 2


def test_draws_that_are_cut() -> None:
    """They have no context, and as many tokens as they may have."""
    found = count(settings(**GENERATED), lengths=replace(LENGTHS, cut={"leave_one_out": 0.5}))
    assert found["generated/leave_one_out"] == 3 * 2 * (31 + 64) / 2
    assert found["prefilled/regenerated"] == 3 * 5 * CONTEXT
    found = count(settings(**GENERATED), lengths=replace(LENGTHS, cut={"collider": 1.0}))
    assert found["prefilled/regenerated"] == 3 * 2 * CONTEXT and "trained/kappa_rows" not in found


def test_a_share_of_the_responses() -> None:
    """Without Upsilon only the responses with a kappa term have leave-one-out draws and contexts."""
    found = count(settings(4, **GENERATED, weighting="off", reference={"subsample": 0.25}), 4)
    assert found["generated/leave_one_out"] == 3 * 31
    assert found["scored_unshared"] == 3 * 3 * (FRAME + 3 * BLOCK + DRAW + 21)


def test_block_budgets() -> None:
    """Blocks hold the end of a response, or its answer; an appended draw is one more block."""
    frame = 3 * (FRAME + 2 * 3)
    assert count(settings(preset="light", blocks={"max_tokens": 7}))["prefilled/collider"] == frame + 3 * 2 * 7
    answer = count(settings(preset="light", blocks={"truncation": "answer"}))
    assert answer["prefilled/collider"] == frame + 3 * 2 * 6  # \boxed{1000}
    plain, appended = (
        count(settings(preset="paper", reference={"collider_context": kind})) for kind in ("replace", "append")
    )
    assert appended["scored_unshared"] - plain["scored_unshared"] == 3 * 2 * DRAW


def test_measured_gradient_norms() -> None:
    """Every tenth step: policy, beta and kappa once more."""
    found = count(settings(preset="light", metrics={"grad_norm_every": 10}), use_kl_loss=True)
    assert found["trained/measured"] == pytest.approx((2 * found["trained/plain"] + found["trained/kappa_rows"]) / 10)
    on_query = settings(preset="light", metrics={"grad_norm_every": 10}, reference={"policy_condition": "query"})
    found = count(on_query)
    assert "trained/kappa_rows" not in found
    assert found["trained/measured"] == pytest.approx(2 * found["trained/plain"] / 10)


@pytest.mark.parametrize(("intervention", "branch"), [("lm_head", 6), ("hidden_state", 9 * (1 + 6 + 2 * 2))])
def test_gc2po(intervention: str, branch: int) -> None:
    """n = 2, two episodes: the answer prompt of 6 tokens behind each, for every perturbation and every answer."""
    run = Run(n=2, response_length=64, max_tokens=10_000)
    method = GC2PO(GC2PO.parse({"intervention": intervention}, run), run)
    lengths = Lengths(12, 21, episodes=2)
    found = Simulation(method, Step(run, 3, cache_block=0), lengths, Tokenizer(), groups=4).run()
    assert found["scored"] == 3 * (12 + 2 * (20 + 2 * branch))
    assert found["scored_unshared"] > 3 * 2 * (32 + 2 * branch)
    assert found["scored/old"] == found["trained/plain"] == 3 * 2 * 33


def test_costs() -> None:
    """Tokens times weights; a recomputed forward pass is one more."""
    tokens = {"generated/response": 10.0, "prefilled/response": 8.0, "cached/response": 3.0, "scored": 7.0}
    tokens |= {"scored/old": 5.0, "scored_unshared": 99.0, "trained/plain": 4.0, "trained/kappa_rows": 2.0}
    tokens |= {"trained/kappa_rows_unshared": 50.0}
    weights = {"generated": 3, "prefilled": 2, "forward": 1, "backward": 2}
    found = command.stage_costs(tokens, weights, recomputed=False)
    assert found == {"generation": 40, "scoring": 12, "training": 18}
    assert command.stage_costs(tokens, weights, recomputed=True)["training"] == 4 * 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"response": 0.5}, "the length response is 0.5; it must be a number of at least 1"),
        ({"spread": float("nan")}, "the length spread is nan"),
        ({"draws": {"collider": -1}}, "the length collider is -1"),
        (
            {"draws": {**LENGTHS.draws, "leave_one_out": 65}},
            "the mean length leave_one_out is 65, and it is cut at 64 tokens",
        ),
    ],
)
def test_lengths_that_cannot_be(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        count(settings(), lengths=replace(LENGTHS, **changes))


def test_numbers() -> None:
    numbers = (0.4, 12.3, 999.4, 999.6, 12_345, 999_499, 999_600, 2.5e9)
    assert [command.short(x) for x in numbers] == ["0", "12", "999", "1 k", "12.3 k", "999 k", "1 M", "2.5 G"]


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model):
    """A folder as a run leaves it."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "hydra" / ".hydra").mkdir(parents=True)
    generated = ["gcpo.preset=balanced", "gcpo.collider.num_draws=2", "gcpo.features.source=response"]
    config = compose_config("gcpo_quickstart", [*generated, f"actor_rollout_ref.model.path={tiny_model}"])
    OmegaConf.save(config, folder / "hydra" / ".hydra" / "config.yaml")
    shared = {"gcpo/rollout/equal_rewards_frac": 0.5, "gcpo/rollout/spread_in_groups": 0.2}
    data = {"response_length/mean": 30.0, "prompt_length/mean": 20.0, "gcpo/tokens/generated/response": 3840.0}
    data |= {"gcpo/rollout/regenerated/tokens_mean": 25.0, "gcpo/tokens/generated/regenerated": 192 * 25.0}
    data |= {"gcpo/rollout/regenerated/cut": 48.0}
    data |= {"gcpo/rollout/collider/tokens_mean": 32.0, "gcpo/tokens/generated/collider": 1300.0}
    lines = [{"step": 0, "data": {"val-core/x/acc/mean@1": 0.5}}]
    lines += [{"step": k, "data": {**shared, **{name: v + k - 1.5 for name, v in data.items()}}} for k in (1, 2)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder


@pytest.fixture
def estimated(monkeypatch: pytest.MonkeyPatch):
    """``estimated(*arguments)``: the estimate that ``gcpo cost`` prints."""

    def make(*arguments: str) -> command.Estimate:
        options: list[Any] = []
        monkeypatch.setattr(command, "cost", options.append)
        cli.main(["cost", *arguments])
        return command.estimate(options[0])

    return make


def test_a_log(run, estimated) -> None:
    """Lengths, frequencies and configuration of the run, and its counters beside the model's."""
    found = estimated("--log", str(run / "metrics.jsonl"), "--groups", "16")
    assert found.lengths.draws == pytest.approx({"collider": 32, "leave_one_out": 32, "regenerated": 12})
    assert (found.lengths.question, found.lengths.response, found.lengths.spread) == (20, 30, 0.2)
    assert found.lengths.cut["regenerated"] == pytest.approx(0.25)
    assert found.own == "balanced" and not found.notes
    ratio = {name: sum(costs.values()) for name, costs in found.costs.items()}
    assert ratio["paper"] > ratio["balanced"] > ratio["light"] > ratio["grpo"]
    assert found.log["generated/response"] == (3840, pytest.approx(3840, rel=1e-2))
    assert found.log["generated/collider"] == (1300, pytest.approx(1024, rel=1e-2))
    # Half of the groups, 24 contexts each.
    assert found.log["generated/regenerated"][1] == pytest.approx(16 / 2 * 24 * 25, rel=0.03)


def test_tables(run, capsys) -> None:
    """The tables and the assumptions; a counter that is off by more than 5 % is marked."""
    assert cli.main(["cost", "--log", str(run / "metrics.jsonl"), "--weight", "generated=4", "--groups", "8"]) == 0
    shown = capsys.readouterr().out
    assert "balanced *" in shown and "leave-one-out draws" in shown
    marked = {line.split()[0]: line.rstrip().endswith("!") for line in shown.splitlines() if "%" in line}
    assert marked["generated/collider"] and not marked["generated/response"]
    assert "generated 4, prefilled 1, forward 1, backward 2 (cached: 0)" in shown


def test_a_configuration(estimated, tiny_model) -> None:
    """Overrides as a run script passes them; without lengths the longest that are allowed; the model's tokenizer."""
    model = f"actor_rollout_ref.model.path={tiny_model}"
    found = estimated("--config-name", "gcpo_quickstart", model, "data.train_batch_size=4", "--groups", "4")
    assert found.own == "balanced"
    assert found.tokens["grpo"]["generated/response"] == 4 * 8 * 64
    assert found.lengths.question == 48 and found.lengths.spread == 0
    assert found.notes == ["lengths that are not given are the longest that the configuration allows"]


def test_grpo_beside_its_presets(estimated) -> None:
    """The presets of a GRPO configuration have its other settings."""
    changes = ["gcpo.weighting=off", "gcpo.kappa=0", "gcpo.features.source=prompt", "data.train_batch_size=2"]
    found = estimated(*changes, "--groups", "1", "--response", "400", "--question", "100", "--collider", "300")
    assert found.own == "grpo" and set(found.tokens) == {"grpo", "balanced", "light"}
    assert sum(found.costs["light"].values()) > 1.2 * sum(found.costs["grpo"].values())
    assert found.tokens["light"]["generated/collider"] == 2 * 300
    assert any(note.startswith("paper is left out: gcpo.features.source") for note in found.notes)
    assert "the fixed texts of the prompts are counted as a token for four characters" in found.notes


def test_gc2po_beside_grpo(estimated) -> None:
    """The other method has a column of its own."""
    found = estimated(
        "--config-name", "gcpo_quickstart", "method=gc2po", "--response", "40", "--episodes", "3", "--groups", "2"
    )
    assert found.own == "gc2po" and set(found.tokens) == {"grpo", "gc2po"}
    assert found.tokens["gc2po"]["scored"] > 0 and found.lengths.episodes == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--log", "no/metrics.jsonl"], "there is no log no/metrics.jsonl; give the metrics.jsonl of a run"),
        (["--log", "RUN/hydra/.hydra/config.yaml"], "has no training step with response_length/mean"),
        (["--log", "ALONE/metrics.jsonl"], "config.yaml is missing, so the run's configuration is not known"),
        (["gcpo.no_such=1"], "the configuration gcpo_trainer can't be made: Could not override 'gcpo.no_such'"),
        (["--config-name", "none"], "the configuration none can't be made"),
        (["trainer.v1.trainer_mode=sync"], "trainer.v1.trainer_mode=sync; the cost model knows "),
        (["gcpo.collider.num_draws=99"], "gcpo.collider.num_draws is 99: L = 99 is more than the 8 responses"),
        (["--weight", "speed=3"], "--weight speed=3 is not NAME=NUMBER with one of the names generated, prefilled"),
        (["--weight", "generated"], "--weight generated is not NAME=NUMBER"),
        (["--response", "1e6"], "the mean length response is 1e+06, and it is cut at"),
        (["gcpo.scoring.max_token_len_per_gpu=900", "--groups", "1"], "the token budget is 900"),
        (["--groups", "0"], "--groups is 0; it must be at least 1"),
        (["--equal-rewards", "2"], "--equal-rewards is 2; it must lie between 0 and 1"),
    ],
)
def test_bad_input(arguments: list[str], message: str, run, tmp_path, capsys) -> None:
    """One sentence and an exit code."""
    (tmp_path / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text())
    arguments = [a.replace("RUN", str(run)).replace("ALONE", str(tmp_path)) for a in arguments]
    assert cli.main(["cost", *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("gcpo cost: ") and captured.err.count("\n") == 1
    assert message in captured.err


def test_arguments_that_are_not_known(capsys) -> None:
    """An unknown option of any command, and overrides for one that takes none."""
    for arguments in (["cost", "a=1", "--speed", "3"], ["doctor", "a=1"]):
        with pytest.raises(SystemExit):
            cli.main(arguments)
        assert "unrecognized arguments" in capsys.readouterr().err
