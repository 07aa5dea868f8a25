"""The sets of programs: their places on the hub, their prompts, and their tests in the form of ``gcpo.rewards.code``.

**MBPP** has the prompt of its authors: the task and its tests, with an added request for a code block, since the answer
is a chat message and not a continuation up to their ``[DONE]``. Task ids 601 to 974 are for training, 511 to 600 are
held out, 11 to 510 are the evaluation set ``mbpp_test``, and 1 to 10 are only for few-shot prompts: MBPP's own splits.

**HumanEval** has EvalPlus' prompt for chat models: one sentence, and the function's head in a code block. The answer is
a whole function or the rest of one. HumanEval has no few-shot examples; frameworks that offer them (such as
lm-evaluation-harness with ``--num_fewshot 5``, which warns about it) draw from the 164 evaluation problems.
``humaneval_5shot`` uses problems 2 to 6 of MBPP's prompt split instead (2, 3 and 4 are the examples of MBPP's authors),
in HumanEval's form, as earlier turns of the conversation.

``extra_info.details`` keeps the reference solutions for ``benchmarks.code_grading``; no prompt or reward uses them.
"""

from __future__ import annotations

import ast
import builtins
import dataclasses
import json
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from data_prep.answers import string_of, text_of
from data_prep.core import read_source
from data_prep.schema import DataError, DataSet, Drop, Hub, Row, Schema
from gcpo.rewards.code import load_tests, program_of
from gcpo.rewards.sources import VERL_CODE

Raw = Mapping[str, Any]

MBPP_TRAIN, MBPP_VALIDATION, MBPP_TEST, MBPP_PROMPT = range(601, 975), range(511, 601), range(11, 511), range(1, 11)
EXAMPLES = (2, 3, 4, 5, 6)
"""MBPP's task ids of the few-shot examples."""
MBPP_COLUMNS = ("text", "code", "task_id", "test_list")
MBPP_QUESTION = (
    "You are an expert Python programmer, and here is your task: {task} "
    "Your code should pass these tests:\n\n{tests}\n\nPut your code in a ```python block."
)
HUMANEVAL_QUESTION = (
    "Please provide a self-contained Python script that solves the following problem in a markdown code block:\n"
    "```python\n{prompt}\n```"
)


def lines(text: Any, what: str) -> str:
    """Return text with ``LF`` line ends, which vary in MBPP; raise `Drop` if it is not a string."""
    return string_of(text, what).replace("\r\n", "\n")


# ---- MBPP ------------------------------------------------------------------------------------------------------------


def mbpp_tests(row: Raw) -> dict[str, Any]:
    """Return the tests of a row of MBPP.

    ``names`` are the names that the tests use and the reference solution defines. Some shadow builtins (``sum``), which
    a program may replace only where the reference solution does.

    Raises:
        Drop: a test is not Python, or the tests do not use the program.
    """
    setup = lines(row.get("test_setup_code") or "", "setup of the tests")
    cases = tests_of(row)
    code = lines(row["code"], "reference solution")
    try:
        used = names_of(ast.parse("\n".join((setup, *cases))), ast.Load)
        defined = top_level_names(ast.parse(code))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Drop("a test or the reference solution is no Python") from error
    names = [name for name in defined if name in used]
    if not names:
        raise Drop("its tests test nothing")
    # One test compares with sys.getsizeof and relies on the program's import.
    modules = sorted(name for name in used if name in sys.stdlib_module_names and not hasattr(builtins, name))
    imports = "".join(f"import {name}\n" for name in modules if name not in names)
    before = imports + (setup and setup.rstrip() + "\n")
    return {"assert_case": [before + case for case in cases], "names": names}


def tests_of(row: Raw) -> list[str]:
    """Return the tests of a row of MBPP; raise `Drop` if they are not a list of strings."""
    if not isinstance(row["test_list"], list):
        raise Drop("its tests are no list")
    return [lines(test, "test") for test in row["test_list"]]


def names_of(tree: ast.AST, context: type[ast.expr_context]) -> set[str]:
    """Return the names that are used in this context."""
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, context)}


def top_level_names(tree: ast.Module) -> list[str]:
    """Return the functions, classes and variables of a module, in order."""
    found: dict[str, None] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = None
        elif isinstance(node, ast.Assign):
            found.update(dict.fromkeys(sorted(names_of(node, ast.Store))))
    return list(found)


