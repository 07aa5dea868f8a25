"""The aggregated answers: prompts as in training, numbers by hand, intervals by scipy, and a run that goes on."""

from __future__ import annotations

import asyncio
import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from gcpo.collider.prompts import CandidatePrompts
from gcpo.methods.gcpo.draws import ColliderSampler
from gcpo.methods.gcpo.method import make_prompts
from gcpo.methods.gcpo.settings import GCPOConfig
from gcpo.rewards import same_answer
from gcpo.seeding import request_seed
from gcpo.tools import cli
from gcpo.tools.evaluate import EvaluationError, metrics
from gcpo.tools.evaluate.aggregate import Aggregation, make_aggregation, parse_blocks
from gcpo.tools.evaluate.metrics import Aggregate, Sample
from gcpo.tools.evaluate.models import Model, find_model
from gcpo.tools.evaluate.results import Results, read_results
from gcpo.tools.evaluate.run import Settings, evaluate
from gcpo.tools.evaluate.sampling import Completion, Request
from gcpo.tools.evaluate.table import comma_separated, markdown, table_of
from tests.tools.evaluate.made import Rule, prompts_of, sums, write_set

MODEL = Model("tiny", "/models/tiny", "abc")
SETTINGS = Settings(samples=5, temperature=1.0, max_tokens=24)
MESSAGES = [{"role": "user", "content": "What is 12 + 39?"}]
RESPONSES = [[31, 32, 33, 34, 35, 36, 37, 2], [33, 2], [34, 35, 36, 2], [37, 2], [38, 39, 40, 41, 42, 2]]
KEYS = [(1, "q"), (7, "another question"), (2, 3)]


def aggregation(tokenizer: Any, size: int, *overrides: str) -> Aggregation:
    blocks = parse_blocks(overrides, SETTINGS.max_tokens)
    return Aggregation(size, blocks, make_prompts(blocks, tokenizer), SETTINGS.max_tokens, seed=0)


# ---- prompts -------------------------------------------------------------------------------------------------------


def training_prompt(tokenizer: Any, key: tuple, blocks: dict[str, Any]) -> list[int]:
    """The prompt of the shared draw that training makes for `RESPONSES`."""
    asked = []

    async def generate(prompt: list[int], params: dict[str, Any]) -> Any:
        asked.append(prompt)
        return SimpleNamespace(token_ids=[60, 2], stop_reason="completed", extra_fields={})

    config = GCPOConfig.from_config({"blocks": blocks}, n=len(RESPONSES), response_length=SETTINGS.max_tokens)
    prompts = make_prompts(config.blocks, tokenizer)
    stage = ColliderSampler(config, prompts, generate, {"temperature": 1.0}, 2048, prompts.end_ids)
    result = asyncio.run(stage.run(MESSAGES, RESPONSES, seed_parts=key, equal_rewards=False))
    assert [draw.kind for draw in result.draws][:2] == ["collider", "leave_one_out"]
    return asked[0]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(
    "blocks", [{}, {"max_tokens": 3}, {"max_tokens": 2, "truncation": "keep_start", "candidate": "\n<{label}>\n"}]
)
def test_the_prompt_is_that_of_training(tokenizer: Any, key: tuple, blocks: dict[str, Any]) -> None:
    """The same token ids as before a shared collider draw over the same candidates in the same order of ties."""
    ours = aggregation(
        tokenizer, len(RESPONSES), *(f"gcpo.blocks.{name}={json.dumps(value)}" for name, value in blocks.items())
    )
    order = request_seed(0, "order", *key)
    assert ours.prompt(MESSAGES, RESPONSES, order) == training_prompt(tokenizer, key, blocks)


def test_the_order_of_the_blocks_follows_the_seed(tokenizer: Any) -> None:
    """The place of a candidate is not its number."""
    ours = aggregation(tokenizer, len(RESPONSES))
    assert len({tuple(ours.prompt(MESSAGES, RESPONSES, seed)) for seed in range(20)}) > 5


def test_a_group_of_one_is_one_block(tokenizer: Any) -> None:
    ours, prompts = aggregation(tokenizer, 1), CandidatePrompts(tokenizer)
    frame, block = prompts.frame(MESSAGES), prompts.candidate_block(0, RESPONSES[2])
    assert ours.prompt(MESSAGES, RESPONSES[2:3], 0) == [*frame.head, *block, *frame.tail]


def test_no_prompt_is_longer_than_the_bound(tokenizer: Any, tmp_path: Path) -> None:
    found = sums(tmp_path)
    for overrides in ((), ("gcpo.blocks.max_tokens=3",), ("gcpo.blocks.max_tokens=100",)):
        ours = aggregation(tokenizer, 5, *overrides)
        longest = [40 + i for i in range(SETTINGS.max_tokens)]
        made = [len(ours.prompt(question.prompt, [longest] * 5, 0)) for question in found.questions]
        assert max(made) + SETTINGS.max_tokens <= ours.longest([found]) <= max(made) + SETTINGS.max_tokens + 5 * 8


