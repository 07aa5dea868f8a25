"""Rows that lack a column or hold values of other types: dropped and counted, never a traceback."""

from __future__ import annotations

import json
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep import code_sets, gradable
from data_prep.core import convert_rows
from data_prep.gradable import TEXT_ONLY, UNGRADABLE, is_gradable, unreadable
from data_prep.schema import Drop, Records, Source
from data_prep.sets import SETS
from tests.data_prep.made import provenance, run, truths, write

GOOD = {
    "aime": {"Question": "Find x.", "Answer": "1", "Year": 2001},
    "deepscaler_aime": {"problem": "Find x.", "answer": "1", "year": 2001},
    "numinamath": {"problem": "Find x.", "solution": r"\boxed{1}"},
    "gsm8k_train": {"question": "Find x.", "answer": "#### 1"},
    "math_train": {"problem": "Find x.", "solution": r"\boxed{1}"},
    "aime24": {"problem": "Find x.", "answer": "1"},
    "aime25": {"question": "Find x.", "answer": "1"},
    "amc23": {"problem": "Find x.", "answer": 1.0},
    "math500": {"problem": "Find x.", "answer": "1"},
    "minerva": {"problem": "Find x.", "solution": r"\boxed{1}"},
    "gsm8k": {"question": "Find x.", "answer": "#### 1"},
    "mbpp": {"task_id": 601, "text": "t", "code": "def f():return 1", "test_list": ["assert f()==1"]},
    "eurus_code": {
        "data_source": "taco",
        "prompt": [{"role": "user", "content": "x"}],
        "reward_model": {"ground_truth": '{"inputs": ["1"], "outputs": ["1"]}'},
    },
    "humaneval": {"task_id": 1, "prompt": "def f():", "entry_point": "f", "test": "def check(c): pass"},
    "mbpp_test": {"task_id": 11, "text": "t", "code": "def f():return 1", "test_list": ["assert f()==1"]},
}


def test_every_set_is_tried():
    assert GOOD.keys() == SETS.keys() - {"humaneval_5shot"}


@pytest.mark.parametrize("name", GOOD)
def test_a_row_that_lacks_a_column(tmp_path, capsys, name):
    good = GOOD[name]
    broken = [{key: value for key, value in good.items() if key != left_out} for left_out in good]
    source = write(tmp_path / "x.jsonl", [good, *broken])
    assert run(name, "--source", source, "--output", tmp_path / "out", "--against", "none") == 0
    dropped = provenance(tmp_path / "out")["dropped"]
    assert {reason: one["rows"] for reason, one in dropped.items()} == {
        f"it lacks {column}": [number] for number, column in enumerate(good, 1)
    }
    assert "dropped: 1 × it lacks " in capsys.readouterr().out


