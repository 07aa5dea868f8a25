"""The cost model by hand, and the command ``gcpo cost``."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from omegaconf import OmegaConf

from gcpo.methods.gcpo.settings import GCPOConfig
from gcpo.scoring import BudgetError
from gcpo.tools import cli
from gcpo.tools.cost import (
    AlikeTexts,
    Lengths,
    PrefixCache,
    Shares,
    Step,
    Texts,
    Weights,
    packed_tokens,
    ragged,
    ragged_groups,
    ragged_questions,
    shared_tokens,
    stage_costs,
    step_tokens,
    sum_of,
    tokens_of,
    whole,
)
from gcpo.tools.cost_report import compose_config, short, weights_of_log

# A question of 10 tokens, responses of 20, an end token in each; "\n[Answer 1]\n" takes 8 tokens, 7 of them the same.
LENGTHS = Lengths(question=12, response=21, collider=31, leave_one_out=31, regenerated=41)
TEXTS = Texts(intro=6, tail=5, label=10, label_start=7, collider_label=9, question_end=2)
FRAME, BLOCK, DRAW = 10 + 6 + 5, 30, 39

GENERATED = {"preset": "balanced", "collider": {"num_draws": 2}, "features": {"source": "response"}}
"""L = 2, L' = 1, M = 1."""


def settings(n: int = 2, **changes: object) -> GCPOConfig:
    return GCPOConfig.from_config({"metrics": {"grad_norm_every": 0}, **changes}, n=n, response_length=64)


def count(config: GCPOConfig, n: int = 2, shares: Shares | None = None, **changes: object) -> dict[str, float]:
    step = Step(**{"groups": 3, "n": n, "max_response": 64, "budget": 10_000, "cache_block": 0, **changes})
    return step_tokens(config, step, LENGTHS, TEXTS, shares, simulated=4)


def path(*segments: tuple[str, int]) -> tuple:
    return tuple(((name, 0), tokens) for name, tokens in segments)


# ---- lengths, trees, caches ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mean", "spread", "limit"), [(30, 0.3, 64), (60, 0.5, 64), (5, 1.0, 1000), (64, 0.3, 64)])
def test_ragged_lengths(mean: float, spread: float, limit: int) -> None:
    """The mean holds whatever is cut off at the limit; the same seed gives the same lengths."""
    lengths = list(itertools.islice(ragged(mean, spread, limit, np.random.default_rng(1)), 640))
    assert np.mean(lengths) == pytest.approx(mean, abs=0.05)
    assert 1 <= min(lengths) and max(lengths) <= limit
    if spread == 0.3 and mean == 30:
        assert np.std(lengths) / mean == pytest.approx(spread, abs=0.02)
    assert lengths == list(itertools.islice(ragged(mean, spread, limit, np.random.default_rng(1)), 640))
    assert list(itertools.islice(ragged(7, 0, 64, np.random.default_rng(0)), 5)) == [7] * 5


def test_ragged_groups() -> None:
    """Both spreads and the mean are what was asked for; so are the mean and the range of the questions."""
    lengths = replace(LENGTHS, response=100, spread=0.3, group_spread=0.2, question=30, question_range=(20, 90))
    groups = np.array(ragged_groups(lengths, 1000, 400, 8, np.random.default_rng(0)))
    assert groups.mean() == pytest.approx(100, abs=0.01)
    assert groups.var(1, ddof=1).mean() ** 0.5 == pytest.approx(30, rel=0.05)
    means = groups.mean(1).var() - groups.var(1, ddof=1).mean() / 8
    assert means**0.5 == pytest.approx(20, rel=0.1)
    questions = ragged_questions(lengths, 100, np.random.default_rng(0))
    assert np.mean(questions) == pytest.approx(30, abs=0.5) and 20 <= min(questions) < 22 and 85 < max(questions) <= 90
    assert ragged_questions(LENGTHS, 3, np.random.default_rng(0)) == [12, 12, 12]
    assert list(itertools.islice(whole(1.4), 5)) == [1, 2, 1, 2, 1]


def test_packed_tokens() -> None:
    """Shared beginnings count once; a budget repeats them where it cuts, and one too small is refused with numbers."""
    a, b, c = path(("q", 10), ("x", 5)), path(("q", 10), ("y", 6), ("x", 5)), path(("z", 3))
    assert shared_tokens(a, b) == 10 and shared_tokens(b, c) == 0 and tokens_of(b) == 21
    assert packed_tokens([b, c, a], 100) == 10 + 5 + 6 + 5 + 3
    assert packed_tokens([b, c, a], 21) == 15 + 21 + 3
    assert packed_tokens([], 1) == 0
    with pytest.raises(BudgetError, match="a sequence of 21 tokens does not fit into the token budget of 20"):
        packed_tokens([a, b], 20)


