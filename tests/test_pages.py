"""The pages of the documentation that list what the code has: metrics."""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Iterable

from data_prep.sets import SETS
from gcpo.methods import own_method_names
from tests.run_inputs import ROOT
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
