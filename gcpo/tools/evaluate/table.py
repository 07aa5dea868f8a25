"""The paper's Table 1 of any number of runs: rows are runs, columns are question sets, differences are to the first.

A difference is taken question by question, so that what the questions have in common falls out; it is outside the noise
where its 95 % interval leaves out 0.
"""

from __future__ import annotations

import csv
import io
import math
import sys
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gcpo.tools.evaluate import EvaluationError
from gcpo.tools.evaluate.metrics import (
    AggregateSummary,
    Interval,
    Question,
    Summary,
    interval,
    outside_noise,
    summarize,
    summarize_aggregates,
)
from gcpo.tools.evaluate.questions import TABLE_1, TITLES
from gcpo.tools.evaluate.results import Results, read_results
from gcpo.tools.report import short_names

AVERAGE = "average"
LEVELS = {"single": "mean", "aggregated": "aggregated", "majority": "majority", "oracle": "oracle"}
"""Columns of the aggregated answers by the field of `AggregateSummary`."""
DIFFERENCES = {"over_single": "aggregated − mean", "over_majority": "aggregated − majority"}
Rows = list[list[str]]


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
    """Cells by run and column; a run has no cell for a set that it was not evaluated on.

    Attributes:
        averaged: the sets that the average is taken over.
        aggregates: results of the aggregated answers, by run, set and K.
    """

    runs: list[str]
    columns: list[str]
    cells: dict[tuple[str, str], Cell]
    averaged: list[str]
    aggregates: dict[tuple[str, str, int], AggregateSummary] = field(default_factory=dict)

    def title(self, column: str) -> str:
        """What a column is called."""
        if column == AVERAGE:
            return "Avg." if len(self.averaged) == len(TABLE_1) else f"Avg. of {len(self.averaged)}"
        return TITLES.get(column, column)

    def best(self, column: str) -> float:
        """The highest value of a column."""
        return max(cell.value.mean for (_, name), cell in self.cells.items() if name == column)


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
    for (name, path), short in zip(given, short_names([path for _, path in given]), strict=True):
        if (name or short) in runs:
            raise EvaluationError(f"two runs are called {name or short}; name them: NAME={path}")
        runs[name or short] = path
    return runs


def load(runs: Mapping[str, Path]) -> Table:
    """The table of these runs.

    Raises:
        EvaluationError: a folder holds no results.
    """
    return table_of({name: read_results(folder) for name, folder in runs.items()})


def table_of(results: Mapping[str, Results]) -> Table:
    """Return the table of these results."""
    table = make_table({run: found.questions for run, found in results.items()})
    for run, found in results.items():
        for name in filter(found.aggregates.__contains__, table.columns):
            for size, questions in sorted(found.aggregates[name].items()):
                table.aggregates[run, name, size] = summarize_aggregates(questions)
    return table


def make_table(results: Mapping[str, Mapping[str, Sequence[Question]]]) -> Table:
    """Return the table of the samples, by run and set, without aggregated answers."""
    names = {name for found in results.values() for name in found}
    columns = [name for name in TITLES if name in names] + sorted(names - TITLES.keys())
    averaged = [name for name in TABLE_1 if all(name in found for found in results.values())]
    if len(averaged) > 1:
        columns.insert(max(columns.index(name) for name in columns if name in TABLE_1) + 1, AVERAGE)
    base: Mapping[str, Sequence[Question]] = {}
    cells: dict[tuple[str, str], Cell] = {}
    for run, found in results.items():
        for name, questions in found.items():
            summary = summarize(questions)
            difference, outside = _compare([questions], [base[name]]) if name in base else (None, None)
            cells[run, name] = Cell(summary.pass_at_1, difference, outside, summary)
        if AVERAGE in columns:
            own = [found[name] for name in averaged]
            difference, outside = _compare(own, [base[name] for name in averaged]) if base else (None, None)
            cells[run, AVERAGE] = Cell(_average(own), difference, outside)
        base = base or found
    return Table(list(results), columns, cells, averaged)


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
            return Interval(_average(sets).mean - _average(base).mean, math.nan, math.nan), None
        differences.append([question.accuracy - known[question.id] for question in questions])
    found = interval(*differences)
    return found, outside_noise(found, sum(map(len, differences)))