def test_prefix_cache() -> None:
    """Whole blocks that an earlier prompt began with, never the last token."""
    cache = PrefixCache(4)
    assert cache.cached(path(("q", 10), ("x", 6))) == 0
    assert cache.cached(path(("q", 10), ("y", 3))) == 8
    assert cache.cached(path(("q", 10), ("x", 6))) == 12  # 16 are there, and the last one must run
    assert cache.cached(path(("q", 10), ("x", 6), ("z", 1))) == 16
    assert cache.cached(path(("y", 3))) == 0
    off = PrefixCache(0)
    assert [off.cached(path(("q", 10))) for _ in range(2)] == [0, 0]


# ---- a step by hand ------------------------------------------------------------------------------------------------


def test_grpo() -> None:
    """n = 2, three groups: what GRPO generates, scores and trains on, and nothing else."""
    found = count(settings(weighting="off", kappa=0.0), epochs=2, reference_policy=True)
    assert {name: value for name, value in found.items() if value} == {
        "generated/response": 3 * 2 * 21,
        "prefilled/response": 3 * 2 * 12,
        "scored/old": 3 * 2 * 33,
        "scored/reference": 3 * 2 * 33,
        "trained/plain": 3 * 2 * 33 * 2,
    }


def test_plain_prompts_are_cached_on_every_server() -> None:
    """The first response on a server prefills; the last token of a prompt always runs."""
    grpo = settings(8, weighting="off", kappa=0.0)
    assert count(grpo, 8, cache_block=4)["cached/response"] == 3 * 7 * 8
    assert count(grpo, 8, cache_block=4, servers=3)["cached/response"] == 3 * 5 * 8
    assert count(grpo, 8, cache_block=4, servers=20)["cached/response"] == 0


def test_light() -> None:
    """n = 2: a shared draw and one over the other response, for the one response that has a kappa term."""
    found = count(settings(preset="light"))
    context = FRAME + BLOCK + DRAW
    assert found["generated/collider"] == found["generated/leave_one_out"] == 3 * 31
    assert found["prefilled/leave_one_out"] == 3 * (FRAME + BLOCK)
    assert found["scored_unshared/response"] == 3 * 2 * 21
    assert found["scored_unshared/context"] == 3 * 2 * (context + 21)
    assert found["trained/kappa_rows"] == 3 * (context + 21)


def test_balanced() -> None:
    """n = 2: one shared draw over both responses, one over the other one each; states of all four contexts, and one
    response is scored under two of them."""
    found = count(settings(preset="balanced"))
    assert found["generated/collider"] == 3 * 31 and found["generated/leave_one_out"] == 3 * 2 * 31
    assert found["prefilled/collider"] == 3 * (FRAME + 2 * BLOCK)
    assert found["prefilled/leave_one_out"] == 3 * 2 * (FRAME + BLOCK)
    assert found["generated/regenerated"] == 0
    context = FRAME + BLOCK + DRAW
    assert found["scored_unshared/response"] == 3 * 2 * 21
    assert found["scored_unshared/context"] == 3 * (4 * context + 2 * 21)
    # The head and the 7 tokens with which labels begin are shared by all contexts, each block by two of them, and the
    # label of the draws, 9 tokens, by the same two.
    tree = (FRAME - 5 + 7) + 2 * (BLOCK - 7) + 2 * 9 + 4 * (30 + 5) + 2 * 21
    assert found["scored"] == 3 * (2 * 21 + tree)
    assert found["trained/kappa_rows"] == found["trained/kappa_rows_unshared"] == 3 * (context + 21)


def test_generated() -> None:
    """n = 2, L = 2, L' = 1, M = 1: six contexts, one generation under each, fed back alone."""
    found = count(settings(**GENERATED))
    context = FRAME + BLOCK + DRAW
    assert found["prefilled/regenerated"] == 3 * 6 * context and found["generated/regenerated"] == 3 * 6 * 41
    assert found["scored_unshared/regenerated"] == 3 * 6 * 41
    assert found["scored_unshared/context"] == 3 * 3 * (context + 21)  # of one response, half of them
    dense = count(settings(**GENERATED, scoring={"packing": "dense"}))
    assert dense["scored"] == sum_of(found, "scored_unshared") == sum_of(dense, "scored_unshared")
    both = count(settings(**{**GENERATED, "features": {"source": "response", "input": "prompt_response"}}))
    assert both["scored_unshared/response"] == 3 * 2 * 33
    assert both["scored_unshared/regenerated"] == 3 * 6 * (context + 41)


