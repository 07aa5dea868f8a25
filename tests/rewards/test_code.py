"""The reward of programs: what counts as the program, the forms of tests, and real reference solutions."""

from __future__ import annotations

import asyncio
import gzip
import json
import random

import pytest

from benchmarks.code_grading import mutants
from data_prep.code_sets import mbpp_tests
from gcpo.rewards import code
from gcpo.rewards.code import Grade, compute_score, continuation, extract, free_names, grade, grade_many
from gcpo.rewards.sandbox import SandboxError, check
from gcpo.rewards.sources import is_code
from tests.data_prep.made import real

ADD = {"assert_case": ["assert add(2, 3) == 5", "assert add(-1, 1) == 0"], "names": ["add"]}
RIGHT = "def add(a, b):\n    return a + b"
WRONG = "def add(a, b):\n    return a - b"


@pytest.fixture(scope="module", autouse=True)
def works():
    try:
        check()
    except SandboxError as error:
        pytest.skip(str(error))


def fenced(source: str, language: str = "python") -> str:
    return f"Here it is.\n```{language}\n{source}\n```\nThat is all."


def score(response: object, tests: object, **settings: object) -> tuple[float, float]:
    result = compute_score(response, tests, {"index": 1}, **settings)
    assert result["score"] == result["acc"] and set(result) == {"score", "acc", "format"}
    assert all(type(value) is float for value in result.values())
    return result["score"], result["format"]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("gcpo/mbpp", True),
        ("gcpo/mbpp_test", True),
        ("gcpo/humaneval_5shot", True),
        ("codecontests", True),
        ("taco", True),
        ("apps", True),
        ("codeforces", True),
        ("gcpo/aime", False),
        ("gsm8k", False),
        (None, False),
        (["apps"], False),
    ],
)
def test_is_code(source, expected):
    assert is_code(source) is expected


@pytest.mark.parametrize(
    ("response", "program"),
    [
        ("```python\nx\n```", "x"),
        ("a\n```python\nx\n```\nb\n```py\ny\n```", "y"),
        ("```python\nx\n```\n```\ny\n```", "x"),
        ("```\nx\n```\n```\ny\n```\n```output\nz\n```", "y"),
        ("```Python3 \r\nx\n```", "x"),
        ("  ```python\n  x\n  ```", "x"),
        ("~~~python\nx\n```\n~~~", "x\n```"),
        ("````python\nx = '''\n```\n'''\n````", "x = '''\n```\n'''"),
        ("```python\n\n```", ""),
        ("```python\nx", "x"),
        ("```\nx\n", "x\n"),
        ("```\n", None),
        ("```cpp\nx", None),
        ("```python\nx\n```\n```python\ny", "x"),
        ("`x`", None),
        ("x", None),
        ("", None),
        ("```output\nx\n```", None),
        ("<think>\n```python\nx\n```\n</think>\nno", None),
        ("<think>\n```python\nx\n```", None),
        ("```python\nx\n```\n<think>", None),
        ("```python\nx\n```</think>\n```python\ny\n```", "y"),
        ("```python\nprint('``` in a line')\n```", "print('``` in a line')"),
        ("```" * 20_000, None),
        ("\n```" * 10_001, ""),
    ],
)
def test_extract(response, program):
    assert extract(response) == program


@pytest.mark.parametrize(
    ("response", "program"),
    [
        ("    return 1\n\ndef other():\n    pass", "    return 1\n"),
        ("\n    return 1\nprint(f())", "\n    return 1"),
        ("    return 1\n# that was it", "    return 1"),
        (
            "    return 1\n    # a comment of its own\n    return 2",
            "    return 1\n    # a comment of its own\n    return 2",
        ),
        ("def f():\n    return 1\n\ndef g(): pass", "def f():\n    return 1\n\ndef g(): pass"),
        ("<think>    return 2", None),
        ("   \n", None),
    ],
)
def test_continuation(response, program):
    assert continuation(response) == program


def test_right_and_wrong_programs():
    assert score(fenced(RIGHT), json.dumps(ADD)) == (1.0, 1.0)
    assert score(fenced(RIGHT), ADD) == (1.0, 1.0)
    assert score(fenced(WRONG), ADD) == (0.0, 1.0)
    assert score(fenced(WRONG) + fenced(RIGHT), ADD) == (1.0, 1.0)
    assert score(fenced(RIGHT) + fenced(WRONG), ADD) == (0.0, 1.0)
    assert score(f"<think>{fenced(RIGHT)}</think>I have it.", ADD) == (0.0, 0.0)
    assert score(RIGHT, ADD) == (0.0, 0.0), "MBPP's prompt asks for a block"
    assert score(fenced("def add(a, b):\n    return 5"), ADD) == (0.0, 1.0), "one of two is not enough"
    assert score(fenced("#" * 100_001), ADD) == (0.0, 1.0)
    assert score(None, ADD) == score(["x"], ADD) == score("", ADD) == (0.0, 0.0)
    assert grade(fenced(WRONG), ADD).reason == "AssertionError"


