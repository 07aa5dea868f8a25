"""``python -m data_prep SET``: prepare a data set; ``python -m data_prep --list``: list them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from data_prep.core import SEED, Prepared, prepare
from data_prep.decontamination import EvaluationSets, load_sets
from data_prep.output import is_prepared
from data_prep.schema import PROVENANCE, DataError, DataSet
from data_prep.sets import SETS, find_set
from gcpo.rewards import GraderError


def show_list() -> None:
    """Print one line per set."""
    for kind, title in (("train", "to train on"), ("eval", "to evaluate on")):
        print(f"{title}:")
        for dataset in SETS.values():
            if dataset.kind == kind:
                usual = dataset.hubs[0].name if dataset.hubs else "needs --source"
                print(f"  {dataset.name:<16} {dataset.title} [{usual}]")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep", description="Prepare a data set: verl's parquet schema and a provenance file."
    )
    parser.add_argument("set", nargs="?", metavar="SET", help="what to prepare; --list names all")
    parser.add_argument("--list", action="store_true", help="show the sets and exit")
    parser.add_argument(
        "--source", nargs="+", default=[], metavar="PATH_OR_ID", help="files, a folder, or a data set of the hub"
    )
    parser.add_argument("--revision", help="of the data set of the hub (default: the newest)")
    parser.add_argument(
        "--data", type=Path, default=Path("data"), metavar="DIR", help="where sets are prepared (%(default)s)"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder of this set (default: DATA/SET)")
    parser.add_argument(
        "--examples", nargs="+", default=[], metavar="PATH_OR_ID", help="few-shot examples: MBPP (humaneval_5shot)"
    )
    parser.add_argument("--rows", type=int, metavar="N", help="draw so many rows at random (numinamath: 4000)")
    parser.add_argument("--seed", type=int, default=SEED, help="of the draw (%(default)s)")
    parser.add_argument(
        "--against",
        nargs="+",
        default=["auto"],
        metavar="SET_OR_FILE",
        help="what must not be trained on (default: all evaluation sets that are prepared in DATA); none: nothing",
    )
    parser.add_argument(
        "--is-prepared", type=Path, metavar="FILE", help="exit with 0 if FILE is in verl's schema, else with 1"
    )
    options = parser.parse_args(arguments)
    if not options.list and options.is_prepared is None and options.set is None:
        parser.error("which set? --list names all")
    if options.rows is not None and options.rows < 1:
        parser.error(f"--rows is {options.rows}; it must be at least 1")
    return options


def run(options: argparse.Namespace) -> None:
    """Prepare one set and print the result."""
    dataset = find_set(options.set)
    output = options.output or options.data / dataset.name
    prepared = prepare(
        dataset,
        output,
        options.source,
        revision=options.revision,
        rows=options.rows,
        seed=options.seed,
        evaluation=evaluation_sets(options, dataset) if dataset.kind == "train" else None,
        examples=options.examples,
        say=lambda line: print(line, flush=True),
    )
    if dataset.rows and prepared.read not in dataset.rows and not options.rows:
        known = " or ".join(map(str, dataset.rows))
        print(f"note: {dataset.name} is known with {known} rows, this source has {prepared.read}", file=sys.stderr)
    show_result(output, prepared)


def evaluation_sets(options: argparse.Namespace, dataset: DataSet) -> EvaluationSets:
    """Return the problems that are excluded from training."""
    sets = load_sets(options.against, [one.name for one in SETS.values() if one.kind == "eval"], options.data)
    if sets.origin:
        print(f"compared with: {', '.join(one['set'] for one in sets.origin)}")
    elif options.against != ["none"]:
        note = f"note: no evaluation set is prepared in {options.data}, so {dataset.name} is compared with none"
        print(note, file=sys.stderr)
    return sets


def show_result(output: Path, prepared: Prepared) -> None:
    """Print the counts and the reasons."""
    counts = {"to train on": len(prepared.train), "to evaluate on": len(prepared.test)}
    print(f"{output}: " + ", ".join(f"{count} rows {purpose}" for purpose, count in counts.items() if count))
    for word, reasons in (("dropped", prepared.dropped), ("kept", prepared.noted)):
        for reason, rows in reasons.items():
            print(f"{word}: {len(rows)} × {reason}")
    for name in prepared.changed:
        print(f"note: {output / name} is not what it was before", file=sys.stderr)
    if prepared.dropped or prepared.noted:
        print(f"which rows: {output / PROVENANCE}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code."""
    options = parse(arguments)
    if options.list:
        show_list()
        return 0
    if options.is_prepared is not None:
        return 0 if is_prepared(options.is_prepared) else 1
    try:
        run(options)
    except (DataError, GraderError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
