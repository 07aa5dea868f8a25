"""The reward of a program: whether it passes all its tests.

``compute_score`` grades the rows that `gcpo.rewards.grader_of` calls code; `grade` also returns why it failed.

The program is a fenced code block of the answer, see `gcpo.rewards.blocks`. The tests are JSON in
``reward_model.ground_truth``, in the forms of verl's code reward and two more:

* ``{"inputs": [...], "outputs": [...]}``: a program that reads standard input and prints (verl's form; codecontests,
  taco, and most of apps and codeforces);
* the same with ``"fn_name"``: a function, or a method of a class ``Solution``; an input is one JSON value per line or a
  list of arguments (verl's form);
* ``[{"input": ..., "output": ...}, ...]``: either of the two above, case by case; a function is named by ``"fn_name"``
  or by ``"metadata": {"func_name": ...}`` of every case (LiveCodeBench, PrimeIntellect, DeepCoder);
* ``{"assert_case": [...]}``: test code that uses the program's functions (verl's form for SandboxFusion; MBPP). With
  ``"names"``, only these names are taken from the program; otherwise all that are neither built in nor defined by the
  tests or ``"setup"``;
* ``{"prompt": ..., "test": ..., "entry_point": ...}``: HumanEval. ``test`` defines ``check(candidate)``.
"""

from __future__ import annotations

import ast
import builtins
import functools
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from gcpo.rewards.answers import answer_of
from gcpo.rewards.blocks import code_blocks, program_blocks
from gcpo.rewards.math_verify_pool import size
from gcpo.rewards.sandbox import Limits, Program, Sandbox, open_sandbox
from gcpo.rewards.sources import is_code

__all__ = ["Grade", "compute_score", "extract", "grade", "grade_many", "is_code", "load_tests", "program_of"]

MAX_PROGRAM_CHARS = 100_000
"""A longer program is graded as wrong."""
RECURSION = 600_000
"""Recursion limit of programs of contest data sets, which recurse deeply."""

