"""The error of cheaper estimates of Upsilon and of the kappa term, on the same groups as the full method.

``python -m benchmarks.estimators --model models/arithmetic-warm --data data/arithmetic`` samples groups of n = 8
responses, with L = 8 shared draws, L' = 8 leave-one-out draws for every response, and M = 8 regenerated responses for
every context. Preset ``paper`` reads these samples in one way, and every cheaper estimate reads fewer of them: Upsilon
and the gradient of the kappa term are compared on the same responses. Writes ``estimators.json`` and
``estimators.png``. ``--quick`` takes 3 groups.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import ENVIRONMENT, arguments, interval, print_table, save, two_axes
from benchmarks.kappa_gradients import Estimate, cosine, draw_variance, fraction_variance, kappa_gradients, largest_part
from benchmarks.sampled_groups import Contexts, Engine, Group, N, Policy, cut_contexts, sample_groups
from gcpo.algorithms import causal_diagnostics, causal_target, causal_weight, group_mean_target
from gcpo.collider.prompts import BlockBudget, CandidatePrompts

PAPER = Estimate("paper", N, generations=N)
LEAVE_ONE_OUT = Estimate("leave one out, L = L' = M = 8", N, N, N)
TRUTHS = {"shared": PAPER, "leave_one_out": LEAVE_ONE_OUT}
LIGHT = Estimate("mean of the group, nothing generated (light)", 0, generations=0)
BALANCED = Estimate("leave one out, L = L' = 1, prompt states (balanced)", 1, 1, source="prompt")
ONE_EACH = Estimate("leave one out, L = L' = 1", 1, 1)
KAPPA = [
    *(Estimate(f"shared, L = {n}, {p}", n, projection=p) for n in (2, 4) for p in ("inclusive", "exclusive")),
    ONE_EACH,
    Estimate("leave one out, L = 2, L' = 1", 2, 1),
    Estimate("leave one out, L = L' = 2", 2, 2),
    Estimate("leave one out, L = L' = 4", 4, 4),
]
"""Estimates whose gradients of the kappa term are compared, which do not depend on generations."""
ESTIMATES = [
    LIGHT,
    *KAPPA[:4],
    Estimate("shared, L = 8, M = 1", 8),
    Estimate("shared, L = 8, prompt states", 8, source="prompt"),
    *KAPPA[4:],
    BALANCED,
    Estimate("leave one out, L = 2, L' = 1, prompt states", 2, 1, source="prompt"),
    Estimate("leave one out, L = L' = 8, prompt states", 8, 8, source="prompt"),
]


def _pm(name: str) -> str:
    return f"{{{name}[0]:.2f}} ± {{{name}[1]:.2f}}"


def _span(name: str) -> str:
    return f"{{{name}[0]:.2f}} ({{{name}[1]:.2f}} to {{{name}[2]:.2f}})"


TABLES = (
    {
        "Υ by": "{name}",
        "tokens generated": "{generated:.1f} ×",
        "rank corr. with paper": _pm("shared[rank correlation]"),
        "with leave one out": _pm("leave_one_out[rank correlation]"),
        "mean error": _pm("shared[mean error]"),
        "spread": "{spread:.2f}",
        "split half": _pm("split half"),
    },
    {
        "blocks (balanced)": "{blocks}",
        "tokens of a context": "{context tokens:.0f}",
        "rank corr. with whole responses": _pm("rank correlation"),
        "mean error": _pm("mean error"),
    },
    {
        "κ gradient by": "{name}",
        "tokens generated": "{generated:.1f} ×",
        "norm": "{norm:.3f}",
        "relative variance": "{relative variance:.2f}",
        "largest group": "{largest group:.0%}",
        "cosine to paper": _span("cosine to paper"),
        "to leave one out": _span("cosine to leave one out"),
    },
    {"fraction": "{fraction}", "cosine": "{cosine:.2f}", "relative variance": "{relative variance:.2f}"},
    {"blocks": "{blocks}", "norm": "{norm:.3f}", "cosine to whole responses": _span("cosine")},
)
"""Header and format of every column: Upsilon, blocks, gradients, fractions, gradients with cut blocks."""


# ---- Upsilon -------------------------------------------------------------------------------------------------------


@dataclass
class Features:
    """The states of a group: responses [n, d]; by source, states [n, 2n, n or 1, d], shared draws first, and valid."""

    z: torch.Tensor
    states: dict[str, torch.Tensor]
    valid: dict[str, torch.Tensor]

    def samples(self, estimate: Estimate) -> dict[str, Any]:
        """Return the arguments of the public functions for the samples that an estimate uses."""
        z, valid = self.states[estimate.source], self.valid[estimate.source]
        count = estimate.generations if estimate.source == "response" else 1
        shared, own = slice(estimate.shared), slice(N, N + estimate.leave_one_out)
        samples = {"z_conditioned": z[:, shared, :count], "valid": valid[:, shared, :count]}
        if estimate.leave_one_out:
            samples |= {"z_marginal": z[:, own, :count], "valid_marginal": valid[:, own, :count]}
        return {**samples, "projection": estimate.projection}


def features_of(policy: Policy, group: Group, contexts: Contexts) -> Features:
    """Return the states of a group; states of prompts use ``contexts``."""
    ids = {
        "response": [one for row in group.result.outputs for one in row],
        "prompt": [one for row in contexts for one in row],
    }
    return Features(
        policy.states(group.responses),
        {name: policy.states(flat).view(N, 2 * N, len(flat) // (2 * N * N), -1) for name, flat in ids.items()},
        {name: torch.tensor([bool(one) for one in flat]).view(N, 2 * N, -1) for name, flat in ids.items()},
    )


def upsilon(features: Features, estimate: Estimate) -> torch.Tensor:
    """Compute Upsilon [n]; NaN without a target."""
    if not estimate.shared:
        return causal_weight(features.z, group_mean_target(features.z))
    target, has_target = causal_target(features.z, **features.samples(estimate))
    return causal_weight(features.z, target, has_target).where(has_target, torch.tensor(math.nan))


def compare(values: list[torch.Tensor], truth: list[torch.Tensor]) -> dict[str, Any]:
    """Return the rank correlation inside groups and mean absolute error, with 95 % intervals over groups."""
    from scipy.stats import spearmanr

    ranks, errors = [], []
    for a, b in zip(values, truth, strict=True):
        both = a.isfinite() & b.isfinite()
        if both.sum() > 2:
            ranks.append(float(spearmanr(a[both], b[both]).statistic))
            errors.append(float((a - b)[both].abs().mean()))
    return {"rank correlation": interval(ranks), "mean error": interval(errors)}


def generated_tokens(groups: Sequence[Group], estimate: Estimate) -> float:
    """Return the generated tokens of an estimate as a multiple of the responses' tokens."""
    generations = N * (estimate.shared + estimate.leave_one_out) * estimate.generations
    counts = {
        "collider": estimate.shared,
        "leave_one_out": N * estimate.leave_one_out,
        "regenerated": generations if estimate.source == "response" else 0,
    }
    total = sum(
        count * statistics.mean(draw.generated for draw in group.result.draws if draw.kind == kind)
        for group in groups
        for kind, count in counts.items()
    )
    return total / sum(len(response) for group in groups for response in group.responses)


