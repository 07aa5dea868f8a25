"""``gcpo cost``: what a step takes in tokens, by the configuration alone or with the lengths of a run's log."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import gcpo.config
from gcpo.methods.gcpo.settings import PRESETS, BlocksConfig, GCPOConfig
from gcpo.scoring import BudgetError
from gcpo.scoring.tree import common_prefix
from gcpo.settings import ConfigError
from gcpo.tools.cost import (
    KINDS,
    Lengths,
    Shares,
    Step,
    Texts,
    Weights,
    block_text,
    length_limits,
    ragged_groups,
    stage_costs,
    step_tokens,
    sum_of,
)
from gcpo.tools.report import merge_lines

SPREAD = 0.3
"""Spread of the lengths of a group where a mean is given and nothing is known about the spread."""

TOLERANCE = 0.05

CACHE_BLOCK = 16
"""vLLM's default on a GPU."""

SHARE = "cached share"

CACHED = "cached/"

ROWS: dict[str, dict[str, str]] = {
    "generated": {
        "responses": "generated/response",
        "shared draws": "generated/collider",
        "leave-one-out draws": "generated/leave_one_out",
        "regenerated": "generated/regenerated",
    },
    "prefilled": {"prompts": "prefilled", "of them cached": "cached", "share cached": SHARE},
    "scored (forward)": {
        "old log-probs": "scored/old",
        "reference policy": "scored/reference",
        "contexts, states": "scored",
        "  without sharing": "scored_unshared",
    },
    "trained on (both ways)": {
        "responses": "trained/plain",
        "kappa rows": "trained/kappa_rows",
        "  without sharing": "trained/kappa_rows_unshared",
        "gradient norms": "trained/measured",
    },
}
"""Lines of the table, and the count that each shows with all below it; ``scored`` alone is what GCPO adds."""


class CostError(Exception):
    """What keeps the cost from being told; the message is one sentence for the user."""


@dataclass(frozen=True)
class Assumptions:
    """What the model is given besides the configuration."""

    lengths: Lengths
    texts: Texts
    shares: Shares
    weights: Weights
    notes: tuple[str, ...] = ()


# ---- the configuration --------------------------------------------------------------------------------------------