def mbpp_row(row: Raw, *, held_out: bool = False) -> Row:
    """Return a row of MBPP."""
    task, tests = text_of(row["text"]), mbpp_tests(row)
    shown = "\n".join(test.strip() for test in tests_of(row))
    prompt = MBPP_QUESTION.format(task=task, tests=shown)
    details = {"task_id": row["task_id"], "solution": lines(row["code"], "reference solution")}
    return Row(task, json.dumps(tests, sort_keys=True), prompt, details, held_out=held_out)


def task_id(row: Raw) -> int:
    """Return the task id, which determines the split."""
    try:
        return int(row["task_id"])
    except (TypeError, ValueError, OverflowError):
        raise Drop("no task id") from None


def mbpp_train(row: Raw) -> Row:
    """Return a row of MBPP to train on; its validation part is held out."""
    number = task_id(row)
    if number in MBPP_TEST:
        raise Drop("of MBPP's test part (task ids 11 to 510)")
    if number in MBPP_PROMPT:
        raise Drop("of MBPP's few-shot part (task ids 1 to 10)")
    return mbpp_row(row, held_out=number in MBPP_VALIDATION)


def mbpp_test(row: Raw) -> Row:
    """Return a row of MBPP to evaluate on."""
    if task_id(row) not in MBPP_TEST:
        raise Drop("not of MBPP's test part (task ids 11 to 510)")
    return mbpp_row(row)


# ---- HumanEval -------------------------------------------------------------------------------------------------------


def humaneval_row(row: Raw, examples: Sequence[Mapping[str, str]] = ()) -> Row:
    """Return a row of HumanEval, after the turns of the examples."""
    prompt = lines(row["prompt"], "prompt")
    entry_point = text_of(row["entry_point"], "entry point")
    tests = {"prompt": prompt, "test": lines(row["test"], "test"), "entry_point": entry_point}
    try:
        program_of("", load_tests(tests))
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError) as error:
        raise Drop("its prompt or its test is no Python") from error
    question = {"role": "user", "content": HUMANEVAL_QUESTION.format(prompt=prompt.strip())}
    details = {"task_id": row["task_id"], "solution": lines(row.get("canonical_solution") or "", "reference solution")}
    return Row(text_of(prompt, "prompt"), json.dumps(tests, sort_keys=True), [*examples, question], details)


def example_of(row: Raw) -> tuple[str, str]:
    """Return a problem of MBPP in HumanEval's form: (the question, the whole program).

    The task and the tests become the docstring of the tested function, with the tests as in a console.
    """
    entry = mbpp_tests(row)["names"][-1]
    tree = ast.parse(lines(row["code"], "reference solution"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == entry]
    if not functions:
        raise Drop(f"its reference solution defines no function {entry}")
    function = functions[-1]
    shown = [text_of(row["text"])]
    for test in tests_of(row):
        check = ast.parse(test.strip()).body[0]
        if not isinstance(check, ast.Assert) or not isinstance(check.test, ast.Compare):
            raise DataError(f"MBPP's problem {row['task_id']} can't be an example: its tests are no comparisons")
        shown += [f">>> {ast.unparse(check.test.left)}", ast.unparse(check.test.comparators[0])]
    docstring = ast.Expr(ast.Constant("\n" + textwrap.indent("\n".join(shown), "    ") + "\n    "))
    body = function.body
    function.body = [docstring]
    asked = ast.unparse(ast.fix_missing_locations(tree))
    function.body = [docstring, *body]
    return asked, ast.unparse(ast.fix_missing_locations(tree))


def five_shot(sources: Sequence[str]) -> DataSet:
    """Return HumanEval with five examples of MBPP.

    Args:
        sources: source of MBPP: files, a folder, or a data set of the hub; empty: its usual place.

    Raises:
        DataError: MBPP cannot be read, or lacks the examples.
    """
    try:
        source = read_source(MBPP_PROMPTS, sources)
    except DataError as error:
        raise DataError(f"the examples: {error}".replace("--source", "--examples")) from error
    missing = set(MBPP_COLUMNS) - source.records.columns
    if missing:
        raise DataError(f"{source.label} can't give the examples: it lacks the columns {', '.join(sorted(missing))}")
    problems = {}
    for row in source.records.read(range(len(source.records))):
        if row.keys() >= set(MBPP_COLUMNS) and isinstance(row["task_id"], int):
            problems[row["task_id"]] = row
    if not problems.keys() >= set(EXAMPLES):
        ids = ", ".join(map(str, EXAMPLES))
        raise DataError(f"{source.label} can't give the examples: it lacks task ids of {ids}; give all of MBPP")
    turns: list[dict[str, str]] = []
    for number in EXAMPLES:
        try:
            asked, answer = example_of(problems[number])
        except Drop as reason:
            raise DataError(f"MBPP's problem {number} of {source.label} can't be an example: {reason}") from reason
        turns.append({"role": "user", "content": HUMANEVAL_QUESTION.format(prompt=asked)})
        turns.append({"role": "assistant", "content": f"```python\n{answer}\n```"})
    return dataclasses.replace(
        HUMANEVAL_5SHOT,
        schemas=(Schema(HUMANEVAL_COLUMNS, lambda row: humaneval_row(row, turns), HUMANEVAL_EXTRAS),),
        few_shot=None,
        examples={"set": "MBPP", "task_ids": list(EXAMPLES), "source": source.origin},
    )


def _without_examples(row: Raw) -> Row:
    raise DataError("humaneval_5shot has no rows without its examples")


# ---- programming contests --------------------------------------------------------------------------------------------


def eurus_row(row: Raw) -> Row:
    """Return a row of Eurus-2-RL-Data, which is in verl's schema already, without its system message."""
    origin = string_of(row["data_source"], "data source")
    if origin not in VERL_CODE:
        raise Drop("no problem of a programming contest")
    messages = row["prompt"] if isinstance(row["prompt"], list) else []
    asked = [one.get("content") for one in messages if isinstance(one, Mapping) and one.get("role") == "user"]
    if len(asked) != 1:
        raise Drop("not one question")
    truth = row["reward_model"].get("ground_truth") if isinstance(row["reward_model"], Mapping) else None
    try:
        program_of("", load_tests(truth))
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError) as error:
        raise Drop("its tests can't be read") from error
    question = text_of(asked[0])
    truth = truth if isinstance(truth, str) else json.dumps(truth, sort_keys=True)
    return Row(question.partition("\n\nWrite Python code to solve the problem.")[0], truth, question, {"set": origin})


