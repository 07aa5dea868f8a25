"""The documents name only what exists: paths, settings, metrics, Python names, and commands with their options."""

from __future__ import annotations

import argparse
import fnmatch
import functools
import importlib
import importlib.util
import itertools
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from data_prep.sets import SETS
from gcpo.checks.overrides import dotted_keys
from gcpo.checks.reward import OPTIONS
from gcpo.methods import method_class, own_method_names
from gcpo.methods.gcpo.settings import GCPOSettings
from recipe.rest_mcts.__main__ import read_settings
from tests.golden.runs import RUNS
from tests.run_inputs import ROOT, composed, with_overrides
from tests.test_scripts import Sandbox

DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
FOLDERS = ("gcpo", "docs", "tests", "run_scripts", "benchmarks", "data_prep", "examples", "recipe", "requirements")
TRAINING = ("recipe.gcpo.main_gcpo", "verl.trainer.main_ppo")
SYSTEM = ("kill", "truncate", "rm", "mount", "source", "pip", "git")
"""Programs whose arguments are not ours."""
VERL_GROUPS = ("actor_rollout_ref", "algorithm", "critic", "data", "trainer", "reward", "skip", "distillation")
NOT_IN_YAML = ("actor_rollout_ref.rollout.repetition_penalty", "reward.custom_reward_function.reward_kwargs")
"""Settings that vLLM and verl read although verl's yaml does not have them."""


def code_of(document: Path) -> tuple[list[str], list[str]]:
    """Inline code, and the text of the fenced blocks in bash."""
    inline: list[str] = []
    bash: list[str] = []
    for token in MarkdownIt().enable("table").parse(document.read_text()):
        if token.type == "fence" and token.info.strip() == "bash":
            bash.append(token.content)
        inline += [child.content for child in token.children or () if child.type == "code_inline"]
    return inline, bash


def by_document(found: dict[Path, list[Any]]) -> list[Any]:
    """Parameters of a test with the name of the document in the id."""
    return [
        pytest.param(item, id=f"{document.name}-{item}")
        for document, items in found.items()
        for item in dict.fromkeys(items)
    ]


def spread(text: str) -> list[str]:
    """``a.{b,c}`` is ``a.b`` and ``a.c``."""
    parts = re.split(r"\{([^{}]*,[^{}]*)\}", text)
    return ["".join(choice) for choice in itertools.product(*(part.split(",") for part in parts))]


# ---- paths and links -------------------------------------------------------------------------------------------------


@functools.cache
def metric_patterns() -> tuple[str, ...]:
    """Names of metrics in the source, with ``*`` where the source fills something in."""
    source = "\n".join(path.read_text() for path in (ROOT / "gcpo").rglob("*.py"))
    names = set(re.findall(rf'f?"((?:{"|".join(own_method_names())}|stability)/[^"\s]+)"', source))
    names |= {f"{name}/{{kind}}" for name in re.findall(r'_distribution\("([^"]+)"', source)}
    adapters = "\n".join(path.read_text() for path in (ROOT / "gcpo" / "adapters").glob("*.py"))
    of_the_method = re.findall(r'f"\{(?:self\.method\.name|self\.method_name|name)\}/([^"\s]+)"', adapters)
    names |= {f"{method}/{name}" for method in own_method_names() for name in of_the_method}
    return tuple(re.sub(r"\{[^{}]*\}", "*", name) for name in names)


def is_metric(name: str) -> bool:
    """Whether the source has a metric of that name; ``*`` and a trailing ``…`` in it stand for anything."""
    wanted = name.replace("…", "*")
    return any(fnmatch.fnmatch(wanted, pattern) or fnmatch.fnmatch(pattern, wanted) for pattern in metric_patterns())


@functools.cache
def file_names() -> frozenset[str]:
    """Names of all files of the repository without their folders."""
    return frozenset(p.name for f in FOLDERS for p in (ROOT / f).rglob("*")) | {p.name for p in ROOT.iterdir()}


def paths(document: Path) -> list[str]:
    """Inline code that looks like a path of the repository."""
    folders = "|".join(FOLDERS)
    return [
        path
        for text in code_of(document)[0]
        for path in spread(text)
        if re.fullmatch(rf"(?:{folders})/[\w./*…-]*|[\w.-]+\.(?:py|sh|md|yaml)", path) and "NAME" not in path
    ]


@pytest.mark.parametrize("path", by_document({document: paths(document) for document in DOCUMENTS}))
def test_paths_exist(path: str) -> None:
    """A path is a file, a folder or a pattern of files; a name with slashes can also be a metric."""
    exists = bool(list(ROOT.glob(path.rstrip("/")))) or is_metric(path)
    assert exists or ("/" not in path and path in file_names()), path


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_links_lead_somewhere(document: Path) -> None:
    """Relative links and images."""
    for target in re.findall(r"\]\(([^)#\s]+)", document.read_text()):
        assert target.startswith("http") or (document.parent / target).exists(), target