def compose_config(name: str, overrides: Sequence[str]) -> DictConfig:
    """What ``python -m recipe.gcpo.main_gcpo --config-name NAME OVERRIDES`` is given."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException

    verl, folder = find_spec("verl"), Path(gcpo.config.__file__).parent
    if verl is None or verl.origin is None:
        raise CostError("verl is not installed; `gcpo doctor` says what is missing")
    # As a path, because hydra would import verl, and with it torch and vLLM, to find it as a package.
    search = f"hydra.searchpath=[file://{Path(verl.origin).parent / 'trainer' / 'config'}]"
    try:
        with initialize_config_dir(str(folder), version_base=None):
            return compose(name, overrides=[search, *overrides])
    except (HydraException, OmegaConfBaseException) as error:
        raise CostError(f"the configuration {name} can't be made: {' '.join(str(error).split())}") from error


def run_config(log: Path) -> DictConfig:
    """The configuration that the run of a log was given."""
    path = log.parent / "hydra" / ".hydra" / "config.yaml"
    if not path.is_file():
        raise CostError(f"{path} is missing, so the run's configuration is not known; give its overrides as arguments")
    return OmegaConf.load(path)


def step_of(config: DictConfig) -> Step:
    """The settings of a step."""
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    engine = (rollout.get("engine_kwargs") or {}).get("vllm") or {}
    gpus = config.trainer.n_gpus_per_node * config.trainer.nnodes
    return Step(
        groups=config.data.train_batch_size,
        n=rollout.n,
        max_response=config.data.max_response_length,
        budget=actor.ppo_max_token_len_per_gpu,
        epochs=actor.ppo_epochs,
        reference_policy=bool(actor.use_kl_loss),
        recomputed=bool(config.actor_rollout_ref.model.enable_gradient_checkpointing),
        cache_block=int(engine.get("block_size") or CACHE_BLOCK) if rollout.enable_prefix_caching else 0,
        servers=max(1, gpus // rollout.tensor_model_parallel_size),
    )


def variants(config: DictConfig, step: Step) -> tuple[str, dict[str, GCPOConfig], list[str]]:
    """GRPO and every preset with the other settings of ``config``.

    Returns:
        Which of them ``config`` is, their settings, and why a preset is left out.
    """
    raw = OmegaConf.to_container(config.gcpo, resolve=True)

    def settings(**changes: Any) -> GCPOConfig:
        return GCPOConfig.from_config({**raw, **changes}, n=step.n, response_length=step.max_response)

    own, found, notes = settings(), {"grpo": settings(weighting="off", kappa=0.0)}, []
    # GRPO has switched off what makes the presets.
    on = {"weighting": {}, "kappa": GCPOConfig.kappa} if own.is_grpo else {}
    for name in PRESETS:
        try:
            found[name] = settings(preset=name, **on)
        except ConfigError as error:
            if name == raw["preset"] and not own.is_grpo:
                raise
            notes.append(f"{name} is left out: {error}")
    return "grpo" if own.is_grpo else raw["preset"], found, notes


def texts_of(config: DictConfig, blocks: BlocksConfig, tokenizer: str | None) -> tuple[Texts, list[str]]:
    """Tokens of the fixed texts: by the model's tokenizer where it is a local folder, else by their characters."""
    path = tokenizer or str(config.actor_rollout_ref.model.path)
    if not Path(path).is_dir():
        if tokenizer is not None:
            raise CostError(f"--tokenizer: there is no folder {tokenizer}")
        return Texts.estimated(blocks), ["the fixed texts of the prompts are counted as a token for four characters"]
    from transformers import AutoTokenizer

    from gcpo.collider.prompts import CandidatePrompts, PromptTemplate

    template = PromptTemplate(blocks.intro, blocks.candidate, blocks.collider, blocks.outro)
    options = OmegaConf.to_container(config.data.get("apply_chat_template_kwargs") or OmegaConf.create({}))
    prompts = CandidatePrompts(AutoTokenizer.from_pretrained(path), None, template, options)
    return measured_texts(prompts, config.actor_rollout_ref.rollout.n), []


def measured_texts(prompts: Any, n: int) -> Texts:
    """The fixed texts of ``CandidatePrompts`` in tokens, around the shortest question."""
    messages = [{"role": "user", "content": "?"}]
    frame = prompts.frame(messages)
    plain = prompts.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False, **prompts.chat_template_kwargs
    )
    plain = prompts.tokenizer.encode(plain, add_special_tokens=False)
    question = common_prefix(plain, frame.head)
    labels = [prompts.candidate_block(k, []) for k in range(n)]
    return Texts(
        intro=len(frame.head) - question,
        tail=len(frame.tail),
        label=fmean(map(len, labels)),
        label_start=min((common_prefix(labels[0], label) for label in labels[1:]), default=0),
        collider_label=len(prompts.collider_block([])),
        question_end=len(plain) - question,
    )


# ---- lengths ------------------------------------------------------------------------------------------------------


def longest(config: DictConfig, settings: GCPOConfig, step: Step) -> Lengths:
    """The most that the configuration allows, no spread."""
    return Lengths(config.data.max_prompt_length, **length_limits(settings, step))


def read_log(log: Path) -> dict[str, float]:
    """Every metric's mean over the steps that have it."""
    if not log.is_file():
        raise CostError(
            f"there is no log {log}; give the metrics.jsonl of a run, which `file` in trainer.logger writes"
        )
    steps = merge_lines(log.read_text(encoding="utf-8", errors="replace").splitlines())
    steps = {k: data for k, data in steps.items() if "response_length/mean" in data}
    if not steps:
        raise CostError(f"{log} has no training step with response_length/mean; give the metrics.jsonl of a run")
    names = {name for data in steps.values() for name in data}
    return {name: fmean(data[name] for data in steps.values() if name in data) for name in names}


