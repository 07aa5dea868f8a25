"""Contexts of a group scored as packed prefix trees, compared with dense micro-batches of the same token budget.

``python -m benchmarks.packing --output outputs/packing`` makes groups of n responses of random tokens and ragged
lengths, every x_{i,l} with y_i, ordered by the group's plan, and a random model of transformers; no engine, no vLLM.
Every round runs both sides. It prints medians and writes ``packing.json``:

* ratio: dense over packed, in seconds, and in seconds of processor time, which other work on the machine affects less;
* token bound: tokens of dense over tokens of packed, which is the ratio if every token costs the same;
* FLOP bound: the same for the operations of the matrix products and of attention over the keys that a token sees;
* memory: the largest resident size while the gradient is taken, minus that before, each side in its own process.

Dense rows are sorted by length and padded on the right, without a mask: padding after a causal row needs no mask, and
this is the fastest dense form of that budget. ``--dense-rows 1`` reads one sequence at a time instead, which is faster
where a single one occupies the processor. Both sides run the language-model head only on the scored positions.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.common import arguments, print_table, save
from gcpo.collider.plan import leave_one_out_plan
from gcpo.scoring import BudgetError, PrefixForest
from gcpo.scoring.attention import tree_attention_on

SIDES = ("dense", "packed")


@dataclass(frozen=True)
class Problem:
    """Sequences x_{i,l} + y_i, and the number of tokens of y_i at the end of each."""

    sequences: list[torch.Tensor]
    targets: list[int]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.sequences))


def make_problem(args: argparse.Namespace, draws: int) -> Problem:
    """Return groups of random tokens; response lengths are uniform within ``spread`` of ``length``."""
    generator = torch.Generator().manual_seed(args.seed)

    def tokens(length: int) -> torch.Tensor:
        return torch.randint(0, args.vocabulary, (length,), generator=generator)

    def response() -> torch.Tensor:
        low, high = (round(args.length * (1 + side * args.spread)) for side in (-1, 1))
        return tokens(int(torch.randint(low, high + 1, (1,), generator=generator)))

    sequences, targets = [], []
    for _ in range(args.groups):
        question, tail = tokens(args.question), tokens(8)
        responses = [response() for _ in range(args.n)]
        colliders = [response() for _ in range(draws)]
        plan = leave_one_out_plan(args.n, draws, lengths=[len(r) for r in responses])
        for i, orders in enumerate(plan.orders):
            for order in orders:
                blocks = [responses[k] if kind == "candidate" else colliders[k] for kind, k in order]
                sequences.append(torch.cat([question, *blocks, tail, responses[i]]))
                targets.append(len(responses[i]))
    return Problem(sequences, targets)


def make_model(args: argparse.Namespace) -> Qwen2ForCausalLM:
    """Return a random model, which depends only on the arguments."""
    torch.manual_seed(args.seed)
    config = Qwen2Config(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 8 // 3,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads or args.heads,
        max_position_embeddings=1 << 16,
    )
    return Qwen2ForCausalLM(config).eval()


def log_probs(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of ``labels`` [K] under ``logits`` [1, K, V]."""
    return logits[0].log_softmax(-1).gather(1, labels.unsqueeze(1)).squeeze(1)


def packed(model: Qwen2ForCausalLM, problem: Problem, args: argparse.Namespace) -> Iterator[torch.Tensor]:
    """Yield the log-probabilities of every pack, including the construction of the tree."""
    for pack in PrefixForest(problem.sequences, min_shared=args.min_shared).packs(args.budget):
        places = [place[-problem.targets[i] - 1 :] for i, place in zip(pack.sequences, pack.places, strict=True)]
        output = model(
            pack.token_ids.unsqueeze(0),
            attention_mask=None,
            position_ids=pack.position_ids.unsqueeze(0),
            logits_to_keep=torch.cat([place[:-1] for place in places]),
            use_cache=False,
            tree_pack=pack,
        )
        yield log_probs(output.logits, pack.token_ids[torch.cat([place[1:] for place in places])])


