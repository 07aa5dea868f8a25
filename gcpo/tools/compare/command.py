"""The command ``gcpo compare``."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from gcpo.files import lock, why, write_atomically
from gcpo.settings import ConfigError
from gcpo.tools.compare.execution import execute, make_missing
from gcpo.tools.compare.figures import save_figures
from gcpo.tools.compare.results import Results, load
from gcpo.tools.compare.runs import ResultsError, plan
from gcpo.tools.compare.settings import Comparison
from gcpo.tools.compare.tables import Tables, agreement
from gcpo.tools.display import say


def compare(options: argparse.Namespace) -> int:
    """Run what is missing and write the tables and figures; returns an exit code."""
    try:
        comparison = Comparison.load(options.experiment, quick=options.quick)
        if not options.tables_only:
            make_missing(comparison.tasks)
        runs, output = plan(comparison), Path(comparison.output)
        other = Comparison.load(options.against, quick=options.quick) if options.against else None
        if not options.tables_only:
            with lock(output, lambda: say(f"another gcpo compare runs in {output}; waiting for its end")):
                execute(runs, options.jobs if comparison.trainer == "one_file" else 1, retry=options.retry_failed)
        results = load(runs)
        words = ["gcpo", "compare", str(options.experiment), *(["--quick"] if options.quick else [])]
        write(comparison, results, shlex.join(words), (other, load(plan(other))) if other else None)
    except (ConfigError, ResultsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or 'a file'} can't be written or read: {why(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on, and --tables-only shows what is there", file=sys.stderr)
        return 130
    return 1 if (results.runs["state"] == "failed").any() else 0


def write(
    comparison: Comparison, results: Results, command: str, other: tuple[Comparison, Results] | None = None
) -> None:
    """Write tables, figures and csv files into the output, and say where they are."""
    output = Path(comparison.output)
    text = Tables(comparison, results, command).text()
    if other:
        text += f"\n{agreement((comparison, other[0]), (results, other[1]))}\n"
    for path in save_figures(comparison, results, output):
        text += f"\n![{path.stem.replace('_', ' ')}]({path.name})\n"
    write_atomically(output / "comparison.md", text)
    write_atomically(output / "runs.csv", results.runs.to_csv(index=False))
    write_atomically(output / "curves.csv", results.curves.to_csv(index=False))
    say(text)
    say(f"tables: {output / 'comparison.md'}; all numbers: {output / 'runs.csv'}, {output / 'curves.csv'}")
