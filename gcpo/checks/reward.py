"""Checks that the reward function exists, has valid options, and can grade the data."""

from __future__ import annotations

import ast
import importlib.util
import logging
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from gcpo.checks.data import Table
from gcpo.reading import OUR_REWARD, first_line, get, group
from gcpo.settings import ConfigError

logger = logging.getLogger(__name__)

KEY = "reward.custom_reward_function"
_OPTIONS = f"{KEY}.reward_kwargs"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_switch(value: Any) -> bool:
    return isinstance(value, bool)


OPTIONS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "format_weight": (lambda value: _is_number(value) and 0 <= value <= 1, "a number from 0 to 1"),
    "require_think": (_is_switch, "True or False"),
    "require_boxed": (_is_switch, "True or False"),
    "sandbox": (lambda value: isinstance(value, str) and bool(value), "the name of a sandbox, for example auto"),
    "sandbox_fusion_url": (
        lambda value: value is None or isinstance(value, str) and value.startswith(("http://", "https://")),
        "a URL that begins with http:// or https://, or null",
    ),
    "time_limit": (lambda value: _is_number(value) and value > 0, "a number of seconds greater than 0"),
    "memory_limit_mb": (lambda value: _is_number(value) and value >= 1, "a number of MiB of at least 1"),
}
"""The options of ``gcpo.rewards``: the test of a value, and the description of valid values."""


def check_reward(config: DictConfig, tables: Iterable[Table]) -> None:
    """Check that the reward function exists, its options have valid values, and programs can be run.

    Args:
        config: the run's configuration.
        tables: the local data files; programs among them need a sandbox.

    Raises:
        ConfigError: a check fails.
    """
    path = get(config, f"{KEY}.path")
    if path is None:
        return
    check_function(path, get(config, f"{KEY}.name"))
    if path != OUR_REWARD:
        return
    url = get(config, "reward.sandbox_fusion.url")
    if url is not None:
        raise ConfigError(
            f"reward.sandbox_fusion.url is {url!r}: it is read by verl's own reward function and not by {OUR_REWARD}; "
            f"set reward.sandbox_fusion.url=null ++{_OPTIONS}.sandbox_fusion_url={url}"
        )
    options = group(config, _OPTIONS)
    _check_options(options)
    if _check_rows(tables):
        _check_sandbox(options)


def _check_options(options: dict[str, Any]) -> None:
    for name, value in options.items():
        if name not in OPTIONS:
            raise ConfigError(f"{_OPTIONS}.{name} is no option of {OUR_REWARD}; it has {', '.join(OPTIONS)}")
        accepts, kind = OPTIONS[name]
        if not accepts(value):
            raise ConfigError(f"{_OPTIONS}.{name} is {value!r}; it must be {kind}")


def _check_rows(tables: Iterable[Table]) -> bool:
    """Check that every row has a grader that can read its ground truth; whether there are programs among the rows."""
    from gcpo.rewards import grader_of, problem_of

    programs = False
    for table in tables:
        for row, (source, entry) in enumerate(zip(table.sources, table.truths, strict=True)):
            truth = entry["ground_truth"]
            problem = problem_of(source, truth)
            if problem is not None:
                raise ConfigError(f"{KEY}: row {row} of {table.file} cannot be graded: {problem}")
            programs = programs or grader_of(source, truth) == "code"
    return programs


def _check_sandbox(options: dict[str, Any]) -> None:
    from gcpo.rewards.sandbox import SandboxError, check

    settings = {name: options[name] for name in ("sandbox", "sandbox_fusion_url") if name in options}
    try:
        logger.info("gcpo: programs are graded in the sandbox %s", check(**settings))
    except (SandboxError, ValueError) as error:
        raise ConfigError(f"{_OPTIONS}: {error}") from error


# ---- location of the function ----------------------------------------------------------------------------------------


def check_function(path: Any, name: Any) -> None:
    """Check that the module exists and defines the function. The module's code is read and not run.

    Args:
        path: a file, ``file://...`` or ``pkg://module``, as for verl.
        name: the name of the function.

    Raises:
        ConfigError: there is no such module or function, or it is not Python.
    """
    if not isinstance(path, str) or not path.strip():
        raise ConfigError(f"{KEY}.path is {path!r}; it must be a Python file or pkg://module")
    if not isinstance(name, str) or not name.isidentifier():
        raise ConfigError(f"{KEY}.name is {name!r}; it must be the name of a function")
    file = _module_file(path)
    if file is None:
        return
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, ValueError, SyntaxError) as error:
        raise ConfigError(f"{KEY}.path: {path} is no Python file that can be read ({first_line(error)})") from error
    names = _defined(tree.body)
    if name not in names and not names & {"*", "__getattr__"}:
        raise ConfigError(f"{KEY}.name: {path} defines no {name}; it defines {_some(names)}")


def _module_file(path: str) -> Path | None:
    """Return the file of the module, or ``None`` if it is not Python source."""
    if not path.startswith("pkg://"):
        file = Path(path.removeprefix("file://"))
        if not file.is_file():
            raise ConfigError(f"{KEY}.path: there is no file {path}")
        return file
    module = path.removeprefix("pkg://").replace("/", ".")
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError) as error:
        raise ConfigError(f"{KEY}.path: the module {module} cannot be imported ({first_line(error)})") from error
    if spec is None:
        raise ConfigError(f"{KEY}.path: there is no module {module}")
    return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None


def _defined(statements: Iterable[ast.stmt]) -> set[str]:
    """Return the names that a module has after these statements, including branches."""
    names: set[str] = set()
    for statement in statements:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(statement.name)
        elif isinstance(statement, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in statement.names}
        else:
            names |= {node.id for node in ast.walk(statement)
                      if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}  # fmt: skip
            nested = [child for child in ast.iter_child_nodes(statement) if isinstance(child, ast.stmt)]
            names |= _defined(nested)
            for handler in getattr(statement, "handlers", []):
                names |= _defined(handler.body)
    return names


def _some(names: set[str]) -> str:
    public = sorted(name for name in names if not name.startswith("_"))
    return ", ".join(public[:8]) + (", ..." if len(public) > 8 else "") if public else "nothing"
