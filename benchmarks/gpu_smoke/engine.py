"""The packed passes of the engine beside one sequence at a time: agreement, seconds, memory. Needs no vLLM.

``python -m benchmarks.gpu_smoke.engine`` makes a random Qwen2 of 0.5 B parameters, in bf16 under FSDP2 on one GPU; with
``--cpu`` a small one in float32. It writes ``engine.json`` and ``engine.md``, and ends with status 1 if packed and
single passes disagree by more than single passes in that precision differ from float32.

* agreement: log-probabilities, states, the gradient of the kappa term, and the divergences of GC²PO. The reference is
  only transformers, in float32 (float64 with ``--cpu``). *dense* is the engine with one sequence in a row, for GC²PO
  transformers in the precision of the engine.
* rates: the FLOP of the packed passes over those of a large product on the same machine, and the bytes of the weights
  over the bandwidth of a large copy. Both limits are measured here, not taken from a data sheet.
"""

from __future__ import annotations

import argparse
import importlib.util
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.common import arguments, save, table_text
from benchmarks.gpu_smoke.machine import Machine, shares
from benchmarks.gpu_smoke.problem import HALF_A_BILLION, SMALL, Group, OneAtATime, kl_loss, make_group, make_model

FACTOR, FLOOR = 2.0, 1e-4
"""A packed pass may err this many times as much as a single one, and so much in any case (relative)."""
BUDGET = 1 << 18
LAYER = 2
"""Of the perturbed states of `hidden_state`."""


class Passes:
    """The engine with its scorers; ``dense``: one sequence in a row."""

    def __init__(self, folder: str, machine: Machine) -> None:
        from gcpo.adapters.standalone import standalone_engine

        self.machine = machine
        flash = machine.device == "cuda" and importlib.util.find_spec("flash_attn") is not None
        options = {"attention": "flash_attention_2", "use_remove_padding": True} if flash else {}
        dtype = "fp32" if machine.device == "cpu" else "bf16"
        self.engine = standalone_engine(folder, dtype=dtype, **options)
        self.settings = {"use_remove_padding": flash, "use_fused_kernels": False}
        with self.engine.eval_mode():
            if problem := self.engine.tree_problem:
                sys.exit(f"gpu_smoke: packed trees are not used: {problem}")

    def score(self, group: Group, *, is_tree: bool) -> tuple[list[Any], int]:
        """Scores of the contexts, and the tokens that went through the model."""
        from gcpo.adapters.scoring import PackScorer

        scorer = PackScorer(
            self.engine, settings=self.settings, temperature=1.0, layer=-1, is_tree=is_tree, max_tokens=BUDGET
        )
        with self.engine.eval_mode():
            return scorer(group.contexts), scorer.tokens

    def gradient(self, group: Group, references: list[Tensor], *, is_tree: bool) -> dict[str, Tensor]:
        """The gradient of the kappa term, whole."""
        from gcpo.adapters.standalone import add_gradient

        settings = {**self.settings, "temperature": 1.0}
        loss = kl_loss(references)
        with self.engine.train_mode():  # which forgets the gradient at its end
            add_gradient(self.engine, group.contexts, loss, is_tree=is_tree, max_tokens=BUDGET, settings=settings)
            parameters = self.engine.module.named_parameters()
            return {name: p.grad.full_tensor() for name, p in parameters if p.grad is not None}

    def perturbed(self, group: Group, intervention: str) -> tuple[list[Tensor], int]:
        """Divergences of GC²PO, and the tokens that went through the model."""
        from gcpo.adapters.perturbed import EpisodeScorer

        is_head = intervention == "lm_head"
        scorer = EpisodeScorer(
            self.engine,
            settings=self.settings,
            temperature=1.0,
            layer=-1 if is_head else LAYER,
            intervention=intervention,
            relative=True,
            max_tokens=BUDGET,
        )
        with self.engine.eval_mode():
            scores = scorer(group.episodes if is_head else group.branches)
        return [score.divergence for score in scores], scorer.path_tokens + scorer.branch_tokens


# ---- agreement -------------------------------------------------------------------------------------------------------


