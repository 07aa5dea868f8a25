"""The sets of programs: small made files, and the real ones where they are."""

from __future__ import annotations

import json
import textwrap

import pytest

from data_prep.code_sets import EXAMPLES, mbpp_tests
from data_prep.core import convert_rows, prepare, read_source
from data_prep.schema import DataError, Drop
from data_prep.sets import SETS
from gcpo.rewards.code import extract, grade, load_tests
from gcpo.rewards.sandbox import SandboxError
from gcpo.rewards.sandbox import check as check_sandbox
from gcpo.rewards.sources import is_code
from tests.data_prep.made import provenance, real, run, table, write


def mbpp(number: int, **changes) -> dict:
    name = f"add_{number}"
    row = {
        "task_id": number,
        "text": f"Write a function to add {number} to a number.",
        "code": f"def {name}(x):\r\n  return x + {number}",
        "test_list": [f"assert {name}(1) == {number + 1}", f"assert {name}(0)=={number} "],
        "test_setup_code": "",
        "challenge_test_list": [],
    }
    return row | changes


MBPP = [mbpp(number) for number in (*range(1, 11), 11, 510, 511, 600, 601, 974)]
HUMANEVAL = [
    {
        "task_id": "HumanEval/0",
        "prompt": 'import math\n\n\ndef double(x):\n    """ Twice x. """\n',
        "canonical_solution": "    return 2 * x\n",
        "test": "def check(candidate):\n    assert candidate(2) == 4\n",
        "entry_point": "double",
    }
]


def prepared(tmp_path, name, rows):
    source = read_source(SETS[name], [str(write(tmp_path / f"{name}.jsonl", rows))])
    return convert_rows(SETS[name], source)


def truth_of(row: dict) -> dict:
    return load_tests(row["reward_model"]["ground_truth"])


def test_mbpp(tmp_path):
    source = write(tmp_path / "mbpp.jsonl", MBPP)
    assert run("mbpp", "--source", source, "--output", tmp_path / "out", "--against", "none") == 0
    train, held_out = (table(tmp_path / "out" / f"{split}.parquet") for split in ("train", "test"))
    assert [json.loads(row["extra_info"]["details"])["task_id"] for row in (*train, *held_out)] == [601, 974, 511, 600]
    assert train[0]["data_source"] == "gcpo/mbpp" and train[0]["ability"] == "code" and is_code("gcpo/mbpp")
    assert train[0]["prompt"] == [
        {
            "role": "user",
            "content": "You are an expert Python programmer, and here is your task: "
            "Write a function to add 601 to a number. Your code should pass these tests:\n\n"
            "assert add_601(1) == 602\nassert add_601(0)==601\n\nPut your code in a ```python block.",
        }
    ]
    assert truth_of(train[0]) == {
        "assert_case": ["assert add_601(1) == 602", "assert add_601(0)==601 "],
        "names": ["add_601"],
    }
    dropped = provenance(tmp_path / "out")["dropped"]
    assert {reason: found["count"] for reason, found in dropped.items()} == {
        "of MBPP's few-shot part (task ids 1 to 10)": 10,
        "of MBPP's test part (task ids 11 to 510)": 2,
    }
    assert [len(prepared(tmp_path, "mbpp_test", MBPP).test)] == [2]


def test_training_problems_that_stand_in_an_evaluation_set_are_left_out(tmp_path):
    rows = [*MBPP, mbpp(700, text=MBPP[10]["text"])]
    source = write(tmp_path / "mbpp.jsonl", rows)
    assert run("mbpp_test", "--source", source, "--data", tmp_path) == 0
    assert run("mbpp", "--source", source, "--data", tmp_path) == 0
    (overlap,) = [one for one in provenance(tmp_path / "mbpp")["overlaps"] if one["match"] == "exact"]
    assert overlap["row"] == 16 and overlap["set"] == "mbpp_test"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"text": " "}, "empty question"),
        ({"task_id": None}, "no task id"),
        ({"test_list": ["assert add("]}, "a test or the reference solution is no Python"),
        ({"code": "def add_601(x) return"}, "a test or the reference solution is no Python"),
        ({"test_list": ["assert 1 == 1"]}, "its tests test nothing"),
    ],
)
def test_rows_of_mbpp_without_use(tmp_path, changes, why):
    found = prepared(tmp_path, "mbpp", [mbpp(601, **changes), mbpp(602)])
    assert found.dropped == {why: [0]} and len(found.train) == 1


def test_what_tests_of_mbpp_take_from_the_program():
    uses_sys = mbpp(
        1, code="import sys\ndef size(x): return sys.getsizeof(x)", test_list=["assert size(1) == sys.getsizeof(1)"]
    )
    assert mbpp_tests(uses_sys) == {
        "assert_case": ["import sys\nassert size(1) == sys.getsizeof(1)"],
        "names": ["size"],
    }
    shadows = mbpp(1, code="def sum(a, b): return a + b", test_list=["assert sum(1, 2) == abs(3)"])
    assert mbpp_tests(shadows)["names"] == ["sum"]
    tree = mbpp(
        1,
        code="class Node: pass\ndef other(): pass\ndef depth(root): return 1",
        test_list=["assert depth(root) == 1"],
        test_setup_code="root = Node()\r\nroot.left = Node()\r\n",
    )
    assert mbpp_tests(tree) == {
        "assert_case": ["root = Node()\nroot.left = Node()\nassert depth(root) == 1"],
        "names": ["Node", "depth"],
    }
    with pytest.raises(Drop, match="test nothing"):
        mbpp_tests(mbpp(1, code="x = 1"))


