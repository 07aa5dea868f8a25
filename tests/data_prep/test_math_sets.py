"""Every mathematics set, in every schema that it comes in; small made files, and the real ones where they are."""

from __future__ import annotations

import json
import time

import pytest

from data_prep.core import convert_rows, read_source
from data_prep.gradable import TEXT_ONLY
from data_prep.sets import SETS
from gcpo.rewards import GraderError, compute_score
from tests.data_prep.made import AIME_ROWS, provenance, real, run, table, truths, write

INSTRUCTION = r"Let's think step by step and output the final answer within \boxed{}."


def prepared(tmp_path, name, rows, suffix="json"):
    source = read_source(SETS[name], [str(write(tmp_path / f"{name}.{suffix}", rows))])
    return convert_rows(SETS[name], source, rows=SETS[name].sample)


def answers(found):
    return [row["reward_model"]["ground_truth"] for row in (*found.train, *found.test)]


def details(found):
    return [json.loads(row["extra_info"]["details"]) for row in (*found.train, *found.test)]


# ---- training ------------------------------------------------------------------------------------------------------


def test_aime_of_the_hub(tmp_path):
    source = write(tmp_path / "aime.parquet", AIME_ROWS)
    assert run("aime", "--source", source, "--output", tmp_path / "out", "--against", "none") == 0
    train, test = (table(tmp_path / "out" / f"{split}.parquet") for split in ("train", "test"))
    assert train[0] == {
        "data_source": "gcpo/aime",
        "prompt": [{"role": "user", "content": f"Find x. {INSTRUCTION}"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "60"},
        "extra_info": {
            "index": 0,
            "split": "train",
            "source_row": 0,
            "question": "Find x.",
            "details": '{"id": "1983-1", "problem_number": 1, "year": 1983}',
        },
    }
    assert [row["extra_info"]["source_row"] for row in train] == [0, 1, 5]
    assert [row["extra_info"]["source_row"] for row in test] == [6]
    written = provenance(tmp_path / "out")
    assert written["rows"] == {"read": 7, "train": 3, "test": 1, "dropped": 3, "not_drawn": 0}
    assert written["dropped"] == {
        "empty question": {"count": 1, "rows": [2]},
        "same question as an earlier row": {"count": 1, "rows": [3]},
        "no answer": {"count": 1, "rows": [4]},
    }
    assert written["noted"] == {"several answers, or forms of one": {"count": 1, "rows": [1]}}


def test_aime_in_deepscaler_s_schema(tmp_path):
    rows = [
        {"problem": "Find a.", "solution": "s", "answer": 60.0, "year": "1990"},
        {"problem": "Find b.", "solution": "s", "answer": "9", "year": None},
        {"problem": "Find c.", "solution": "s", "answer": "009", "year": 2024},
    ]
    for name in ("aime", "deepscaler_aime"):
        found = prepared(tmp_path, name, rows)
        assert answers(found) == ["60", "9"] and len(found.train) == len(found.test) == 1
        assert found.dropped == {"no year": [1]} and details(found)[0] == {"year": 1990}


def test_years_after_2023_are_never_trained_on(tmp_path):
    rows = [{"Year": year, "Question": f"Find {year}.", "Answer": "1"} for year in range(1983, 2030)]
    found = prepared(tmp_path, "aime", rows)
    assert [one["year"] for one in details(found)[: len(found.train)]] == list(range(1983, 2024))
    assert len(found.test) == 6


def test_numinamath_cot(tmp_path):
    rows = [
        {"source": "s", "problem": "p0", "solution": r"\boxed{\frac{2}{3}}", "messages": []},
        {"source": "s", "problem": "p1", "solution": "It is 5.", "messages": []},
        {"source": "s", "problem": "p2", "solution": rf"\boxed{{\text{{{'long ' * 50}}}}}", "messages": []},
        {"source": "s", "problem": "p3", "solution": r"\boxed{1,\!234}", "messages": []},
        {"source": "s", "problem": "p4", "solution": r"\boxed{\text{proof}}", "messages": []},
        {"source": "s", "problem": "p5", "solution": r"(1) \boxed{3}. (2) \boxed{5}.", "messages": []},
    ]
    found = prepared(tmp_path, "numinamath", rows)
    assert set(answers(found)) == {r"\frac{2}{3}", "1234"}
    assert found.dropped == {
        "no boxed answer in the solution": [1],
        "an answer of more than 200 characters": [2],
        "the answer is a word for none, such as proof": [4],
        "several boxes with different answers in the solution": [5],
    }
    assert details(found)[0] == {"source": "s"}


def test_numinamath_15(tmp_path):
    valid = {
        "solution": "",
        "question_type": "math-word-problem",
        "problem_is_valid": "Yes",
        "solution_is_valid": "Yes",
    }
    rows = [
        {**valid, "problem": "p0", "answer": "12"},
        {**valid, "problem": "p1", "answer": "proof"},
        {**valid, "problem": "p2", "answer": "7", "question_type": "proof"},
        {**valid, "problem": "p3", "answer": "notfound"},
        {**valid, "problem": "p4", "answer": "7", "problem_is_valid": "Incomplete"},
        {**valid, "problem": "p5", "answer": "7", "solution_is_valid": "No"},
        {**valid, "problem": "p6", "answer": None},
        {**valid, "problem": "p7", "answer": "$x = 3$", "question_type": None},
    ]
    for suffix in ("jsonl", "parquet"):
        found = prepared(tmp_path, "numinamath", rows, suffix)
        assert set(answers(found)) == {"12", "$x = 3$"}
        assert {reason: sorted(which) for reason, which in found.dropped.items()} == {
            "the answer is a word for none, such as proof": [1, 3],
            "a proof is asked for": [2],
            "the set says that the problem or its solution is not valid": [4, 5],
            "no answer": [6],
        }


def test_numinamath_draws_4000(tmp_path):
    rows = [{"source": "s", "problem": f"What is {i}?", "solution": rf"\boxed{{{i}}}"} for i in range(4321)]
    source = write(tmp_path / "x.parquet", rows)
    for name in ("a", "b"):
        assert run("numinamath", "--source", source, "--output", tmp_path / name, "--against", "none") == 0
    assert run("numinamath", "--source", source, "--output", tmp_path / "c", "--against", "none", "--seed", "1") == 0
    one, two, other = (truths(tmp_path / name / "train.parquet") for name in "abc")
    assert one == two != other and len(set(one)) == len(other) == 4000
    written = provenance(tmp_path / "a")
    assert written["drawn"] == {"rows": 4000, "seed": 20250} and written["rows"]["not_drawn"] == 321


def test_gsm8k(tmp_path):
    rows = [
        {"question": "q0", "answer": "12 * 2 = <<12*2=24>>24\n#### 24"},
        {"question": "q1", "answer": "so\n#### 1,450,000"},
        {"question": "q2", "answer": "no mark"},
        {"question": "q3", "answer": "nothing\n####"},
        {"question": "q4", "answer": "#### wrong\n#### -5"},
    ]
    for name in ("gsm8k", "gsm8k_train"):
        found = prepared(tmp_path, name, rows)
        assert answers(found) == ["24", "1450000", "-5"]
        assert found.dropped == {"no #### before the answer": [2], "no answer": [3]}


def test_math(tmp_path):
    rows = [{"problem": "p", "level": "Level 5", "type": "Algebra", "solution": r"So $x=\boxed{\frac12}$."}]
    found = prepared(tmp_path, "math_train", rows)
    assert answers(found) == [r"\frac12"] and details(found) == [{"level": "Level 5", "type": "Algebra"}]


# ---- evaluation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rows", "expected"),
    [
        ("aime24", [{"problem": "p", "answer": "073", "year": 2024}], ["73"]),
        ("aime24", [{"id": 60, "problem": "p", "solution": r"\boxed{204}", "url": "u"}], ["204"]),
        ("aime24", [{"ID": "2024-I-1", "Problem": "p", "Solution": "s", "Answer": 204}], ["204"]),
        ("aime25", [{"id": "0", "problem": "p", "answer": "70"}], ["70"]),
        ("aime25", [{"question": "p", "answer": "70"}], ["70"]),
        ("amc23", [{"id": 0, "problem": "p", "answer": 27.0, "url": "u", "question": "p"}], ["27"]),
        ("amc23", [{"id": "0", "question": "p", "answer": "27", "url": "u"}], ["27"]),
        ("math500", [{"problem": "p", "solution": "s", "answer": r"10,\!080", "unique_id": "u"}], ["10080"]),
        ("minerva", [{"question": "p", "answer": "4.5e33"}], ["4.5e33"]),
        ("minerva", [{"problem": "p", "solution": r"\boxed{4.5e33} \mathrm{erg}", "idx": 1}], ["4.5e33"]),
        ("minerva", [{"problem": "p", "solution": r"\boxed{np.sin(2)}"}], [r"\sin(2)"]),
        ("minerva", [{"problem": "p", "answer": ["0.01\n", "0.02\n"]}], ['["0.01", "0.02"]']),
        ("minerva", [{"problem": "p", "solution": r"\boxed{2e2}", "answer": ["1", "200"]}], ['["2e2", "1", "200"]']),
        ("minerva", [{"problem": "p", "solution": r"\boxed{2}", "answer": ["2.0\n"]}], ["2"]),
        ("minerva", [{"problem": "p", "solution": r"\boxed{20}", "answer": ["0.2\n"]}], ["20"]),
        ("minerva", [{"problem": "p", "answer": ["-0.2\n", "-0.2"]}], ["-0.2"]),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_evaluation_sets(tmp_path, name, rows, expected, suffix):
    found = prepared(tmp_path, name, rows, suffix)
    assert answers(found) == expected and not found.dropped
    assert found.test[0]["data_source"] == f"gcpo/{name}" and found.test[0]["extra_info"]["split"] == "test"
    assert found.test[0]["prompt"][0]["content"] == f"p {INSTRUCTION}"


def test_a_grader_that_does_not_start(tmp_path, capsys, monkeypatch):
    def broken(one, other):
        raise GraderError("math-verify does not start")

    monkeypatch.setattr("data_prep.math_sets.same_answer", broken)
    source = write(tmp_path / "x.json", [{"problem": "p", "solution": r"\boxed{1}", "answer": ["2"]}])
    assert run("minerva", "--source", source, "--output", tmp_path / "out") == 2
    assert capsys.readouterr().err == "error: math-verify does not start\n" and not (tmp_path / "out").exists()


# ---- real files ----------------------------------------------------------------------------------------------------

REAL = {
    "aime24": ("deepscaler/test/aime.json", 30),
    "aime25": ("aime25", 30),
    "amc23": ("amc23/test.jsonl", 40),
    "amc23 of DeepScaleR": ("deepscaler/test/amc.json", 83),
    "math500": ("math500", 500),
    "minerva": ("minerva/test.jsonl", 272),
    "minerva of DeepScaleR": ("deepscaler/test/minerva.json", 272),
    "gsm8k": ("gsm8k", 1319),
    "gsm8k_train": ("gsm8k", 7473),
    "deepscaler_aime": ("deepscaler/train/aime.json", 975),
    "aime": ("deepscaler/train/aime.json", 975),
    "numinamath": ("numina/numinamath_cot_3rows.jsonl", 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_files_lose_no_row_and_every_answer_is_right(name):
    path, count = REAL[name]
    dataset = SETS[name.split()[0]]
    found = convert_rows(dataset, read_source(dataset, [str(real(path))]))
    assert len(found.train) + len(found.test) == count and not found.dropped
    assert len(found.train) == (count if dataset.kind == "train" else 0)
    if "aime" in name:
        assert all(answer.isdigit() and str(int(answer)) == answer for answer in answers(found))
    for answer in answers(found):
        for form in json.loads(answer) if answer.startswith('["') else [answer]:
            assert compute_score("gcpo/" + name, rf"\boxed{{{form}}}", answer)["acc"] == 1.0
    if name.startswith(("amc23", "gsm8k")):
        assert all(answer.lstrip("-").replace(".", "", 1).isdigit() for answer in answers(found))


def minerva(path):
    return convert_rows(SETS["minerva"], read_source(SETS["minerva"], [str(real(path))]))


@pytest.mark.slow
def test_minerva_s_two_schemas_agree():
    """One has the answer in the solution, the other a list of forms as well, some of another part of the question."""
    lists, boxes = minerva("deepscaler/test/minerva.json"), minerva("minerva/test.jsonl")
    forms = {row["extra_info"]["question"]: row["reward_model"]["ground_truth"] for row in lists.test}
    for row in boxes.test:
        truth, form = row["reward_model"]["ground_truth"], forms[row["extra_info"]["question"]]
        assert truth == (json.loads(form)[0] if form.startswith("[") else form)
    assert not set(boxes.noted) - {TEXT_ONLY}
    assert len(lists.noted["the answer column differs from the box of the solution, which counts"]) == 40


@pytest.mark.slow
def test_two_real_answers_that_are_both_right():
    truths = [row["reward_model"]["ground_truth"] for row in minerva("deepscaler/test/minerva.json").test]
    (truth,) = [one for one in truths if one.startswith("[") and set(json.loads(one)) == {"0.01", "0.02"}]
    grades = [compute_score("gcpo/minerva", rf"\boxed{{{one}}}", truth)["acc"] for one in ("0.01", "0.02", "0.03")]
    assert grades == [1.0, 1.0, 0.0]


def test_real_overlap_of_aime_and_math500(tmp_path):
    train, evaluation = real("deepscaler/train/aime.json"), real("math500/test.jsonl")
    output = tmp_path / "out"
    assert run("deepscaler_aime", "--source", train, "--output", output, "--against", evaluation) == 0
    overlaps = {
        match: [(one["row"], one["set_row"]) for one in provenance(output)["overlaps"] if one["match"] == match]
        for match in ("exact", "letters", "near")
    }
    assert overlaps == {
        "exact": [(560, 412), (725, 285), (786, 80)],
        "letters": [(1, 489), (177, 101), (302, 292)],
        "near": [(188, 352), (326, 126), (454, 475), (744, 110)],
    }
    assert len(table(output / "train.parquet")) == 965


def test_real_aime_and_later_contests_are_apart(tmp_path):
    sources = [real(name) for name in ("deepscaler/test/aime.json", "amc23/test.jsonl", "aime25/test2025-I.jsonl")]
    train = real("deepscaler/train/aime.json")
    assert run("deepscaler_aime", "--source", train, "--output", tmp_path / "out", "--against", *sources) == 0
    assert provenance(tmp_path / "out")["overlaps"] == []


def test_no_set_takes_long(tmp_path):
    """The processor's time, so that other programs on the machine don't count; the largest real set."""
    began = time.process_time()
    assert (
        run("gsm8k_train", "--source", real("gsm8k"), "--output", tmp_path, "--against", real("gsm8k/test.jsonl")) == 0
    )
    assert time.process_time() - began < 30