def distance(found: list[Tensor], right: list[Tensor]) -> float:
    """The norm of the difference over the norm of what is right."""
    pairs = [
        (one.double().cpu().flatten(), other.double().cpu().flatten()) for one, other in zip(found, right, strict=True)
    ]
    difference = sum(float((one - other).square().sum()) for one, other in pairs)
    return (difference / sum(float(other.square().sum()) for _, other in pairs)) ** 0.5


def agreement(passes: Passes, folder: str, group: Group) -> dict[str, dict[str, float]]:
    """Errors of packed and of single passes against the reference."""
    machine, found = passes.machine, {}
    right = OneAtATime(folder, machine.device, machine.exact, LAYER)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        log_p, states = zip(*(right.log_probs(request) for request in group.contexts), strict=True)
    references = [values.cpu() + 0.3 * torch.randn(len(values), generator=noise) for values in log_p]
    gradient = right.gradient(group.contexts, kl_loss(references))
    for side, is_tree in (("packed", True), ("dense", False)):
        scores, _ = passes.score(group, is_tree=is_tree)
        own = passes.gradient(group, references, is_tree=is_tree)
        found[side] = {
            "log-probabilities": distance([score.log_probs for score in scores], list(log_p)),
            "states": distance([score.state for score in scores], list(states)),
            "gradient of kappa": distance([own[name] for name in gradient], list(gradient.values())),
        }
    single = OneAtATime(folder, machine.device, machine.dtype, LAYER)
    for intervention, requests in (("lm_head", group.episodes), ("hidden_state", group.branches)):
        with torch.no_grad():
            wanted = [right.divergence(request) for request in requests]
            dense = [single.divergence(request) for request in requests]
        packed, _ = passes.perturbed(group, intervention)
        found["packed"][f"GC²PO, {intervention}"] = distance(packed, wanted)
        found["dense"][f"GC²PO, {intervention}"] = distance(dense, wanted)
    return found


def disagreements(errors: dict[str, dict[str, float]]) -> list[str]:
    """What differs by more than the precision explains; a value that is not finite does."""
    return [
        f"{name}: packed passes err by {packed:.1e}, single ones by {errors['dense'][name]:.1e}"
        for name, packed in errors["packed"].items()
        if not packed <= max(FACTOR * errors["dense"][name], FLOOR)
    ]


# ---- seconds and memory ----------------------------------------------------------------------------------------------


def rates(passes: Passes, group: Group) -> dict[str, Any]:
    """Seconds and peak memory of every pass over a group, and the tokens of both sides."""
    machine, found, tokens = passes.machine, {}, {}
    references = [torch.zeros(len(request.target)) for request in group.contexts]
    for side, is_tree in (("packed", True), ("dense", False)):
        passes_of = {
            f"scoring, {side}": lambda is_tree=is_tree: passes.score(group, is_tree=is_tree)[1],
            f"gradient, {side}": lambda is_tree=is_tree: passes.gradient(group, references, is_tree=is_tree),
        }
        for name, work in passes_of.items():
            for _ in range(2):  # the first warms up
                with machine.measured(found, name):
                    result = work()
                    if isinstance(result, int):
                        tokens[side] = result
    for intervention in ("lm_head", "hidden_state"):
        for _ in range(2):
            with machine.measured(found, f"GC²PO, {intervention}"):
                passes.perturbed(group, intervention)
    return {"tokens": tokens, "passes": found}


def packed_pairs(group: Group) -> int:
    """Pairs of a token and a key that it sees in the packs of the contexts."""
    from gcpo.scoring import PrefixForest

    sequences = [torch.cat([request.context, request.target]) for request in group.contexts]
    return sum(int((pack.position_ids + 1).sum()) for pack in PrefixForest(sequences, min_shared=8).packs(BUDGET))


# ---- command ---------------------------------------------------------------------------------------------------------