def test_humaneval(tmp_path):
    (row,) = prepared(tmp_path, "humaneval", HUMANEVAL).test
    assert row["data_source"] == "gcpo/humaneval" and is_code(row["data_source"])
    (message,) = row["prompt"]
    assert message["content"].endswith(
        'markdown code block:\n```python\nimport math\n\n\ndef double(x):\n    """ Twice x. """\n```'
    )
    assert truth_of(row) == {name: HUMANEVAL[0][name] for name in ("prompt", "test", "entry_point")}


def test_humaneval_after_five_examples(tmp_path, capsys):
    rows, examples = write(tmp_path / "h.jsonl", HUMANEVAL), write(tmp_path / "mbpp.jsonl", MBPP)
    arguments = ("humaneval_5shot", "--source", rows, "--output", tmp_path / "out", "--examples")
    assert run(*arguments, examples) == 0
    (row,) = table(tmp_path / "out" / "test.parquet")
    turns = row["prompt"]
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 5 + ["user"]
    assert turns[-1] == prepared(tmp_path, "humaneval", HUMANEVAL).test[0]["prompt"][0]
    docstring = "Write a function to add 2 to a number.\n>>> add_2(1)\n3\n>>> add_2(0)\n2"
    shown = 'def add_2(x):\n    """\n' + textwrap.indent(docstring, "    ") + '\n    """'
    assert turns[0]["content"].endswith(f":\n```python\n{shown}\n```")
    assert extract(turns[1]["content"]) == f"{shown}\n    return x + 2"
    assert provenance(tmp_path / "out")["examples"]["task_ids"] == list(EXAMPLES)
    before = (tmp_path / "out" / "test.parquet").read_bytes()
    assert run(*arguments, examples) == 0 and (tmp_path / "out" / "test.parquet").read_bytes() == before

    capsys.readouterr()
    for source, says in (
        (write(tmp_path / "few.jsonl", MBPP[:4]), "lacks task ids of 2, 3, 4, 5, 6"),
        (rows, "lacks the columns code, test_list, text"),
        (tmp_path / "none.jsonl", "the examples: there is no file"),
    ):
        assert run(*arguments, source) == 2
        said = capsys.readouterr().err
        assert says in said and said.count("\n") == 1
    assert run("humaneval", "--source", rows, "--output", tmp_path / "0", "--examples", examples) == 2
    assert "leave out --examples" in capsys.readouterr().err and not (tmp_path / "0").exists()
    with pytest.raises(DataError):
        convert_rows(SETS["humaneval_5shot"], read_source(SETS["humaneval_5shot"], [str(rows)]))


def test_programming_contests(tmp_path):
    question = (
        "Add two numbers.\n\nWrite Python code to solve the problem. "
        "Present the code in \n```python\nYour code\n```\nat the end."
    )
    good = {
        "data_source": "taco",
        "prompt": [{"role": "system", "content": "Think."}, {"role": "user", "content": question}],
        "ability": "code",
        "reward_model": {"style": "rule", "ground_truth": json.dumps({"inputs": ["1 2\n"], "outputs": ["3\n"]})},
        "extra_info": {"index": 0, "split": "train"},
    }

    def other(text, **changes):
        asked = [{"role": "user", "content": text}]
        return good | {"prompt": asked} | changes

    rows = [
        good,
        other("Prove it.", data_source="numina_olympiads"),
        other("a", reward_model={"style": "rule", "ground_truth": "{}"}),
        other("b", reward_model={"style": "rule", "ground_truth": json.dumps({"inputs": [], "outputs": []})}),
        other("c", reward_model=None),
        other("d", prompt=[]),
    ]
    found = prepared(tmp_path, "eurus_code", rows)
    (row,) = found.train
    assert row["data_source"] == "gcpo/eurus_code" and is_code(row["data_source"])
    assert row["prompt"] == [{"role": "user", "content": question}]
    assert row["extra_info"]["question"] == "Add two numbers."
    assert json.loads(row["extra_info"]["details"]) == {"set": "taco"}
    assert row["reward_model"] == good["reward_model"]
    assert found.dropped == {
        "no problem of a programming contest": [1],
        "its tests can't be read": [2, 3, 4],
        "not one question": [5],
    }


def test_the_real_sets(tmp_path):
    humaneval, all_mbpp = real("humaneval/HumanEval.jsonl.gz"), real("mbpp/mbpp.jsonl")
    assert len(prepare(SETS["humaneval"], tmp_path / "a", [str(humaneval)]).test) == 164
    examples = [str(all_mbpp)]
    shown = prepare(SETS["humaneval_5shot"], tmp_path / "b", [str(humaneval)], examples=examples).test
    assert len(shown) == 164 and len({str(row["prompt"][:10]) for row in shown}) == 1
    mbpp_train = prepare(SETS["mbpp"], tmp_path / "c", examples)
    assert (len(mbpp_train.train), len(mbpp_train.test)) == (374, 90)
    mbpp_test = prepare(SETS["mbpp_test"], tmp_path / "d", examples)
    assert len(mbpp_test.test) == 500
    try:
        check_sandbox()
    except SandboxError as error:
        pytest.skip(str(error))
    for row in (*shown[:2], *mbpp_train.train[:2], *mbpp_test.test[:2]):
        solution = json.loads(row["extra_info"]["details"])["solution"]
        assert grade(f"```python\n{solution}\n```", row["reward_model"]["ground_truth"]).passed
    answers = [turn["content"] for turn in shown[0]["prompt"] if turn["role"] == "assistant"]
    tests = {
        row["task_id"]: mbpp_tests(row)
        for row in map(json.loads, all_mbpp.read_text().splitlines())
        if row["task_id"] in EXAMPLES
    }
    assert all(grade(answer, tests[number]).passed for answer, number in zip(answers, EXAMPLES, strict=True))