def of_log(
    log: Mapping[str, float], texts: Texts, settings: GCPOConfig, step: Step, *, exact: bool
) -> tuple[Lengths, Texts, Shares]:
    """Lengths, fixed texts and shares of a run; ``exact``: the texts are those of the run's tokenizer."""
    question, response = log["prompt_length/mean"], log["response_length/mean"]
    kinds = {kind: log.get(f"gcpo/rollout/{kind}/tokens_mean") for kind in KINDS[1:]}
    limits = length_limits(settings, step)
    shares = Shares(log.get("gcpo/rollout/equal_rewards_frac", 0.0), {}, {})
    for kind, mean in kinds.items():
        if mean:
            draws = log[f"gcpo/tokens/generated/{kind}"] / mean
            cut, *lost = (log.get(f"gcpo/rollout/{kind}/{outcome}", 0.0) for outcome in ("cut", "failed", "empty"))
            shares.cut[kind], shares.lost[kind] = cut / draws, sum(lost) / draws
            # The log's mean is over all draws.
            valid = max(1 - shares.cut[kind] - shares.lost[kind], 1 / draws)
            kinds[kind] = max(1.0, (mean - shares.cut[kind] * limits[kind]) / valid)
    drawn = next((kinds[kind] for kind in ("collider", "leave_one_out") if kinds[kind]), response)
    means = {kind: min(kinds[kind] or drawn, limits[kind]) for kind in kinds}
    lengths = Lengths(
        question,
        response,
        **means,
        spread=log.get("gcpo/rollout/spread_in_groups", SPREAD),
        group_spread=log.get("gcpo/rollout/spread_of_groups", 0.0),
        alike=log.get("gcpo/rollout/common_prefix_tokens", 0.0),
        alike_draws=log.get("gcpo/rollout/common_prefix_draw_tokens"),
        question_range=(log.get("prompt_length/min", question), log.get("prompt_length/max", question)),
    )
    if "gcpo/prompts/block_tokens" not in log:
        return lengths, texts, shares
    block, frame = log["gcpo/prompts/block_tokens"], log["gcpo/prompts/frame_tokens"]
    if settings.blocks.truncation == "answer":
        lengths = replace(lengths, answer=max(1.0, block - texts.label))
    if not exact:
        groups = ragged_groups(lengths, step.max_response, 64, step.n, np.random.default_rng(0))
        cut = (step.max_response, settings.blocks, lengths.answer)
        text = fmean(block_text(length, *cut) for group in groups for length in group)
        intro = max(0.0, frame - texts.tail - (question - texts.question_end))
        texts = replace(texts, label=max(0.0, block - text), intro=intro)
    return lengths, texts, shares


def weights_of_log(log: Mapping[str, float], tokens: Mapping[str, float], step: Step) -> Weights | None:
    """What a token cost in the run's own stages; ``None`` where a stage took less than its forward passes.

    Args:
        log: means of the run's metrics.
        tokens: what the run's stages went through.
        step: settings of the run.
    """
    seconds = {name: log.get(f"timing_s/{name}", 0.0) for name in ("gen", "old_log_prob", "ref", "update_actor")}
    forward = (seconds["old_log_prob"] + seconds["ref"]) / sum_of(tokens, "scored")
    if not forward:
        return None
    prefilled = sum_of(tokens, "prefilled") - sum_of(tokens, "cached")
    generated = (seconds["gen"] / forward - prefilled) / sum_of(tokens, "generated")
    trained = sum(tokens.get(f"trained/{name}", 0.0) for name in ("plain", "kappa_rows", "measured"))
    backward = seconds["update_actor"] / forward / trained - 1 - step.recomputed
    return Weights(generated, 1.0, 1.0, backward) if min(generated, backward) > 0 else None


# ---- the command --------------------------------------------------------------------------------------------------


def cost(options: Namespace, console: Console | None = None) -> int:
    """Run ``gcpo cost``; 0, or 1 with a sentence where it can't be told."""
    console = console or Console(soft_wrap=True)
    try:
        return _cost(options, console)
    except (CostError, ConfigError, BudgetError, ValueError) as error:
        Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(f"gcpo cost: {error}")
        return 1


