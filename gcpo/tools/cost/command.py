"""``gcpo cost``: the tokens of a step, from only the configuration or with the lengths of a run's log."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from gcpo.methods.gcpo.draws import KINDS
from gcpo.scoring import BudgetError
from gcpo.settings import ConfigError
from gcpo.tools.cost.inputs import (
    CostError,
    assume,
    compose_config,
    read_log,
    run_config,
    step_of,
    tokenizer_of,
    variants,
)
from gcpo.tools.cost.step import Simulation, draw_limits
from gcpo.tools.cost.texts import Lengths

TOLERANCE = 0.05
"""Largest relative error of a counter that is not marked."""
ROWS = (
    ("generated: responses", "generated/response"),
    *zip(("  shared draws", "  leave-one-out draws", "  regenerated"), map("generated/{}".format, KINDS), strict=True),
    ("prefilled: prompts", "prefilled"),
    ("  of them cached", "cached"),
    ("scored: old log-probs", "scored/old"),
    ("  reference policy", "scored/reference"),
    ("  contexts, states", "scored"),
    ("  without sharing", "scored_unshared"),
    ("trained on: responses", "trained/plain"),
    ("  kappa rows", "trained/kappa_rows"),
    ("  without sharing", "trained/kappa_rows_unshared"),
    ("  gradient norms", "trained/measured"),
)
"""Lines of the table and their counts; ``prefilled`` and ``cached`` are sums over the kinds of prompts."""
WEIGHTS = {"generated": 8.0, "prefilled": 1.0, "forward": 1.0, "backward": 2.0}
"""Cost of a token relative to a token in a forward pass. A generated token is expensive, because its pass reads all
weights of the model for few tokens."""


def weights_of(entries: Sequence[str]) -> dict[str, float]:
    """Return `WEIGHTS` with the changes ``NAME=NUMBER``."""
    weights = dict(WEIGHTS)
    for entry in entries:
        name, _, value = entry.partition("=")
        if name not in weights or not re.fullmatch(r"[0-9.]+(e[+-]?\d+)?", value):
            raise CostError(f"--weight {entry} is not NAME=NUMBER with one of the names {', '.join(weights)}")
        weights[name] = float(value)
    return weights


@dataclass(frozen=True)
class Estimate:
    """The result of ``gcpo cost``.

    Attributes:
        own: name of the configuration's own variant.
        tokens: the tokens of a step, by variant and stage.
        costs: the cost of every stage, by variant.
        lengths: lengths and frequencies.
        weights: the cost of a token.
        log: logged and expected tokens by counter, for the run of a log.
        notes: remarks on all of these.
    """

    own: str
    tokens: dict[str, dict[str, float]]
    costs: dict[str, dict[str, float]]
    lengths: Lengths
    weights: dict[str, float]
    log: dict[str, tuple[float, float]]
    notes: list[str]


def cost(options: Namespace) -> int:
    """Run ``gcpo cost``; return 0, or 1 after a message if it fails."""
    console = Console(soft_wrap=True, highlight=False, markup=False)
    try:
        found = estimate(options)
    except (CostError, ConfigError, BudgetError, ValueError) as error:
        Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(f"gcpo cost: {error}")
        return 1
    console.print(cost_table(found))
    if found.log:
        console.print(log_table(found.log))
    console.print(explain(found))
    return 0


def estimate(options: Namespace) -> Estimate:
    """Return the tokens and the cost of a step for every variant of a configuration."""
    if options.groups < 1:
        raise CostError(f"--groups is {options.groups}; it must be at least 1")
    if options.equal_rewards is not None and not 0 <= options.equal_rewards <= 1:
        raise CostError(f"--equal-rewards is {options.equal_rewards:g}; it must lie between 0 and 1")
    weights, log = weights_of(options.weight), read_log(options.log) if options.log else None
    of_run = log is not None and not options.overrides and options.config_name is None
    name = options.config_name or "gcpo_trainer"
    config = run_config(options.log) if of_run else compose_config(name, options.overrides)
    step = step_of(config)
    own, methods, notes = variants(config, step.run)
    limits = draw_limits(next(reversed(methods.values())).settings)
    lengths, assumed = assume(options, config, limits, log)
    tokenizer, estimated = tokenizer_of(config, step.run)
    notes += assumed + estimated
    tokens: dict[str, dict[str, float]] = {}
    for name, method in methods.items():
        try:
            tokens[name] = Simulation(method, step, lengths, tokenizer, options.groups).run()
        except BudgetError as error:
            if name == own:
                raise
            notes.append(f"{name} is left out: {error}")
    costs = {name: stage_costs(counts, weights, recomputed=step.recomputed) for name, counts in tokens.items()}
    compared = compare(tokens[own], log) if log is not None and of_run else {}
    return Estimate(own, tokens, costs, lengths, weights, compared, notes)


def sum_of(tokens: Mapping[str, float], name: str) -> float:
    """Return the sum of the counts below ``name``."""
    return sum(value for key, value in tokens.items() if key.startswith(f"{name}/"))


def stage_costs(tokens: Mapping[str, float], weights: Mapping[str, float], *, recomputed: bool) -> dict[str, float]:
    """Return the cost of every stage of a step in forward tokens."""
    prefilled = sum_of(tokens, "prefilled") - sum_of(tokens, "cached")
    trained = sum_of(tokens, "trained") - tokens.get("trained/kappa_rows_unshared", 0.0)
    return {
        "generation": weights["generated"] * sum_of(tokens, "generated") + weights["prefilled"] * prefilled,
        "scoring": weights["forward"] * (sum_of(tokens, "scored") + tokens.get("scored", 0.0)),
        "training": (weights["forward"] * (1 + recomputed) + weights["backward"]) * trained,
    }


def compare(tokens: Mapping[str, float], log: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """Return the logged and the expected value of every counter that the log and the model have.

    Cached tokens are summed over the kinds of prompts, because it is random which of two prompts reaches the server
    first and so is not cached.
    """
    logged = {name.partition("/tokens/")[2]: value for name, value in log.items() if "/tokens/" in name}
    if "unshared" in logged:  # of GC2PO
        logged["scored_unshared"] = logged["unshared"]
    both = {name: (logged[name], value) for name, value in tokens.items() if name in logged}
    cached = [both.pop(name) for name in list(both) if name.startswith("cached/")]
    both["cached"] = (sum(pair[0] for pair in cached), sum(pair[1] for pair in cached))
    return {name: pair for name, pair in both.items() if any(pair)}


def short(number: float) -> str:
    """Format a number with three digits and a unit."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= 0.9995 * size:
            return f"{number / size:.3g} {unit}" if abs(number) < 999.5 * size else f"{number / size:.0f} {unit}"
    return f"{number:.0f}"