def dense(model: Qwen2ForCausalLM, problem: Problem, args: argparse.Namespace) -> Iterator[torch.Tensor]:
    """Yield the log-probabilities of every micro-batch."""
    order = sorted(range(len(problem.sequences)), key=lambda i: len(problem.sequences[i]))
    while order:
        count = 1
        while (
            count < min(len(order), args.dense_rows or len(order))
            and (count + 1) * len(problem.sequences[order[count]]) <= args.budget
        ):
            count += 1
        chosen, order = order[:count], order[count:]
        rows = [problem.sequences[i] for i in chosen]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        hidden = model.model(ids, use_cache=False).last_hidden_state
        targets = [problem.targets[i] for i in chosen]
        kept = [states[len(row) - t - 1 : len(row) - 1] for states, row, t in zip(hidden, rows, targets, strict=True)]
        labels = torch.cat([row[-t:] for row, t in zip(rows, targets, strict=True)])
        yield log_probs(model.lm_head(torch.cat(kept)).unsqueeze(0), labels)


def operations(model: Qwen2ForCausalLM, tokens: int, pairs: int) -> int:
    """Return the FLOP of a forward pass without the head, which runs on the same positions on both sides.

    Args:
        model: its matrices multiply every token.
        tokens: that are read.
        pairs: of a token and a key that it sees.
    """
    matrices = sum(weight.numel() for weight in model.model.layers.parameters() if weight.dim() == 2)
    return 2 * matrices * tokens + 4 * model.config.hidden_size * model.config.num_hidden_layers * pairs


def score(side: str, model: Qwen2ForCausalLM, problem: Problem, args: argparse.Namespace, gradient: bool) -> float:
    """Return the sum of all log-probabilities; with ``gradient``, store its gradient in the parameters."""
    total = 0.0
    with torch.set_grad_enabled(gradient), tree_attention_on(model.config) if side == "packed" else nullcontext():
        for values in (packed if side == "packed" else dense)(model, problem, args):
            if gradient:
                values.sum().backward()
            total += float(values.detach().double().sum())
    return total


