"""Which grader a row goes to: verl's own parquets, sets of programs under their usual names, and rows of neither."""

from __future__ import annotations

import json

import numpy as np
import pytest
from verl.utils.reward_score import default_compute_score

from gcpo.rewards import compute_score, extracted_answer, grade_many, grader_of, guarded, problem_of
from gcpo.rewards.sandbox import SandboxError, check
from gcpo.rewards.sources import is_code, marked_answer

STDIN = json.dumps({"inputs": ["1"], "outputs": ["1"]})
ECHO = "```python\nprint(input())\n```"
ONE = "```python\ndef f(): return 1\n```"


@pytest.fixture(scope="module")
def box():
    try:
        check()
    except SandboxError as error:
        pytest.skip(str(error))


def acc(source: object, response: str, truth: object, **options: object) -> float:
    return compute_score(source, response, truth, **options)["acc"]


@pytest.mark.parametrize(
    ("source", "grader"),
    [
        *((name, "hashes") for name in ("openai/gsm8k", "gsm8k", "GSM8K", "gsm8k_tool", "someone/gsm8k-fr")),
        *((name, "answer_line") for name in ("math_dapo", "math", "math_dapo_reasoning", "aime24", "aime_2024")),
        *((name, "answer_line") for name in ("HuggingFaceH4/aime_2024", "BytedTsinghua-SIA/DAPO-Math-17k")),
        *((name, "boxed") for name in ("lighteval/MATH", "DigitalLearningGmbH/MATH-lighteval")),
        *((name, "boxed") for name in ("HuggingFaceH4/MATH-500", "hiyouga/geometry3k", "numina_olympiads")),
        *((name, "boxed") for name in ("gcpo/gsm8k", "gcpo/aime24", "gcpo/arithmetic", "mine", "", None, 3, ["x"])),
        *((name, "code") for name in ("codecontests", "apps", "codeforces", "taco", "TACO", "likaixin/TACO")),
        *((name, "code") for name in ("livecodebench", "leetcode", "deepcoder", "primeintellect", "mbpp", "kodcode")),
        *((name, "code") for name in ("openai/openai_humaneval", "gcpo/mbpp_test", "gcpo/humaneval_5shot")),
    ],
)
def test_by_name(source, grader):
    assert grader_of(source) == grader_of(source, "x") == grader
    assert is_code(source) is (grader == "code")


@pytest.mark.parametrize(
    ("truth", "grader"),
    [
        *((STDIN, "code"), (json.loads(STDIN), "code"), ("  " + STDIN, "code"), ('{"assert_case": []}', "code")),
        ('[{"input": "1", "output": "1"}]', "code"),
        (np.array([{"input": "1", "output": "1"}]), "code"),
        ('{"target": 5, "numbers": [1, 2]}', "code"),
        *(("{1, 2}", "boxed"), (r"\{1,2\}", "boxed"), ("[1, 2]", "boxed"), ('["80", "81"]', "boxed"), ("{}", "boxed")),
        *(("[0, 1)", "boxed"), ("{", "boxed"), ('{"a"', "boxed"), ("", "boxed"), (None, "boxed"), (7, "boxed")),
        *((["1", "2"], "boxed"), (np.array(["1"]), "boxed"), ("[" * 100_000 + '{"', "boxed")),
        *(("assertion", "boxed"), ("define x", "boxed"), ("from 3 to 5", "boxed"), ("class C", "boxed")),
    ],
)
def test_by_ground_truth(truth, grader):
    assert grader_of("mine", truth) == grader


@pytest.mark.parametrize(
    ("source", "truth", "says"),
    [
        ("searchR1_nq", {"target": ["x"]}, "searchR1_nq is question answering by search"),
        ("searchR1_musique", "x", "no grader"),
        ("mine", "assert f() == 1", "is Python code"),
        ("KodCode/V1", "from solution import f\n\ndef test_f():\n    assert f() == 1", "is Python code"),
        ("mine", {"target": 5, "numbers": [1]}, r"have the keys \['numbers', 'target'\]"),
        ("leetcode", {"functional": "def check(c): ..."}, r"have the keys \['functional'\]"),
        ("kodcode", "assert f() == 1", "no JSON"),
        ("livecodebench", "7", "must be a JSON object"),
        ("livecodebench", None, "must be a JSON object"),
        ("taco", '{"inputs": [], "outputs": []}', "are empty"),
        ("taco", '{"inputs": ["1"], "outputs": []}', "1 inputs, 0 outputs"),
        ("mine", '{"assert_case": ["assert ("]}', "can't be read|was never closed"),
        ("mine", {"prompt": "def f(:", "test": "def check(c): pass", "entry_point": "f"}, "invalid|never closed"),
        ("mine", {"prompt": "def f():", "test": "def check(c) pass", "entry_point": "f"}, "expected"),
        ("mine", [{"input": "1"}], r"test 0 of a program has the keys \['input'\]"),
        ("mine", [{"input": "1", "output": "1", "testtype": "functional"}], "does not name it"),
        ("mine", [{"input": "1", "output": "1", "fn_name": f} for f in "fg"], "different functions"),
    ],
)
def test_what_no_grader_understands(source, truth, says):
    """Refused before a run, and an error in it: never a wrong answer without a word."""
    import re

    problem = problem_of(source, truth)
    assert problem is not None and re.search(says, problem) and "\n" not in problem
    with pytest.raises(ValueError, match=says):
        compute_score(source, ONE, truth)
    assert guarded(compute_score)(source, ONE, truth)["reward_error"] == 1.0


