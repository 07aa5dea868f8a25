"""Reading question sets, good ones and bad ones."""

from __future__ import annotations

import pytest

from examples.arithmetic.task import prepare
from gcpo.tools.evaluate import EvaluationError
from gcpo.tools.evaluate.questions import TABLE_1, TITLES, load_sets
from tests.tools.evaluate.made import rows, write_set


def test_a_set_by_name(tmp_path):
    write_set(tmp_path / "aime24" / "test.parquet", rows(3))
    (found,) = load_sets(["aime24"], data=tmp_path)
    assert found.name == "aime24" and [question.row for question in found.questions] == [0, 1, 2]
    assert found.questions[1].ground_truth == "2" and found.questions[1].extra_info == {"index": 1}


def test_names_are_those_that_data_prep_knows():
    from data_prep.sets import SETS

    assert set(TABLE_1) <= set(TITLES)
    assert set(TITLES) - {"arithmetic"} == {dataset.name for dataset in SETS.values() if dataset.kind == "eval"}


@pytest.mark.parametrize(
    ("name", "command"),
    [("aime24", "python -m data_prep aime24"), ("arithmetic", "python -m examples.arithmetic.task --output")],
)
def test_a_set_that_is_not_prepared(tmp_path, name, command):
    with pytest.raises(EvaluationError, match=f"the set {name} is not prepared .* run `{command}"):
        load_sets([name], data=tmp_path)


def test_a_set_by_file_or_folder_is_called_by_it(tmp_path):
    prepare(tmp_path / "arithmetic", train_size=2, test_size=5)
    for name in ("arithmetic/test.parquet", "arithmetic"):
        (found,) = load_sets([str(tmp_path / name)])
        assert found.name == "arithmetic" and len(found.questions) == 5
        assert all(question.has_answer for question in found.questions)
    (found,) = load_sets([str(write_set(tmp_path / "mine.parquet", rows(1, ability="code")))])
    assert found.name == "mine" and not found.questions[0].has_answer


def test_the_first_questions(tmp_path):
    path = str(write_set(tmp_path / "mine.parquet", rows(4)))
    (first,), (all_of_them,) = load_sets([path], limit=2), load_sets([path])
    assert first.questions == all_of_them.questions[:2] and first.sha256 == all_of_them.sha256


def test_the_same_question_twice_has_two_ids(tmp_path):
    path = write_set(tmp_path / "mine.parquet", rows(1) * 2)
    (found,) = load_sets([str(path)])
    first, second = (question.id for question in found.questions)
    assert second == f"{first}-2"


def test_two_files_of_one_name(tmp_path):
    paths = [str(write_set(tmp_path / folder / "mine.parquet", rows(1))) for folder in ("a", "b")]
    with pytest.raises(EvaluationError, match="would both be called mine"):
        load_sets(paths)
    assert len(load_sets([paths[0], paths[0]])) == 1


def without(column: str) -> list[dict]:
    return [{key: value for key, value in row.items() if key != column} for row in rows(2)]


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (without("prompt"), "lacks the column prompt; it has data_source, ability"),
        (without("reward_model"), "lacks the column reward_model"),
        (rows(2, prompt=[]), "the prompt in row 0 of .* is empty"),
        (rows(2, prompt=[{"role": "user", "content": "  "}]), "the prompt in row 0 of .* is empty"),
        (rows(2, prompt="What?"), "the prompt in row 0 of .* no list of messages"),
        (rows(2, reward_model={"style": "rule"}), "row 0 of .* has no reward_model.ground_truth"),
    ],
)
def test_files_that_can_not_be_used(tmp_path, found, sentence):
    path = write_set(tmp_path / "bad.parquet", found)
    with pytest.raises(EvaluationError, match=sentence) as error:
        load_sets([str(path)])
    assert "\n" not in str(error.value)


def test_a_file_that_is_cut_off(tmp_path):
    path = write_set(tmp_path / "bad.parquet", rows(50))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(EvaluationError, match="is not a readable parquet file") as error:
        load_sets([str(path)])
    assert "\n" not in str(error.value)


def test_a_file_without_rows(tmp_path):
    import pyarrow.parquet as pq

    path = write_set(tmp_path / "empty.parquet", rows(1))
    pq.write_table(pq.read_table(path).slice(0, 0), path)
    with pytest.raises(EvaluationError, match="has no rows"):
        load_sets([str(path)])


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("aime2024", "aime2024 is no known set and no parquet file; the sets are aime24, aime25"),
        ("nowhere.parquet", "there is no file nowhere.parquet"),
    ],
)
def test_unknown_names(name, sentence):
    with pytest.raises(EvaluationError, match=sentence):
        load_sets([name])
    with pytest.raises(EvaluationError, match="no question set is named"):
        load_sets([])