def test_settings():
    slow = fenced("def add(a, b):\n    for _ in range(10**9): pass\n    return a + b")
    assert grade(slow, ADD, time_limit=0.2).reason == "out of time"
    large = fenced("x = bytearray(2 * 10**8)\n" + RIGHT)
    assert grade(large, ADD, memory_limit_mb=128).reason == "MemoryError"
    assert grade(large, ADD).passed
    for settings, says in (
        ({"time_limit": 0}, "time_limit is 0"),
        ({"memory_limit_mb": 1}, "memory_limit_mb is 1"),
        ({"sandbox": "none"}, "sandbox is 'none'"),
        ({"sandbox": "fusion"}, "sandbox_fusion_url"),
    ):
        with pytest.raises(ValueError, match=says):
            grade(fenced(RIGHT), ADD, **settings)
    assert score(fenced(RIGHT), ADD, something="else", max_seconds=3) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("tests", "says"),
    [
        ("assert add(1, 2) == 3", "no JSON"),
        ("[1]", "must be a JSON object, not list"),
        (None, "must be a JSON object, not NoneType"),
        ({"input": ["1"], "output": ["2"]}, "have the keys"),
        ({"inputs": "1", "outputs": "2"}, "have the keys"),
        ({"inputs": [], "outputs": []}, "are empty"),
        ({"assert_case": []}, "are empty"),
        ({"inputs": ["1", "2"], "outputs": ["2"]}, "2 inputs, 1 outputs"),
        ({"inputs": ["1"], "outputs": ["no json"], "fn_name": "f"}, "can't be read"),
        ({"inputs": [1], "outputs": ["1"], "fn_name": "f"}, "can't be read"),
        ({"assert_case": ["assert ("]}, "can't be read"),
    ],
)
def test_tests_that_can_not_be_used(tests, says):
    with pytest.raises(ValueError, match=says) as refusal:
        grade(fenced(RIGHT), tests)
    assert "\n" not in str(refusal.value)


