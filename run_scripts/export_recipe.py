"""Assemble ``OUT/gcpo``, the recipe as verl-recipe takes it; ``run_scripts/export_recipe.sh`` calls this module.

The imports decide which parts of ``gcpo`` go along: all that the entry points and the methods of the recipe reach.
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECIPE = "recipe/gcpo"
"""The files that belong to the exported folder only, and the entry point."""
METHODS = ("gc2po", "gcpo", "grpo")
"""The configurations of ``gcpo/config/method`` that are exported."""
ENTRIES = ("gcpo.plugin", "gcpo.cpu")
"""Parts that verl and vLLM load by their entry points, which no import shows."""
TESTS = ("tests/algorithms", "tests/collider", "tests/methods/gc2po", "tests/methods/gcpo", "tests/scoring")
"""Tests to export, without those that need another part of the repository or a fixture of ``tests/conftest.py``."""
OURS = ("benchmarks", "data_prep", "examples", "gcpo", "recipe", "run_scripts", "tests")
HEADER = "# SPDX-FileCopyrightText: The gcpo developers\n# SPDX-License-Identifier: Apache-2.0\n"
RUFF = [
    *("--isolated", "--line-length=120", "--target-version=py310"),
    *("--config", 'lint.isort.known-first-party=["verl"]'),
]
"""The style of verl-recipe."""
RULES = "--select=E,F,UP,B,I,G"
NOTE = "*A page of gcpo's documentation. The paths and commands that it names belong to the whole package.*\n\n"


@cache
def imports_of(path: Path) -> frozenset[str]:
    """Return the dotted names that a module of this repository imports, inside of functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(name for name in names if name.partition(".")[0] in OURS)


def part_of(name: str) -> Path:
    """Return the part of ``gcpo`` that goes along as a whole if the module ``name`` does, relative to ``ROOT``.

    A part is a module or a package directly in ``gcpo``, or a method. ``gcpo.methods`` itself is the modules in it.
    """
    names = name.split(".")
    if names[1] == "methods" and (ROOT / "gcpo" / Path(*names[1:3]) / "__init__.py").is_file():
        return Path("gcpo", *names[1:3])
    for found in (Path("gcpo", names[1]), Path("gcpo", f"{names[1]}.py")):
        if (ROOT / found).exists():
            return found
    return Path("gcpo", "__init__.py")


def files_of(part: Path) -> Iterator[Path]:
    """Yield the files of a part."""
    if (ROOT / part).is_file():
        yield ROOT / part
    elif part == Path("gcpo", "methods"):
        yield from (ROOT / part).glob("*.py")
    else:
        yield from (path for path in (ROOT / part).rglob("*") if path.is_file() and path.suffix != ".pyc")


@cache
def parts() -> frozenset[Path]:
    """Return the parts of ``gcpo`` that the recipe reaches."""
    methods = [f"gcpo.methods.{name}" for name in METHODS if (ROOT / "gcpo" / "methods" / name).is_dir()]
    todo = [part_of(name) for name in (*imports_of(ROOT / RECIPE / "main_gcpo.py"), *ENTRIES, *methods)]
    found = {Path("gcpo", "__init__.py"), Path("gcpo", "py.typed")}
    while todo:
        part = todo.pop()
        if part not in found:
            found.add(part)
            modules = [path for path in files_of(part) if path.suffix == ".py"]
            todo += [part_of(name) for path in modules for name in imports_of(path)]
    return frozenset(found)


def is_exported(path: Path) -> bool:
    """Return whether a file of an exported part goes along: no yaml of another method or of data made elsewhere."""
    configuration = ROOT / "gcpo" / "config"
    experiments = [p for p in (configuration / "experiment").glob("*.yaml") if "train_files:" not in p.read_text()]
    if path.is_relative_to(configuration / "method"):
        return path.stem in METHODS
    if path.is_relative_to(configuration / "experiment"):
        return path in experiments
    if path.is_relative_to(configuration / "method_on"):
        return path.stem in {f"{experiment.stem}_{method}" for experiment in experiments for method in METHODS}
    return path.name != "gcpo_quickstart.yaml"


def source_files() -> list[Path]:
    """Return the files of ``gcpo`` that are exported."""
    return sorted(path for part in parts() for path in files_of(part) if is_exported(path))


def test_files() -> list[Path]:
    """Return the tests that run with the exported files alone."""
    fixtures = {
        node.name
        for node in ast.parse((ROOT / "tests" / "conftest.py").read_text()).body
        if isinstance(node, ast.FunctionDef)
    }

    def runs(path: Path) -> bool:
        arguments = {node.arg for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.arg)}
        outside = [name for name in imports_of(path) if not name.startswith("gcpo.") or part_of(name) not in parts()]
        return not outside and not arguments & fixtures

    modules = [path for name in TESTS for path in [ROOT / name, *(ROOT / name).rglob("*.py")] if path.suffix == ".py"]
    return sorted(path for path in modules if runs(path))


def with_header(path: Path) -> str:
    """Return the text of a file with the licence, after a shebang or hydra's ``@package``, which come first."""
    text = path.read_text()
    if path.suffix not in (".py", ".sh", ".yaml", ".toml"):
        return text
    first, line, rest = text.partition("\n")
    return f"{first}{line}{HEADER}{rest}" if first.startswith(("#!", "# @package")) else HEADER + text


def page(document: Path, names: set[str]) -> str:
    """Return a page of the documentation with links to other exported pages only; other links become plain text."""
    keep = lambda link: link[0] if link[2].startswith("http") or link[2] in names else link[1]  # noqa: E731
    title, _, rest = document.read_text().partition("\n\n")
    return f"{title}\n\n{NOTE}" + re.sub(r"!?\[([^]]*)\]\(([^)#\s]+)[^)\s]*\)", keep, rest)


def export(folder: Path) -> None:
    """Write the recipe to ``folder``.

    Raises:
        FileExistsError: ``folder`` exists.
    """
    folder.mkdir(parents=True)
    recipe = [path for path in (ROOT / RECIPE).iterdir() if path.is_file()]
    files = {path.relative_to(ROOT / RECIPE): with_header(path) for path in recipe}
    files |= {Path("src") / path.relative_to(ROOT): with_header(path) for path in source_files()}
    files |= {path.relative_to(ROOT): with_header(path) for path in test_files()}
    packages = {folder for path in files if path.parts[0] == "tests" for folder in path.parents} - {Path()}
    files |= {folder / "__init__.py": HEADER for folder in packages}
    pins = (ROOT / "requirements" / "cpu.txt").read_text().splitlines(keepends=True)
    files[Path("requirements-cpu.txt")] = (
        "# Every package for a machine without a GPU (Linux on x86-64, Python 3.11 or 3.12). Install with --no-deps.\n"
        + "".join(line for line in pins if not line.startswith("#"))
    )
    named = {name for text in files.values() for name in re.findall(r"docs/(\w+\.md)", text)}
    files |= {Path("docs", name): page(ROOT / "docs" / name, named) for name in named}
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
        (folder / path).chmod(0o755 if path.suffix == ".sh" else 0o644)
    for command in (["check", "--quiet", "--fix", "--select=I"], ["format", "--quiet"]):
        subprocess.run([sys.executable, "-m", "ruff", *command, *RUFF, folder.name], cwd=folder.parent, check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out / "gcpo"
    try:
        export(out)
    except FileExistsError:
        sys.exit(f"error: {out} exists; give another folder")
    print(f"the recipe is in {out}")