@pytest.mark.parametrize("truth", ["7", r"\frac{1}{2}", '["80", "81"]', ["80", "81"], STDIN, {"assert_case": ["f()"]}])
def test_what_a_grader_understands(truth):
    assert problem_of("mine", truth) is None


@pytest.mark.parametrize(
    ("source", "response", "truth", "right"),
    [
        ("livecodebench", ECHO, STDIN, 1),
        ("mbpp", ONE, '{"assert_case": ["assert f()==1"]}', 1),
        ("openai_humaneval", ONE, '{"prompt": "def f():", "test": "def check(c): c()==1", "entry_point": "f"}', 1),
        ("leetcode", ECHO, STDIN, 1),
        ("deepcoder", ECHO, STDIN, 1),
        ("TACO", ECHO, STDIN, 1),
        ("codecontests", ECHO, STDIN, 1),
        ("codecontests", ONE, STDIN, 0),
        ("never heard of", ECHO, STDIN, 1),
        ("never heard of", ECHO, json.loads(STDIN), 1),
        ("lcb", ECHO, [{"input": "1\n", "output": "1\n", "testtype": "stdin", "metadata": {"func_name": None}}], 1),
        ("lcb", ONE, '[{"input": "[]", "output": "1", "testtype": "functional", "metadata": {"func_name": "g"}}]', 0),
        ("primeintellect", ONE, [{"type": "function_call", "fn_name": "f", "input": [], "output": [1]}], 1),
        ("primeintellect", ECHO, [{"type": "stdin_stdout", "input": n, "output": n} for n in "56"], 1),
        ("primeintellect", ECHO, [{"type": "stdin_stdout", "input": n, "output": "5"} for n in "56"], 0),
    ],
)  # fmt: skip
def test_programs_under_any_name(box, source, response, truth, right):
    assert acc(source, response, truth) == right


@pytest.mark.parametrize(
    ("source", "response", "truth", "right"),
    [
        ("openai/gsm8k", "18*4=72\n#### 72", "72", 1),
        ("openai/gsm8k", "#### 1,234", "1234", 1),
        ("openai/gsm8k", "#### 71", "72", 0),
        ("openai/gsm8k", "#### 71\nno\n#### 72", "72", 1),
        ("openai/gsm8k", "#### 72\nno\n#### 71", "72", 0),
        ("openai/gsm8k", "#### 72 dollars", "72", 1),
        ("openai/gsm8k", "#### $72.00", "72", 1),
        ("openai/gsm8k", "#### **72**", "72", 1),
        ("openai/gsm8k", "#### -5", "-5", 1),
        ("openai/gsm8k", "#### -5", "5", 0),
        ("openai/gsm8k", "#### 72/5", "72", 0),
        ("openai/gsm8k", "#### 72x", "72", 0),
        ("openai/gsm8k", "#### 7.25", "7", 0),
        ("openai/gsm8k", "#### Step 2\nso 72", "2", 0),
        ("openai/gsm8k", "#### 1. First\nso it is \\boxed{72}", "72", 1),
        ("openai/gsm8k", "#### 1. First\nso it is \\boxed{72}", "1", 0),
        ("openai/gsm8k", "\\boxed{71}\n#### 72", "72", 1),
        ("openai/gsm8k", "\\boxed{72}", "72", 1),
        ("openai/gsm8k", "so 72", "72", 0),
        ("openai/gsm8k", "<think>#### 72</think>\n#### 71", "72", 0),
        ("openai/gsm8k", "<think>\n#### 72", "72", 0),
        ("openai/gsm8k", "### 72", "72", 0),
        ("gsm8k", "Answer: 72", "72", 0),
        ("math_dapo", "thus\nAnswer: 34", "34", 1),
        ("math_dapo", "thus\nAnswer: $34$", "34", 1),
        ("math_dapo", "**Answer:** 34", "34", 1),
        ("math_dapo", "**Answer: 34**", "34", 1),
        ("math_dapo", "The final answer: \\(34\\).", "34", 1),
        ("math_dapo", "Answer: \\[34\\]", "34", 1),
        ("math_dapo", "Answer: $\\boxed{34}$", "34", 1),
        ("math_dapo", "Answer: \\boxed{35}", "34", 0),
        ("math_dapo", "Answer:\nAnswer: 34", "34", 1),
        ("math_dapo", "Answer: $\\frac{1}{2}$", "0.5", 1),
        ("math_dapo", "Answer: 35\nAnswer: 34", "34", 1),
        ("math_dapo", "Answer: 34\nAnswer: 35", "34", 0),
        ("math_dapo", "Answer: 340", "34", 0),
        ("math_dapo", "it is 34", "34", 0),
        ("math_dapo", "it is \\boxed{34}", "34", 1),
        ("math_dapo", "Answer: let me see.\nIt is \\boxed{34}", "34", 1),
        ("math_dapo", "<think>Answer: 34</think> no", "34", 0),
        ("math_dapo", "Answer: 34\n" + "and so on " * 1000, "34", 0),
        ("aime_2024", "Answer: 034", "34", 1),
        ("HuggingFaceH4/aime_2024", "Answer: 34", "34", 1),
        ("mine", "Answer: 34", "34", 0),
        ("mine", "#### 34", "34", 0),
        ("gcpo/gsm8k", "#### 34", "34", 0),
    ],
)
def test_the_answers_that_verls_prompts_ask_for(source, response, truth, right):
    assert acc(source, response, truth) == right
    assert acc(source, response, truth, require_boxed=False) >= right
    assert grade_many([response], [truth], source)[0]["acc"] == right