# ---- numbers -------------------------------------------------------------------------------------------------------


def samples(*pairs: tuple[str | None, bool]) -> list[Sample]:
    return [Sample(right, False, 1, answer) for answer, right in pairs]


def test_numbers_of_a_question_by_hand() -> None:
    """Group 1: 0.5, 1/2 and 2, so two of three votes for a right answer. Group 2: three answers with one vote each."""
    groups = [
        samples(("0.5", True), ("1/2", True), ("2", False)),
        samples(("3", False), ("0.5", True), ("2", False)),
    ]
    found = metrics.aggregate_of("q", groups, samples(("3", False), ("0.5", True)), same_answer)
    assert found == Aggregate("q", 2, pytest.approx(1 / 2), 0.5, pytest.approx((1 + 1 / 3) / 2), 1.0)


def test_a_wrong_majority_a_group_without_a_right_answer_and_one_without_any() -> None:
    groups = [
        samples(("2", False), ("2", False), ("1", True)),
        samples(("2", False), ("3", False), (None, False)),
        samples((None, False), (None, False), (None, False)),
    ]
    found = metrics.aggregate_of("q", groups, samples(*[("1", True)] * 3), same_answer)
    assert found == Aggregate("q", 3, pytest.approx(1 / 9), 1.0, 0.0, pytest.approx(1 / 3))


def test_a_group_of_one_votes_for_itself() -> None:
    found = metrics.aggregate_of("q", [samples(("1", True)), samples(("2", False))], samples(*[("1", True)] * 2), None)
    assert found == Aggregate("q", 2, 0.5, 1.0, None, 0.5)
    found = metrics.aggregate_of(
        "q", [samples(("1", True)), samples(("2", False))], samples(*[("1", True)] * 2), str.__eq__
    )
    assert found.majority == found.single == found.oracle == 0.5


def test_intervals_are_those_of_scipy() -> None:
    """Student's t over questions, and the paired t interval of scipy's own test."""
    rng = np.random.default_rng(3)
    single, majority, oracle = rng.uniform(0.2, 0.8, (3, 40))
    aggregated = np.clip(single + rng.normal(0.05, 0.1, 40), 0, 1)
    rows = zip(single, aggregated, majority, oracle, strict=True)
    found = metrics.summarize_aggregates([Aggregate(str(i), 2, *map(float, row)) for i, row in enumerate(rows)])
    for ours, values in ((found.single, single), (found.aggregated, aggregated), (found.majority, majority)):
        low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        assert (ours.mean, ours.low, ours.high) == pytest.approx((values.mean(), low, high))
    for ours, other in ((found.over_single, single), (found.over_majority, majority)):
        low, high = stats.ttest_rel(aggregated, other).confidence_interval(0.95)
        assert (ours.mean, ours.low, ours.high) == pytest.approx(((aggregated - other).mean(), low, high))
    assert (found.questions, found.groups, found.oracle.mean) == (40, 2, pytest.approx(oracle.mean()))


def test_the_table() -> None:
    """Differences of 0.5, 0, 0.5, 0: mean 0.25, s = 0.288675, t(3) = 3.18245, half = 3.18245 * 0.288675 / 2."""
    found = [Aggregate(f"q{i}", 1, 0.25, 0.25 + (0.5, 0, 0.5, 0)[i], 0.0, 1.0) for i in range(4)]
    plain = [metrics.Question(f"q{i}", 4, 1, 0.0, 0, 40, 4.0) for i in range(4)]
    better = [replace(one, aggregated=1.0) for one in found]
    results = {"before": Results({"aime24": plain}, {"aime24": {4: found}}), "after": Results({"aime24": plain}, {})}
    table = table_of({**results, "both": Results({"aime24": plain}, {"aime24": {2: better, 4: found}})})
    lines = markdown(table).splitlines()
    assert "| run | set | questions | K | groups | mean | aggregated | majority | oracle |" in "\n".join(lines)
    before = "| before | AIME 2024 | 4 | 4 | 1 | 25.0 ±0.0 | 50.0 ±45.9 | 0.0 ±60.2 | 100.0 ±60.2 | +25.0 ±45.9 |"
    assert any(line.startswith(before) for line in lines)
    rows = list(csv.DictReader(io.StringIO(comma_separated(table))))
    assert [row["K=4_over_single"] for row in rows] == ["0.250000", "", "0.250000"]
    assert [row["K=2_aggregated"] for row in rows] == ["", "", "1.000000"]
    assert float(rows[0]["K=4_over_single_high"]) == pytest.approx(0.25 + 3.18245 * 0.288675 / 2, abs=1e-5)
    assert "aggregated" not in markdown(table_of({"after": results["after"]}))


