"""The page of ``gcpo report``: one HTML file without server and network, in which no output of a model is executed."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gcpo.files import write_atomically
from gcpo.tools.groups.reading import Group, NoGroupsError, read_groups, rollout_folder
from gcpo.tools.groups.texts import safe, visible

MAX_GROUPS = 1000
MAX_BYTES = 100 * 2**20
"""Bounds on the groups of a page, so that a browser opens it at once."""
_KEYS_OF_THE_GROUP = ("input", "gts", "step", "group", "question", "uid", "padding")
_FOLDER = Path(__file__).parent


def write_page(path: Path, runs: Mapping[str, Path], table: Sequence[Mapping[str, str]], curves: bytes | None) -> str:
    """Write the page and return a sentence about its groups.

    Args:
        path: the HTML file.
        runs: folders of the runs by their names.
        table: one row per run, values by the heading of their column.
        curves: an SVG image, or ``None``.

    Raises:
        OSError: the page cannot be written.
    """
    groups, notes = [], []
    for name, folder in runs.items():
        try:
            found = list(read_groups(rollout_folder(folder), MAX_GROUPS // len(runs), MAX_BYTES // len(runs)))
        except NoGroupsError as error:
            notes.append(str(error))
            continue
        groups += [as_json(name, group) for group in found]
    write_atomically(path, render_page(list(runs), table, groups, notes, curves))
    return "; ".join([f"{len(groups)} groups", *notes])


def as_json(run: str, group: Group) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the row of a group in the table, and its details, which the page reads when they are shown."""
    row = {
        "run": visible(run),
        "step": group.step,
        "question": group.question,
        "upsilon_spread": group.upsilon_spread,
        "disagreement": group.disagreement,
        "reward": group.reward,
        "draws": len(group.draws),
    }
    details = {
        "prompt": group.prompt,
        "truth": group.truth,
        "responses": [_shown(line) for line in group.responses],
        "draws": [_shown(line) for line in group.draws],
    }
    return row, details


def _shown(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line without the keys that the group has, and without a block that is the whole output."""
    left_out = {*_KEYS_OF_THE_GROUP, *(["block"] if line.get("block") == line.get("output") else [])}
    return {key: value for key, value in line.items() if key not in left_out}


def render_page(
    runs: Sequence[str],
    table: Sequence[Mapping[str, str]],
    groups: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
    notes: Sequence[str] = (),
    curves: bytes | None = None,
) -> str:
    """Return the page as HTML; see `write_page`, and `as_json` for ``groups``.

    The texts are data: the template escapes them, the script sets them with ``textContent``, and the policy of the page
    admits only its own script and style, by their hashes.
    """
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    script, style = ((_FOLDER / name).read_text(encoding="utf-8") for name in ("page.js", "page.css"))
    return environment.from_string((_FOLDER / "page.html.jinja").read_text(encoding="utf-8")).render(
        title=safe(", ".join(runs)),
        table=safe([dict(row) for row in table]),
        rows=[row for row, _ in groups],
        details=[details for _, details in groups],
        notes=safe(list(notes)),
        curves=base64.b64encode(curves).decode() if curves else None,
        script=script,
        style=style,
        hashes={"script": _digest(script), "style": _digest(style)},
    )


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