# ---- what is shown -------------------------------------------------------------------------------------------------


def _percent(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{100 * value:.1f}"


def _cell_text(cell: Cell | None) -> str:
    if cell is None:
        return "–"
    text = _value_text(cell.value)
    if cell.difference is not None:
        mark = {True: "†", False: "", None: "?"}[cell.outside]
        text += f" ({100 * cell.difference.mean:+.1f}{mark})"
    return text


def _main_rows(table: Table, before: str, after: str) -> Rows:
    """Header and rows of the main table; the best value of a column stands between two marks."""
    rows = [["run", *map(table.title, table.columns)]]
    for run in table.runs:
        cells = [table.cells.get((run, column)) for column in table.columns]
        best = [
            cell is not None and len(table.runs) > 1 and cell.value.mean == table.best(column)
            for column, cell in zip(table.columns, cells, strict=True)
        ]
        texts = map(_cell_text, cells)
        rows.append([run, *(f"{before}{text}{after}" if b else text for b, text in zip(best, texts, strict=True))])
    return rows


def _detail_rows(table: Table) -> Rows:
    rows = [["run", "set", "questions", "n", "pass@1", "95 %", "pass@n", "maj@n", "cut", "tokens", "format"]]
    for column in table.columns:
        for run in table.runs:
            cell = table.cells.get((run, column))
            if cell is None or cell.summary is None:
                continue
            found, value = cell.summary, cell.value
            numbers = [found.pass_at[found.samples], found.majority, found.truncated]
            rows.append(
                [
                    *(run, table.title(column), f"{found.questions:,}", str(found.samples), _percent(value.mean)),
                    f"{_percent(value.low)} to {_percent(value.high)}",
                    *map(_percent, numbers),
                    f"{found.tokens:,.0f}",
                    _percent(found.formatted),
                ]
            )
    return rows


def _aggregate_rows(table: Table) -> Rows:
    """Return the header and the rows of the table of the aggregated answers."""
    rows = [["run", "set", "questions", "K", "groups", *LEVELS.values(), *DIFFERENCES.values()]]
    for (run, name, size), found in table.aggregates.items():
        levels = [_value_text(getattr(found, key)) for key in LEVELS]
        differences = [_difference_text(getattr(found, key), found.questions) for key in DIFFERENCES]
        rows.append(
            [run, table.title(name), f"{found.questions:,}", str(size), str(found.groups), *levels, *differences]
        )
    return rows


def _value_text(value: Interval | None) -> str:
    if value is None:
        return "–"
    return _percent(value.mean) + ("" if math.isnan(value.low) else f" ±{_percent(value.reach)}")


def _difference_text(value: Interval | None, count: int) -> str:
    if value is None:
        return "–"
    reach = "" if math.isnan(value.low) else f" ±{_percent(value.reach)}"
    return f"{100 * value.mean:+.1f}{reach}{'†' * outside_noise(value, count)}"


def _notes(table: Table) -> list[str]:
    notes = [
        "pass@1 in %, the mean over n samples a question; ± to the farther end of its 95 % interval over questions"
    ]
    if len(table.runs) > 1:
        notes.append(f"in brackets: difference to {table.runs[0]}, taken question by question; † outside the noise")
    if any(cell.difference is not None and cell.outside is None for cell in table.cells.values()):
        notes.append("?: the questions are not the same, so nothing is known about the noise")
    if AVERAGE in table.columns and len(table.averaged) < len(TABLE_1):
        notes.append(f"the average is over {', '.join(map(table.title, table.averaged))}, which all runs have")
    if table.aggregates:
        notes.append(
            "aggregated: the answer after K samples in the prompt; mean, majority and oracle: of the same K samples; "
            "± to the farther end of the 95 % interval over questions; † outside the noise"
        )
    notes.append(
        "cut: fraction of the samples that reached the token limit; format: fraction in the format of training"
    )
    return notes


def _tables(table: Table, before: str, after: str) -> list[tuple[str, Rows, int]]:
    """Return title, rows and number of left-aligned columns of every table."""
    tables = [("pass@1, %", _main_rows(table, before, after), 1), ("details, %", _detail_rows(table), 2)]
    return tables + [("aggregated answers, %", _aggregate_rows(table), 2)] * bool(table.aggregates)


def markdown(table: Table) -> str:
    """All tables in markdown."""
    lines: list[str] = []
    for _, (header, *rows), left in _tables(table, "**", "**"):
        align = ["---"] * left + ["---:"] * (len(header) - left)
        # A bar would end the cell.
        lines += [f"| {' | '.join(one.replace('|', chr(92) + '|') for one in row)} |" for row in (header, align, *rows)]
        lines.append("")
    return "\n".join([*lines, *(f"- {note}" for note in _notes(table))]) + "\n"


def comma_separated(table: Table) -> str:
    """One line per run and set with all metrics; fractions and accuracies are between 0 and 1."""
    ks = sorted({k for cell in table.cells.values() if cell.summary for k in cell.summary.pass_at if k > 1})
    names = ["run", "set", "questions", "samples", "pass@1", "pass@1_low", "pass@1_high"]
    names += ["difference", "difference_low", "difference_high", "outside_noise"]
    names += [f"pass@{k}" for k in ks] + ["maj", "truncated", "tokens", "format"]
    aggregates = {key: _aggregate_fields(key[2], found) for key, found in table.aggregates.items()}
    names += dict.fromkeys(name for fields in aggregates.values() for name in fields)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, names, lineterminator="\n", restval="")
    writer.writeheader()
    for run in table.runs:
        for column in table.columns:
            if cell := table.cells.get((run, column)):
                own = [fields for (*place, _), fields in aggregates.items() if place == [run, column]]
                writer.writerow({"run": run, "set": column, **_fields(cell), **ChainMap(*own)})
    return stream.getvalue()


