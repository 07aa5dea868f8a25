"""The paper's Table 1 of any number of runs: rows are runs, columns are question sets, differences are to the first.

A difference is taken question by question, so that what the questions have in common falls out; it is outside the noise
where its 95 % interval leaves out 0.
"""

from __future__ import annotations

import csv
import io
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gcpo.tools.evaluate import EvaluationError
from gcpo.tools.evaluate.metrics import Interval, Question, Summary, interval, outside_noise, summarize
from gcpo.tools.evaluate.questions import TABLE_1, TITLES
from gcpo.tools.evaluate.run import read_results

AVERAGE = "average"


@dataclass(frozen=True)
class Cell:
    """What one run reaches on one set, or on average.

    Attributes:
        value: pass@1.
        difference: to the first run; ``None`` for the first run, and where it has not this set.
        outside: whether the difference is outside the noise; ``None`` where that can't be known, since the questions
            are not the same.
        summary: the other metrics; ``None`` for an average.
    """

    value: Interval
    difference: Interval | None = None
    outside: bool | None = None
    summary: Summary | None = None


@dataclass(frozen=True)
class Table:
    """Cells by run and column; a run has no cell for a set that it was not evaluated on."""

    runs: list[str]
    columns: list[str]
    cells: dict[tuple[str, str], Cell]
    averaged: int
    """How many sets the average is taken over."""

    def title(self, column: str) -> str:
        """What a column is called."""
        if column == AVERAGE:
            return "Avg." if self.averaged == len(TABLE_1) else f"Avg. of {self.averaged}"
        return TITLES.get(column, column)

    def best(self, column: str) -> float:
        """The highest value of a column."""
        return max(self.cells[run, column].value.mean for run in self.runs if (run, column) in self.cells)


def parse_runs(arguments: Sequence[str]) -> dict[str, Path]:
    """Folders by the name of their run: ``NAME=DIR``, or ``DIR``, which is called by as much of its path as it takes.

    Raises:
        EvaluationError: two runs have the same name.
    """
    given: list[tuple[str, Path]] = []
    for argument in arguments:
        name, separator, folder = argument.partition("=")
        named = separator and name and not Path(argument).is_dir()
        given.append((name, Path(folder)) if named else ("", Path(argument)))
    runs: dict[str, Path] = {}
    for index, (name, path) in enumerate(given):
        others = [other.resolve() for at, (_, other) in enumerate(given) if at != index]
        name = name or _short_name(path.resolve(), others)
        if name in runs:
            raise EvaluationError(f"two runs are called {name}; name them: NAME={path}")
        runs[name] = path
    return runs


def _short_name(path: Path, others: Sequence[Path]) -> str:
    """The shortest end of the path that no other path has."""
    for length in range(1, len(path.parts)):
        if not any(other.parts[-length:] == path.parts[-length:] for other in others):
            return "/".join(path.parts[-length:])
    return path.name


def load(runs: Mapping[str, Path]) -> Table:
    """The table of these runs.

    Raises:
        EvaluationError: a folder holds no results.
    """
    return make_table({name: read_results(folder) for name, folder in runs.items()})


def make_table(results: Mapping[str, Mapping[str, Sequence[Question]]]) -> Table:
    """The table of what runs found, by run and set."""
    names = {name for found in results.values() for name in found}
    columns = [name for name in TITLES if name in names] + sorted(names - TITLES.keys())
    averaged = [name for name in TABLE_1 if all(name in found for found in results.values())]
    if len(averaged) > 1:
        last = max(columns.index(name) for name in columns if name in TABLE_1)
        columns.insert(last + 1, AVERAGE)
    base, cells = None, {}
    for run, found in results.items():
        for name, questions in found.items():
            summary = summarize(questions)
            against = base.get(name) if base is not None else None
            difference, outside = _compare([questions], [against]) if against else (None, None)
            cells[run, name] = Cell(summary.pass_at_1, difference, outside, summary)
        if AVERAGE in columns:
            own = [found[name] for name in averaged]
            difference, outside = _compare(own, [base[name] for name in averaged]) if base is not None else (None, None)
            cells[run, AVERAGE] = Cell(_average(own), difference, outside)
        base = found if base is None else base
    return Table(list(results), columns, cells, len(averaged))


def _average(sets: Sequence[Sequence[Question]]) -> Interval:
    found = interval(*([question.accuracy for question in questions] for questions in sets))
    if found.low == found.high:  # all right or all wrong everywhere: no spread to tell from
        return Interval(found.mean, math.nan, math.nan)
    return found


def _compare(sets: Sequence[Sequence[Question]], base: Sequence[Sequence[Question]]) -> tuple[Interval, bool | None]:
    """The difference of the (average) pass@1, and whether it is outside the noise."""
    differences = []
    for questions, others in zip(sets, base, strict=True):
        known = {question.id: question.accuracy for question in others}
        if known.keys() != {question.id for question in questions}:
            mean = _average(sets).mean - _average(base).mean
            return Interval(mean, math.nan, math.nan), None
        differences.append([question.accuracy - known[question.id] for question in questions])
    found = interval(*differences)
    return found, outside_noise(found, sum(map(len, differences)))


# ---- what is shown -------------------------------------------------------------------------------------------------


def _percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None or math.isnan(value) else f"{100 * value:.{digits}f}"