def cost_table(found: Estimate) -> Table:
    """Return a table of the tokens and cost of a step, with a column for every variant."""
    table = Table("tokens of a step", box=SIMPLE_HEAD)
    for name in found.tokens:
        table.add_column(f"{name} *" if name == found.own else name, justify="right")
    for line, name in ROWS:
        added = name in ("prefilled", "cached")
        values = [sum_of(counts, name) if added else counts.get(name, 0.0) for counts in found.tokens.values()]
        table.add_row(line, *(short(value) if value else "-" for value in values))
    total = {name: sum(stages.values()) for name, stages in found.costs.items()}
    table.add_section()
    for stage in found.costs["grpo"]:
        table.add_row(f"cost of {stage}", *(short(stages[stage]) for stages in found.costs.values()))
    table.add_row("cost of the step", *(short(value) for value in total.values()))
    table.add_row("ratio to GRPO", *(f"{value / total['grpo']:.2f}" for value in total.values()))
    return table


def log_table(compared: Mapping[str, tuple[float, float]]) -> Table:
    """Counters of a run, averaged over its steps, next to the expected counters."""
    table = Table("mean of the run", box=SIMPLE_HEAD)
    for name in ("logged", "expected", "off by"):
        table.add_column(name, justify="right")
    for name, (logged, expected) in compared.items():
        gap = expected / logged - 1 if logged else float("inf")
        table.add_row(name, short(logged), short(expected), f"{gap:+.1%}{' !' if abs(gap) > TOLERANCE else ''}")
    return table


def explain(found: Estimate) -> str:
    """Return a text with the assumptions behind the numbers."""
    lengths = found.lengths
    means = {"question": lengths.question, "response": lengths.response, **lengths.draws}
    return "\n".join(
        [
            f"mean tokens: {', '.join(f'{name} {value:.4g}' for name, value in means.items())}; spread in a group "
            f"{lengths.spread:.2f}, of groups {lengths.group_spread:.2f}; answers to one question begin with "
            f"{lengths.common:.3g} tokens in common",
            f"cost of a token: {', '.join(f'{name} {value:.3g}' for name, value in found.weights.items())} (cached: 0)",
            *(f"note: {note}" for note in found.notes),
            "The ratio adds up tokens. It does not know that attention costs more in a longer context, that stages "
            "overlap or wait, how full the accelerator is, nor the time of a step that tokens do not cause.",
        ]
    )
