"""``gcpo evaluate MODEL``, ``gcpo evaluate table RUN...`` and ``gcpo evaluate inspect RUN...``."""

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


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options; settings of the blocks are in ``overrides``."""
    if arguments[:1] == ["table"]:
        parser = argparse.ArgumentParser(
            prog="gcpo evaluate table", description="Show runs side by side, with differences to the first."
        )
        parser.set_defaults(command=table)
        parser.add_argument("runs", nargs="+", metavar="RUN", help="the --output of an evaluation, or NAME=DIR")
        parser.add_argument("--format", choices=("terminal", "markdown", "csv"), default="terminal")
        return parser.parse_args(arguments[1:])
    if arguments[:1] == ["inspect"]:
        parser = argparse.ArgumentParser(
            prog="gcpo evaluate inspect", description="Write the samples of runs as logs that `inspect view` shows."
        )
        parser.set_defaults(command=inspect)
        parser.add_argument("runs", nargs="+", metavar="RUN", help="the --output of an evaluation, or NAME=DIR")
        parser.add_argument("--sets", default="", metavar="A,B,...", help="as in the evaluation (default: all of its)")
        return parser.parse_args(arguments[1:])
    parser = argparse.ArgumentParser(
        prog="gcpo evaluate",
        description="Sample a model, grade the samples, and show the table of this run.",
        epilog="gcpo evaluate table RUN... compares runs; gcpo evaluate inspect RUN... writes logs of Inspect.",
    )
    parser.set_defaults(command=run)
    parser.add_argument("model", metavar="MODEL", help="folder, checkpoint (global_step_N), or name on the hub")
    sets = f"of {', '.join(TITLES)}, or parquet files (default: %(default)s)"
    parser.add_argument("--sets", default=",".join(TABLE_1), metavar="A,B,...", help=sets)
    for field, text in SAMPLING.items():
        default = getattr(Settings, field)
        option = f"--{field.replace('_', '-')}"
        parser.add_argument(option, type=type(default), default=default, help=f"{text} (%(default)s)")
    aggregate = "put K samples of a question into a prompt and answer again; takes gcpo.blocks.KEY=VALUE of training"
    parser.add_argument("--aggregate", type=int, metavar="K", help=aggregate)
    parser.add_argument("--limit", type=int, metavar="N", help="the first N questions of every set (default: all)")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="that the model is spread over (%(default)s)")
    parser.add_argument("--sandbox", default="auto", help="for programs: auto, bubblewrap or fusion (%(default)s)")
    parser.add_argument("--sandbox-fusion-url", metavar="URL", help="of SandboxFusion's run_code")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: outputs/evaluation/NAME_OF_THE_MODEL")
    options, options.overrides = parser.parse_known_args(arguments)
    unknown = [text for text in options.overrides if text.startswith("-") or options.aggregate is None]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return options


def run(options: argparse.Namespace) -> None:
    """Evaluate, and show the table of this run."""
    from gcpo.tools.evaluate.aggregate import make_aggregation
    from gcpo.tools.evaluate.models import find_model
    from gcpo.tools.evaluate.questions import load_sets
    from gcpo.tools.evaluate.run import evaluate
    from gcpo.tools.evaluate.sampling import Sampler, make_prompts, vllm_sampler
    from gcpo.tools.evaluate.table import show, table_of

    settings = Settings(**{name: getattr(options, name) for name in SAMPLING})
    for name in ("limit", "gpus"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise EvaluationError(f"--{name} is {value}; it must be 1 or more")
    sets = load_sets([name for name in options.sets.split(",") if name], options.limit)
    model = find_model(options.model, say=lambda line: print(line, flush=True))
    prompts = make_prompts(model, sets)
    aggregation = None
    if options.aggregate is not None:
        aggregation = make_aggregation(model, sets, prompts.context, options.aggregate, options.overrides, settings)
    rooms = {question: prompts.room(question, settings.max_tokens) for question in prompts.ids}
    if min(rooms.values()) < settings.max_tokens:
        print(
            f"note: the model's context is {prompts.context:,} tokens, so a response ends after "
            f"{min(rooms.values()):,} to {max(rooms.values()):,} tokens and not after {settings.max_tokens:,}"
        )
    output = options.output or Path("outputs/evaluation") / model.name

    def start(log: Path) -> Sampler:
        longest = max(len(ids) + rooms[question] for question, ids in prompts.ids.items())
        longest = max(longest, aggregation.longest(sets) if aggregation else 0)
        sampling = {"temperature": settings.temperature, "top_p": settings.top_p}
        return vllm_sampler(model, log, **sampling, max_model_len=longest, tensor_parallel_size=options.gpus)

    if options.sandbox_fusion_url:
        from gcpo.adapters import fusion  # noqa: F401  (imports verl, which takes seconds)
    sandbox = {"sandbox": options.sandbox, "sandbox_fusion_url": options.sandbox_fusion_url}
    results = evaluate(model, sets, prompts, settings, output, start, sandbox, aggregation)
    show(table_of({output.name: results}))
    print(f"samples: {output}")


def table(options: argparse.Namespace) -> None:
    """Show the table of several runs."""
    from gcpo.tools.evaluate.table import comma_separated, load, markdown, parse_runs, show

    found = load(parse_runs(options.runs))
    if options.format == "terminal":
        show(found)
    else:
        print({"markdown": markdown, "csv": comma_separated}[options.format](found), end="")


def inspect(options: argparse.Namespace) -> None:
    """Write the samples of several runs as logs of Inspect."""
    from gcpo.tools.evaluate.inspect_log import export
    from gcpo.tools.evaluate.table import parse_runs

    for name, output in parse_runs(options.runs).items():
        for path in export(name, output, [one for one in options.sets.split(",") if one]):
            print(f"written: {path}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    options = parse(sys.argv[1:] if arguments is None else arguments)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        options.command(options)
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