# ---- the sets --------------------------------------------------------------------------------------------------------

MBPP_EXTRAS = ("test_setup_code",)
HUMANEVAL_COLUMNS = ("task_id", "prompt", "entry_point", "test")
HUMANEVAL_EXTRAS = ("canonical_solution",)
HUMANEVAL_HUB = Hub("openai/openai_humaneval", "test")


def _set(name: str, kind: Literal["train", "eval"], title: str, schema: Schema, *hubs: Hub, **options: Any) -> DataSet:
    return DataSet(name, title, kind, "code", (schema,), hubs, **options)


def _mbpp(
    name: str, kind: Literal["train", "eval"], title: str, convert: Callable[[Raw], Row], split: str, *rows: int
) -> DataSet:
    hub = Hub("google-research-datasets/mbpp", split, ("full",))
    return _set(name, kind, title, Schema(MBPP_COLUMNS, convert, MBPP_EXTRAS), hub, rows=rows, split=split)


MBPP_PROMPTS = _mbpp("mbpp_prompt", "eval", "MBPP's few-shot part", mbpp_row, "prompt")
"""The source of the few-shot examples, not a separate set."""

HUMANEVAL_5SHOT = _set(
    "humaneval_5shot",
    "eval",
    "HumanEval after five examples of MBPP (--examples)",
    Schema(HUMANEVAL_COLUMNS, _without_examples),
    HUMANEVAL_HUB,
    rows=(164,),
    few_shot=five_shot,
)
HUMANEVAL = Schema(HUMANEVAL_COLUMNS, humaneval_row, HUMANEVAL_EXTRAS)

SETS = (
    _mbpp("mbpp", "train", "MBPP, task ids 601 to 974", mbpp_train, "train", 374, 974),
    _set(
        "eurus_code",
        "train",
        "programming contests of Eurus-2-RL-Data (codecontests, apps, codeforces, taco)",
        Schema(("data_source", "prompt", "reward_model"), eurus_row),
        Hub("PRIME-RL/Eurus-2-RL-Data", "train"),
    ),
    _set("humaneval", "eval", "HumanEval", HUMANEVAL, HUMANEVAL_HUB, rows=(164,)),
    HUMANEVAL_5SHOT,
    _mbpp("mbpp_test", "eval", "MBPP, task ids 11 to 510", mbpp_test, "test", 500, 974),
)
