"""The reward of a program: does it pass all its tests.

``compute_score`` is what ``gcpo.rewards`` calls for the data sets of `is_code`; `grade` also says why a program failed.

What is run is the last fenced code block of the answer, see `extract`. The tests are a JSON object in
``reward_model.ground_truth``, in the forms that verl's own code reward reads, and one for HumanEval:

* ``{"inputs": [...], "outputs": [...]}``: a program that reads standard input and prints (verl's form; codecontests,
  taco, and most of apps and codeforces);
* the same with ``"fn_name"``: a function, or a method of a class ``Solution``; an input is one JSON value per line or a
  list of arguments (verl's form);
* ``{"assert_case": [...]}``: test code that uses the program's functions (verl's form for SandboxFusion; MBPP). With
  ``"names"``, only these names are taken from the program; without, all that are neither built in nor defined by the
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
from dataclasses import dataclass
from typing import Any

from gcpo.rewards.pool import size
from gcpo.rewards.sandbox import Limits, Program, Sandbox, Verdict, open_sandbox

__all__ = ["Grade", "compute_score", "extract", "grade", "grade_many", "is_code"]

SOURCES = frozenset({"codecontests", "apps", "codeforces", "taco"})
"""What verl's own code reward is for."""
OWN_SOURCES = ("gcpo/mbpp", "gcpo/humaneval", "gcpo/eurus_code")
"""Beginnings of the names that ``data_prep`` gives."""
MAX_PROGRAM_CHARS = 100_000
"""A longer program is wrong."""
RECURSION = 600_000
"""Recursion limit of programs for the sets of programming contests, which recurse deeply."""

