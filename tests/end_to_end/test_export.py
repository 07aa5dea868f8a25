"""The exported recipe needs nothing else of this repository: its imports, its style, and a run in a new environment."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from run_scripts.export_recipe import HEADER, METHODS, ROOT, RUFF, RULES, export, imports_of
from tests.processes import pip_setting, uv
from tests.run_inputs import composed
from tests.test_structure import imported, tree_of

COMES_ALONG = {
    *("flash_attn", "torch", "transformers", "vllm"),  # verl's environment, which differs between the platforms
    *("safetensors", "pydantic_core"),  # transformers and pydantic
    *("sympy", "latex2sympy2_extended"),  # math-verify
}
"""Imported packages that the packages of pyproject.toml need."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported folder, ``recipe/gcpo`` of a checkout that has nothing else."""
    folder = tmp_path_factory.mktemp("checkout") / "recipe" / "gcpo"
    export(folder)
    return folder


def module_of(name: str, folder: Path) -> tuple[str, ...]:
    """The longest beginning of a dotted name that is a module in ``folder``."""
    names = name.split(".")
    for end in range(len(names), 0, -1):
        path = folder.joinpath(*names[:end])
        if path.with_suffix(".py").is_file() or (path / "__init__.py").is_file():
            return tuple(names[:end])
    return ()


def left_out(path: Path, recipe: Path) -> set[str]:
    """Modules of this repository that an exported file imports or names, and that are not exported."""
    names = set(imports_of(path)) if path.suffix == ".py" else set()
    names |= set(re.findall(r"\bgcpo(?:\.[a-z]\w*)+", path.read_text()))
    return {name for name in names if module_of(name, ROOT) != module_of(name, recipe / "src")}


def sources(recipe: Path) -> Iterator[Path]:
    yield from (path for path in recipe.rglob("*") if path.suffix in (".py", ".yaml", ".sh", ".toml"))


def test_every_import_is_exported(recipe: Path, tmp_path: Path) -> None:
    """Inside of functions too, and the modules that a text names; a module that is left out would be found."""
    missing = {path.relative_to(recipe).as_posix(): left_out(path, recipe) for path in sources(recipe)}
    assert {path: names for path, names in missing.items() if names} == {}
    (tmp_path / "a.py").write_text("def f():\n    from gcpo.tools import cli\n    from tests import processes\n")
    assert left_out(tmp_path / "a.py", recipe) == {"gcpo.tools.cli", "gcpo.tools", "tests.processes"}


def test_what_is_left_out(recipe: Path) -> None:
    """The tools and the other methods stay here; the equations, their tests and the parts without imports go along."""
    assert {path.stem for path in (recipe / "src/gcpo/config/method").iterdir()} == set(METHODS)
    for name in (
        "tools",
        "selftraining",
        "methods/l2t",
        "config/gcpo_quickstart.yaml",
        "config/experiment/arithmetic.yaml",
    ):
        assert (ROOT / "gcpo" / name).exists() and not (recipe / "src/gcpo" / name).exists(), name
    for name in (
        "src/gcpo/plugin.py",
        "src/gcpo/cpu/patches.py",
        "src/gcpo/py.typed",
        "tests/algorithms/test_weighting.py",
    ):
        assert (recipe / name).is_file(), name
    assert not list(recipe.rglob("*.pyc"))


def test_paths_exist(recipe: Path) -> None:
    """Paths in the code, and paths and links of the README."""
    for path in sources(recipe):
        named = re.findall(r"\b(?:docs|run_scripts|requirements|examples|benchmarks)/[\w/]+\.\w+", path.read_text())
        assert [name for name in named if not (recipe / name).exists()] == [], path
    text = (recipe / "README.md").read_text()
    named = re.findall(
        r"`((?:src/|run_|main_|requirements)[\w./-]*)`|recipe/gcpo/([\w.-]+)|\]\(((?!http|#)[^)]+)\)", text
    )
    assert len(named) > 30
    assert [name for names in named for name in names if name and not (recipe / name).exists()] == []
    for page in (recipe / "docs").iterdir():
        links = re.findall(r"\]\(((?!http|#)[^)#]+)", page.read_text())
        assert [name for name in links if not (page.parent / name).exists()] == [], page


def test_every_file_has_the_licence(recipe: Path) -> None:
    """Where neither a shebang nor hydra's header comes behind it."""
    for path in sources(recipe):
        lines = path.read_text().splitlines()
        assert "\n".join(lines[lines[0].startswith(("#!", "# @package")) :]).startswith(HEADER.rstrip()), path
        assert not any(line.startswith(("#!", "# @package")) for line in lines[1:]), path


def test_the_style_of_verl_recipe(recipe: Path) -> None:
    """ruff with its rules, and its format."""
    for command in (["check", RULES], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *command, *RUFF, recipe.name]
        done = subprocess.run(ruff, cwd=recipe.parent, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_settings_of_the_readme_exist(recipe: Path) -> None:
    """Those with a value in its text and in its commands."""
    named = set(re.findall(r"(?<![\w./])((?:gcpo|gc2po|trainer)(?:\.\w+)+)", (recipe / "README.md").read_text()))
    assert {"gcpo.kappa", "gc2po.counterfactual", "trainer.test_freq"} <= named
    config = composed("gcpo_trainer", "method=gc2po")
    missing = object()
    assert [name for name in named if OmegaConf.select(config, name, default=missing) is missing] == []


def project(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "pyproject.toml").read_text())["project"]


