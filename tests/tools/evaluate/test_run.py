"""Sampling, grading and going on, with a sampler that answers by rule; the grader and the files are the real ones."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest

import gcpo.rewards
from gcpo.tools.evaluate import EvaluationError
from gcpo.tools.evaluate.__main__ import main
from gcpo.tools.evaluate.models import Model
from gcpo.tools.evaluate.questions import load_sets
from gcpo.tools.evaluate.results import read_results
from gcpo.tools.evaluate.run import Settings, evaluate, sample_seed
from gcpo.tools.evaluate.samples import SampleFile, alone_in
from tests.tools.evaluate.made import Rule, prompts_of, rows, sums, write_set

MODEL = Model("tiny", "/models/tiny", "abc")
SETTINGS = Settings(samples=3, max_tokens=100)


def right_but_for_the_last(row: int, index: int) -> str:
    """Right, but question 1 is wrong every time, and the last sample of question 2 has no answer."""
    if row == 2 and index == 2:
        return "I don't know"
    return f"\\boxed{{{2 * row + (row == 1)}}}"


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def found(tmp_path):
    return sums(tmp_path / "data")


def run(found, output, rule, settings=SETTINGS, model=MODEL):
    return evaluate(model, [found], prompts_of(found), settings, output, rule).questions


def test_samples_are_graded_and_summed_up(found, tmp_path):
    output = tmp_path / "out"
    results = run(found, output, Rule([found], right_but_for_the_last))["sums"]
    assert [question.right for question in results] == [3, 0, 2, 3]
    assert [question.majority for question in results] == [1.0, 0.0, 1.0, 1.0]
    assert [question.formatted for question in results] == [3, 3, 2, 3]
    written = lines(output / "sums.jsonl")
    assert len(written) == 12
    line = next(line for line in written if line["row"] == 3 and line["sample"] == 1)
    assert line["question"] == found.questions[3].id and line["answer"] == "6"
    assert line["seed"] == sample_seed(0, line["question"], 1) and f"seed {line['seed']}" in line["text"]
    assert line["scores"] == {"score": 1.0, "acc": 1.0, "format": 1.0}
    assert line["finish_reason"] == "stop" and line["tokens"] == len(line["text"])
    assert read_results(output).questions["sums"] == results
    summary = json.loads((output / "results.json").read_text())["sets"]["sums"]["summary"]
    assert summary["pass_at_1"]["mean"] == pytest.approx((1 + 0 + 2 / 3 + 1) / 4)


def test_a_stopped_run_goes_on_with_the_same_samples(found, tmp_path):
    whole = Rule([found], right_but_for_the_last)
    expected = run(found, tmp_path / "whole", whole)

    output = tmp_path / "out"
    stopped = Rule([found], right_but_for_the_last)
    stopped.stop_after = 6
    with pytest.raises(KeyboardInterrupt):
        run(found, output, stopped)
    assert len(lines(output / "sums.jsonl")) == 6
    with pytest.raises(EvaluationError, match="not finished"):
        read_results(output)
    # As after a power cut: a line that is not whole.
    with (output / "sums.jsonl").open("a") as file:
        file.write('{"question": "abc", "sam')

    rest = Rule([found], right_but_for_the_last)
    assert run(found, output, rest) == expected
    assert len(rest.asked) == 6
    by_key = lambda line: (line["row"], line["sample"])  # noqa: E731
    assert sorted(lines(output / "sums.jsonl"), key=by_key) == sorted(
        lines(tmp_path / "whole" / "sums.jsonl"), key=by_key
    )


def test_a_complete_run_starts_no_engine(found, tmp_path, capsys):
    output = tmp_path / "out"
    first = run(found, output, Rule([found], right_but_for_the_last))
    again = Rule([found], right_but_for_the_last)
    assert run(found, output, again) == first and again.starts == 0
    assert "nothing to generate" in capsys.readouterr().out


def test_more_samples_keep_those_that_are_there(found, tmp_path):
    output = tmp_path / "out"
    run(found, output, Rule([found], right_but_for_the_last))
    more = Rule([found], right_but_for_the_last)
    results = run(found, output, more, replace(SETTINGS, samples=5))["sums"]
    assert len(more.asked) == 4 * 2 and {question.samples for question in results} == {5}
    fewer = Rule([found], right_but_for_the_last)
    results = run(found, output, fewer, replace(SETTINGS, samples=2))["sums"]
    assert fewer.starts == 0 and [question.right for question in results] == [2, 0, 2, 2]


def test_another_set_joins(found, tmp_path):
    output, other = tmp_path / "out", sums(tmp_path / "data", 2, "others")
    run(found, output, Rule([found], right_but_for_the_last))
    rule = Rule([other], right_but_for_the_last)
    run(other, output, rule)
    assert len(rule.asked) == 6 and set(read_results(output).questions) == {"sums", "others"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"settings": replace(SETTINGS, temperature=1.0)}, "temperature 0.6, now 1.0"),
        ({"settings": replace(SETTINGS, seed=7)}, "seed 0, now 7"),
        ({"model": Model("tiny", "/models/tiny", "other")}, 'model "abc", now "other"'),
    ],
)
def test_other_settings_are_refused(found, tmp_path, changes, reason):
    output = tmp_path / "out"
    run(found, output, Rule([found], right_but_for_the_last))
    before = (output / "sums.jsonl").read_bytes()
    with pytest.raises(EvaluationError, match="give another --output") as error:
        run(found, output, Rule([found], right_but_for_the_last), **changes)
    assert reason in str(error.value) and "\n" not in str(error.value)
    assert (output / "sums.jsonl").read_bytes() == before


def test_another_file_of_the_same_name_is_refused(found, tmp_path):
    output = tmp_path / "out"
    run(found, output, Rule([found], right_but_for_the_last))
    changed = sums(tmp_path / "elsewhere", 3)
    with pytest.raises(EvaluationError, match="another file of sums"):
        run(changed, output, Rule([changed], right_but_for_the_last))


def test_folders_of_something_else_are_left_alone(found, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("...")
    with pytest.raises(EvaluationError, match="holds something else"):
        run(found, tmp_path / "mine", Rule([found], right_but_for_the_last))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    (tmp_path / "file").write_text("")
    with pytest.raises(EvaluationError, match="can't be made"):
        run(found, tmp_path / "file", Rule([found], right_but_for_the_last))


def test_an_engine_that_does_not_start_leaves_nothing_behind(found, tmp_path):
    def start(log):
        raise EvaluationError("vLLM can't load it")

    with pytest.raises(EvaluationError, match="can't load"):
        run(found, tmp_path / "new" / "out", start)
    assert not (tmp_path / "new").exists()


def test_a_log_of_an_engine_that_did_not_start_is_in_nobody_s_way(found, tmp_path):
    def start(log):
        log.write_text("why")
        raise EvaluationError("vLLM can't load it")

    with pytest.raises(EvaluationError, match="can't load"):
        run(found, tmp_path / "out", start)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["vllm.log"]
    assert len(run(found, tmp_path / "out", Rule([found], right_but_for_the_last))["sums"]) == 4


def test_what_can_not_be_graded_stops_the_run_and_can_go_on(found, tmp_path, monkeypatch):
    def refuse(*arguments):
        raise gcpo.rewards.GraderError("no sandbox here; set up one")

    with monkeypatch.context() as patched, pytest.raises(EvaluationError, match="^no sandbox here"):
        patched.setattr(gcpo.rewards, "grade_many", refuse)
        run(found, tmp_path / "out", Rule([found], right_but_for_the_last))
    rule = Rule([found], right_but_for_the_last)
    assert len(run(found, tmp_path / "out", rule)["sums"]) == 4 and len(rule.asked) == 12


def test_the_grader_is_told_what_it_is_told_in_training(found, tmp_path, monkeypatch):
    """Programs are told from mathematics by the data source, and have no answers to count."""
    told = []

    def grade_many(texts, truths, sources, extras):
        told.extend(zip(truths, sources, extras, strict=True))
        return [{"score": 0.9, "acc": 1.0, "format": 0.0} for _ in texts]

    monkeypatch.setattr(gcpo.rewards, "grade_many", grade_many)
    path = write_set(tmp_path / "code.parquet", rows(2, ability="code", data_source="gcpo/humaneval"))
    (programs,) = load_sets([str(path)])
    results = run(programs, tmp_path / "out", Rule([programs], lambda row, index: "\\boxed{7}"))["code"]
    assert told.count(("2", "gcpo/humaneval", {"index": 1})) == 3
    assert [(question.right, question.majority, question.formatted) for question in results] == [(3, None, 0.0)] * 2
    assert all(line["answer"] is None for line in lines(tmp_path / "out" / "code.jsonl"))


def test_two_evaluations_do_not_write_into_one_folder(found, tmp_path):
    output = tmp_path / "out"
    with alone_in(output), pytest.raises(EvaluationError, match="an evaluation is writing into"):
        run(found, output, Rule([found], right_but_for_the_last))
    run(found, output, Rule([found], right_but_for_the_last))


def test_a_line_that_is_no_sample_is_named(tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text('{"question": "a"}\n')
    with pytest.raises(EvaluationError, match=r"line 1 of .*sums.jsonl is no sample"):
        SampleFile(path)
    assert path.read_text() == '{"question": "a"}\n'


def test_responses_end_where_the_context_does(found, tmp_path):
    rule = Rule([found], right_but_for_the_last)
    evaluate(MODEL, [found], prompts_of(found, context=50), SETTINGS, tmp_path / "out", rule)
    assert [request.max_tokens for request in rule.asked[::3]] == [49, 48, 47, 46]  # prompts of 1 to 4 tokens


def test_seeds_depend_on_the_question_and_not_on_its_place(tmp_path):
    first = sums(tmp_path / "a")
    shuffled = write_set(tmp_path / "b" / "sums.parquet", rows(4)[::-1])
    (second,) = load_sets([str(shuffled)])
    assert {question.id for question in first.questions} == {question.id for question in second.questions}
    ids = [question.id for question in first.questions]
    seeds = {sample_seed(seed, id, index) for seed in (0, 1) for id in ids for index in range(8)}
    assert len(seeds) == 2 * 4 * 8


def test_a_sample_that_no_file_can_hold_is_written(found, tmp_path):
    """A decoder may leave half of a surrogate pair."""
    run(found, tmp_path / "out", Rule([found], lambda row, index: "\ud83d \\boxed{0}\u2028"))
    assert len((tmp_path / "out" / "sums.jsonl").read_text().split("\n")) == 13
    assert len(SampleFile(tmp_path / "out" / "sums.jsonl").samples) == 12


def test_progress_without_a_terminal_is_lines(found, tmp_path, capsys):
    run(found, tmp_path / "out", Rule([found], right_but_for_the_last))
    shown = [line for line in capsys.readouterr().out.splitlines() if "samples" in line and "/" in line]
    assert "] sums  3/12 samples  pass@1 100.0 %" in shown[0]
    assert "] sums  12/12 samples  pass@1 66.7 %" in shown[-1]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"samples": 0}, "--samples is 0; it must be 1 or more"),
        ({"temperature": -1.0}, "--temperature is -1.0"),
        ({"temperature": float("nan")}, "--temperature is nan"),
        ({"top_p": 0.0}, "--top-p is 0.0"),
        ({"max_tokens": 0}, "--max-tokens is 0"),
        ({"temperature": 0.0}, "is greedy"),
    ],
)
def test_settings_that_can_not_work(values, sentence):
    with pytest.raises(EvaluationError, match=sentence):
        Settings(**values)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere", "--samples", "0"], "--samples is 0; it must be 1 or more"),
        (["./nowhere", "--sets", "SET"], "there is no folder ./nowhere"),
        (["./nowhere", "--sets", "aime2024"], "aime2024 is no known set"),
        (["./nowhere", "--sets", "SET", "--limit", "0"], "--limit is 0"),
        (["table", "nowhere"], "nowhere holds no results"),
    ],
)
def test_the_command_says_what_is_wrong_in_one_sentence(tmp_path, monkeypatch, capsys, arguments, sentence):
    found = write_set(tmp_path / "sums.parquet", rows(2))
    monkeypatch.chdir(tmp_path)
    assert main([str(found) if one == "SET" else one for one in arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith(f"error: {sentence}") and shown.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["sums.parquet"]


def test_the_command_ends_with_its_exit_code(tmp_path):
    done = subprocess.run([sys.executable, "-m", "gcpo.tools.evaluate", "table", "nowhere"], cwd=tmp_path)
    assert done.returncode == 2


def test_programs_need_a_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked for before anything is sampled, and the sentence says what is missing."""
    from types import SimpleNamespace

    from gcpo.rewards import sandbox
    from gcpo.tools.evaluate.run import _check_sandbox

    asked = []

    def refuse(**settings: object) -> str:
        asked.append(settings)
        raise sandbox.SandboxError("no sandbox works here")

    monkeypatch.setattr(sandbox, "check", refuse)

    def of(source: str) -> list:
        return [SimpleNamespace(questions=[SimpleNamespace(data_source=source, ground_truth="1")])]

    _check_sandbox(of("gcpo/math500"), {"sandbox": "auto"})
    assert not asked
    with pytest.raises(EvaluationError, match="no sandbox works here"):
        _check_sandbox(of("gcpo/humaneval"), {"sandbox": "bubblewrap"})
    assert asked == [{"sandbox": "bubblewrap"}]