_FENCES = ("```", "~~~")
_LANGUAGES = frozenset({"python", "py", "python3"})
_STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\nassert ", "\n@", "\n```")
"""Where a plain continuation ends (the stop words of HumanEval's authors, and the usual additions)."""


@dataclass(frozen=True)
class Grade:
    """How a response did."""

    passed: bool
    """Whether its program passes all tests."""
    format: bool
    """Whether it has a fenced code block, behind its thinking part if it has one."""
    reason: str = ""
    """Why it did not pass."""
    seconds: float = 0.0
    """Processor time of the program."""


def is_code(data_source: Any) -> bool:
    """Whether a data set's answers are programs."""
    return isinstance(data_source, str) and (data_source in SOURCES or data_source.startswith(OWN_SOURCES))


def answer_of(response: str) -> str:
    """What follows the thinking part; empty where that is never closed."""
    answer = response.rpartition("</think>")[2]
    return "" if "<think>" in answer else answer


def extract(response: str) -> str | None:
    """The last closed code block of the answer that is marked as Python, else the last without a mark, else None.

    A block is what stands between a line that begins with three or more backticks (or tildes), perhaps indented, and
    the next line of nothing but as many of them. A thinking part, closed or not, does not count.
    """
    marked = unmarked = None
    fence, language, lines = "", "", []
    for line in answer_of(response).split("\n"):
        bare = line.strip()
        if fence:
            if bare.startswith(fence) and not bare.strip(fence[0]):
                block = "\n".join(lines)
                if language in _LANGUAGES:
                    marked = block
                elif not language:
                    unmarked = block
                fence = ""
            else:
                lines.append(line)
        elif bare.startswith(_FENCES):
            fence = bare[: len(bare) - len(bare.lstrip(bare[0]))]
            language, lines = bare[len(fence) :].strip().lower(), []
    return marked if marked is not None else unmarked


def continuation(response: str) -> str | None:
    """The code of an answer without a fenced block, for sets whose prompt is code to go on from; None where empty."""
    answer = answer_of(response).rstrip()
    if not answer.strip():
        return None
    if answer.startswith((" ", "\t", "\n")):
        ends = [at for at in (answer.find(stop, 1) for stop in _STOPS) if at > 0]
        return answer[: min(ends, default=len(answer))]
    return answer


def load_tests(ground_truth: Any) -> dict[str, Any]:
    """The tests of a row.

    Raises:
        ValueError: they are no JSON object in one of the known forms.
    """
    tests = ground_truth
    if isinstance(tests, str):
        try:
            tests = json.loads(tests)
        except ValueError as error:
            raise ValueError(f"the tests of a program are no JSON: {error}") from None
    if not isinstance(tests, Mapping):
        raise ValueError(f"the tests of a program must be a JSON object, not {type(tests).__name__}")
    for needed, kind in (
        (("prompt", "test", "entry_point"), str),
        (("assert_case",), list),
        (("inputs", "outputs"), list),
    ):
        if all(isinstance(tests.get(name), kind) for name in needed):
            break
    else:
        raise ValueError(f"the tests of a program have the keys {sorted(tests)}; see gcpo.rewards.code for the forms")
    if not tests.get("assert_case", True) or not tests.get("inputs", True):
        raise ValueError("the tests of a program are empty: everything would pass")
    if "inputs" in tests and "outputs" in tests and len(tests["inputs"]) != len(tests["outputs"]):
        raise ValueError(f"the tests of a program have {len(tests['inputs'])} inputs, {len(tests['outputs'])} outputs")
    return dict(tests)


def program_of(code: str, tests: Mapping[str, Any]) -> Program:
    """The program with its tests, as the sandbox takes them."""
    if "entry_point" in tests:
        entry = tests["entry_point"]
        case = f"{tests['test']}\n\ncheck({entry})\n"
        setup, names = tests["prompt"], (entry,)
        return Program(code, "assert", [(case,)], entry, prompt=tests["prompt"], setup=setup, names=names)
    if "assert_case" in tests:
        cases, setup = [str(case) for case in tests["assert_case"]], str(tests.get("setup") or "")
        names = tests.get("names")
        if names is None:
            names = free_names((setup, *cases))
        return Program(code, "assert", [(case,) for case in cases], setup=setup, names=names)
    if tests.get("fn_name"):
        pairs = [
            (arguments(given), value(expected))
            for given, expected in zip(tests["inputs"], tests["outputs"], strict=True)
        ]
        return Program(code, "call", pairs, tests["fn_name"], stars=True, recursion=RECURSION)
    pairs = [(text(given), text(expected)) for given, expected in zip(tests["inputs"], tests["outputs"], strict=True)]
    return Program(code, "stdin", pairs, stars=True, recursion=RECURSION)


def text(lines: Any) -> str:
    """What is read or printed; verl's form allows a list of lines."""
    return "\n".join(map(str, lines)) if isinstance(lines, list) else str(lines)


def arguments(given: Any) -> list[Any]:
    """The arguments of a call: a list, or one JSON value per line."""
    return [json.loads(line) for line in given.split("\n")] if isinstance(given, str) else list(given)


def value(expected: Any) -> Any:
    """What a call must return: JSON in a string, or the value itself."""
    return json.loads(expected) if isinstance(expected, str) else expected


@functools.lru_cache(maxsize=4096)
def free_names(sources: tuple[str, ...]) -> tuple[str, ...]:
    """Names that test code uses, and neither defines nor finds among the builtins: the program has to have them."""
    used: dict[str, None] = {}
    own: set[str] = set()
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Name):
                if isinstance(node.ctx, ast.Load):
                    used[node.id] = None
                else:
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
        response: what the model wrote.
        ground_truth: the tests, see above.
        sandbox: one of `gcpo.rewards.sandbox.KINDS`.
        sandbox_fusion_url: of a SandboxFusion service's ``run_code``.
        time_limit: seconds of processor time for one test case; three times as long on the clock, and five times as
            long for all of them.
        memory_limit_mb: MiB of address space.

    Raises:
        ValueError: a setting or the tests can't be used.
        SandboxError: no sandbox works here, or it failed.
    """
    limits = Limits(float(time_limit), int(memory_limit_mb))
    runner: Sandbox = open_sandbox(sandbox, sandbox_fusion_url)
    tests = load_tests(ground_truth)
    code = extract(response) if isinstance(response, str) else None
    has_block = code is not None
    if code is None and isinstance(response, str) and "entry_point" in tests:
        code = continuation(response)
    if code is None:
        return Grade(False, False, "no code block")
    if len(code) > MAX_PROGRAM_CHARS:
        return Grade(False, has_block, f"a program of more than {MAX_PROGRAM_CHARS} characters")
    try:
        program = program_of(code, tests)
    except (SyntaxError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the tests of a program can't be read: {error}") from error
    longest = max((len(case[-1]) for case in program.cases), default=0) if program.mode == "stdin" else 0
    verdict: Verdict = runner.run(program, Limits(limits.time, limits.memory_mb, 2 * longest))
    return Grade(verdict.passed, has_block, verdict.reason, verdict.seconds)


def compute_score(
    solution_str: Any,
    ground_truth: Any,
    extra_info: Any = None,
    *,
    sandbox: str = "auto",
    sandbox_fusion_url: str | None = None,
    time_limit: float = Limits.time,
    memory_limit_mb: int = Limits.memory_mb,
    **kwargs: Any,
) -> dict[str, float]:
    """Grade a response.

    Args:
        solution_str: the response.
        ground_truth: the tests, see above.
        extra_info: unused.
        sandbox: see `grade`, like the three that follow.
        sandbox_fusion_url: see `grade`.
        time_limit: see `grade`.
        memory_limit_mb: see `grade`.
        kwargs: unused; verl passes more, and other rewards have settings of their own.

    Returns:
        ``score`` and ``acc``: 1 if the program passes all its tests, else 0. ``format``: 1 if there is a fenced code
        block. A response of a wrong type scores 0.

    Raises:
        ValueError: a setting or the tests can't be used.
        SandboxError: no sandbox works here, or it failed.
    """
    result = grade(
        solution_str,
        ground_truth,
        sandbox=sandbox,
        sandbox_fusion_url=sandbox_fusion_url,
        time_limit=time_limit,
        memory_limit_mb=memory_limit_mb,
    )
    return {"score": float(result.passed), "acc": float(result.passed), "format": float(result.format)}


def grade_many(responses: Sequence[Any], ground_truths: Sequence[Any], **settings: Any) -> list[Grade]:
    """`grade` for many responses, on all cores.

    Args:
        responses: [N] what the model wrote.
        ground_truths: [N] the tests.
        settings: of `grade`.

    Returns:
        [N] grades, in order.
    """
    pairs = list(zip(responses, ground_truths, strict=True))
    with ThreadPoolExecutor(size()) as threads:
        return list(threads.map(lambda pair: grade(*pair, **settings), pairs))