@contextmanager
def one_rank(backend: str) -> Iterator[None]:
    """A process group with only this process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.distributed.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def kernels(machine: Machine) -> dict[str, Any]:
    """Name of a kernel for packed rows -> a context in which it is used."""
    if machine.device == "cpu":
        return {"the kernel for CPUs": nullcontext()}
    fallback = {"SDPA": patch("gcpo.scoring.attention.kernel_for", return_value=None)}
    return {"flash-attn": nullcontext(), **fallback} if importlib.util.find_spec("flash_attn") else fallback


def run(args: argparse.Namespace, machine: Machine) -> dict[str, Any]:
    """All measurements; see `main`."""
    sizes = SMALL if args.cpu else HALF_A_BILLION
    results: dict[str, Any] = {"device": machine.name, "dtype": str(machine.dtype), "limits": machine.limits()}
    with tempfile.TemporaryDirectory() as folder, one_rank("gloo" if args.cpu else "nccl"):
        model = make_model(Path(folder), sizes)
        passes = Passes(model, machine)
        for kernel, switch in kernels(machine).items():
            with switch:
                errors = agreement(passes, model, make_group(4, args.check_length, sizes))
                results[kernel] = {"errors": errors, "disagreements": disagreements(errors), "rates": {}}
                for n in args.n:
                    for length in args.lengths:
                        group = make_group(n, length, sizes)
                        found = rates(passes, group)
                        seconds, tokens = (
                            found["passes"]["scoring, packed"]["seconds"],
                            found["tokens"].get("packed", 0),
                        )
                        found["shares"] = shares(
                            *(seconds, tokens, packed_pairs(group)),
                            *(passes.engine.module, machine.dtype.itemsize, results["limits"]),
                        )
                        results[kernel]["rates"][f"n = {n}, T = {length}"] = found
                        print(f"{kernel}: n = {n}, T = {length} done", file=sys.stderr, flush=True)
    return results


def tables(results: dict[str, Any]) -> str:
    """Agreement and rates, as markdown."""
    text = ""
    for kernel in (name for name, value in results.items() if isinstance(value, dict) and "errors" in value):
        errors, found = results[kernel]["errors"], results[kernel]["rates"]
        reference = "float64" if results["device"] == "CPU" else "float32"
        rows = [[name, *(f"{error[name]:.1e}" for error in errors.values())] for name in errors["packed"]]
        text += table_text([f"{kernel}: relative error against {reference}", *errors], *rows)
        names = next(iter(found.values()))["passes"]
        rows = [[name, *(cell(one["passes"][name]) for one in found.values())] for name in names]
        rows += [
            [f"tokens, {side}", *(f"{one['tokens'].get(side, 0):,}" for one in found.values())]
            for side in ("packed", "dense")
        ]
        rows += [
            [f"packed scoring, {limit}", *(f"{one['shares'].get(limit, 0):.0%}" for one in found.values())]
            for limit in ("of the product", "of the copy")
        ]
        text += table_text([f"{kernel}: seconds (peak MiB)", *found], *rows)
    return text


def cell(one: dict[str, Any]) -> str:
    """Seconds and memory of a pass."""
    return "out of memory" if one["seconds"] is None else f"{one['seconds']:.3f} ({one['peak MiB']:,})"


def main() -> int:
    """Command line; returns an exit code."""
    parser = arguments(__doc__, "outputs/gpu_smoke", model=False)
    parser.add_argument("--cpu", action="store_true", help="a small model in float32 on the CPU")
    parser.add_argument("--n", type=int, nargs="+", help="responses of a group (8 and 16)")
    parser.add_argument("--lengths", type=int, nargs="+", help="mean tokens of a response (1,024 to 8,192)")
    parser.add_argument("--check-length", type=int, help="the same where the passes are compared")
    args = parser.parse_args()
    if not args.cpu and not torch.cuda.is_available():
        parser.error("no CUDA device answers; --cpu runs the same checks on a small model")
    args.n = args.n or ([4] if args.cpu else [8, 16])
    args.lengths = args.lengths or ([48] if args.cpu else [1024, 2048, 4096, 8192])
    args.check_length = args.check_length or (32 if args.cpu else 512)
    machine = Machine(cpu=args.cpu)
    results = run(args, machine)
    print(text := tables(results))
    save(args.output / "engine.json", results)
    (args.output / "engine.md").write_text(text)
    problems = [
        line for value in results.values() if isinstance(value, dict) for line in value.get("disagreements", [])
    ]
    print("\n".join(f"gpu_smoke: {line}" for line in problems) or "packed and single passes agree")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
