"""verl's rows packed without padding (``gcpo.padding_free``) beside padded ones: seconds of a pass of the actor.

``python -m benchmarks.padding_free`` makes groups of n responses to one question, of random tokens and ragged lengths,
and a random Qwen2 of the size of the quick start's model, under FSDP2 in one process; no Ray, no vLLM. Every round runs
both sides, forward and with gradient. It prints medians and writes ``padding_free.json``:

* tokens: those that the model reads, padding included, over those of the packed rows;
* ratio: padded over packed, in seconds, and in seconds of processor time, which other work on the machine affects less.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import arguments, print_table, save
from benchmarks.gpu_smoke.engine import one_rank
from benchmarks.gpu_smoke.problem import make_model

SIDES = ("padded", "packed")
PASSES = {"forward": False, "with gradient": True}


def make_rows(args: argparse.Namespace, length: int) -> list[torch.Tensor]:
    """Questions with n responses each; lengths are uniform within ``spread`` of ``length``."""
    generator = torch.Generator().manual_seed(args.seed)

    def tokens(count: int) -> torch.Tensor:
        return torch.randint(3, args.vocabulary, (count,), generator=generator)

    rows = []
    for _ in range(args.questions):
        question = tokens(args.question)
        for _ in range(args.n):
            share = 1 + args.spread * (2 * float(torch.rand((), generator=generator)) - 1)
            rows.append(torch.cat([question, tokens(max(1, round(length * share)))]))
    return rows


def tokens_read(engine: Any, rows: Sequence[torch.Tensor], budget: int, side: str) -> int:
    """Tokens that the model reads in a pass, padding included."""
    from gcpo.adapters.standalone import plain_pass

    read: list[int] = []
    hook = engine.module.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    engine.padding_free = side == "packed"
    with engine.eval_mode():
        plain_pass(engine, rows, with_gradient=False, max_tokens=budget)
    hook.remove()
    return sum(read)


def measure(engine: Any, rows: Sequence[torch.Tensor], args: argparse.Namespace) -> dict[str, Any]:
    """Medians of both sides, and what they read."""
    from gcpo.adapters.standalone import plain_pass

    taken: dict[str, dict[str, list[tuple[float, float]]]] = {name: {side: [] for side in SIDES} for name in PASSES}
    tokens = {side: tokens_read(engine, rows, args.budget, side) for side in SIDES}
    for turn in range(args.rounds + 1):  # the first warms up
        for name, with_gradient in PASSES.items():
            for side in SIDES:
                engine.padding_free = side == "packed"
                with engine.train_mode() if with_gradient else engine.eval_mode():
                    start = time.perf_counter(), time.process_time()
                    plain_pass(engine, rows, with_gradient=with_gradient, max_tokens=args.budget)
                    seconds = time.perf_counter() - start[0], time.process_time() - start[1]
                if turn:
                    taken[name][side].append(seconds)
    found: dict[str, Any] = {"tokens": tokens}
    for name, sides in taken.items():
        wall, processor = ({side: statistics.median(x[i] for x in sides[side]) for side in SIDES} for i in (0, 1))
        found[name] = {
            "seconds": wall,
            "processor seconds": processor,
            "ratio": wall["padded"] / wall["packed"],
            "ratio of processor seconds": processor["padded"] / processor["packed"],
        }
    return found


def main() -> None:
    """Command line."""
    parser = arguments(__doc__, "outputs/padding_free", model=False)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--n", type=int, default=8, help="responses of a group")
    parser.add_argument("--lengths", type=int, nargs="+", default=[30, 300], help="mean tokens of a response")
    parser.add_argument("--spread", type=float, default=0.9, help="lengths lie within this share of the mean")
    parser.add_argument("--question", type=int, default=16, help="tokens of the question")
    parser.add_argument("--budget", type=int, default=32768, help="actor_rollout_ref.actor.ppo_max_token_len_per_gpu")
    parser.add_argument("--hidden", type=int, default=96)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--vocabulary", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}; it must be at least 1")
    sizes = {
        "vocab_size": args.vocabulary,
        "hidden_size": args.hidden,
        "intermediate_size": 3 * args.hidden,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.heads,
        "tie_word_embeddings": True,
    }
    with tempfile.TemporaryDirectory() as folder, one_rank("gloo"):
        from gcpo.adapters.standalone import standalone_engine

        engine: Any = standalone_engine(make_model(Path(folder), sizes))
        with engine.eval_mode():
            engine.use_padding_free()
        if not engine.padding_free:
            parser.exit(1, "padding_free: the model cannot be packed\n")
        found = {f"T = {length}": measure(engine, make_rows(args, length), args) for length in args.lengths}
    rows = [["tokens", *(f"{one['tokens']['padded']:,} / {one['tokens']['packed']:,}" for one in found.values())]]
    for name in PASSES:
        text = "{0[seconds][padded]:.2f} / {0[seconds][packed]:.2f} ({0[ratio]:.2f} ×)"
        rows.append([f"{name}, seconds", *(text.format(one[name]) for one in found.values())])
        processor = "{0[ratio of processor seconds]:.2f} ×"
        rows.append([f"{name}, processor seconds", *(processor.format(one[name]) for one in found.values())])
    print_table([f"padded / packed, {args.questions} questions, n = {args.n}", *found], *rows)
    settings = {name: value for name, value in vars(args).items() if name != "output"}
    save(args.output / "padding_free.json", {"settings": settings, "results": found})


if __name__ == "__main__":
    main()
