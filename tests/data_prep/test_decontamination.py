"""Problems that are the same, nearly the same, and not the same."""

from __future__ import annotations

import pytest

from data_prep.decontamination import EvaluationSets, grams, key_of, load_sets, words
from data_prep.schema import DataError
from tests.data_prep.made import AIME_ROWS, files_under, provenance, run, table, write

LONG = "Let $x$ be a real number such that $\\dfrac{x}{2} = 7$ holds. How many positive divisors does $x^2 + 1$ have?"
OTHER = (
    "A train leaves the station at noon and travels west at 60 miles per hour. When is it 90 miles from the station?"
)


def sets(*questions: str) -> EvaluationSets:
    found = EvaluationSets()
    found.add("some", questions)
    return found


def test_words():
    assert words(r"Find $\dfrac{1}{2}$ of \text{12},\!000 -- [asy] draw(A); [/asy] now") == (
        ["find", r"\frac", "1", "2", "of", "1", "2", "0", "0", "0", "-", "-", "now"]
    )
    assert words("") == []


def test_keys_forget_layout_and_nothing_else():
    assert key_of(r"Find $\left(x - 1\right)$.") == key_of("find \n $( x-1 )$")
    assert key_of("Find $x - 1$.") != key_of("Find $x + 1$.")
    assert key_of("[asy]draw(A);[/asy]") == "[asy]draw(A);[/asy]"


def test_grams():
    assert grams(list("abc"), 2) == {("a", "b"), ("b", "c")}
    assert grams(list("ab"), 5) == {("a", "b")} and grams([], 5) == set()


@pytest.mark.parametrize(
    ("question", "match"),
    [
        (LONG, "exact"),
        (LONG.replace(" ", "\n "), "exact"),
        (LONG.replace(r"$\dfrac{x}{2} = 7$", r"\[\dfrac x2=7.\]"), "letters"),
        (LONG.replace(r"\dfrac", r"\frac"), "near"),
        (LONG.replace("positive divisors", "divisors"), "near"),
        ("Reminder of chapter three. " + LONG + " Give the answer as an integer.", "near"),
        (OTHER, None),
    ],
)
def test_what_is_found(question, match):
    found = sets("What is it?", LONG).find(question)
    assert (found and found["match"]) == match
    if found:
        assert found["set"] == "some" and found["set_row"] == 1 and found["shared"] >= 0.6
    assert sets().find(question) is None


def test_a_share_by_hand():
    """The shorter has 20 words, 16 runs of five; a word in its middle is another, which breaks five of them."""
    letters = "abcdefghijklmnopqrst"
    assert sets(" ".join(letters)).find(" ".join(letters.replace("j", "z")) + " u v") == {
        "set": "some",
        "set_row": 0,
        "match": "near",
        "shared": 0.688,
    }


def test_short_problems_are_found_by_their_whole_text_alone():
    short = sets("Compute $\\sin 60^\\circ$.")
    assert short.find("compute $\\sin 60^{\\circ}$")["match"] == "letters"
    assert short.find("Compute $\\sin 60^\\circ + \\cos 30^\\circ$.") is None


def test_the_nearest_is_named():
    found = sets(OTHER, LONG.replace("real", "good").replace("many", "few"), LONG.replace("real", "good")).find(LONG)
    assert found["set_row"] == 2


# ---- in the command ------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """An evaluation set and a training set that shares a problem with it."""
    write(tmp_path / "eval.jsonl", [{"problem": OTHER, "answer": "1"}, {"problem": LONG, "answer": "2"}])
    write(tmp_path / "train.jsonl", [{"problem": q, "answer": "1", "year": 1990} for q in ("Find it.", LONG)])
    return tmp_path


def test_prepared_evaluation_sets_are_compared_with(folder, capsys):
    data = ("--data", folder / "data")
    assert run("amc23", "--source", folder / "eval.jsonl", *data) == 0
    capsys.readouterr()
    assert run("aime", "--source", folder / "train.jsonl", *data) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("compared with: amc23\n")
    assert "dropped: 1 \u00d7 also in the evaluation set amc23 (exact)\n" in printed.out
    written = provenance(folder / "data" / "aime")
    assert written["overlaps"] == [
        {"row": 1, "question": LONG[:120], "set": "amc23", "set_row": 1, "match": "exact", "shared": 1.0}
    ]
    (compared,) = written["compared_with"]
    assert compared["set"] == "amc23" and compared["questions"] == 2 and len(compared["sha256"]) == 64
    assert written["rows"] == {"read": 2, "train": 1, "test": 0, "dropped": 1, "not_drawn": 0}


@pytest.mark.parametrize("against", ["eval.jsonl", "eval.parquet"])
def test_any_file_can_be_compared_with(folder, against):
    write(folder / "eval.parquet", [{"id": "1", "question": LONG}])
    assert run("aime", "--source", folder / "train.jsonl", "--output", folder / "o", "--against", folder / against) == 0
    assert provenance(folder / "o")["overlaps"][0]["set"] == against


def test_nothing_to_compare_with(folder, capsys):
    arguments = ("aime", "--source", folder / "train.jsonl", "--data", folder / "data")
    assert run(*arguments) == 0
    note = f"note: no evaluation set is prepared in {folder}/data, so aime is compared with none\n"
    assert note in capsys.readouterr().err
    assert run(*arguments, "--against", "none") == 0
    assert note not in capsys.readouterr().err
    assert len(table(folder / "data" / "aime" / "train.parquet")) == 2


@pytest.mark.parametrize(
    ("against", "sentence"),
    [
        ("math500", "the evaluation set math500 is not prepared: python -m data_prep math500"),
        ("nothing", "nothing is neither an evaluation set (aime24, "),
        ("train", "train is neither an evaluation set"),
        ("wrong.json", "has no problems: none of the columns question, problem, "),
    ],
)
def test_bad_evaluation_sets(folder, capsys, against, sentence):
    write(folder / "wrong.json", [{"a": "b"}])
    before = files_under(folder)
    path = folder / against if "." in against else against
    arguments = ("--source", folder / "train.jsonl", "--data", folder / "data", "--against", path)
    assert run("aime", *arguments) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1 and files_under(folder) == before


def test_a_broken_evaluation_set(folder):
    broken = folder / "data" / "aime24"
    write(broken / "provenance.json", [])
    with pytest.raises(DataError, match="aime24/test.parquet can't be read: "):
        load_sets(["auto"], ["aime24"], folder / "data")


def test_evaluation_sets_keep_all_rows(folder):
    assert run("amc23", "--source", folder / "eval.jsonl", "--data", folder) == 0
    assert run("aime24", "--source", folder / "eval.jsonl", "--data", folder) == 0
    assert len(table(folder / "aime24" / "test.parquet")) == 2 and provenance(folder / "aime24")["compared_with"] == []


def test_rows_that_are_held_out_are_not_compared(tmp_path):
    write(tmp_path / "eval.json", [{"question": "Find w."}])
    source = write(tmp_path / "a.json", AIME_ROWS)
    assert run("aime", "--source", source, "--output", tmp_path / "o", "--against", tmp_path / "eval.json") == 0
    assert [row["extra_info"]["question"] for row in table(tmp_path / "o" / "test.parquet")] == ["Find w."]
