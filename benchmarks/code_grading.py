"""Check that reference solutions pass and mutated ones fail, and measure the graded programs per second.

``python -m benchmarks.code_grading --humaneval FILE --mbpp FILE`` grades all reference solutions of HumanEval and MBPP
and ``--mutants`` mutations of each with ``gcpo.rewards.code``, and every program once more the usual way, with the
tests after the program in the same process (in the sandbox, too). It prints a table and writes ``code_grading.json``.
On a shared machine, the processor time per program is more reliable than programs per second.

A mutation changes one thing in a solution: a comparison, an operator, a number, or a returned value. Not every mutation
makes a program wrong, and tests do not find every error; if a mutant also passes the usual way, the tests accept it
and not the grader.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import arguments, print_table, save
from data_prep.code_sets import MBPP_PROMPTS
from data_prep.core import convert_rows, read_source
from data_prep.schema import DataError, DataSet
from data_prep.sets import SETS
from gcpo.rewards.code import Grade, grade_many
from gcpo.rewards.math_verify_pool import size
from gcpo.rewards.sandbox import Limits, Program, SandboxError, Verdict, open_sandbox

SEED = 20250
FLIPPED: dict[type[ast.AST], type[ast.AST]] = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.Div: ast.Mult,
    ast.Mod: ast.FloorDiv,
}  # fmt: skip


@dataclass(frozen=True)
class Solution:
    """A program and its tests.

    Attributes:
        name: name of the problem.
        source: the whole program.
        tests: the tests, as in ``ground_truth``.
        kind: kind of the mutation; empty for the reference.
        line: the mutated line.
    """

    name: str
    source: str
    tests: dict[str, Any]
    kind: str = ""
    line: str = ""

    @property
    def one_process(self) -> str:
        """The program followed by its tests."""
        if "entry_point" in self.tests:
            return f"{self.source}\n{self.tests['test']}\ncheck({self.tests['entry_point']})\n"
        return "\n".join((self.source, *self.tests["assert_case"]))


def solutions(dataset: DataSet, source: Path) -> list[Solution]:
    """Return the reference solutions of a set.

    Raises:
        DataError: the source cannot be read.
    """
    found = []
    for row in convert_rows(dataset, read_source(dataset, [str(source)])).test:
        details, tests = json.loads(row["extra_info"]["details"]), json.loads(row["reward_model"]["ground_truth"])
        found.append(Solution(str(details["task_id"]), tests.get("prompt", "") + details["solution"], tests))
    return found


def mutants(source: str) -> list[tuple[str, str]]:
    """Return all mutations of a program, as (kind, source)."""
    tree = ast.parse(source)
    found = []
    for number, node in enumerate(ast.walk(tree)):
        for kind, change in changes(node):
            mutant = copy.deepcopy(tree)
            change(next(other for i, other in enumerate(ast.walk(mutant)) if i == number))
            found.append((kind, ast.unparse(ast.fix_missing_locations(mutant))))
    return found


def changes(node: ast.AST) -> list[tuple[str, Callable[[Any], None]]]:
    """Return the possible mutations of a node."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in FLIPPED:
        return [("comparison", lambda n: n.ops.__setitem__(0, FLIPPED[type(n.ops[0])]()))]
    if isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in FLIPPED:
        return [("operator", lambda n: setattr(n, "op", FLIPPED[type(n.op)]()))]
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return [("number", lambda n: setattr(n, "value", n.value + 1))]
    if isinstance(node, ast.Return) and node.value is not None:
        return [("return", lambda n: setattr(n, "value", ast.Constant(None)))]
    return []


def drawn(originals: Sequence[Solution], count: int) -> list[Solution]:
    """Return ``count`` random mutations of each solution, the same in every run."""
    draw = random.Random(SEED)
    found = []
    for one in originals:
        possible = mutants(one.source)
        before = ast.unparse(ast.parse(one.source)).splitlines()
        for kind, source in draw.sample(possible, min(count, len(possible))):
            line = next((b for a, b in zip(before, source.splitlines(), strict=False) if a != b), "")
            found.append(dataclasses.replace(one, source=source, kind=kind, line=line.strip()[:120]))
    return found


def graded(programs: Sequence[Solution], seconds: float) -> list[Grade]:
    """Grade programs with the reward function."""
    return grade_many(
        [f"```python\n{one.source}\n```" for one in programs], [one.tests for one in programs], time_limit=seconds
    )