VERL_TABLE = {
    "openai/gsm8k": "so\n#### 72",
    "lighteval/MATH": r"so $\boxed{72}$",
    "DigitalLearningGmbH/MATH-lighteval": r"so $\boxed{72}$",
    "HuggingFaceH4/MATH-500": r"so $\boxed{72}$",
    "math_dapo": "so\nAnswer: 72",
    "math": "so\nAnswer: 72",
    "math_dapo_reasoning": r"so \boxed{72}",
    "aime_2025": "so\nAnswer: 72",
    "numina_aops_forum": r"so $\boxed{72}$",
    "numina_synthetic_math": r"so $\boxed{72}$",
    "numina_amc_aime": r"so $\boxed{72}$",
    "numina_synthetic_amc": r"so $\boxed{72}$",
    "numina_cn_k12": r"so $\boxed{72}$",
    "numina_olympiads": r"so $\boxed{72}$",
}


@pytest.mark.parametrize("source", VERL_TABLE)
def test_the_marks_are_those_of_verl(source):
    """For every mathematics set of verl's table, right and wrong answers are graded as verl grades them."""
    for truth, right in (("72", 1.0), ("71", 0.0)):
        theirs = default_compute_score(source, VERL_TABLE[source], truth)
        theirs = theirs["acc"] if isinstance(theirs, dict) else theirs
        assert acc(source, VERL_TABLE[source], truth) == float(theirs) == right
        assert problem_of(source, truth) is None


def test_every_set_of_verls_table_is_graded_or_refused():
    """The names in verl's source; a new one must be decided upon."""
    import ast
    import inspect

    tree = ast.parse(inspect.getsource(default_compute_score))
    tests = [node.test for node in ast.walk(tree) if isinstance(node, ast.If)]
    names = {
        node.value
        for test in tests
        for node in ast.walk(test)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    graded = set(VERL_TABLE) - {"aime_2025"} | {"aime"} | {"codecontests", "apps", "codeforces", "taco"}
    refused = {name for name in names if problem_of(name, "x") and not is_code(name)}
    assert names - graded - refused == {"hiyouga/geometry3k"}, "its images are refused"
    assert refused == {name for name in names if name.startswith("searchR1_")} and refused


def test_format_counts_the_mark():
    assert compute_score("openai/gsm8k", "#### 3", "72")["format"] == 1
    assert compute_score("openai/gsm8k", "3", "72")["format"] == 0
    assert compute_score("openai/gsm8k", "#### 72", "72", require_think=True)["format"] == 0
    assert compute_score("openai/gsm8k", "<think>x</think>#### 72", "72", require_think=True)["format"] == 1


def test_extracted_answers():
    assert extracted_answer("openai/gsm8k", "#### 1,234") == "1,234"
    assert extracted_answer("math_dapo", "Answer: $x$.") == "$x$."
    assert extracted_answer("mine", r"\boxed{7}") == "7"
    assert extracted_answer("mine", "7") is extracted_answer("mine", None) is None
    assert extracted_answer("taco", ECHO) == "print(input())"
    assert marked_answer("#### 7", "boxed") is marked_answer(None, "hashes") is None