def _cost(options: Namespace, console: Console) -> int:
    if options.groups < 1:
        raise CostError(f"--groups is {options.groups}; it must be at least 1")
    if options.equal_rewards is not None and not 0 <= options.equal_rewards <= 1:
        raise CostError(f"--equal-rewards is {options.equal_rewards:g}; it must lie between 0 and 1")
    log = read_log(options.log) if options.log else None
    own = log is not None and not options.overrides and options.config_name is None
    config = (
        run_config(options.log) if own else compose_config(options.config_name or "gcpo_trainer", options.overrides)
    )
    mode = OmegaConf.select(config, "trainer.v1.trainer_mode")
    if mode != "gcpo":
        raise CostError(
            f"the configuration trains with trainer.v1.trainer_mode={mode}; the cost model knows gcpo alone"
        )
    step = step_of(config)
    preset, settings, notes = variants(config, step)
    given = assume(options, config, settings[preset], step, log)
    notes += given.notes
    tokens = {}
    for name, variant in settings.items():
        try:
            tokens[name] = step_tokens(
                variant, step, given.lengths, given.texts, given.shares, simulated=options.groups, seed=options.seed
            )
        except BudgetError as error:
            if name == preset:
                raise
            notes.append(f"{name} is left out: {error}")
    weights = given.weights
    if log is not None and own and not options.weight:
        logged = {name: log.get(f"gcpo/tokens/{name}", value) for name, value in tokens[preset].items()}
        measured = weights_of_log(log, logged, step)
        if measured is not None:
            weights = measured
            notes.append("the weights are those of the run's own stages: seconds of a stage over its tokens")
    costs = {name: stage_costs(found, step, weights) for name, found in tokens.items()}
    compared = compare(tokens[preset], log) if log is not None and own else {}
    if options.json:
        console.print_json(
            json.dumps(
                {
                    "preset": preset,
                    "lengths": vars(given.lengths),
                    "weights": vars(weights),
                    "tokens": tokens,
                    "cost": costs,
                    "ratio": {name: sum(c.values()) / sum(costs["grpo"].values()) for name, c in costs.items()},
                    "log": {name: {"logged": a, "model": b} for name, (a, b) in compared.items()},
                    "notes": notes,
                }
            )
        )
        return 0
    console.print(cost_table(tokens, costs, preset, step))
    if compared:
        console.print(log_table(compared, options.log))
    console.print(explain(given.lengths, weights, notes), highlight=False, markup=False)
    return 0


def assume(
    options: Namespace, config: DictConfig, settings: GCPOConfig, step: Step, log: Mapping[str, float] | None
) -> Assumptions:
    """Lengths and weights: what is given, else what the log says, else the longest that is allowed."""
    texts, notes = texts_of(config, settings.blocks, options.tokenizer)
    shares = Shares()
    if log is not None:
        lengths, texts, shares = of_log(log, texts, settings, step, exact=not notes)
        if settings.needs_generations and "gcpo/rollout/equal_rewards_frac" not in log:
            notes.append("the log does not say how many groups had equal rewards; none is assumed")
    else:
        lengths = longest(config, settings, step)
        if options.response is not None:
            means = {kind: min(options.response, limit) for kind, limit in length_limits(settings, step).items()}
            lengths = replace(lengths, **means, spread=SPREAD, group_spread=SPREAD)
        else:
            notes.append("lengths that are not given are the longest that the configuration allows")
    given = {"leave_one_out": options.collider}
    names = ("question", "response", "collider", "regenerated", "spread", "alike")
    given |= {name: getattr(options, name) for name in names}
    lengths = replace(lengths, **{name: value for name, value in given.items() if value is not None})
    if options.question is not None:
        most = min((1 + SPREAD) * options.question, config.data.max_prompt_length)
        lengths = replace(lengths, question_range=(2 * options.question - most, most))
    if options.equal_rewards is not None:
        shares = replace(shares, equal_rewards=options.equal_rewards)
    weights = Weights()
    for entry in options.weight:
        name, _, value = entry.partition("=")
        try:
            weights = replace(weights, **{name: float(value)})
        except (TypeError, ValueError):
            known = ", ".join(vars(weights))
            raise CostError(f"--weight {entry} is not NAME=NUMBER with one of the names {known}") from None
    return Assumptions(lengths, texts, shares, weights, tuple(notes))


