"""What all sets go through: reading files and folders, drawing, writing, and what happens when that fails."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import core
from data_prep.files import sha256_of
from data_prep.schema import DataError, Hub, Row, Schema
from data_prep.sets import SETS
from tests.data_prep.made import AIME_ROWS, TINY, files_under, provenance, run, table, write

ROWS = [{"q": f"question {i}", "a": i, "unused": [i]} for i in range(5)]


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.jsonl.gz", "x.parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    prepared = core.prepare(TINY, tmp_path / "out", [str(write(tmp_path / name, ROWS))])
    assert [row["reward_model"]["ground_truth"] for row in prepared.train] == ["0", "1", "2", "3", "4"]
    (file,) = provenance(tmp_path / "out")["source"]["files"]
    assert file == {"file": str(tmp_path / name), "rows": 5, "sha256": sha256_of(tmp_path / name)}


def test_json_that_has_one_object_per_line(tmp_path):
    (tmp_path / "x.json").write_text('\ufeff{"q": "a\u2028b", "a": 1}\r\n\n{"q": "c", "a": 2}')
    assert [row["prompt"][0]["content"] for row in core.prepare(TINY, tmp_path, [str(tmp_path / "x.json")]).train] == [
        "a\u2028b",
        "c",
    ]


def test_a_row_in_full(tmp_path):
    dataset = dataclasses.replace(
        TINY,
        ability="code",
        instruction="Think.",
        schemas=(
            Schema(("q",), lambda row: Row(row["q"], "t", details={"b": [1], "a": "é"}, note="odd")),
            Schema(("never",), lambda row: Row("", "")),
        ),
    )
    core.prepare(dataset, tmp_path, [str(write(tmp_path / "x.json", [{"q": "Add."}]))])
    assert table(tmp_path / "train.parquet") == [
        {
            "data_source": "gcpo/tiny",
            "prompt": [{"role": "user", "content": "Add. Think."}],
            "ability": "code",
            "reward_model": {"style": "rule", "ground_truth": "t"},
            "extra_info": {
                "index": 0,
                "split": "train",
                "source_row": 0,
                "question": "Add.",
                "details": '{"a": "\\u00e9", "b": [1]}',
            },
        }
    ]
    written = provenance(tmp_path)
    assert written["noted"] == {"odd": {"count": 1, "rows": [0]}} and written["source"]["columns"] == ["q"]
    assert written["files"]["train.parquet"]["sha256"] == sha256_of(tmp_path / "train.parquet")


def test_prompts_of_several_messages(tmp_path):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    dataset = dataclasses.replace(TINY, schemas=(Schema(("q",), lambda row: Row("q", "t", prompt=messages)),))
    core.prepare(dataset, tmp_path, [str(write(tmp_path / "x.json", [{"q": ""}]))])
    assert table(tmp_path / "train.parquet")[0]["prompt"] == messages


def test_all_sets_have_the_same_columns(tmp_path):
    """verl puts the files of a run into one table, which fails where they differ."""
    import datasets

    run("aime", "--source", write(tmp_path / "a.json", AIME_ROWS), "--output", tmp_path / "aime")
    code = dataclasses.replace(TINY, name="code", ability="code", kind="eval")
    core.prepare(code, tmp_path / "code", [str(write(tmp_path / "x.json", ROWS))])
    files = [str(tmp_path / "aime" / "train.parquet"), str(tmp_path / "code" / "test.parquet")]
    parts = [datasets.Dataset.from_parquet(file, cache_dir=str(tmp_path / "cache")) for file in files]
    assert len(datasets.concatenate_datasets(parts)) == 3 + 5


def test_the_same_bytes_every_time(tmp_path):
    write(tmp_path / "x.parquet", [{"q": f"{i}", "a": i} for i in range(3000)])
    for name in ("one", "two"):
        core.prepare(TINY, tmp_path / name, [str(tmp_path / "x.parquet")], rows=2000, seed=1)
    for file in ("train.parquet", "provenance.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_a_draw_depends_on_the_seed_alone(tmp_path):
    as_lists = core.read_source(TINY, [str(write(tmp_path / "x.jsonl", ROWS * 600))])
    as_table = core.read_source(TINY, [str(write(tmp_path / "x.parquet", ROWS * 600))])

    def drawn(source, **options):
        prepared = core.convert_rows(dataclasses.replace(TINY, kind="eval"), source, **options)
        return [row["extra_info"]["source_row"] for row in prepared.test], prepared

    rows, prepared = drawn(as_lists, rows=100, seed=3)
    assert len(set(rows)) == 100 and prepared.read == 3000 and prepared.not_drawn == 2900
    assert drawn(as_table, rows=100, seed=3)[0] == rows != drawn(as_table, rows=100, seed=4)[0]
    assert rows != sorted(rows) and max(rows) > 1500
    everything, prepared = drawn(as_table, rows=5000)
    assert sorted(everything) == list(range(3000)) and prepared.not_drawn == 0


def test_a_draw_is_filled_up_with_usable_rows(tmp_path):
    rows = [{"q": f"{i}", "a": i if i % 2 else None} for i in range(100)]
    source = core.read_source(TINY, [str(write(tmp_path / "x.jsonl", rows))])
    prepared = core.convert_rows(TINY, source, rows=50)
    assert {int(row["reward_model"]["ground_truth"]) for row in prepared.train} == set(range(1, 100, 2))
    assert set(prepared.dropped["no answer"]) <= set(range(0, 100, 2))
    assert len(prepared.dropped["no answer"]) + prepared.not_drawn == 50


def test_doubled_rows_are_dropped_from_training_alone(tmp_path):
    rows = [{"q": "Find $x$.", "a": 1}, {"q": "find  $ x $", "a": 1}, {"q": "Find $-x$.", "a": 2}]
    source = core.read_source(TINY, [str(write(tmp_path / "x.json", rows))])
    assert core.convert_rows(TINY, source).dropped == {"same question as an earlier row": [1]}
    assert len(core.convert_rows(dataclasses.replace(TINY, kind="eval"), source).test) == 3


def test_half_characters_are_dropped(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"q": "\\ud835", "a": 1}\n{"q": "b", "a": 2}')
    prepared = core.prepare(TINY, tmp_path, [str(tmp_path / "x.jsonl")])
    assert prepared.dropped == {"half a character, which is no text": [0]} and len(prepared.train) == 1


# ---- folders -------------------------------------------------------------------------------------------------------

HUBBED = dataclasses.replace(TINY, hubs=(Hub("o/n", "train", ("main",)),))


def names(dataset, folder: Path, *sources: str) -> list[str]:
    source = core.read_source(dataset, [str(folder / name) for name in sources] or [str(folder)])
    return [str(Path(file["file"]).relative_to(folder)) for file in source.origin["files"]]


def test_files_of_a_split(tmp_path):
    for name in ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "test.parquet", "validation.parquet"):
        write(tmp_path / "data" / name, ROWS)
    assert names(TINY, tmp_path) == ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]
    assert names(dataclasses.replace(TINY, split="test"), tmp_path) == ["data/test.parquet"]


def test_files_with_numbers_behind_the_split(tmp_path):
    for name in ("test2025-II.jsonl", "test2025-I.jsonl", "train.jsonl"):
        write(tmp_path / name, ROWS)
    assert names(dataclasses.replace(TINY, split="test"), tmp_path) == ["test2025-I.jsonl", "test2025-II.jsonl"]


def test_a_folder_for_every_configuration(tmp_path):
    for name in ("main/train.parquet", "socratic/train.parquet"):
        write(tmp_path / name, ROWS)
    assert names(HUBBED, tmp_path) == ["main/train.parquet"]


def test_a_folder_for_every_split(tmp_path):
    for name in ("train/0000.parquet", "train/0001.parquet", "test/0000.parquet"):
        write(tmp_path / name, ROWS)
    assert names(TINY, tmp_path) == ["train/0000.parquet", "train/0001.parquet"]


def test_the_only_file(tmp_path):
    write(tmp_path / "Questions.jsonl.gz", ROWS)
    (tmp_path / "README.md").write_text("")
    write(tmp_path / ".cache" / "x.json", ROWS)
    assert names(TINY, tmp_path) == ["Questions.jsonl.gz"]


@pytest.mark.parametrize("folder", ["", "train/"])
def test_a_folder_of_several_sets_is_refused(tmp_path, folder):
    for name in ("aime.json", "amc.json"):
        write(tmp_path / f"{folder}{name}", ROWS)
    with pytest.raises(DataError, match=f"holds {folder}aime.json, {folder}amc.json, and which of them is tiny"):
        core.read_source(TINY, [str(tmp_path)])
    assert names(TINY, tmp_path, f"{folder}amc.json") == [f"{folder}amc.json"]


def test_several_files_are_read_one_after_the_other(tmp_path):
    write(tmp_path / "b.json", ROWS[:1])
    write(tmp_path / "a.parquet", ROWS[1:])
    source = core.read_source(TINY, [str(tmp_path / "b.json"), str(tmp_path / "a.parquet")])
    assert [row["a"] for row in source.records.read(range(5))] == [0, 1, 2, 3, 4]
    assert source.label == f"2 files, {tmp_path}/b.json first"


# ---- bad input -----------------------------------------------------------------------------------------------------

AIME_COLUMNS = "it has answer, question, and (Question, Answer, Year) or (problem, answer, year) are needed"


def truncated_parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"problem": ["p" * 1000], "answer": ["1"], "year": [1990]}), sink)
    return sink.getvalue().to_pybytes()[:-100]


BAD = {
    "a file that is not there": ("missing.json", None, "there is no file or folder "),
    "a kind that is not known": ("x.csv", b"a,b", "is no .json, .jsonl, .json.gz, .jsonl.gz, .parquet file"),
    "json that ends": ("x.json", b"[{", "can't be read: "),
    "a line that ends": ("x.jsonl", b'{"a": 1}\n{', "can't be read: line 2 is no JSON"),
    "no parquet": ("x.parquet", b"not parquet", "can't be read: "),
    "a truncated parquet": ("x.parquet", truncated_parquet(), "can't be read: "),
    "a truncated gzip": ("x.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99)[:-9], "can't be read: "),
    "no gzip": ("x.jsonl.gz", b"{}", "can't be read: Not a gzipped file"),
    "no text": ("x.jsonl", b'{"a": "\xff"}', "can't be read: "),
    "lists without end": ("x.json", b"[" * 100_000, "can't be read: "),
    "an empty file": ("x.jsonl", b"", "has no rows"),
    "an empty parquet file": ("x.parquet", b"", "can't be read: "),
    "an empty list": ("x.json", b"[]", "has no rows"),
    "rows that are none": ("x.json", b"[1]", "holds no list of rows"),
    "wrong columns": ("x.json", b'[{"question": "q", "answer": "1"}]', f"lacks columns of aime: {AIME_COLUMNS}"),
    "no usable row": (
        "x.json",
        b'[{"problem": "", "answer": "1", "year": 1990}]',
        "has no usable row of aime (1 \u00d7 empty question)",
    ),
    "nothing to train on": (
        "x.json",
        b'[{"problem": "q", "answer": "1", "year": 2024}]',
        "has no row of aime to train on (none dropped)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path, capsys, name):
    file, content, sentence = BAD[name]
    if content is not None:
        (tmp_path / file).write_bytes(content)
    assert run("aime", "--source", tmp_path / file, "--output", tmp_path / "a" / "b", "--against", "none") == 2
    error = capsys.readouterr().err
    assert sentence in error and error.startswith("error: ") and error.count("\n") == 1
    assert files_under(tmp_path) == ([file] if content is not None else [])


def test_a_folder_without_files(tmp_path):
    with pytest.raises(DataError, match=r"holds no \.json, .* file; give the folder or the file with the rows"):
        core.read_source(TINY, [str(tmp_path)])


def test_parquet_files_that_do_not_fit(tmp_path):
    write(tmp_path / "train-0.parquet", [{"q": "a", "a": 1}])
    write(tmp_path / "train-1.parquet", [{"q": "a", "a": "b"}])
    with pytest.raises(DataError, match="holds files of different columns"):
        core.read_source(TINY, [str(tmp_path)])


@pytest.mark.parametrize(
    ("name", "hint"), [("aimee", "did you mean aime?"), ("x", "there are aime, "), ("x/y", "there are aime, ")]
)
def test_a_set_that_does_not_exist(capsys, name, hint):
    assert run(name) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: there is no set {name}; {hint}") and error.count("\n") == 1


def test_no_set_at_all(capsys):
    with pytest.raises(SystemExit):
        run()
    assert "which set? --list names all" in capsys.readouterr().err


def test_a_set_that_the_hub_does_not_have(capsys):
    assert run("deepscaler_aime", "--against", "none") == 2
    assert "give its file, deepscaler/data/train/aime.json of github.com" in capsys.readouterr().err


def test_a_revision_of_a_file(tmp_path):
    with pytest.raises(DataError, match="--revision is for data sets of the hub"):
        core.read_source(TINY, [str(write(tmp_path / "x.json", ROWS))], revision="abc")


def test_a_number_of_rows_that_is_none(capsys):
    with pytest.raises(SystemExit):
        run("aime", "--rows", "0")
    assert "--rows is 0; it must be at least 1" in capsys.readouterr().err


# ---- writing -------------------------------------------------------------------------------------------------------


def test_an_output_below_a_file(tmp_path, capsys):
    source = write(tmp_path / "a.json", AIME_ROWS)
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file" / "out", tmp_path / "file"):
        assert run("aime", "--source", source, "--output", output, "--against", "none") == 2
        assert "can't be" in capsys.readouterr().err
    assert files_under(tmp_path) == ["a.json", "file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_that_is_read_only(tmp_path, capsys):
    source = write(tmp_path / "a.json", AIME_ROWS)
    (tmp_path / "out").mkdir(mode=0o500)
    assert run("aime", "--source", source, "--output", tmp_path / "out", "--against", "none") == 2
    assert "can't be written: Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize("there", [False, True])
def test_a_write_that_fails_half_way(tmp_path, monkeypatch, there):
    """The disk is full when the second file is written: what stood there stands there still."""
    source = str(write(tmp_path / "a.json", AIME_ROWS))
    if there:
        core.prepare(SETS["aime"], tmp_path / "out", [source], rows=1)
    before = {name: (tmp_path / name).read_bytes() for name in files_under(tmp_path) if (tmp_path / name).is_file()}
    write_table = pq.write_table

    def full(rows, path):
        if path.name == "test.parquet":
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        write_table(rows, path)

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(DataError, match="can't be written: No space left on device"):
        core.prepare(SETS["aime"], tmp_path / "out", [source])
    after = {name: (tmp_path / name).read_bytes() for name in files_under(tmp_path) if (tmp_path / name).is_file()}
    assert after == before and (tmp_path / "out").exists() == there


def test_a_rename_that_fails_leaves_no_new_folder(tmp_path, monkeypatch):
    source = str(write(tmp_path / "a.json", AIME_ROWS))
    replace = os.replace

    def fails(old, new):
        if Path(new).name == "test.parquet":
            raise OSError(5, "Input/output error")
        replace(old, new)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(DataError, match="can't be written: Input/output error"):
        core.prepare(SETS["aime"], tmp_path / "new" / "out", [source])
    assert files_under(tmp_path) == ["a.json"]


def test_a_folder_of_another_set_is_left_alone(tmp_path, capsys):
    source = write(tmp_path / "a.json", AIME_ROWS)
    assert run("aime", "--source", source, "--output", tmp_path / "out") == 0
    written = provenance(tmp_path / "out")
    assert run("amc23", "--source", source, "--output", tmp_path / "out") == 2
    assert "holds the set aime; give another folder for amc23: --output DIR" in capsys.readouterr().err
    assert provenance(tmp_path / "out") == written


def test_a_second_run_replaces_the_first_and_says_what_changed(tmp_path, capsys):
    for rows, changed in ((AIME_ROWS, []), (AIME_ROWS, []), (AIME_ROWS[:1], ["train", "test"])):
        source = write(tmp_path / "a.json", rows)
        assert run("aime", "--source", source, "--output", tmp_path / "out", "--against", "none") == 0
        error = capsys.readouterr().err
        noted = [split for split in ("train", "test") if f"out/{split}.parquet is not what it was before" in error]
        assert noted == changed
    assert files_under(tmp_path / "out") == ["provenance.json", "train.parquet"]


def test_is_prepared(tmp_path):
    raw = write(tmp_path / "raw.parquet", AIME_ROWS)
    run("aime", "--source", raw, "--output", tmp_path)
    assert run("--is-prepared", tmp_path / "train.parquet") == 0
    for other in ("raw.parquet", "provenance.json", "missing.parquet"):
        assert run("--is-prepared", tmp_path / other) == 1


def test_the_list_of_sets(capsys):
    assert run("--list") == 0
    lines = capsys.readouterr().out
    assert all(f"  {name} " in lines for name in SETS) and "[di-zhang-fdu/AIME_1983_2024]" in lines


def test_it_says_where_rows_come_from(tmp_path, capsys):
    source = write(tmp_path / "a.json", AIME_ROWS)
    assert run("aime", "--source", source, "--data", tmp_path / "data") == 0
    printed = capsys.readouterr()
    assert f"aime: 7 rows from the file {source}\n" in printed.out
    assert f"{tmp_path}/data/aime: 3 rows to train on, 1 rows to evaluate on\n" in printed.out
    assert (
        "dropped: 1 \u00d7 no answer\n" in printed.out
        and "kept: 1 \u00d7 several answers, or forms of one\n" in printed.out
    )
    assert "note: aime is known with 933 or 975 rows, this source has 7\n" in printed.err
    assert json.loads((tmp_path / "data" / "aime" / "provenance.json").read_text())["set"] == "aime"