def test_code_has_no_majority() -> None:
    plain = [metrics.Question(f"q{i}", 4, 1, None, 0, 40, None) for i in range(4)]
    found = [Aggregate(f"q{i}", 1, 0.25, 0.5, None, 1.0) for i in range(4)]
    text = markdown(table_of({"run": Results({"humaneval": plain}, {"humaneval": {4: found}})}))
    assert "| 25.0 ±0.0 | 50.0 ±0.0 | – | 100.0 ±60.2 | +25.0 ±0.0 | – |" in text


# ---- runs ----------------------------------------------------------------------------------------------------------


class Reader(Rule):
    """Plain samples by rule; an answer after a prompt with candidates is right."""

    def __init__(self, *given: Any, tokenizer: Any) -> None:
        super().__init__(*given)
        self.encode = lambda text: tokenizer.encode(text, add_special_tokens=False)

    def _completion(self, request: Request) -> Completion:
        if len(request.prompt_ids) < 10:
            return super()._completion(request)
        question = request.key.partition(":")[0]
        text = f"seed {request.seed}: \\boxed{{{2 * self._rows[question]}}}"
        return Completion(request.key, text, self.encode(text), "stop")

    @property
    def read(self) -> list[Request]:
        """The requests with candidates."""
        return [request for request in self.asked if len(request.prompt_ids) >= 10]


def first_two_right(row: int, index: int) -> str:
    """Question 0 is answered rightly twice in the first pair; question 1 once in each pair; the others never."""
    right = index < 2 if row == 0 else index % 2 == 0 and row == 1
    return f"\\boxed{{{2 * row if right else 1000 + index}}}"


@pytest.fixture
def found(tmp_path: Path) -> Any:
    return sums(tmp_path / "data", 3)


@pytest.fixture
def run(found: Any, tokenizer: Any, tmp_path: Path) -> Any:
    """``run(size, ...)``: an evaluation with `Reader`; what it found, and the reader."""

    def go(
        size: int | None, *overrides: str, output: str = "out", stop_after: int | None = None, samples: int = 5
    ) -> Any:
        reader = Reader([found], first_two_right, tokenizer=tokenizer)
        reader.stop_after = stop_after
        made = aggregation(tokenizer, size, *overrides) if size else None
        settings = replace(SETTINGS, samples=samples)
        arguments = (MODEL, [found], prompts_of(found), settings, tmp_path / output, reader)
        return evaluate(*arguments, aggregation=made), reader

    return go


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_evaluation(run: Any, found: Any, tokenizer: Any, tmp_path: Path) -> None:
    """Two groups of two of the five samples; each prompt holds the tokens of its own two."""
    results, reader = run(2)
    one, two, three = results.aggregates["sums"][2]
    assert (one.groups, one.single, one.majority, one.oracle, one.aggregated) == (2, 0.5, 0.5, 0.5, 1.0)
    assert (two.single, two.majority, two.oracle, two.aggregated) == (0.5, 0.5, 1.0, 1.0)
    assert (three.single, three.majority, three.oracle, three.aggregated) == (0.0, 0.0, 0.0, 1.0)
    assert results.questions["sums"][0].samples == 5 and read_results(tmp_path / "out") == results

    plain = {(line["row"], line["sample"]): line for line in lines(tmp_path / "out" / "sums.jsonl")}
    answers = lines(tmp_path / "out" / "sums.aggregate-2.jsonl")
    assert sorted((line["row"], line["sample"]) for line in answers) == [(r, g) for r in range(3) for g in range(2)]
    assert all(line["scores"]["acc"] == 1 and line["tokens"] == len(line["token_ids"]) for line in answers)
    seeds = {line["seed"] for line in [*answers, *plain.values()]}
    assert len(seeds) == 15 + 6
    prompts = CandidatePrompts(tokenizer)
    for request in reader.read:
        question, _, group = request.key.partition(":")
        row = next(one.row for one in found.questions if one.id == question)
        for k in range(2):
            block = prompts.candidate_block(k, plain[row, 2 * int(group) + k]["token_ids"])
            text = " ".join(map(str, request.prompt_ids))
            assert f" {' '.join(map(str, block))} " in text
        assert request.max_tokens == SETTINGS.max_tokens
    assert not {request.key for request in reader.read} - {f"{q.id}:{g}" for q in found.questions for g in range(2)}