# ---- dotted names ----------------------------------------------------------------------------------------------------


@functools.cache
def settings() -> frozenset[str]:
    """All settings and groups of settings by their dotted names, also those of the methods from their group."""
    keys: set[str] = set()
    methods = [composed("gcpo_trainer", f"method={name}") for name in own_method_names()]
    for config in (composed("gcpo_trainer", "device=cpu"), composed("verl"), *methods):
        for key in dotted_keys(config):
            names = key.split(".")
            keys |= {".".join(names[:end]) for end in range(1, len(names) + 1)}
    own = tuple(f"{name}." for name in own_method_names())
    keys |= {key.split(".", 1)[1] for key in keys if key.startswith(own) and key.count(".") > 1}
    return frozenset(keys)


def imports(name: str) -> bool:
    """Whether a module, or an attribute of one, has that dotted name."""
    for end in range(name.count(".") + 1, 0, -1):
        names = name.split(".")
        try:
            found: Any = importlib.import_module(".".join(names[:end]))
            for attribute in names[end:]:
                found = getattr(found, attribute)
        except (ImportError, AttributeError):
            continue
        return True
    return False


def former(name: str) -> str | None:
    """The sentence that refuses a setting of an earlier version."""
    method, _, key = name.partition(".")
    if method in own_method_names() and key:
        return method_class(method).settings_class.former(method, key)
    return GCPOSettings.former("gcpo", name)


def dotted_names(document: Path) -> list[str]:
    """Inline code that looks like a setting or a Python name of this project."""
    groups = "|".join([*own_method_names(), *VERL_GROUPS, *GCPOSettings.model_fields])
    return [
        name
        for text in code_of(document)[0]
        for whole in text.split()
        for name in spread(re.split(r"[=:(]", whole.lstrip("+"))[0])
        if re.fullmatch(rf"(?:{groups})\.[\w.]+(?:\*)?", name)
        and not name.endswith((".py", ".md", ".yaml", ".pt"))
        and not (document.name == "CHANGELOG.md" and former(name))
    ]


@pytest.mark.parametrize("name", by_document({document: dotted_names(document) for document in DOCUMENTS}))
def test_dotted_names_exist(name: str) -> None:
    """A dotted name is a setting, an option of our reward function, or it can be imported."""
    group, _, option = name.removesuffix(".*").rpartition(".")
    if group.endswith("reward_kwargs"):
        assert option in OPTIONS
        return
    assert name.removesuffix(".*") in settings() or name in NOT_IN_YAML or imports(name), name


def test_the_changelog_gives_the_new_names() -> None:
    """Its table says the same as the refusals."""
    rows = re.findall(r"\| `([\w.]+)`.*? \| `([\w.]+)`", (ROOT / "CHANGELOG.md").read_text())
    assert len(rows) == 10
    for old, new in rows:
        assert (former(old) or "").endswith(f"new name: write {new if new.startswith('gc2po') else f'gcpo.{new}'}")


# ---- commands --------------------------------------------------------------------------------------------------------


def commands(document: Path) -> Iterator[str]:
    """The commands of the blocks in bash and of the inline code, without comments."""
    inline, bash = code_of(document)
    for block in bash:
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield shlex.join(words)
    yield from (
        text for text in inline if re.match(r"(?:\w+=\S+ )*(?:bash|python -m|gcpo (?:compare \w|cost|doctor))", text)
    )


class Parsed(Exception):
    """The arguments of a command were parsed; nothing after that is wanted."""


def parse(monkeypatch: pytest.MonkeyPatch, module: str, arguments: list[str]) -> tuple[Any, list[str]]:
    """What a module's own parser makes of ``arguments``; the module runs no further.

    Raises:
        SystemExit: it refuses them.
    """
    originals = {name: getattr(argparse.ArgumentParser, name) for name in ("parse_args", "parse_known_args")}

    def stopping(name: str) -> Any:
        def parse_and_stop(self: argparse.ArgumentParser, *given: Any, **named: Any) -> None:
            for other, original in originals.items():
                monkeypatch.setattr(argparse.ArgumentParser, other, original)
            result = originals[name](self, *given, **named)
            raise Parsed(*(result if isinstance(result, tuple) else (result, [])))

        return parse_and_stop

    for name in originals:
        monkeypatch.setattr(argparse.ArgumentParser, name, stopping(name))
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(Parsed) as stopped:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    options, rest = stopped.value.args
    return options, rest