def package_of(requirement: str) -> str:
    """The normal form of the name of a package."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\s\[<>=!~;]", requirement)[0]).lower()


def test_the_packages_are_named(recipe: Path) -> None:
    """Every package that is imported, with the versions and the entry points of this repository."""
    here, there = project(ROOT), project(recipe)
    assert set(there["dependencies"]) < set(here["dependencies"])
    assert set(there["optional-dependencies"]["test"]) < set(here["optional-dependencies"]["test"])
    assert there["entry-points"] == here["entry-points"]
    owners, known = packages_distributions(), {package_of(text) for text in there["dependencies"]}
    used = {name for path in (recipe / "src").rglob("*.py") for name in imported(tree_of(str(path)))}
    used -= {*sys.stdlib_module_names, *COMES_ALONG, "gcpo"}
    assert {name for name in used if not {package_of(owner) for owner in owners.get(name, ())} & known} == set()


def test_the_required_verl(recipe: Path) -> None:
    """One version in REQUIRED_VERL.txt, in pyproject.toml and in the lock, which is the one of this repository."""
    required = dict(
        line.split("=", 1) for line in (recipe / "REQUIRED_VERL.txt").read_text().splitlines() if line[0] != "#"
    )
    version = required["TAG"].removeprefix("v")
    assert required["MODE"] == "pinned_tag" and re.fullmatch(r"[0-9a-f]{40}", required["COMMIT"])
    assert f"verl=={version}" in project(recipe)["dependencies"]
    assert required["PIP_INSTALL"] == f"pip install verl=={version}"
    pins = (recipe / "requirements-cpu.txt").read_text().splitlines()[1:]
    assert f"verl=={version}" in pins
    assert pins == [line for line in (ROOT / "requirements/cpu.txt").read_text().splitlines() if line[0] != "#"]


def test_the_baseline_differs_in_the_method_only(recipe: Path, tmp_path: Path) -> None:
    """The three commands, with another program in the place of Python."""
    program = tmp_path / "python3"
    program.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TRAIN_FILE": "a b.parquet", "TEST_FILE": "c.parquet"}
    said = {
        method: subprocess.check_output(
            ["bash", f"recipe/gcpo/run_{method}.sh", "a=1"], cwd=recipe.parents[1], env=variables, text=True
        )
        for method in ("gcpo", "gc2po", "grpo")
    }
    assert "data.train_files=a b.parquet\n" in said["gcpo"] and said["gcpo"].endswith("\na=1\n")
    for method, text in said.items():
        assert text == said["gcpo"].replace("method=gcpo\n", f"method={method}\n"), method


def test_an_existing_folder_stays(recipe: Path) -> None:
    """Nothing is written over it."""
    with pytest.raises(FileExistsError):
        export(recipe)


@pytest.fixture(scope="module")
def environment(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the packages of the lock, and the recipe instead of this repository."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    # Ray gives its agent a limited time to start, in which a busy machine cannot compile all that the agent imports.
    options = ["--python", str(folder / "bin/python"), "--no-deps", "--compile-bytecode"]
    if not any(list(Path(link).glob("torch-*+cpu-*")) for link in pip_setting("find-links")):
        options.append("--torch-backend=cpu")
    uv("venv", "--python", sys.executable, str(folder))
    uv("pip", "install", *options, "-r", str(recipe / "requirements-cpu.txt"))
    uv("pip", "install", *options, "--no-build-isolation", str(recipe))
    return folder


@pytest.mark.slow
def test_two_steps_from_the_recipe(recipe: Path, environment: Path, inputs: Path, tmp_path: Path) -> None:
    """The script of the recipe trains in its environment, which has no other copy of the package."""
    metrics = tmp_path / "metrics.jsonl"
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")} | {
        "PATH": f"{environment / 'bin'}:{os.environ['PATH']}",
        "PYTHONWARNINGS": "ignore",
        "VERL_FILE_LOGGER_PATH": str(metrics),
        "TENSORBOARD_DIR": str(tmp_path / "tensorboard"),
        "MODEL_PATH": str(inputs / "model"),
        "TRAIN_FILE": str(inputs / "data/train.parquet"),
        "TEST_FILE": str(inputs / "data/test.parquet"),
    }
    # The wheel of TransferQueue has a folder `recipe` too.
    where = [environment / "bin/python", "-c", "import gcpo, recipe.gcpo; print(gcpo.__file__, *recipe.gcpo.__path__)"]
    package, folder = subprocess.check_output(where, cwd=recipe.parents[1], env=variables, text=True).split()
    assert Path(package).is_relative_to(environment) and Path(folder).samefile(recipe)
    command = ["bash", "recipe/gcpo/run_gcpo.sh", "size=tiny", "device=cpu", "gcpo.preset=balanced"]
    command += ["actor_rollout_ref.rollout.n=4", "trainer.save_freq=-1", "trainer.test_freq=-1"]
    command += [f"trainer.default_local_dir={tmp_path}/checkpoints", f"hydra.run.dir={tmp_path}/hydra"]
    done = subprocess.run(
        command, cwd=recipe.parents[1], env=variables, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2]
    for step in steps:
        assert step["data"]["gcpo/tokens/scored"] > 0 and step["data"]["gcpo/rollout/failed_groups"] == 0
        assert all(math.isfinite(value) for value in step["data"].values() if isinstance(value, float))
