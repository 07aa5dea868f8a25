"""``gcpo show``: one group of a run in the terminal."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.console import Group as Lines
from rich.table import Table
from rich.text import Text

from gcpo.tools.groups.reading import Group, NoGroupsError, read_step, rollout_folder, steps_in
from gcpo.tools.groups.texts import shortened

SHOWN_CHARACTERS = 600
"""Characters of a text without ``--full``."""
COLUMNS = {"score": "reward", "grpo_advantage": "A", "upsilon": "Υ", "advantage": "B", "kappa_kl": "κ-KL"}
"""The keys of a response that are shown, and their names."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the group that the arguments name; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="gcpo show",
        description="Print one group: its responses with reward, A, Υ and B, and the auxiliary generations.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the --output of a run")
    parser.add_argument("--step", type=int, required=True, metavar="S", help="a step of the run")
    parser.add_argument(
        "--question", metavar="Q", help="its place in the data set (default: the first question with draws)"
    )
    parser.add_argument("--full", action="store_true", help="print long texts whole")

    options = parser.parse_args(arguments)
    try:
        folder = rollout_folder(options.run)
        groups, bad = read_step(folder, options.step)
        group = chosen(groups, folder, options.step, options.question)
    except (NoGroupsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if bad:
        print(f"warning: {bad} lines of step {options.step} are not readable and left out", file=sys.stderr)
    # In a pipe the table would be limited to 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False, markup=False, emoji=False)
    console.print(render(group, None if options.full else SHOWN_CHARACTERS))
    return 0


def chosen(groups: Sequence[Group], folder: Path, step: int, question: str | None) -> Group:
    """Return the group of a question, or the first one with draws.

    Raises:
        NoGroupsError: there is none.
    """
    if not groups:
        steps = steps_in(folder)
        raise NoGroupsError(f"{folder} has no step {step}; it has {listed(steps)}")
    if question is None:
        return next((group for group in groups if group.draws), groups[0])
    found = [group for group in groups if group.question == question]
    if not found:
        raise NoGroupsError(f"step {step} has no question {question}; it has {listed([g.question for g in groups])}")
    return found[0]


def listed(values: Sequence[Any]) -> str:
    """Return some values as a list in words."""
    shown = ", ".join(map(str, values[:20]))
    return f"{shown} and {len(values) - 20} more" if len(values) > 20 else shown


def render(group: Group, limit: int | None) -> Lines:
    """Return what is printed of a group."""
    head = Text(f"step {group.step}, question {group.question}, right answer ").append(
        "–" if group.truth is None else shortened(str(group.truth), limit)
    )
    parts: list[Any] = [head, Text(shortened(group.prompt.strip(), limit)), _responses(group, limit)]
    if any(line.get("episodes") for line in group.responses):
        parts.append(_episodes(group, limit))
    parts.append(_draws(group, limit) if group.draws else Text("The dump has no draws of this group."))
    return Lines(*parts)


def _table(title: str, *names: str) -> Table:
    table = Table(title=Text(title), show_lines=True, title_justify="left")
    for name in names:
        table.add_column(Text(name), overflow="fold", justify="left" if name in ("text", "prompt", "kind") else "right")
    return table


def _responses(group: Group, limit: int | None) -> Table:
    names = [name for name in COLUMNS if group.numbers(name)]
    table = _table("responses", "#", *(COLUMNS[name] for name in names), "text")
    for number, line in enumerate(group.responses):
        values = [_number(line.get(name)) for name in names]
        table.add_row(str(line.get("index", number)), *values, Text(shortened(str(line.get("output", "")), limit)))
    return table


def _episodes(group: Group, limit: int | None) -> Table:
    names = list(dict.fromkeys(key for _, episode in _all_episodes(group) for key in episode if key != "text"))
    table = _table("episodes", "#", *names, "text")
    for place, episode in _all_episodes(group):
        values = [_number(episode.get(name)) for name in names]
        table.add_row(place, *values, Text(shortened(str(episode.get("text", "")), limit)))
    return table


def _all_episodes(group: Group) -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"{number}.{k + 1}", episode)
        for number, line in enumerate(group.responses)
        for k, episode in enumerate(line.get("episodes") or ())
    ]


def _draws(group: Group, limit: int | None) -> Table:
    table = _table("auxiliary generations", "#", "kind", "without", "outcome", "reward", "prompt", "text")
    for number, line in enumerate(group.draws):
        left_out, blocks = line.get("left_out"), line.get("prompt") or ()
        table.add_row(
            str(line.get("draw", number)),
            Text(str(line.get("kind", ""))),
            "" if left_out is None else str(left_out),
            Text(str(line.get("outcome", ""))),
            _number(line.get("score")),
            Text(", ".join(map(str, blocks))),
            Text(shortened(str(line.get("output", "")), limit)),
        )
    return table


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else "–"