_SETTINGS = {"sandbox", "sandbox_fusion_url", "time_limit", "memory_limit_mb"}
_STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\nassert ", "\n@", "\n```")
"""Texts that end a plain continuation (the stop words of HumanEval's authors, and the usual additions)."""


@dataclass(frozen=True)
class Grade:
    """The result of grading a response.

    Attributes:
        passed: whether its program passes all tests.
        format: whether it has a fenced code block, after its thinking part if it has one.
        reason: reason of a failure.
        seconds: processor time of the program.
    """

    passed: bool
    format: bool
    reason: str = ""
    seconds: float = 0.0


def extract(response: str, names: Sequence[str] = (), *, reads: bool = False) -> str | None:
    """Return the program of a response, without its thinking part: the last of `program_blocks`, or None."""
    blocks = program_blocks(code_blocks(answer_of(response)), names, reads=reads)
    return blocks[-1] if blocks else None


def continuation(response: str) -> str | None:
    """Return the code of an answer without a fenced block, for sets whose prompt is code to continue; None if empty."""
    answer = answer_of(response).rstrip()
    if answer.startswith((" ", "\t", "\n")):
        ends = [at for at in (answer.find(stop, 1) for stop in _STOPS) if at > 0]
        return answer[: min(ends, default=len(answer))]
    return answer or None


def load_tests(ground_truth: Any) -> dict[str, Any]:
    """Parse the tests of a row.

    Raises:
        ValueError: the tests are not JSON in one of the known forms.
    """
    tests = ground_truth
    if isinstance(tests, str):
        try:
            tests = json.loads(tests)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the tests of a program are no JSON: {error}") from None
    if isinstance(tests, list) and tests and all(isinstance(case, Mapping) for case in tests):
        tests = _of_cases(tests)
    if not isinstance(tests, Mapping):
        raise ValueError(f"the tests of a program must be a JSON object, not {type(tests).__name__}")
    forms = ((("prompt", "test", "entry_point"), str), (("assert_case",), list), (("inputs", "outputs"), list))
    for needed, kind in forms:
        if all(isinstance(tests.get(name), kind) for name in needed):
            break
    else:
        raise ValueError(f"the tests of a program have the keys {sorted(tests)}; docs/sandbox.md has the known forms")
    if not tests.get("assert_case", True) or not tests.get("inputs", True):
        raise ValueError("the tests of a program are empty: everything would pass")
    if "inputs" in tests and "outputs" in tests and len(tests["inputs"]) != len(tests["outputs"]):
        raise ValueError(f"the tests of a program have {len(tests['inputs'])} inputs, {len(tests['outputs'])} outputs")
    return dict(tests)


def _of_cases(cases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Convert tests that are listed case by case to the form with ``inputs`` and ``outputs``."""
    names = set()
    for number, case in enumerate(cases):
        if "input" not in case or "output" not in case:
            raise ValueError(f"test {number} of a program has the keys {sorted(case)}; it needs input and output")
        metadata = case.get("metadata")
        name = case.get("fn_name") or (metadata.get("func_name") if isinstance(metadata, Mapping) else None)
        kind = str(case.get("testtype") or case.get("type") or "")
        if not name and kind.startswith("function"):
            raise ValueError(f"test {number} of a program calls a function and does not name it (fn_name)")
        names.add(name or None)
    if len(names) > 1:
        raise ValueError(f"the tests of a program call different functions: {sorted(map(str, names))}")
    tests: dict[str, Any] = {name + "s": [case[name] for case in cases] for name in ("input", "output")}
    return {**tests, "fn_name": names.pop()}


def program_of(code: str, tests: Mapping[str, Any]) -> Program:
    """Return the program and its tests in the sandbox's format."""
    if "entry_point" in tests:
        entry = tests["entry_point"]
        case = f"{tests['test']}\n\ncheck({entry})\n"
        setup, names = whole_function(tests["prompt"]), (entry,)
        check_python(case)
        return Program(code, "assert", [(case,)], entry, prompt=tests["prompt"], setup=setup, names=names)
    if "assert_case" in tests:
        cases, setup = [str(case) for case in tests["assert_case"]], str(tests.get("setup") or "")
        names = tests.get("names")
        for source in (setup, *cases):
            check_python(source)
        if names is None:
            names = free_names((setup, *cases))
        return Program(code, "assert", [(case,) for case in cases], setup=setup, names=names)
    if tests.get("fn_name"):
        pairs = [(arguments(a), value(b)) for a, b in zip(tests["inputs"], tests["outputs"], strict=True)]
        # Some sets wrap every expected result in a list, as verl's form does; others do not.
        unwrap = all(isinstance(expected, list) and len(expected) == 1 for _, expected in pairs)
        name = tests["fn_name"]
        return Program(code, "call", pairs, name, stars=True, recursion=RECURSION, unwrap=unwrap)
    pairs = [(text(a), text(b)) for a, b in zip(tests["inputs"], tests["outputs"], strict=True)]
    return Program(code, "stdin", pairs, stars=True, recursion=RECURSION)


@functools.lru_cache(maxsize=4096)
def check_python(source: str) -> None:
    """Raise SyntaxError or ValueError if test code is not Python, since no program could pass it."""
    ast.parse(source)


@functools.lru_cache(maxsize=4096)
def whole_function(prompt: str) -> str:
    """Return HumanEval's prompt as valid Python: a head without a docstring gets a body."""
    try:
        check_python(prompt)
    except SyntaxError:
        prompt += "\n    pass\n"
        check_python(prompt)
    return prompt


def text(lines: Any) -> str:
    """Return an input or output as text; verl's form allows a list of lines."""
    return "\n".join(map(str, lines)) if isinstance(lines, list) else str(lines)


def arguments(given: Any) -> list[Any]:
    """Return the arguments of a call, given as a list, or one JSON value per line."""
    return [json.loads(line) for line in given.split("\n")] if isinstance(given, str) else list(given)


def value(expected: Any) -> Any:
    """Return the expected result of a call, given as JSON in a string or as the value itself."""
    return json.loads(expected) if isinstance(expected, str) else expected


@functools.lru_cache(maxsize=4096)
def free_names(sources: tuple[str, ...]) -> tuple[str, ...]:
    """Return names that test code uses but neither defines nor finds in the builtins: the program must define them."""
    used: dict[str, None] = {}
    own: set[str] = set()
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                used[node.id] = None
            elif isinstance(node, ast.Name):
                own.add(node.id)
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.arg):
                own.add(node.arg)
            elif isinstance(node, ast.alias):
                own.add(node.asname or node.name.partition(".")[0])
    return tuple(name for name in used if name not in own and not hasattr(builtins, name))


def grade(
    response: Any,
    ground_truth: Any,
    *,
    sandbox: str = "auto",
    sandbox_fusion_url: str | None = None,
    time_limit: float = Limits.time,
    memory_limit_mb: int = Limits.memory_mb,
) -> Grade:
    """Run the program of a response against its tests.

    Args:
        response: the model's response.
        ground_truth: the tests, see the module's description.
        sandbox: one of `gcpo.rewards.sandbox.KINDS`.
        sandbox_fusion_url: address of a SandboxFusion service's ``run_code``.
        time_limit: seconds of processor time per test case; the wall-clock limit is three times, the limit of all cases
            five times as long.
        memory_limit_mb: MiB of address space.

    Raises:
        ValueError: a setting or the tests cannot be used.
        SandboxError: no sandbox works here, or it failed.
    """
    limits = Limits(float(time_limit), int(memory_limit_mb))
    runner: Sandbox = open_sandbox(sandbox, sandbox_fusion_url)
    tests = load_tests(ground_truth)
    try:
        program = program_of("", tests)
    except (SyntaxError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the tests of a program can't be read: {error}") from error
    codes, has_block = _programs(response, program)
    if not codes:
        return Grade(False, False, "no code block")
    if len(codes[-1]) > MAX_PROGRAM_CHARS:
        return Grade(False, has_block, f"a program of more than {MAX_PROGRAM_CHARS} characters")
    longest = max((len(case[-1]) for case in program.cases), default=0) if program.mode == "stdin" else 0
    limits = replace(limits, output=2 * longest)
    verdict = runner.run(replace(program, code=codes[-1]), limits)
    seconds = verdict.seconds
    together = "\n\n".join(codes)
    if verdict.reason.startswith("NameError") and len(codes) > 1 and len(together) <= MAX_PROGRAM_CHARS:
        # The program spans several blocks: the last block uses definitions of earlier ones.
        verdict = runner.run(replace(program, code=together), limits)
        seconds += verdict.seconds
    return Grade(verdict.passed, has_block, verdict.reason, seconds)


def _programs(response: Any, program: Program) -> tuple[list[str], bool]:
    """Return the code blocks that may be needed, the program last, and whether the response has a closed block."""
    if not isinstance(response, str):
        return [], False
    blocks = code_blocks(answer_of(response))
    names = [program.entry] if program.entry else list(program.names)
    codes = program_blocks(blocks, names, reads=program.mode == "stdin")
    if not codes and program.prompt is not None:
        rest = continuation(response)
        codes = [] if rest is None else [rest]
    return codes, any(block.closed and block.python is not False for block in blocks)


def compute_score(solution_str: Any, ground_truth: Any, extra_info: Any = None, **settings: Any) -> dict[str, float]:
    """Grade a program as a reward function of verl.

    Args:
        solution_str: the response; a value of a wrong type scores 0.
        ground_truth: the tests, see the module's description.
        extra_info: unused.
        settings: options of `grade`; other keywords, which verl passes, are ignored.

    Returns:
        ``score`` and ``acc``: 1 if the program passes all its tests, else 0. ``format``: 1 if there is a fenced code
        block.

    Raises:
        ValueError, SandboxError: see `grade`.
    """
    result = grade(solution_str, ground_truth, **{name: settings[name] for name in _SETTINGS & settings.keys()})
    return {"score": float(result.passed), "acc": float(result.passed), "format": float(result.format)}


def grade_many(responses: Sequence[Any], ground_truths: Sequence[Any], **settings: Any) -> list[Grade]:
    """Apply `grade` to [N] responses and [N] tests on all cores; return [N] grades in order."""
    pairs = list(zip(responses, ground_truths, strict=True))
    with ThreadPoolExecutor(size()) as threads:
        return list(threads.map(lambda pair: grade(*pair, **settings), pairs))