def test_paper() -> None:
    """n = L = M = 2: shared draws alone, two generations under each of four contexts, every response scored."""
    found = count(settings(preset="paper"))
    assert found["generated/collider"] == 3 * 2 * 31 and found["generated/leave_one_out"] == 0
    assert found["generated/regenerated"] == 3 * 8 * 41
    assert found["scored_unshared/context"] == 3 * 4 * (FRAME + BLOCK + DRAW + 21)
    assert found["trained/kappa_rows"] < found["trained/kappa_rows_unshared"] == 3 * 2 * (FRAME + BLOCK + DRAW + 21)


def test_equal_rewards() -> None:
    """A group with A = 0 has no regenerated response, leave-one-out draws for its kappa term alone, and with
    kappa = 0 nothing but its responses."""
    full, half = (count(settings(**GENERATED), shares=Shares(share)) for share in (0.0, 0.5))
    assert half["generated/regenerated"] == full["generated/regenerated"] / 2
    assert half["generated/collider"] == full["generated/collider"]
    assert half["generated/leave_one_out"] == full["generated/leave_one_out"] * 3 / 4
    assert half["trained/kappa_rows_unshared"] == full["trained/kappa_rows_unshared"]
    half = count(settings(**GENERATED, kappa=0.0), shares=Shares(0.5))
    assert half["generated/leave_one_out"] == full["generated/leave_one_out"] / 2


@pytest.mark.parametrize("alike", [0.0, 4.0, 9.0, 20.0, 26.0])
def test_answers_that_begin_alike(alike: float) -> None:
    """Two answers of 28 tokens have as many tokens in common as they should, on average."""
    found = []
    for seed in range(300):
        texts = AlikeTexts(alike, 28, np.random.default_rng(seed))
        paths = [texts.text(("response", i), 28) for i in range(8)]
        assert all(tokens_of(path) == 28 for path in paths)
        found += [shared_tokens(a, b) for a, b in itertools.combinations(paths, 2)]
    assert sum(found) / len(found) == pytest.approx(alike, abs=1.0)


def test_answers_that_are_the_same() -> None:
    """Texts without a fork are one text, as long as the first of them; with forks their mean length stays."""
    rng = np.random.default_rng(0)
    texts = AlikeTexts(28, 28, rng)
    first = texts.text(("response", 0), 28)
    assert texts.text(("response", 1), 20) == texts.text(("response", 2), 40) == first and tokens_of(first) == 28
    lengths = []
    for _ in range(300):
        texts = AlikeTexts(15, 28, rng)
        lengths += [tokens_of(texts.text(("response", i), int(rng.integers(18, 39)))) for i in range(8)]
    assert sum(lengths) / len(lengths) == pytest.approx(28, rel=0.03)


def test_draws_that_are_not_valid() -> None:
    """They have no context; one that is cut has the most tokens that it may have, one that is lost has none."""
    found = count(settings(**GENERATED), shares=Shares(lost={"collider": 1.0}))
    assert found["generated/collider"] == 0 and found["prefilled/collider"] == 3 * 2 * (FRAME + 2 * BLOCK)
    assert found["prefilled/regenerated"] == 3 * 2 * (FRAME + BLOCK + DRAW)
    assert found["trained/kappa_rows"] == 0
    found = count(settings(**GENERATED), shares=Shares(cut={"leave_one_out": 0.5}))
    assert found["generated/leave_one_out"] == 3 * 2 * (31 + 64) / 2
    assert found["prefilled/regenerated"] == 3 * 5 * (FRAME + BLOCK + DRAW)


def test_a_share_of_the_responses() -> None:
    """Without Upsilon only the responses with a kappa term have leave-one-out draws and contexts."""
    found = count(settings(4, **GENERATED, weighting="off", reference={"subsample": 0.25}), 4)
    assert found["generated/leave_one_out"] == 3 * 31
    assert found["scored_unshared/context"] == 3 * 3 * (FRAME + 3 * BLOCK + DRAW + 21)


def test_block_budgets() -> None:
    """Blocks hold the end of a response, or its answer; an appended draw is one more block."""
    frame = 3 * (FRAME + 2 * 10)
    assert count(settings(preset="light", blocks={"max_tokens": 7}))["prefilled/collider"] == frame + 3 * 2 * 7
    answer = count(settings(preset="light", blocks={"truncation": "answer"}))
    assert answer["prefilled/collider"] == frame + 3 * 2 * 12
    plain, appended = (
        count(settings(preset="paper", reference={"collider_context": kind})) for kind in ("replace", "append")
    )
    assert appended["scored_unshared/context"] - plain["scored_unshared/context"] == 3 * 2 * DRAW


