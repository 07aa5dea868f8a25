"""AIME in verl's schema, from both schemas and from what people have on their disks. No hub is asked."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import deepscaler
from gcpo.rewards import compute_score

SHARED_DATA = Path(os.environ.get("GCPO_SHARED_DATA", Path(__file__).resolve().parents[2].parent / "shared" / "data"))

HUB_ROWS = [
    {"ID": "1983-1", "Year": 1983, "Problem Number": 1, "Question": "Find x.", "Answer": "060", "Part": None},
    {
        "ID": "1995-3",
        "Year": 1995,
        "Problem Number": 3,
        "Question": "Find y.",
        "Answer": "080 or 081 (both were accepted)",
    },
    {"ID": "1995-4", "Year": 1995, "Problem Number": 4, "Question": "  ", "Answer": "1"},
    {"ID": "1995-5", "Year": 1995, "Problem Number": 5, "Question": "Find  x.", "Answer": "60"},
    {"ID": "1996-1", "Year": 1996, "Problem Number": 1, "Question": "Find z.", "Answer": None},
    {"ID": "2024-1", "Year": 2024, "Problem Number": 1, "Question": "Find w.", "Answer": "7"},
]
LOCAL_ROWS = [
    {"problem": "Find a.", "solution": "s", "answer": 60.0, "year": "1990"},
    {"problem": "Find b.", "solution": "s", "answer": "9", "year": None},
]


def run(source: Path | str, output: Path, *options: str) -> int:
    return deepscaler.main(["--source", str(source), "--output", str(output), *options])


def test_the_hub_s_schema(tmp_path, capsys):
    source = tmp_path / "aime.parquet"
    pq.write_table(pa.Table.from_pylist(HUB_ROWS), source)
    assert run(source, tmp_path / "out") == 0
    train = pq.read_table(tmp_path / "out" / "train.parquet").to_pylist()
    assert train[0] == {
        "data_source": "gcpo/aime",
        "prompt": [{"role": "user", "content": f"Find x. {deepscaler.INSTRUCTION}"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "60"},
        "extra_info": {"index": 0, "split": "train", "year": 1983, "source_row": 0},
    }
    assert [row["extra_info"]["source_row"] for row in train] == [0, 1]
    test = pq.read_table(tmp_path / "out" / "test.parquet").to_pylist()
    assert [row["extra_info"]["year"] for row in test] == [2024]
    provenance = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert provenance["rows"] == {"read": 6, "train": 2, "test": 1}
    assert provenance["dropped"] == {
        "empty question": {"count": 1, "rows": [2]},
        "same question as an earlier row": {"count": 1, "rows": [3]},
        "no answer": {"count": 1, "rows": [4]},
    }
    assert provenance["source"]["file"] == "aime.parquet" and len(provenance["source"]["sha256"]) == 64
    assert "2 problems to train on, 1 of later years" in capsys.readouterr().out


def test_two_accepted_answers_are_both_right():
    truth = HUB_ROWS[1]["Answer"]
    scores = [compute_score("gcpo/aime", rf"\boxed{{{answer}}}", truth)["score"] for answer in ("80", "081", "82")]
    assert scores == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_deepscaler_s_schema(tmp_path, suffix):
    source = tmp_path / f"aime.{suffix}"
    source.write_text(json.dumps(LOCAL_ROWS) if suffix == "json" else "\n".join(map(json.dumps, LOCAL_ROWS)))
    assert run(source, tmp_path) == 0
    (row,) = pq.read_table(tmp_path / "train.parquet").to_pylist()
    assert row["reward_model"]["ground_truth"] == "60"
    assert json.loads((tmp_path / "provenance.json").read_text())["dropped"] == {"no year": {"count": 1, "rows": [1]}}
    assert not (tmp_path / "test.parquet").exists()


def test_years_can_be_chosen(tmp_path):
    source = tmp_path / "aime.json"
    source.write_text(json.dumps(HUB_ROWS))
    assert run(source, tmp_path, "--first-year", "1990", "--last-year", "1994") == 2
    assert run(source, tmp_path, "--first-year", "1990", "--last-year", "1995") == 0
    assert json.loads((tmp_path / "provenance.json").read_text())["dropped"]["before 1990"] == {"count": 1, "rows": [0]}


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("missing.json", None, "there is no file"),
        ("x.csv", "a,b", "is no .json, .jsonl, .parquet file"),
        ("x.json", "{", "can't be read: "),
        ("x.jsonl", '{"a": 1}\n{', "can't be read: "),
        ("x.parquet", "not parquet", "can't be read: "),
        ("x.json", "[]", "has no rows"),
        ("x.json", '{"a": 1}', "holds no list of rows"),
        ("x.json", "[1]", "holds no list of rows"),
        ("x.json", '[{"question": "q", "answer": "1"}]', "lacks columns: it has answer, question, and "),
        ("x.json", '[{"problem": "", "answer": "1", "year": 1990}]', "no usable problem of 1983 to 2023 (1 × empty"),
    ],
)
def test_bad_sources_are_one_sentence(tmp_path, capsys, name, content, sentence):
    source = tmp_path / name
    if content is not None:
        source.write_text(content)
    assert run(source, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert sentence in error and error.startswith("deepscaler: ") and error.count("\n") == 1


def test_a_hub_out_of_reach(tmp_path, capsys, monkeypatch):
    def load_dataset(name, split):
        raise ConnectionError(f"Couldn't reach {name}")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert run("someone/AIME", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "someone/AIME can't be loaded from the hub (Couldn't reach someone/AIME)" in error
    assert "--source FILE.parquet" in error and error.count("\n") == 1


def test_a_hub_within_reach(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr("datasets.load_dataset", lambda name, split: datasets.Dataset.from_list(HUB_ROWS))
    assert run(deepscaler.HUB_ID, tmp_path) == 0
    source = json.loads((tmp_path / "provenance.json").read_text())["source"]
    assert source["hub"] == deepscaler.HUB_ID and len(source["sha256_of_rows"]) == 64


def test_an_output_that_can_not_be_written(tmp_path, capsys):
    source = tmp_path / "aime.json"
    source.write_text(json.dumps(HUB_ROWS))
    (tmp_path / "file").write_text("")
    assert run(source, tmp_path / "file" / "out") == 2
    assert "can't be written" in capsys.readouterr().err


def test_is_prepared(tmp_path):
    pq.write_table(pa.Table.from_pylist(HUB_ROWS), tmp_path / "raw.parquet")
    run(tmp_path / "raw.parquet", tmp_path)
    assert deepscaler.main(["--is-prepared", str(tmp_path / "train.parquet")]) == 0
    for other in ("raw.parquet", "provenance.json", "missing.parquet"):
        assert deepscaler.main(["--is-prepared", str(tmp_path / other)]) == 1


def test_the_real_file(tmp_path):
    source = SHARED_DATA / "deepscaler" / "train" / "aime.json"
    if not source.is_file():
        pytest.skip(f"{source} is not on this machine (GCPO_SHARED_DATA names another place)")
    prepared = deepscaler.prepare(str(source), tmp_path)
    assert len(prepared.train) == 975 and not prepared.test and not prepared.dropped
    assert all(row["reward_model"]["ground_truth"].isdigit() for row in prepared.train)
    answers = [row["reward_model"]["ground_truth"] for row in prepared.train]
    assert all(compute_score("gcpo/aime", rf"\boxed{{{answer}}}", answer)["score"] == 1.0 for answer in answers)
