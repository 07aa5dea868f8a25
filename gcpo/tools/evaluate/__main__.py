"""``python -m gcpo.tools.evaluate run MODEL`` and ``python -m gcpo.tools.evaluate table RUN...``."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gcpo.tools.evaluate import EvaluationError
from gcpo.tools.evaluate.questions import TABLE_1, TITLES
from gcpo.tools.evaluate.run import Settings

SAMPLING = {
    "samples": "samples of every question",
    "temperature": "0 is greedy",
    "top_p": "smallest set of tokens with this probability",
    "max_tokens": "of a response",
    "seed": "of the samples",
}
"""Options that are the fields of `Settings`."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m gcpo.tools.evaluate", description="Evaluate models and compare them."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="sample a model, grade the samples, and show the table of this run")
    run.add_argument("model", metavar="MODEL", help="folder, checkpoint (global_step_N), or name on the hub")
    sets = f"of {', '.join(TITLES)}, or parquet files (default: %(default)s)"
    run.add_argument("--sets", default=",".join(TABLE_1), metavar="A,B,...", help=sets)
    for field, text in SAMPLING.items():
        default = getattr(Settings, field)
        option = f"--{field.replace('_', '-')}"
        run.add_argument(option, type=type(default), default=default, help=f"{text} (%(default)s)")
    run.add_argument("--limit", type=int, metavar="N", help="the first N questions of every set (default: all)")
    run.add_argument("--gpus", type=int, default=1, metavar="N", help="that the model is spread over (%(default)s)")
    run.add_argument("--sandbox", default="auto", help="for programs: auto, bubblewrap or fusion (%(default)s)")
    run.add_argument("--sandbox-fusion-url", metavar="URL", help="of SandboxFusion's run_code")
    run.add_argument("--output", type=Path, metavar="DIR", help="default: outputs/evaluation/NAME_OF_THE_MODEL")

    table = commands.add_parser("table", help="show runs side by side, with differences to the first")
    table.add_argument("runs", nargs="+", metavar="RUN", help="the --output of an evaluation, or NAME=DIR")
    table.add_argument("--format", choices=("terminal", "markdown", "csv"), default="terminal")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Evaluate, and show the table of this run."""
    from gcpo.tools.evaluate.models import find_model
    from gcpo.tools.evaluate.questions import load_sets
    from gcpo.tools.evaluate.run import evaluate
    from gcpo.tools.evaluate.sampling import Sampler, make_prompts, vllm_sampler
    from gcpo.tools.evaluate.table import make_table, show

    settings = Settings(**{name: getattr(options, name) for name in SAMPLING})
    for name, value in (("limit", options.limit), ("gpus", options.gpus)):
        if value is not None and value < 1:
            raise EvaluationError(f"--{name} is {value}; it must be 1 or more")
    sets = load_sets([name for name in options.sets.split(",") if name], options.limit)
    model = find_model(options.model, say=lambda line: print(line, flush=True))
    prompts = make_prompts(model, sets)
    rooms = {question: prompts.room(question, settings.max_tokens) for question in prompts.ids}
    if min(rooms.values()) < settings.max_tokens:
        print(
            f"note: the model's context is {prompts.context:,} tokens, so a response ends after "
            f"{min(rooms.values()):,} to {max(rooms.values()):,} tokens and not after {settings.max_tokens:,}"
        )
    output = options.output or Path("outputs/evaluation") / model.name

    def start(log: Path) -> Sampler:
        longest = max(len(ids) + rooms[question] for question, ids in prompts.ids.items())
        sampling = {"temperature": settings.temperature, "top_p": settings.top_p}
        return vllm_sampler(model, log, **sampling, max_model_len=longest, tensor_parallel_size=options.gpus)

    if options.sandbox_fusion_url:
        from gcpo.adapters import fusion  # noqa: F401  (imports verl, which takes seconds)
    sandbox = {"sandbox": options.sandbox, "sandbox_fusion_url": options.sandbox_fusion_url}
    results = evaluate(model, sets, prompts, settings, output, start, sandbox)
    show(make_table({output.name: results}))
    print(f"samples: {output}")


def table(options: argparse.Namespace) -> None:
    """Show the table of several runs."""
    from gcpo.tools.evaluate.table import comma_separated, load, markdown, parse_runs, show

    found = load(parse_runs(options.runs))
    if options.format == "terminal":
        show(found)
    else:
        print({"markdown": markdown, "csv": comma_separated}[options.format](found), end="")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    options = parse(arguments)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        {"run": run, "table": table}[options.command](options)
    except EvaluationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on with the samples that are missing", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


if __name__ == "__main__":
    sys.exit(main())