def test_measured_gradient_norms() -> None:
    """Every tenth step: policy, beta and kappa once more."""
    found = count(settings(preset="light", metrics={"grad_norm_every": 10}), reference_policy=True)
    assert found["trained/measured"] == pytest.approx((2 * found["trained/plain"] + found["trained/kappa_rows"]) / 10)
    on_query = settings(preset="light", metrics={"grad_norm_every": 10}, reference={"policy_condition": "query"})
    found = count(on_query)
    assert found["trained/kappa_rows"] == 0
    assert found["trained/measured"] == pytest.approx(2 * found["trained/plain"] / 10)


def test_costs() -> None:
    """Tokens times weights; a recomputed forward pass is one more."""
    tokens = {"generated/response": 10.0, "prefilled/response": 8.0, "cached/response": 3.0, "scored": 7.0}
    tokens |= {"scored/old": 5.0, "scored_unshared/context": 99.0, "trained/plain": 4.0, "trained/kappa_rows": 2.0}
    step = Step(groups=1, n=2, max_response=8, budget=100)
    found = stage_costs(tokens, step, Weights(generated=3, prefilled=2, forward=1, backward=2))
    assert found == {"generation": 40, "scoring": 12, "training": 18}
    again = Step(groups=1, n=2, max_response=8, budget=100, recomputed=True)
    assert stage_costs(tokens, again, Weights())["training"] == 4 * 6
    # The weights that a run with such tokens and timers tells.
    log = {"timing_s/gen": 3 * 10 + 5, "timing_s/old_log_prob": 12, "timing_s/update_actor": 18}
    assert weights_of_log(log, tokens, step) == Weights(generated=3, prefilled=1, forward=1, backward=2)
    assert weights_of_log({**log, "timing_s/update_actor": 1.0}, tokens, step) is None
    assert weights_of_log({}, tokens, step) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"response": 0.5}, "the length response is 0.5; it must be a number of at least 1"),
        ({"spread": float("nan")}, "the length spread is nan"),
        ({"leave_one_out": 65}, "the mean length leave_one_out is 65, and it is cut at 64 tokens"),
    ],
)
def test_lengths_that_cannot_be(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lengths = Lengths(**{**vars(LENGTHS), **changes})
        step_tokens(settings(), Step(groups=1, n=2, max_response=64, budget=1000), lengths, TEXTS)


def test_numbers() -> None:
    numbers = (0.4, 12.3, 999.4, 999.6, 12_345, 999_499, 999_600, 2.5e9)
    assert [short(x) for x in numbers] == ["0", "12", "999", "1 k", "12.3 k", "999 k", "1 M", "2.5 G"]


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):
    """A folder as a run leaves it."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "hydra" / ".hydra").mkdir(parents=True)
    generated = ["gcpo.preset=balanced", "gcpo.collider.num_draws=2", "gcpo.features.source=response"]
    config = compose_config("gcpo_quickstart", [*generated, "actor_rollout_ref.model.path=hub/model"])
    OmegaConf.save(config, folder / "hydra" / ".hydra" / "config.yaml")
    data = {"response_length/mean": 30.0, "prompt_length/mean": 20.0, "gcpo/tokens/generated/response": 3840.0}
    data |= {"gcpo/rollout/regenerated/tokens_mean": 25.0, "gcpo/tokens/generated/regenerated": 192 * 25.0}
    data |= {"gcpo/rollout/regenerated/cut": 48.0, "gcpo/rollout/equal_rewards_frac": 0.5}
    data |= {"gcpo/rollout/collider/tokens_mean": 32.0, "gcpo/tokens/generated/collider": 1300.0}
    data |= {
        "gcpo/prompts/block_tokens": 40.0,
        "gcpo/prompts/frame_tokens": 50.0,
        "gcpo/rollout/spread_in_groups": 0.2,
        "gcpo/rollout/spread_of_groups": 0.1,
    }
    lines = [{"step": 0, "data": {"val-core/x/acc/mean@1": 0.5}}]
    lines += [{"step": k, "data": {name: value + k - 1.5 for name, value in data.items()}} for k in (1, 2)]
    lines[1]["data"] |= {name: data[name] for name in data if "share" in name or "spread" in name}
    lines[2]["data"] |= {name: data[name] for name in data if "share" in name or "spread" in name}
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder


def test_a_log(run, capsys) -> None:
    """Lengths, shares and configuration of the run, and its counters beside the model's."""
    assert cli.main(["cost", "--log", str(run / "metrics.jsonl"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    lengths = {"question": 20, "response": 30, "collider": 32, "leave_one_out": 32, "regenerated": 12}
    assert {name: found["lengths"][name] for name in lengths} == pytest.approx(lengths)
    assert found["lengths"]["spread"] == pytest.approx(0.2)
    assert found["preset"] == "balanced" and found["ratio"]["grpo"] == 1
    assert found["ratio"]["paper"] > found["ratio"]["balanced"] > found["ratio"]["light"] > 1
    assert found["tokens"]["balanced"]["prefilled/collider"] == pytest.approx(16 * 2 * (50 + 8 * 40), rel=0.01)
    assert found["log"]["generated/response"]["model"] == pytest.approx(3840, rel=1e-3)
    assert found["log"]["generated/collider"] == {"logged": 1300, "model": pytest.approx(1024)}
    # Half of the groups, 24 contexts each.
    assert found["log"]["generated/regenerated"]["model"] == pytest.approx(16 / 2 * 24 * 25, rel=0.03)


def test_tables(run, capsys) -> None:
    """The tables and what they rest on; a counter that is off by more than 5 % is marked."""
    arguments = ["--log", str(run / "metrics.jsonl"), "--weight", "generated=4", "--groups", "8"]
    assert cli.main(["cost", *arguments]) == 0
    shown = capsys.readouterr().out
    assert "Tokens of a step: 16 questions, 8 responses each" in shown and "balanced *" in shown
    marked = {
        line.split()[0]: line.rstrip().endswith("!") for line in shown.splitlines() if "%" in line and "/" in line
    }
    assert marked["generated/collider"] and not marked["generated/response"]
    assert "generated 4, prefilled 1, forward 1, backward 2 (cached: 0)" in shown
    assert "note: the fixed texts of the prompts are counted as a token for four characters" in shown


def test_a_configuration(capsys, tiny_model) -> None:
    """Overrides as a run script passes them; without lengths the longest that are allowed; the model's tokenizer."""
    arguments = ["cost", "--config-name", "gcpo_quickstart", f"actor_rollout_ref.model.path={tiny_model}", "--json"]
    assert cli.main([*arguments, "data.train_batch_size=4", "--groups", "4"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["preset"] == "balanced"
    assert found["tokens"]["grpo"]["generated/response"] == 4 * 8 * 64
    assert found["lengths"]["question"] == 48 and found["lengths"]["spread"] == 0
    assert found["notes"] == ["lengths that are not given are the longest that the configuration allows"]


def test_grpo_beside_its_presets(capsys) -> None:
    """Of a GRPO configuration the presets are shown as they would be with it."""
    arguments = ["cost", "gcpo.weighting=off", "gcpo.kappa=0", "gcpo.features.source=prompt", "--json", "--groups", "1"]
    assert cli.main([*arguments, "--response", "400", "--question", "100", "data.train_batch_size=2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["preset"] == "grpo" and set(found["tokens"]) == {"grpo", "balanced", "light"}
    assert found["ratio"]["light"] > 1.2
    assert any(note.startswith("paper is left out: gcpo.features.source") for note in found["notes"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--log", "no/metrics.jsonl"], "there is no log no/metrics.jsonl; give the metrics.jsonl of a run"),
        (["--log", "RUN/hydra/.hydra/config.yaml"], "has no training step with response_length/mean"),
        (["--log", "ALONE/metrics.jsonl"], "config.yaml is missing, so the run's configuration is not known"),
        (["gcpo.no_such=1"], "the configuration gcpo_trainer can't be made: Could not override 'gcpo.no_such'"),
        (["--config-name", "none"], "the configuration none can't be made"),
        (["--config-name", "gc2po_trainer"], "the configuration trains with trainer.v1.trainer_mode=gc2po"),
        (["gcpo.collider.num_draws=99"], "gcpo.collider.num_draws: L = 99 is more than the 8 responses of a group"),
        (["--weight", "speed=3"], "--weight speed=3 is not NAME=NUMBER with one of the names generated, prefilled"),
        (["--weight", "generated"], "--weight generated is not NAME=NUMBER"),
        (["--tokenizer", "no/folder"], "--tokenizer: there is no folder no/folder"),
        (["--response", "1e6"], "the mean length response is 1e+06, and it is cut at"),
        (["gcpo.scoring.max_token_len_per_gpu=900"], "tokens does not fit into the token budget of 900"),
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
