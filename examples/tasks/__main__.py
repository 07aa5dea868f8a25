"""Makes a task: ``python -m examples.tasks TASK`` writes ``data/TASK`` and ``models/TASK-warm``.

What is there already, made by the same recipe, is left as it is.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from examples.arithmetic import task as arithmetic
from examples.arithmetic.task import PrepError
from examples.arithmetic.warm_start import make_once, warm_start
from examples.tasks.recipes import RECIPES, TASKS


def make(name: str, data: Path, model: Path) -> None:
    """Write the splits of a task into ``data`` and its warm-started model into ``model``.

    Raises:
        PrepError: a folder cannot be written or holds something else.
    """
    if name == "arithmetic":
        arithmetic.prepare(data)
        return warm_start(data, model)
    task = TASKS[name]()
    task.prepare(data)
    splits = task.splits()
    return make_once(model, RECIPES[name], task, lambda: {q.key for q in [*splits["test"], *splits["ood"]]})


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.tasks", description=__doc__)
    parser.add_argument("task", choices=["arithmetic", *TASKS])
    parser.add_argument("--data", type=Path, help="folder of the splits (default data/TASK)")
    parser.add_argument("--model", type=Path, help="folder of the model (default models/TASK-warm)")
    args = parser.parse_args(argv)
    data, model = args.data or Path("data", args.task), args.model or Path("models", f"{args.task}-warm")
    try:
        make(args.task, data, model)
    except PrepError as error:
        print(f"{args.task}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
