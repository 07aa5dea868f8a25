"""The size of files and functions, and which package imports which."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from gcpo.methods import method_names

ROOT = Path(__file__).parents[1]
FOLDERS = ("benchmarks", "data_prep", "docs", "examples", "gcpo", "recipe", "run_scripts")
FILES = sorted(path.relative_to(ROOT).as_posix() for name in FOLDERS for path in (ROOT / name).rglob("*.py"))
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 350, 60
LONG = {"examples/gcpo_in_one_file.py": 400}
"""All methods side by side, to be read from top to bottom."""
STACK = {"ray", "tensordict", "transfer_queue", "verl"}
"""What verl brings along; a method, a check, a reward or a tool must not need it."""


def tree_of(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text())


def imported(tree: ast.AST) -> Iterator[str]:
    """The packages that a module imports, inside of functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module or "").partition(".")[0]


def test_the_files_are_found() -> None:
    """The other tests look at something."""
    assert {"gcpo/plugin.py", "recipe/gcpo/main_gcpo.py", "docs/figures/method.py"} <= set(FILES)
    assert "verl" in set(imported(tree_of("gcpo/adapters/trainer.py")))


def test_no_file_is_too_long() -> None:
    lengths = {name: len((ROOT / name).read_text().splitlines()) for name in FILES}
    assert {name: length for name, length in lengths.items() if length > LONG.get(name, MOST_LINES)} == {}


def test_no_function_is_too_long() -> None:
    functions = [
        (name, node.name, (node.end_lineno or 0) - node.lineno + 1)
        for name in FILES
        for node in ast.walk(tree_of(name))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert [entry for entry in functions if entry[2] > MOST_LINES_OF_A_FUNCTION] == []


def test_only_adapters_import_verl() -> None:
    """Also where the import stands inside a function."""
    others = [name for name in FILES if not name.startswith(("gcpo/adapters/", "gcpo/plugin.py", "recipe/"))]
    found = {name: sorted(STACK & set(imported(tree_of(name)))) for name in others}
    assert {name: packages for name, packages in found.items() if packages} == {}


def test_adapters_know_no_single_method() -> None:
    """They call the hooks of `Method`, whichever method it is."""
    methods = tuple(f"gcpo.methods.{name}" for name in method_names())
    names = {
        name: [node.module for node in ast.walk(tree_of(name)) if isinstance(node, ast.ImportFrom) and node.module]
        for name in FILES
        if name.startswith(("gcpo/adapters/", "gcpo/scoring/", "gcpo/plugin.py"))
    }
    assert {
        name: found for name, modules in names.items() if (found := [m for m in modules if m.startswith(methods)])
    } == {}


def test_the_contracts_hold(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """``[tool.importlinter]`` of pyproject.toml."""
    cli = pytest.importorskip("importlinter.cli", reason="import-linter is not installed")
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    broken = cli.lint_imports(no_cache=True)
    assert not broken, capsys.readouterr().out