def _aggregate_fields(size: int, found: AggregateSummary) -> dict[str, str]:
    """Return the numbers of the aggregated answers for the CSV."""
    texts = {f"K={size}_groups": str(found.groups)}
    for key in (*LEVELS, *DIFFERENCES):
        value = getattr(found, key)
        parts = {"": value.mean, "_low": value.low, "_high": value.high} if value else {}
        texts |= {f"K={size}_{key}{end}": "" if math.isnan(part) else f"{part:.6f}" for end, part in parts.items()}
    return texts


def _fields(cell: Cell) -> dict[str, str]:
    """The numbers of a cell for the CSV."""
    numbers: dict[str, float | None] = {}
    for name, value in (("pass@1", cell.value), ("difference", cell.difference)):
        if value is not None:
            numbers |= {name: value.mean, f"{name}_low": value.low, f"{name}_high": value.high}
    texts: dict[str, str] = {}
    if cell.difference is not None:
        texts["outside_noise"] = {True: "yes", False: "no", None: ""}[cell.outside]
    if found := cell.summary:
        texts |= {"questions": str(found.questions), "samples": str(found.samples), "tokens": f"{found.tokens:.1f}"}
        numbers |= {f"pass@{k}": value for k, value in found.pass_at.items() if k > 1}
        numbers |= {"maj": found.majority, "truncated": found.truncated, "format": found.formatted}
    given = {name: value for name, value in numbers.items() if value is not None and not math.isnan(value)}
    return texts | {name: f"{value:.6f}" for name, value in given.items()}


def show(table: Table) -> None:
    """Print all tables to the terminal."""
    from rich.console import Console
    from rich.table import Table as RichTable

    # Piped into a file they would be squeezed into 80 columns.
    width = None if sys.stdout.isatty() else max(140, 30 + 22 * len(table.columns))
    console = Console(width=width, highlight=False)
    for title, (header, *rows), left in _tables(table, "[bold]", "[/bold]"):
        rich = RichTable(title=title)
        for index, name in enumerate(header):
            rich.add_column(name, justify="left" if index < left else "right")
        for row in rows:
            rich.add_row(*row)
        console.print(rich)
    for note in _notes(table):
        console.print(note, markup=False)