def compose_run(arguments: list[str]) -> None:
    """Compose what hydra is given; a setting that does not exist is an error of hydra."""
    names = {"--config-name": "gcpo_trainer", "--config-path": ""}
    while arguments and arguments[0] in names:
        names[arguments[0]], arguments = arguments[1], arguments[2:]
    ours = [text for text in arguments if not text.startswith("hydra.")]
    assert all("=" in text for text in ours), arguments
    groups = [text for text in ours if text.startswith(("experiment=", "device=", "size=", "method="))]
    with_overrides(composed(names["--config-name"], *groups), *(text for text in ours if text not in groups))


def check_python(monkeypatch: pytest.MonkeyPatch, module: str, arguments: list[str]) -> None:
    """The arguments of ``python -m module`` are known to it."""
    if module == "tests.golden":
        assert arguments[0] in ("renew", "check") and set(arguments[1:]) <= {*RUNS, "NAME"}
    elif module in TRAINING:
        at = next(i for i, text in enumerate([*arguments, "--config-name"]) if text.startswith("--"))
        compose_run([*arguments[at:], *arguments[:at]])
    elif module == "pytest":
        assert importlib.util.find_spec(module)
    else:
        options, rest = parse(monkeypatch, module, arguments)
        if module == "data_prep":
            assert options.set is None or options.set in {*SETS, "SET"}
        if module == "recipe.rest_mcts":
            read_settings(options.config, options.overrides)
        # `gcpo report` and `gcpo show` have parsers of their own.
        command = getattr(options, "command", None)
        if module == "gcpo.tools.cli" and command == "cost":
            compose_run(["--config-name", options.config_name or "gcpo_trainer", *rest])
        else:
            assert not rest
        if module == "gcpo.tools.cli" and command == "compare":
            assert (ROOT / options.experiment).is_file() and (ROOT / (options.against or "")).exists()


def check_script(monkeypatch: pytest.MonkeyPatch, box: Sandbox, script: str, arguments: list[str]) -> None:
    """The script takes the arguments, and so does the Python module that it starts."""
    assert (ROOT / script).is_file()
    if script in ("run_scripts/setup.sh", "requirements/lock.sh"):
        assert all(argument in (ROOT / script).read_text() for argument in arguments)
        return
    if script == "run_scripts/lint.sh":
        assert all(re.search(rf"^{name}\(\)", (ROOT / script).read_text(), re.M) for name in arguments)
        return
    trains = Path(script).stem not in ("test", "evaluate", "export_recipe", "gpu_smoke")
    done = box.run(Path(script).name, *arguments, *(["--dry-run"] if trains and "--help" not in arguments else []))
    assert done.returncode == 0, done.stderr
    if "--help" not in arguments:
        _, module, *given = shlex.split(box.calls[-1])
        given = [text for text in given if text not in ("--cfg", "job", "--resolve")]
        check_python(monkeypatch, module, given)


@pytest.fixture
def box(tmp_path: Path) -> Sandbox:
    """A machine without a GPU, with a stand-in for Python."""
    box = Sandbox(tmp_path)
    box.gpus(0)
    return box


@pytest.mark.parametrize("command", by_document({document: list(commands(document)) for document in DOCUMENTS}))
def test_commands_are_accepted(command: str, monkeypatch: pytest.MonkeyPatch, box: Sandbox) -> None:
    """Every command that a document shows, as far as its arguments go; tests of their own run the programs."""
    words = shlex.split(command)
    while re.match(r"\w+=", words[0]):
        words = words[1:]
    if words[0] == "bash":
        check_script(monkeypatch, box, words[1], words[2:])
    elif words[:2] == ["python", "-m"]:
        check_python(monkeypatch, words[2], words[3:])
    elif words[0] == "gcpo":
        check_python(monkeypatch, "gcpo.tools.cli", words[1:])
    elif words[:2] == ["python", "-c"]:
        compile(words[2], "command", "exec")
    else:
        assert words[0] in SYSTEM, command


def test_a_wrong_option_is_found(monkeypatch: pytest.MonkeyPatch, box: Sandbox) -> None:
    """The checks above can fail."""
    with pytest.raises(SystemExit):
        check_python(monkeypatch, "benchmarks.learning", ["--method", "nothing", "--no-such-option"])
    with pytest.raises(Exception, match="no_such_setting"):
        check_python(monkeypatch, "verl.trainer.main_ppo", ["gcpo.no_such_setting=1"])
    with pytest.raises(AssertionError, match="unknown option"):
        check_script(monkeypatch, box, "run_scripts/quickstart.sh", ["--no-such-option", "1"])