def graded_in_one_process(programs: Sequence[Solution], seconds: float) -> list[Verdict]:
    """Grade programs the usual way: a program passes if it reaches the end without an exception."""
    sandbox, limits = open_sandbox(), Limits(time=seconds)
    # The program's own output is discarded.
    before = "import io, sys\nreal_output, sys.stdout = sys.stdout, io.StringIO()\n"
    after = "\nprint('the end', file=real_output)\n"

    def one(program: Solution) -> Verdict:
        return sandbox.run(Program(before + program.one_process + after, "stdin", [("", "the end")]), limits)

    with ThreadPoolExecutor(size()) as threads:
        return list(threads.map(one, programs))


def measure(name: str, originals: Sequence[Solution], count: int, seconds: float) -> dict[str, Any]:
    """Measure one set and return the results."""
    start, used = time.perf_counter(), sum(os.times()[:4])  # of this process and its ended children
    reference = graded(originals, 10 * seconds)
    elapsed, used = time.perf_counter() - start, sum(os.times()[:4]) - used
    changed = drawn(originals, count)
    ours, usual = graded(changed, seconds), graded_in_one_process(changed, seconds)
    usual_reference = graded_in_one_process(originals, 10 * seconds)
    pairs = list(zip(changed, ours, usual, strict=True))
    total, caught = Counter(one.kind for one in changed), Counter(one.kind for one, a, _ in pairs if not a.passed)
    return {
        "set": name,
        "references": len(originals),
        "passed": sum(one.passed for one in reference),
        "failed": {one.name: grade.reason for one, grade in zip(originals, reference, strict=True) if not grade.passed},
        "passed_in_one_process": sum(one.passed for one in usual_reference),
        "programs_per_second": round(len(originals) / elapsed, 1),
        "processor_ms_per_program": round(1000 * used / len(originals), 1),
        "mutants": len(changed),
        "caught": sum(not verdict.passed for verdict in ours),
        "caught_in_one_process": sum(not verdict.passed for verdict in usual),
        "by_kind": {kind: {"mutants": total[kind], "caught": caught[kind]} for kind in sorted(total)},
        "disagreements": [
            {"problem": one.name, "kind": one.kind, "ours": a.reason or "passed", "one_process": b.reason or "passed"}
            for one, a, b in pairs
            if a.passed != b.passed
        ],
        "survivors": [
            {"problem": one.name, "kind": one.kind, "line": one.line} for one, a, b in pairs if a.passed and b.passed
        ],
    }


COLUMNS = {
    "set": "{set}",
    "references": "{references}",
    "pass": "{passed}",
    "mutants": "{mutants}",
    "fail": "{caught} ({share:.1%})",
    "fail in one process": "{caught_in_one_process}",
    "disagree": "{disagree}",
    "programs/s": "{programs_per_second}",
    "ms of processor": "{processor_ms_per_program}",
}


def main() -> int:
    """Command line."""
    parser = arguments(__doc__, "outputs/code_grading", model=False)
    parser.add_argument("--humaneval", type=Path, metavar="FILE", help="HumanEval.jsonl.gz")
    parser.add_argument("--mbpp", type=Path, metavar="FILE", help="mbpp.jsonl")
    parser.add_argument("--mutants", type=int, default=2, help="of each solution (%(default)s)")
    parser.add_argument("--seconds", type=float, default=1.0, help="processor time of a mutant (%(default)s)")
    args = parser.parse_args()
    sets = [("humaneval", SETS["humaneval"], args.humaneval), ("mbpp", MBPP_PROMPTS, args.mbpp)]
    try:
        kind = open_sandbox().kind
        found = [(name, solutions(dataset, source)) for name, dataset, source in sets if source is not None]
    except (DataError, SandboxError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not found:
        parser.error("nothing to grade: give --humaneval, --mbpp or both")
    results = [measure(name, originals, args.mutants, args.seconds) for name, originals in found]
    more = [{"share": r["caught"] / max(1, r["mutants"]), "disagree": len(r["disagreements"])} for r in results]
    rows = [one | other for one, other in zip(results, more, strict=True)]
    print_table(list(COLUMNS), *([cell.format_map(row) for cell in COLUMNS.values()] for row in rows))
    save(args.output / "code_grading.json", {"sandbox": kind, "workers": size(), "sets": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
