"""The tables of the documentation that follow from the code."""

from __future__ import annotations

from typing import Annotated, Literal

import pytest
from pydantic import Field

from gcpo.adapters.schema import all_fields
from gcpo.methods import own_method_names
from gcpo.methods.gcpo.settings import GCPOSettings
from gcpo.settings import Settings, Switch
from gcpo.tools import reference
from tests.run_inputs import ROOT


def test_the_page_of_the_configuration() -> None:
    """``python -m gcpo.tools.reference configuration`` writes it, and every setting has a meaning."""
    written = reference.configuration()
    assert (ROOT / "docs" / "configuration.md").read_text().endswith(f"\n\n{written}")
    assert "|  |" not in written
    for name in own_method_names():
        assert f"\n## `{name}`\n" in f"\n{written}"
    assert all(f"| `gcpo.blocks.{name}` |" in written for name in GCPOSettings().blocks.to_dict())


def test_the_table_of_batch_fields() -> None:
    """``python -m gcpo.tools.reference batch_fields`` writes it."""
    own = [field for field in all_fields() if not str(field).startswith("confidence")]
    assert reference.batch_fields(own) in (ROOT / "docs" / "batch_fields.md").read_text()


class Inner(Settings):
    """A group.

    More about it."""

    share: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Of ``a|b``."""


class Other(Inner):
    """Another."""

    share: Annotated[float, Field(ge=0, lt=1)] | None = 0.5


class Outer(Settings):
    """A run."""

    name: str
    mark: str = "\n"
    kind: Literal["one", "two"] = "one"
    on: Switch = False
    parts: list[str] = []
    inner: Inner = Inner()
    other: Other = Other()


@pytest.mark.parametrize(
    "row",
    [
        "| `x.name` | text | – |  |",
        r'| `x.mark` | text | `"\n"` |  |',
        "| `x.kind` | `one`, `two` | `one` |  |",
        "| `x.on` | `True`, `False` | `False` |  |",
        "| `x.parts` | list of texts | `[]` |  |",
        "### `x.inner`\n\nA group.\n\n| setting |",
        r"| `x.inner.share` | number ≥ 0 and < 1, `null` | `null` | Of `a\|b`. |",
        r"| `x.other.share` | number ≥ 0 and < 1, `null` | `0.5` | Of `a\|b`. |",
    ],
)
def test_a_row(row: str) -> None:
    """Values, defaults and meanings of every kind of setting; a changed default keeps the meaning."""
    assert row in reference.settings_tables(Outer, "x")