def study_upsilon(groups: Sequence[Group], features: list[Features]) -> list[dict[str, Any]]:
    """Compare every estimate of Upsilon with both truths."""
    truths = {name: [upsilon(f, estimate) for f in features] for name, estimate in TRUTHS.items()}
    entries = []
    for estimate in [*TRUTHS.values(), *ESTIMATES]:
        values = [upsilon(f, estimate) for f in features]
        halves = [
            causal_diagnostics(f.z, **f.samples(estimate))["split_half"].item() for f in features if estimate.shared
        ]
        halves = [value for value in halves if math.isfinite(value)]
        entries.append(
            {
                "name": estimate.name,
                "short": estimate.short,
                "source": estimate.source,
                "generated": generated_tokens(groups, estimate),
                "mean": float(torch.cat(values).nanmean()),
                "spread": statistics.mean(float(v[v.isfinite()].std()) for v in values if v.isfinite().sum() > 1),
                "split half": interval(halves) if len(halves) > 2 else None,
                **{name: compare(values, truth) for name, truth in truths.items()},
            }
        )
    return entries


# ---- the study -----------------------------------------------------------------------------------------------------


def study_kappa(
    policy: Policy, groups: Sequence[Group], cut: dict[str, list[Contexts]], seed: int
) -> dict[str, list[dict[str, Any]]]:
    """Compare estimates, fractions of the responses, and cut blocks by the gradient of the kappa term."""
    whole = [group.result.contexts for group in groups]
    gradients = {e.name: kappa_gradients(policy, groups, whole, e) for e in (PAPER, LEAVE_ONE_OUT, *KAPPA)}
    paper, leave_one_out, one = (gradients[e.name] for e in (PAPER, LEAVE_ONE_OUT, ONE_EACH))
    entries = [
        {
            "name": estimate.name,
            "generated": generated_tokens(groups, replace(estimate, source="prompt")),
            "norm": float(own.mean(0).norm()),
            "relative variance": draw_variance(policy, groups, estimate),
            "largest group": largest_part(own),
            "cosine to paper": cosine(own, paper, seed),
            "cosine to leave one out": cosine(own, leave_one_out, seed),
        }
        for estimate, own in zip((PAPER, LEAVE_ONE_OUT, *KAPPA), gradients.values(), strict=True)
    ]
    blocks = []
    for name, contexts in cut.items():
        part = kappa_gradients(policy, groups, contexts[: len(groups)], ONE_EACH)
        blocks.append({"blocks": name, "norm": float(part.mean(0).norm()), "cosine": cosine(part, one, seed)})
    fractions = [fraction_variance(one, fraction, seed) for fraction in (1.0, 0.5, 0.25, 0.125)]
    return {"estimates": entries, "fractions": fractions, "blocks": blocks}