def resident(field: str) -> int:
    """Return ``VmRSS`` or ``VmHWM`` of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{field}:")))


def gradient_memory(side: str, args: argparse.Namespace, draws: int) -> int:
    """Return the peak bytes of one gradient pass beyond the resident bytes before it, with existing gradients."""
    model, problem = make_model(args), make_problem(args, draws)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    few = Problem([sequence[-9:] for sequence in problem.sequences[:2]], [1, 1])
    score(side, model, few, args, gradient=True)
    before = resident("VmRSS")
    score(side, model, problem, args, gradient=True)
    return resident("VmHWM") - before


def memory_apart(side: str, draws: int) -> int:
    """Run ``gradient_memory`` in a new process."""
    command = [sys.executable, "-m", "benchmarks.packing", *sys.argv[1:], "--memory-of", side, "--draws", str(draws)]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure(args: argparse.Namespace, draws: int) -> dict[str, Any]:
    """Measure seconds, tokens and memory of both sides for one L."""
    model, problem = make_model(args), make_problem(args, draws)
    packs = PrefixForest(problem.sequences, min_shared=args.min_shared).packs(args.budget)
    tokens = {"dense": problem.tokens, "packed": sum(map(len, packs))}
    bound = tokens["dense"] / tokens["packed"]
    # A token of a tree sees the tokens before it in its sequence, as many as its position, and itself.
    pairs = {
        "dense": sum(len(sequence) * (len(sequence) + 1) // 2 for sequence in problem.sequences),
        "packed": sum(int((pack.position_ids + 1).sum()) for pack in packs),
    }
    flop = {side: operations(model, tokens[side], pairs[side]) for side in SIDES}
    found: dict[str, Any] = {
        "sequences": len(problem.sequences),
        "packs": len(packs),
        "nodes": sum(len(pack.spans) for pack in packs),
        "tokens": tokens,
        "token bound": round(bound, 3),
        "FLOP bound": round(flop["dense"] / flop["packed"], 3),
    }
    for name, gradient in (("forward", False), ("with gradient", True)):
        spent: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
        sums: dict[str, float] = {}
        for attempt in range(args.rounds + 1):  # the first round warms up
            for side in SIDES:
                model.zero_grad(set_to_none=False)
                started = time.perf_counter(), time.process_time()
                sums[side] = score(side, model, problem, args, gradient)
                if attempt:
                    spent[side].append((time.perf_counter() - started[0], time.process_time() - started[1]))
            print(f"L = {draws}: {name}, round {attempt} of {args.rounds}", file=sys.stderr, flush=True)
        if abs(sums["packed"] - sums["dense"]) > 1e-4 * abs(sums["dense"]):
            sys.exit(f"packing: the sides disagree: {sums}")
        wall, processor = (
            statistics.median(d[clock] / p[clock] for d, p in zip(spent["dense"], spent["packed"], strict=True))
            for clock in (0, 1)
        )
        seconds = [{s: round(statistics.median(t[clock] for t in spent[s]), 6) for s in SIDES} for clock in (0, 1)]
        found[name] = {
            "seconds": seconds[0],
            "processor seconds": seconds[1],
            "ratio": round(wall, 3),
            "ratio of processor seconds": round(processor, 3),
            "share of the bound": round(processor / bound, 3),
        }
    memory = {side: memory_apart(side, draws) for side in SIDES}
    found["gradient memory, MiB"] = {side: round(size / 2**20) for side, size in memory.items()}
    found["memory ratio"] = round(memory["packed"] / memory["dense"], 3)
    return found


def _times(kind: str) -> dict[str, str]:
    sides = "{0[KIND][WHAT][dense]:.2f} / {0[KIND][WHAT][packed]:.2f}".replace("KIND", kind)
    share = f"({{0[{kind}][ratio of processor seconds]:.2f}}x, {{0[{kind}][share of the bound]:.0%}} of the bound)"
    return {
        f"{kind}: seconds dense / packed": f"{sides.replace('WHAT', 'seconds')} ({{0[{kind}][ratio]:.2f}}x)",
        f"{kind}: processor seconds": f"{sides.replace('WHAT', 'processor seconds')} {share}",
    }


ROWS = {
    "tokens dense / packed (bound)": "{0[tokens][dense]} / {0[tokens][packed]} ({0[token bound]:.2f}x)",
    "FLOP bound": "{0[FLOP bound]:.2f}x",
    **_times("forward"),
    **_times("with gradient"),
    "gradient: peak MiB dense / packed": (
        "{0[gradient memory, MiB][dense]} / {0[gradient memory, MiB][packed]} ({0[memory ratio]:.2f}x)"
    ),
}
"""Name and format of every row of the table, which has a column for every L."""


def main() -> None:
    """Command line."""
    parser = arguments(__doc__, "outputs/packing", model=False)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--n", type=int, default=8, help="responses of a group")
    parser.add_argument("--draws", type=int, nargs="+", default=[1, 2], metavar="L", help="contexts of a response")
    parser.add_argument("--groups", type=int, default=1)
    parser.add_argument("--length", type=int, default=256, help="mean tokens of a response")
    parser.add_argument("--spread", type=float, default=0.3, help="lengths lie within this share of the mean")
    parser.add_argument("--question", type=int, default=64, help="tokens of the question")
    parser.add_argument("--budget", type=int, default=8192, help="tokens of a micro-batch")
    parser.add_argument("--dense-rows", type=int, help="most sequences of a dense micro-batch")
    parser.add_argument("--min-shared", type=int, default=8, help="gcpo.scoring.min_shared_tokens")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, help="default: as many as heads")
    parser.add_argument("--vocabulary", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}; it must be at least 1")
    if args.dense_rows is not None and args.dense_rows < 1:
        parser.error(f"--dense-rows is {args.dense_rows}; it must be at least 1")
    if args.memory_of:
        print(gradient_memory(args.memory_of, args, args.draws[0]))
        return
    try:
        found = {f"L = {draws}": measure(args, draws) for draws in args.draws}
    except BudgetError as error:
        sys.exit(f"packing: {error}")
    title = f"n = {args.n}, T = {args.length}, hidden {args.hidden}, {args.layers} layers"
    print_table([title, *found], *([name, *map(row.format, found.values())] for name, row in ROWS.items()))
    settings = {name: value for name, value in vars(args).items() if name not in ("output", "memory_of")}
    results = {"threads": torch.get_num_threads(), "settings": settings, "results": found}
    save(args.output / "packing.json", results)


if __name__ == "__main__":
    main()
