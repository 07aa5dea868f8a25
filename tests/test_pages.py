"""The pages of the documentation that list what the code has: metrics, values of the papers, messages."""

from __future__ import annotations

import ast
import fnmatch
import functools
import re
from collections.abc import Iterable
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from data_prep.sets import SETS
from gcpo.methods import own_method_names
from gcpo.methods.gcpo.settings import GCPOConfig
from gcpo.selftraining.settings import SelfTrainingSettings
from tests.run_inputs import ROOT, composed
from tests.test_docs import metric_patterns, spread

# ---- metrics ---------------------------------------------------------------------------------------------------------


@functools.cache
def documented_metrics() -> frozenset[str]:
    """The first column of docs/metrics.md, with the names of all methods in the place of METHOD."""
    rows = re.findall(r"^\| (`[^|]*`) \| [^|]+ \| [^|]+ \| [^|]+ \|$", (ROOT / "docs" / "metrics.md").read_text(), re.M)
    names = {name for row in rows for text in re.findall(r"`([^`]+)`", row) for name in every_choice(text)}
    return frozenset(name.replace("METHOD", method) for name in names for method in own_method_names())


def every_choice(text: str) -> list[str]:
    """``spread`` until no braces are left."""
    found = spread(text)
    return found if found == [text] else [name for part in found for name in every_choice(part)]


def undocumented(names: Iterable[str]) -> set[str]:
    """The metrics of the methods among ``names`` that docs/metrics.md lacks."""
    own = tuple(f"{name}/" for name in (*own_method_names(), "stability"))
    return {name for name in names if name.startswith(own)} - documented_metrics()


def test_every_metric_of_the_source_has_a_row() -> None:
    """The names in the source, also those with parts that it fills in; tests of real runs compare what they log."""
    others = {f"gcpo/{name}" for name in SETS} | {"gcpo/upsilon", "gcpo/similarity"}  # data sets and prefixes
    assert not {name for name in {*metric_patterns()} - others if not fnmatch.filter(documented_metrics(), name)}


def test_every_row_is_a_metric() -> None:
    """A row without a name in the source is a mistake."""
    rows = documented_metrics()
    assert len(rows) > 120
    assert not {name for name in rows if not any(fnmatch.fnmatch(name, pattern) for pattern in metric_patterns())}


# ---- papers ----------------------------------------------------------------------------------------------------------

BLOCKS = re.findall(r"^## (\S+).*?^```yaml\n(# .*?)\n(.*?)^```", (ROOT / "docs" / "papers.md").read_text(), re.M | re.S)


def values_of(start: str, values: dict[str, Any]) -> dict[str, Any]:
    """The values that a run started as ``start`` says has for the settings of a block."""
    if start.startswith("# defaults of self-training"):
        settings = SelfTrainingSettings(model="m", train_file="a", test_file="b", max_response_tokens=8)
        return {key: OmegaConf.select(OmegaConf.create(settings.to_dict()), key) for key in values}
    match = re.match(r"# bash run_scripts/train.sh (\w+) --method (\w+)$", start)
    assert match, start
    config = composed("gcpo_trainer", f"experiment={match[1]}", f"method={match[2]}")
    if match[2] == "gcpo":  # its presets fill in values
        run = {"n": config.actor_rollout_ref.rollout.n, "response_length": config.data.max_response_length}
        config = OmegaConf.merge(config, {"gcpo": GCPOConfig.from_config(config.gcpo, **run).to_dict()})
    return {key: OmegaConf.select(config, key) for key in values}


@pytest.mark.parametrize(("paper", "start", "block"), BLOCKS, ids=[paper for paper, _, _ in BLOCKS])
def test_the_values_of_the_papers(paper: str, start: str, block: str) -> None:
    """Every value of a block is that of the run, and has its source above it."""
    values = yaml.safe_load(block)
    assert block.startswith("# ") and values_of(start, values) == values


def test_every_method_has_its_paper() -> None:
    """The table and the sections agree, and every method that can be chosen is there."""
    text = (ROOT / "docs" / "papers.md").read_text()
    assert len(BLOCKS) == len(re.findall(r"^## ", text, re.M)) == len(re.findall(r"^\| \[", text, re.M))
    for path in (ROOT / "gcpo" / "config" / "method").glob("*.yaml"):
        assert f"`method={path.stem}`" in text


# ---- messages --------------------------------------------------------------------------------------------------------


@functools.cache
def texts_of_the_source() -> str:
    """The texts of the package, the recipes and the scripts, a line each, with ``…`` where something is filled in."""
    texts = [path.read_text().replace("$", "…") for path in (ROOT / "run_scripts").glob("*.sh")]
    for folder in ("gcpo", "recipe"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                    texts.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(re.sub(r"%\w", "…", node.value))
    return "\n".join(text.replace("\n", " ") for text in texts)


def messages() -> list[str]:
    """The first column of docs/troubleshooting.md."""
    return re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.M)


@pytest.mark.parametrize("message", messages())
def test_the_messages_exist(message: str) -> None:
    """The parts of a message stand in one text of the source, in this order."""
    parts = [re.escape(part) for part in message.split("…")]
    assert re.search("…[^\n]{0,40}?".join(parts), texts_of_the_source()), message