def compare(tokens: Mapping[str, float], log: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """Every counter that the log and the model have: logged, and expected.

    What is cached is added up over the kinds: which of two prompts reaches the server first, and so is not the one that
    finds something, is chance.
    """
    known = {name: value for name, value in tokens.items() if f"gcpo/tokens/{name}" in log}
    found = {name: (log[f"gcpo/tokens/{name}"], value) for name, value in known.items() if not name.startswith(CACHED)}
    cached = [name for name in known if name.startswith(CACHED)]
    found["cached"] = (sum(log[f"gcpo/tokens/{name}"] for name in cached), sum(known[name] for name in cached))
    return {name: pair for name, pair in found.items() if any(pair)}


# ---- output -------------------------------------------------------------------------------------------------------


def short(number: float) -> str:
    """Three digits and a unit."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= 0.9995 * size:
            return f"{number / size:.3g} {unit}" if abs(number) < 999.5 * size else f"{number / size:.0f} {unit}"
    return f"{number:.0f}"


def cost_table(
    tokens: Mapping[str, Mapping[str, float]], costs: Mapping[str, Mapping[str, float]], preset: str, step: Step
) -> Table:
    """Tokens and cost of a step, a column for every method."""
    title = f"Tokens of a step: {step.groups} questions, {step.n} responses each"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for name in tokens:
        table.add_column(f"{name} *" if name == preset else name, justify="right")
    for section, lines in ROWS.items():
        table.add_row(f"[bold]{section}[/bold]")
        for line, name in lines.items():
            table.add_row(f"  {line}", *(_cell(found, name) for found in tokens.values()))
        table.add_section()
    table.add_row("[bold]cost, in forward tokens[/bold]")
    for stage in ("generation", "scoring", "training"):
        table.add_row(f"  {stage}", *(short(found[stage]) for found in costs.values()))
    total = {name: sum(found.values()) for name, found in costs.items()}
    table.add_row("  step", *(short(value) for value in total.values()))
    table.add_row("  ratio to GRPO", *(f"{value / total['grpo']:.2f}" for value in total.values()))
    return table


def _cell(tokens: Mapping[str, float], name: str) -> str:
    if name == SHARE:
        return f"{sum_of(tokens, 'cached') / sum_of(tokens, 'prefilled'):.0%}"
    value = tokens.get(name, 0.0) if name == "scored" else sum_of(tokens, name)
    return short(value) if value else "-"


def log_table(compared: Mapping[str, tuple[float, float]], log: Path) -> Table:
    """What a run logged beside what the model expects of it."""
    title = f"Tokens of a step of {log.parent.name}, mean over the run"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for name, justify in (("gcpo/tokens/", "left"), ("logged", "right"), ("expected", "right"), ("off by", "right")):
        table.add_column(name, justify=justify)
    for name, (logged, expected) in compared.items():
        gap = expected / logged - 1 if logged else float("inf")
        mark = " !" if abs(gap) > TOLERANCE else ""
        table.add_row(name, short(logged), short(expected), f"{gap:+.1%}{mark}")
    return table


def explain(lengths: Lengths, weights: Weights, notes: Sequence[str]) -> str:
    """What the numbers rest on."""
    means = ", ".join(f"{name} {getattr(lengths, name):.4g}" for name in ("question", *KINDS))
    costs = ", ".join(f"{name} {value:.3g}" for name, value in vars(weights).items())
    return "\n".join(
        [
            f"mean tokens: {means}; spread in a group {lengths.spread:.2f}, of groups {lengths.group_spread:.2f}; "
            f"answers to one question begin with {lengths.alike:.3g} tokens in common",
            f"cost of a token: {costs} (cached: 0)",
            *(f"note: {note}" for note in notes),
            "The ratio adds up tokens. It does not know that attention costs more in a longer context, that stages "
            "overlap or wait, how full the accelerator is, nor what a step costs apart from tokens.",
        ]
    )