@pytest.mark.parametrize("name", GOOD)
def test_every_row_lacks_a_column(tmp_path, capsys, name):
    first, second = list(GOOD[name])[:2]
    rows = [{first: GOOD[name][first]}, {key: value for key, value in GOOD[name].items() if key != first}]
    assert second in rows[1]
    assert run(name, "--source", write(tmp_path / "x.jsonl", rows), "--output", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "has no usable row of" in said and f"1 × it lacks {first}" in said and said.count("\n") <= 2


KEYS = ("role", "content", "ground_truth", "inputs", "outputs", "fn_name")
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
    | st.sampled_from(["user", "taco", "f", "#### 3", r"\boxed{3}", "def f():", "assert f()", '{"inputs": [1]}']),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_values_of_any_type(name, data):
    """Of a good row, some values are replaced by others."""
    dataset = SETS[name]
    schema = next(one for one in dataset.schemas if GOOD[name].keys() >= set(one.columns))
    row = dict(GOOD[name])
    for column in data.draw(st.sets(st.sampled_from([*schema.columns, *schema.optional]), min_size=1)):
        row[column] = data.draw(VALUES)
    records = Records([row], schema.columns)
    found = convert_rows(dataset, Source(records, "made", {}))
    assert len(found.train) + len(found.test) + sum(map(len, found.dropped.values())) == 1
    for made in (*found.train, *found.test):
        assert isinstance(made["reward_model"]["ground_truth"], str) and made["prompt"][-1]["content"].strip()
        json.dumps(made)


def test_examples_that_can_not_be_used(tmp_path, capsys):
    """The few-shot part of MBPP, with one broken problem after the other."""
    mbpp = [{**GOOD["mbpp"], "task_id": number} for number in code_sets.EXAMPLES]
    humaneval = write(tmp_path / "h.jsonl", [GOOD["humaneval"]])

    def says(examples):
        file = write(tmp_path / "m.jsonl", [*examples, GOOD["mbpp"]])
        arguments = ("humaneval_5shot", "--source", humaneval, "--examples", file, "--output", tmp_path / "out")
        return run(*arguments), capsys.readouterr().err

    assert says(mbpp)[0] == 0
    for change, words in (
        ({"code": 3}, "reference solution is no text"),
        ({"code": "def f("}, "no Python"),
        ({"test_list": None}, "its tests are no list"),
        ({"test_list": ["assert f()"]}, "are no comparisons"),
        ({"test_list": [1]}, "test is no text"),
        ({"text": None}, "empty question"),
        ({"code": "f = int", "test_list": ["assert f() == 0"]}, "defines no function f"),
    ):
        code, said = says([{**mbpp[0], **change}, *mbpp[1:]])
        assert code == 2 and words in said and said.count("\n") == 1, (change, said)
    assert says([{"text": "t"}, *mbpp[1:]]) == (2, says(mbpp[1:])[1])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "has no rows"),
        (b"\n\n", "has no rows"),
        (b"\xef\xbb\xbf", "has no rows"),
        (b"[]", "has no rows"),
        (b"3", "holds no list of rows"),
        (b'{"a": 1}\n3', "holds no list of rows"),
        (b'{"problem": "p", "answer": "1"}\n{"problem": "q", "ans', "line 2 is no JSON"),
        ('{"problem": "p", "answer": "1"}'.encode("utf-16"), "can't be read"),
        (b'{"problem": "p", "answer": "\xff"}', "can't be read"),
    ],
)
def test_files_that_can_not_be_read(tmp_path, capsys, content, says):
    (tmp_path / "x.jsonl").write_bytes(content)
    assert run("aime25", "--source", tmp_path / "x.jsonl", "--output", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_byte_order_mark_and_doubled_rows(tmp_path):
    """Doubled rows are dropped from sets to train on only."""
    row = json.dumps(GOOD["aime24"])
    (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{row}\r\n{row}\r\n".encode())
    assert run("aime24", "--source", tmp_path / "x.jsonl", "--output", tmp_path / "a") == 0
    assert truths(tmp_path / "a" / "test.parquet") == ["1", "1"]
    train = write(tmp_path / "y.jsonl", [GOOD["numinamath"], {**GOOD["numinamath"], "solution": r"\boxed{2}"}])
    assert run("numinamath", "--source", train, "--output", tmp_path / "b", "--against", "none") == 0
    assert truths(tmp_path / "b" / "train.parquet") in (["1"], ["2"])
    assert provenance(tmp_path / "b")["dropped"]["same question as an earlier row"]["count"] == 1


def test_columns_that_are_no_json(tmp_path):
    """Parquet has types that JSON has not; they stand in the details as text."""
    import datetime

    import pyarrow as pa

    rows = [{**GOOD["aime24"], "year": datetime.date(2024, 1, 1), "id": b"x"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    assert run("aime24", "--source", tmp_path / "x.parquet", "--output", tmp_path / "out") == 0
    (made,) = pq.read_table(tmp_path / "out" / "test.parquet").to_pylist()
    assert json.loads(made["extra_info"]["details"])["year"] == "2024-01-01"


# ---- answers that cannot be graded -----------------------------------------------------------------------------------


@pytest.mark.parametrize("truth", ["x^{", r"\frac{1", "}{", '{"a": 1}', "x" * 1001, "$$", "", '["7", "x^{"]'])
def test_ungradable(truth):
    assert not is_gradable(truth)


@pytest.mark.parametrize("truth", ["7", r"\frac{1}{2}", '["80", "81"]', r"\{1, 2\}", "East", "4:30 p.m."])
def test_gradable(truth):
    assert is_gradable(truth)


def test_answers_that_math_verify_can_not_read():
    answers = ["7", "-0.5", r"\frac{1}{2}", "1/", "&&", "x+1", r"\begin{cases} x", "1/", r"\sqrt[3]{}"]
    assert unreadable(answers) == {"1/", "&&", r"\begin{cases} x", r"\sqrt[3]{}"}
    assert unreadable(["7", "8.25", "-3"]) == unreadable([]) == set()


def test_an_answer_that_takes_for_ever(monkeypatch):
    monkeypatch.setattr(gradable, "MEMORY", 2**40)
    assert unreadable(["1/", "x+1", "9^{9^{9^{9}}}!", "y+1", "&&"]) >= {"1/", "&&"}
    assert not unreadable(["x+1", "9^{9^{9^{9}}}!", "y+1"]) & {"x+1", "y+1"}


def test_a_reader_that_does_not_start(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    source = write(tmp_path / "x.jsonl", [{"problem": "p", "answer": "1/"}])
    assert run("aime24", "--source", source, "--output", tmp_path / "out") == 2
    assert "math-verify does not start" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_they_are_counted(tmp_path, capsys):
    rows = [{"problem": f"p{i}", "answer": answer} for i, answer in enumerate(["1", "1/", "x^{", "None", "&&"])]
    source = write(tmp_path / "x.jsonl", rows)
    assert run("math_train", "--source", source, "--output", tmp_path / "t", "--against", "none") == 0
    shown = capsys.readouterr().out
    assert f"dropped: 1 × {UNGRADABLE}" in shown and f"kept: 2 × {TEXT_ONLY}" in shown
    assert provenance(tmp_path / "t")["noted"] == {TEXT_ONLY: {"count": 2, "rows": [1, 4]}}
    assert {reason: one["rows"] for reason, one in provenance(tmp_path / "t")["dropped"].items()} == {
        UNGRADABLE: [2],
        "the answer is a word for none, such as proof": [3],
    }
    assert run("math500", "--source", source, "--output", tmp_path / "e") == 0
    assert provenance(tmp_path / "e")["noted"][UNGRADABLE]["rows"] == [2], "an evaluation set keeps it"


def test_the_command_line_has_no_traceback(tmp_path):
    source = write(tmp_path / "x.jsonl", [{"problem": "p"}, {"answer": "7"}])
    done = subprocess.run(
        [sys.executable, "-m", "data_prep", "aime25", "--source", str(source), "--output", str(tmp_path / "out")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr


def test_a_drop_is_a_reason():
    with pytest.raises(Drop, match="its tests are no list"):
        code_sets.tests_of({"test_list": "assert f()"})