def study_blocks(
    policy: Policy, groups: Sequence[Group], cut: dict[str, list[Contexts]], features: list[Features]
) -> list[dict[str, Any]]:
    """Compare Upsilon of ``balanced`` with cut blocks and with whole responses."""
    if cut["whole responses"] != [group.result.contexts for group in groups]:
        raise RuntimeError("the contexts over whole responses are not those of the run")
    whole = [upsilon(f, BALANCED) for f in features]
    entries = []
    for name, contexts in cut.items():
        states = [features_of(policy, group, own) for group, own in zip(groups, contexts, strict=True)]
        tokens = statistics.mean(len(one) for own in contexts for row in own for one in row if one)
        entry = compare([upsilon(f, BALANCED) for f in states], whole)
        entries.append({"blocks": name, "context tokens": tokens, **entry})
    return entries


def plot(entries: list[dict[str, Any]], path: Path) -> None:
    """Plot the rank correlation of Upsilon against the tokens spent."""
    figure, axes = two_axes(figsize=(11, 4.2), sharey=True)
    for axis, truth in zip(axes, TRUTHS, strict=True):
        for k, entry in enumerate(sorted(entries, key=lambda entry: entry["generated"])):
            mean, half = entry[truth]["rank correlation"]
            color = {"shared": "C0", "leave one out": "C1"}.get(entry["name"].split(",")[0], "C2")
            x = max(entry["generated"], 0.6)  # the mean of the group needs no generated tokens
            axis.errorbar(x, mean, half, fmt="s" if entry["source"] == "prompt" else "o", color=color, ms=5, lw=1)
            offset = (4, (4, -10)[k % 2])
            axis.annotate(entry["short"], (x, mean), fontsize=7, xytext=offset, textcoords="offset points")
        axis.axhline(0, color="gray", lw=0.6)
        axis.set(xscale="log", xlim=(0.5, 300), xlabel="tokens generated, as a multiple of the responses'")
        axis.set_title(f"against {TRUTHS[truth].name}", fontsize=9)
    axes[0].set_ylabel("rank correlation of Υ inside a group")
    figure.savefig(path)


def cell(template: str, row: dict[str, Any]) -> str:
    """Return a cell of a table; a dash for a missing value."""
    try:
        return template.format_map(row)
    except TypeError:
        return "–"


def main() -> None:
    """Command line."""
    parser = arguments(__doc__, "outputs/estimators")
    parser.add_argument("--groups", type=int, default=24)
    parser.add_argument("--kappa-groups", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--response-length", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help="3 groups, to see that it works")
    args = parser.parse_args()
    if args.quick:
        args.groups = args.kappa_groups = 3
    os.environ.update({**ENVIRONMENT, **os.environ})
    torch.set_num_threads(1)
    import pyarrow.parquet as pq
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    questions = pq.read_table(f"{args.data}/train.parquet")["prompt"].to_pylist()[: args.groups]
    budgets = {
        "whole responses": BlockBudget(args.response_length),
        "last 16 tokens": BlockBudget(16),
        "last 8 tokens": BlockBudget(8),
        "answer only": BlockBudget(16, "answer"),
    }
    prompts = {name: CandidatePrompts(tokenizer, budget) for name, budget in budgets.items()}
    engine = Engine(args.model, 1024)
    groups = list(sample_groups(engine, prompts["whole responses"], questions, args.seed, args.response_length))
    policy = Policy(args.model, 8192)
    features = [features_of(policy, group, group.result.contexts) for group in groups]
    cut = {name: [cut_contexts(group, own) for group in groups] for name, own in prompts.items()}
    results = {
        "groups": args.groups,
        "seed": args.seed,
        "upsilon": study_upsilon(groups, features),
        "blocks and Upsilon of balanced": study_blocks(policy, groups, cut, features),
        "kappa gradient": study_kappa(policy, groups[: args.kappa_groups], cut, args.seed),
    }
    save(args.output / "estimators.json", results)
    plot(results["upsilon"], args.output / "estimators.png")
    entries = results["upsilon"], results["blocks and Upsilon of balanced"], *results["kappa gradient"].values()
    for columns, rows in zip(TABLES, entries, strict=True):
        print_table(list(columns), *([cell(template, row) for template in columns.values()] for row in rows))


if __name__ == "__main__":
    main()