def test_programs_that_read_and_print():
    tests = {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", ["7"]]}
    assert grade(fenced("print(sum(map(int, input().split())))"), tests).passed
    assert grade(fenced("print(max(map(int, input().split())))"), tests).reason == "wrong output: '2\\n'"
    assert grade(fenced("a, b = map(int, input().split())\nprint(a + b if a == 1 else 0)"), tests).reason
    listed = {"inputs": [["2", "a", "b"]], "outputs": [["b", "a"]]}
    assert grade(fenced("print(*[input() for _ in range(int(input()))][::-1], sep='\\n')"), listed).passed
    long = {"inputs": ["x"], "outputs": ["y" * 3_000_000]}
    assert grade(fenced("print('y' * 3_000_000)"), long).passed
    assert grade(fenced("print('y' * 9_000_000)"), long).reason.startswith("it printed more than 6000000")


def test_functions_that_are_called():
    tests = {"fn_name": "add", "inputs": ["1\n2", '"a"\n"b"', "[1]\n[2]"], "outputs": ["3", '"ab"', "[1, 2]"]}
    assert grade(fenced(RIGHT), tests).passed
    method = "class Solution:\n    def add(self, a: List[int], b: Optional[int] = None):\n        return a + b"
    assert grade(fenced(method), tests).passed
    assert grade(fenced(WRONG), tests).reason == "wrong result: -1"
    given = {"fn_name": "add", "inputs": [[1, 2], [[1], [2]]], "outputs": [3, [1, 2]]}
    assert grade(fenced(RIGHT), given).passed


def test_what_test_code_may_take_from_the_program():
    assert free_names(("import math\nx = 1\ndef h(y): return y", "assert f(x, math.pi) == h(len(g))")) == ("f", "g")
    forged = RIGHT.replace("a + b", "7") + "\nset = lambda _: 0\nlen = lambda _: 0"
    tests = {"assert_case": ["assert set([add(2, 3)]) == set([5])", "assert len([add(2, 3)]) == 1"]}
    assert not grade(fenced(forged), tests).passed, "the test's set is Python's"
    assert grade(
        fenced("def sum(a, b): return a + b"), {"assert_case": ["assert sum(2, 3) == 5"], "names": ["sum"]}
    ).passed
    helped = {"setup": "def wanted(n): return n * 2", "assert_case": ["assert add(2, 2) == wanted(2)"]}
    assert grade(fenced(RIGHT), helped).passed
    assert not grade(fenced(WRONG + "\ndef wanted(n): return 0"), helped).passed, "the test's helper is its own"


HUMANEVAL = {
    "prompt": (
        'import math\n\ndef half(x):\n    return x / 2\n\n\ndef area(r: float) -> float:\n    """ Of a circle. """\n'
    ),
    "entry_point": "area",
    "test": "def check(candidate):\n    assert abs(candidate(2) - half(8) * math.pi) < 1e-9\n    assert area(0) == 0\n",
}


@pytest.mark.parametrize(
    ("response", "passed", "format_"),
    [
        ("    return math.pi * r ** 2", 1, 0),
        ("    return math.pi * r ** 2\n\nprint(area('x'))", 1, 0),
        (fenced("    return math.pi * r ** 2"), 1, 1),
        (fenced("def area(r):\n    return half(2) * math.pi * r ** 2"), 1, 1),
        (fenced("def half(x): return 0\ndef area(r): return 0"), 0, 1),
        (fenced("from math import pi\ndef area(r: 'float'): return pi * r * r"), 1, 1),
        ("def area(r):\n    return math.pi * r ** 2", 1, 0),
        (fenced("def other(r): return 1"), 0, 1),
        (fenced("    return math.pi * r"), 0, 1),
        ("    return math.pi * r **", 0, 0),
        ("I can't.", 0, 0),
        ("<think>    return math.pi * r ** 2", 0, 0),
        ("<think>hm</think>\n    return math.pi * r ** 2", 1, 0),
    ],
)
def test_humaneval(response, passed, format_):
    assert score(response, HUMANEVAL) == (passed, format_)


def test_grading_off_the_main_thread():
    async def grades() -> list[Grade]:
        loop = asyncio.get_running_loop()
        return await asyncio.gather(*(loop.run_in_executor(None, grade, fenced(RIGHT), ADD) for _ in range(6)))

    assert all(one.passed for one in asyncio.run(grades()))
    results = grade_many([fenced(RIGHT), fenced(WRONG), ""], [ADD] * 3)
    assert [(one.passed, one.format) for one in results] == [(True, True), (False, True), (False, False)]
    with pytest.raises(ValueError):
        grade_many([""], [ADD] * 2)


def test_a_sandbox_that_fails_is_no_wrong_answer(monkeypatch):
    monkeypatch.setattr(code, "open_sandbox", lambda *_: (_ for _ in ()).throw(SandboxError("no sandbox")))
    with pytest.raises(SandboxError):
        compute_score(fenced(RIGHT), ADD)


# ---- real sets -------------------------------------------------------------------------------------------------------


def humaneval_rows() -> list[dict]:
    return [json.loads(line) for line in gzip.open(real("humaneval", "HumanEval.jsonl.gz"), "rt")]


def mbpp_rows() -> list[dict]:
    return [json.loads(line) for line in real("mbpp", "mbpp.jsonl").read_text().splitlines()]


def failures(names: list, programs: list[str], tests: list[dict], seconds: float = 20) -> dict:
    grades = grade_many([fenced(program) for program in programs], tests, time_limit=seconds)
    return {name: one.reason for name, one in zip(names, grades, strict=True) if not one.passed}


def test_reference_solutions_of_humaneval_pass():
    rows = humaneval_rows()
    assert len(rows) == 164
    every = rows[::4]
    assert failures([r["task_id"] for r in every], [r["canonical_solution"] for r in every], every) == {}


def test_reference_solutions_of_mbpp_pass():
    rows = mbpp_rows()
    assert len(rows) == 974
    # Built-in names, a test that needs sys, objects of the program's own, types as arguments, and a sample.
    odd = {126, 367, 533, 596, 601, 927}
    every = [row for row in rows if row["task_id"] in odd or row["task_id"] % 20 == 0]
    assert odd < {row["task_id"] for row in every}
    assert failures([r["task_id"] for r in every], [r["code"] for r in every], [mbpp_tests(r) for r in every]) == {}


def test_mutated_solutions_fail():
    rows = humaneval_rows()[:30]
    draw = random.Random(0)
    changed = [draw.choice(mutants(row["prompt"] + row["canonical_solution"]))[1] for row in rows]
    caught = failures([row["task_id"] for row in rows], changed, rows, seconds=1)
    assert len(caught) >= 0.75 * len(rows)
    nothing = [f"def {row['entry_point']}(*_): return None" for row in rows]
    assert len(failures([r["task_id"] for r in rows], nothing, rows)) == len(rows)