@pytest.mark.parametrize("stop_after", [6, 18])
def test_a_stopped_run_goes_on(run: Any, tmp_path: Path, stop_after: int) -> None:
    """Among the samples and among the answers; both files are those of a run that was not stopped."""
    whole, _ = run(2, output="whole")
    with pytest.raises(KeyboardInterrupt):
        run(2, stop_after=stop_after)
    results, reader = run(2)
    assert results == whole and len(reader.asked) == 15 + 6 - stop_after
    key = lambda line: (line["row"], line["sample"])  # noqa: E731
    for name in ("sums.jsonl", "sums.aggregate-2.jsonl"):
        made, expected = (sorted(lines(tmp_path / at / name), key=key) for at in ("out", "whole"))
        assert made == expected


def test_another_size_and_more_samples_join(run: Any, tmp_path: Path) -> None:
    run(None)
    _, reader = run(2)
    assert len(reader.asked) == len(reader.read) == 6
    results, reader = run(5)
    assert len(reader.asked) == 3 and results.aggregates["sums"][5][0].single == 0.4
    _, reader = run(2, samples=6)
    assert len(reader.asked) == 3 + 3  # the sixth sample of every question, and its group
    assert set(read_results(tmp_path / "out").aggregates["sums"]) == {2, 5}
    _, reader = run(2, samples=6)
    assert reader.starts == 0
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["aggregate"]["2"]["max_tokens"] == SETTINGS.max_tokens and set(settings["aggregate"]) == {"2", "5"}


def test_other_blocks_are_refused(run: Any) -> None:
    run(2)
    run(3, "gcpo.blocks.max_tokens=4")
    with pytest.raises(EvaluationError, match="other gcpo.blocks with --aggregate 2"):
        run(2, "gcpo.blocks.max_tokens=4")


def test_samples_without_tokens_are_refused(run: Any, tmp_path: Path) -> None:
    run(None)
    path = tmp_path / "out" / "sums.jsonl"
    path.write_text(
        "".join(json.dumps({**line, "token_ids": None}) + "\n" for line in lines(path)).replace("token_ids", "x")
    )
    with pytest.raises(EvaluationError, match="samples of an earlier version, without their tokens"):
        run(2)


# ---- the command line ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["gcpo.alpha=1"], "gcpo.alpha=1 is no option and no setting gcpo.blocks.KEY=VALUE"),
        (["gcpo.blocks.max_tokens"], "is no option and no setting"),
        (["gcpo.blocks.max_token=4"], "did you mean gcpo.blocks.max_tokens"),
        (["gcpo.blocks.max_tokens=0"], "gcpo.blocks.max_tokens is 0; it must be at least 1"),
        (["gcpo.blocks.truncation=middle"], "gcpo.blocks.truncation is 'middle'; choose one of"),
        (["gcpo.blocks.candidate='[Answer]'"], "must contain {label}"),
        (["gcpo.blocks.candidate='[Answer"], "cannot be read as settings; put texts in quotes"),
    ],
)
def test_settings_that_can_not_work(overrides: list[str], sentence: str) -> None:
    with pytest.raises(EvaluationError) as error:
        parse_blocks(overrides, 24)
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("size", [0, -1, 6])
def test_a_size_that_can_not_work(tiny_model: Path, found: Any, size: int) -> None:
    with pytest.raises(EvaluationError, match=f"--aggregate is {size} and --samples is 5"):
        make_aggregation(find_model(str(tiny_model)), [found], None, size, [], SETTINGS)


def test_prompts_that_do_not_fit(tiny_model: Path, found: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model = find_model(str(tiny_model))
    longest = make_aggregation(model, [found], None, 4, [], SETTINGS).longest([found])
    make_aggregation(model, [found], longest, 4, [], SETTINGS)
    assert capsys.readouterr().out == "note: 1 of the 5 samples of every question are in no group\n" * 2
    with pytest.raises(
        EvaluationError, match=rf"can take {longest} tokens .* {longest - 1}: lower gcpo.blocks.max_tok"
    ):
        make_aggregation(model, [found], longest - 1, 4, [], SETTINGS)
    make_aggregation(model, [found], longest - 1, 4, ["gcpo.blocks.max_tokens=23"], SETTINGS)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["./nowhere", "--aggregate", "2"], "error: there is no folder ./nowhere"),
        (["table", "nowhere"], "error: nowhere holds no results"),
        (["m", "gcpo.blocks.max_tokens=4"], "unrecognized arguments: gcpo.blocks.max_tokens=4"),
        (["m", "--aggregate", "2", "--bogus"], "unrecognized arguments: --bogus"),
    ],
)
def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list, sentence: str
) -> None:
    """``gcpo evaluate``."""
    sets = write_set(
        tmp_path / "sums.parquet", [{"data_source": "s", "prompt": MESSAGES, "reward_model": {"ground_truth": "1"}}]
    )
    monkeypatch.chdir(tmp_path)
    given = arguments if arguments[0] == "table" else [*arguments, "--sets", str(sets)]
    try:
        code = cli.main(["evaluate", *given])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2 and sentence in capsys.readouterr().err