def _cell_text(cell: Cell | None) -> str:
    if cell is None:
        return "–"
    text = _percent(cell.value.mean)
    if not math.isnan(cell.value.low):
        text += f" ±{_percent(cell.value.reach)}"
    if cell.difference is not None:
        mark = {True: "†", False: "", None: "?"}[cell.outside]
        text += f" ({100 * cell.difference.mean:+.1f}{mark})"
    return text


def _main_rows(table: Table, strong: tuple[str, str]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the main table; the best value of a column stands between the marks ``strong``."""
    rows = []
    for run in table.runs:
        row = [run]
        for column in table.columns:
            cell = table.cells.get((run, column))
            text = _cell_text(cell)
            if cell is not None and len(table.runs) > 1 and cell.value.mean == table.best(column):
                text = f"{strong[0]}{text}{strong[1]}"
            row.append(text)
        rows.append(row)
    return ["run", *map(table.title, table.columns)], rows


def _detail_rows(table: Table) -> tuple[list[str], list[list[str]]]:
    header = ["run", "set", "questions", "n", "pass@1", "95 %", "pass@n", "maj@n", "cut", "tokens", "format"]
    rows = []
    for column in table.columns:
        for run in table.runs:
            cell = table.cells.get((run, column))
            if cell is None or cell.summary is None:
                continue
            summary = cell.summary
            rows.append(
                [
                    run,
                    table.title(column),
                    f"{summary.questions:,}",
                    str(summary.samples),
                    _percent(cell.value.mean),
                    f"{_percent(cell.value.low)} to {_percent(cell.value.high)}",
                    _percent(summary.pass_at[summary.samples]),
                    _percent(summary.majority),
                    _percent(summary.truncated),
                    f"{summary.tokens:,.0f}",
                    _percent(summary.formatted),
                ]
            )
    return header, rows


def _notes(table: Table) -> list[str]:
    notes = [
        "pass@1 in %, the mean over n samples a question; ± to the farther end of its 95 % interval over questions"
    ]
    if len(table.runs) > 1:
        notes.append(f"in brackets: difference to {table.runs[0]}, taken question by question; † outside the noise")
    if any(cell.difference is not None and cell.outside is None for cell in table.cells.values()):
        notes.append("?: the questions are not the same, so nothing is known about the noise")
    if AVERAGE in table.columns and table.averaged < len(TABLE_1):
        there = [table.title(name) for name in TABLE_1 if all((run, name) in table.cells for run in table.runs)]
        notes.append(f"the average is over {', '.join(there)}, which all runs have")
    notes.append("cut: share of the samples that reached the token limit; format: share in the format of training")
    return notes


def markdown(table: Table) -> str:
    """Both tables in markdown."""

    def lines(header: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> list[str]:
        align = ["---"] * left + ["---:"] * (len(header) - left)
        # A bar would end the cell.
        return [f"| {' | '.join(one.replace('|', chr(92) + '|') for one in row)} |" for row in [header, align, *rows]]

    main, details = _main_rows(table, ("**", "**")), _detail_rows(table)
    notes = [f"- {note}" for note in _notes(table)]
    return "\n".join([*lines(*main, 1), "", *lines(*details, 2), "", *notes]) + "\n"


def comma_separated(table: Table) -> str:
    """One line per run and set with all metrics; shares and accuracies are between 0 and 1."""
    ks = sorted({k for cell in table.cells.values() if cell.summary for k in cell.summary.pass_at})
    names = ["run", "set", "questions", "samples", "pass@1", "pass@1_low", "pass@1_high"]
    names += ["difference", "difference_low", "difference_high", "outside_noise"]
    names += [f"pass@{k}" for k in ks if k > 1] + ["maj", "truncated", "tokens", "format"]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, names, lineterminator="\n", restval="")
    writer.writeheader()
    for run in table.runs:
        for column in table.columns:
            cell = table.cells.get((run, column))
            if cell is None:
                continue
            row = {"run": run, "set": column, **_columns("pass@1", cell.value)}
            if cell.difference is not None:
                row |= _columns("difference", cell.difference)
                row["outside_noise"] = {True: "yes", False: "no", None: ""}[cell.outside]
            if summary := cell.summary:
                row |= {"questions": summary.questions, "samples": summary.samples}
                row |= {f"pass@{k}": _number(value) for k, value in summary.pass_at.items() if k > 1}
                row |= {"maj": _number(summary.majority), "truncated": _number(summary.truncated)}
                row |= {"tokens": f"{summary.tokens:.1f}", "format": _number(summary.formatted)}
            writer.writerow(row)
    return stream.getvalue()


def _columns(name: str, value: Interval) -> dict[str, str]:
    return {name: _number(value.mean), f"{name}_low": _number(value.low), f"{name}_high": _number(value.high)}


def _number(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.6f}"


def show(table: Table) -> None:
    """Print both tables to the terminal."""
    from rich.console import Console
    from rich.table import Table as RichTable

    # Piped into a file they would be squeezed into 80 columns.
    width = None if sys.stdout.isatty() else max(140, 30 + 22 * len(table.columns))
    console = Console(width=width, highlight=False)
    for title, (header, rows), left in (
        ("pass@1, %", _main_rows(table, ("[bold]", "[/bold]")), 1),
        ("details, %", _detail_rows(table), 2),
    ):
        rich = RichTable(title=title)
        for index, name in enumerate(header):
            rich.add_column(name, justify="left" if index < left else "right")
        for row in rows:
            rich.add_row(*row)
        console.print(rich)
    for note in _notes(table):
        console.print(note, markup=False)
