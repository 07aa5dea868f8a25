"""The inputs of ``gcpo cost``: the configuration, the tokenizer and the lengths, given directly or by a run's log."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import gcpo.config
from gcpo.methods import method_class, method_names
from gcpo.methods.base import Method, Run
from gcpo.methods.gcpo.draws import KINDS
from gcpo.methods.gcpo.presets import PRESETS
from gcpo.methods.gcpo.settings import GCPOConfig, GCPOSettings
from gcpo.settings import ConfigError
from gcpo.tools.cost.step import Step
from gcpo.tools.cost.texts import Lengths, Tokenizer
from gcpo.tools.report import merge_lines

SPREAD = 0.3
"""Assumed spread of the lengths of a group if only the mean is given."""
CACHE_BLOCK = 16
"""vLLM's default on a GPU."""


class CostError(Exception):
    """The cost cannot be computed; the message is one sentence for the user."""


# ---- the configuration -----------------------------------------------------------------------------------------------


def compose_config(name: str, overrides: Sequence[str]) -> DictConfig:
    """Return the configuration of ``python -m recipe.gcpo.main_gcpo --config-name NAME OVERRIDES``."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException

    verl, folder = find_spec("verl"), Path(gcpo.config.__file__).parent
    if verl is None or verl.origin is None:
        raise CostError("verl is not installed; `gcpo doctor` says what is missing")
    # The folder is given as a path, because hydra would import verl, torch and vLLM to find it as a package.
    search = f"hydra.searchpath=[file://{Path(verl.origin).parent / 'trainer' / 'config'}]"
    try:
        with initialize_config_dir(str(folder), version_base=None):
            return compose(name, overrides=[search, *overrides])
    except (HydraException, OmegaConfBaseException) as error:
        raise CostError(f"the configuration {name} can't be made: {' '.join(str(error).split())}") from error


def run_config(log: Path) -> DictConfig:
    """Return the configuration of the run of a log."""
    path = log.parent / "hydra" / ".hydra" / "config.yaml"
    if not path.is_file():
        raise CostError(f"{path} is missing, so the run's configuration is not known; give its overrides as arguments")
    config: Any = OmegaConf.load(path)
    return config


def step_of(config: DictConfig) -> Step:
    """Return the settings of a step."""
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    engine = (rollout.get("engine_kwargs") or {}).get("vllm") or {}
    gpus = config.trainer.n_gpus_per_node * config.trainer.nnodes
    return Step(
        run=Run.of(config),
        questions=config.data.train_batch_size,
        epochs=actor.ppo_epochs,
        recomputed=bool(config.actor_rollout_ref.model.enable_gradient_checkpointing),
        cache_block=int(engine.get("block_size") or CACHE_BLOCK) if rollout.enable_prefix_caching else 0,
        servers=max(1, gpus // rollout.tensor_model_parallel_size),
    )


def variants(config: DictConfig, run: Run) -> tuple[str, dict[str, Method], list[str]]:
    """Return GRPO and the method of ``config``; for GCPO every preset, with the other settings of ``config``.

    Returns:
        The name of the configuration's own variant, all variants, and the reasons of omitted presets.
    """
    mode = OmegaConf.select(config, "trainer.v1.trainer_mode")
    if mode not in method_names():
        known = ", ".join(method_names())
        raise CostError(f"the configuration trains with trainer.v1.trainer_mode={mode}; the cost model knows {known}")
    method = method_class(mode)
    raw: Any = OmegaConf.to_container(config[mode], resolve=True)
    own = method.parse(raw, run)
    found, notes = {"grpo": Method(None, run)}, []
    if not isinstance(own, GCPOConfig):
        return mode, {**found, mode: method(own, run)}, notes
    # A GRPO configuration disables the settings of the presets.
    on = {"weighting": {}, "kappa": GCPOSettings.model_fields["kappa"].default} if own.is_grpo else {}
    for name in PRESETS:
        try:
            found[name] = method(method.parse({**raw, "preset": name, **on}, run), run)
        except ConfigError as error:
            if name == raw["preset"] and not own.is_grpo:
                raise
            notes.append(f"{name} is left out: {error}")
    return "grpo" if own.is_grpo else raw["preset"], found, notes


def tokenizer_of(config: DictConfig, run: Run) -> tuple[Tokenizer, list[str]]:
    """Return the model's tokenizer, if it is in a local folder or in the cache of Hugging Face."""
    from transformers import AutoTokenizer

    try:
        inner = AutoTokenizer.from_pretrained(str(config.actor_rollout_ref.model.path), local_files_only=True)
    except (OSError, ValueError):
        return Tokenizer(), ["the fixed texts of the prompts are counted as a token for four characters"]
    return Tokenizer(inner, run.chat_template_kwargs), []


# ---- lengths ---------------------------------------------------------------------------------------------------------


def read_log(log: Path) -> dict[str, float]:
    """Return the mean of every metric over the steps that have it."""
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


def of_log(log: Mapping[str, float], limits: Mapping[str, int]) -> Lengths:
    """Return the lengths of a run, with the limits of all kinds of draws."""
    response, draws, cut = log["response_length/mean"], {}, {}
    for kind, limit in limits.items():
        mean = log.get(f"gcpo/rollout/{kind}/tokens_mean")
        if mean:
            # The logged mean is over all draws; cut draws are as long as the limit.
            share = log.get(f"gcpo/rollout/{kind}/cut", 0.0) * mean / log[f"gcpo/tokens/generated/{kind}"]
            cut[kind], draws[kind] = share, max(1.0, (mean - share * limit) / max(1 - share, 1e-3))
    known = next(iter(draws.values()), response)
    return Lengths(
        log["prompt_length/mean"],
        response,
        {kind: min(draws.get(kind, known), limit) for kind, limit in limits.items()},
        spread=log.get("gcpo/rollout/spread_in_groups", SPREAD),
        group_spread=log.get("gcpo/rollout/spread_of_groups", 0.0),
        common=log.get("gcpo/rollout/common_prefix_tokens", 0.0),
        common_draws=log.get("gcpo/rollout/common_prefix_draw_tokens"),
        episodes=next((log[name] for name in log if name.endswith("/episodes/mean")), Lengths.episodes),
        equal_rewards=log.get("gcpo/rollout/equal_rewards_frac", 0.0),
        cut=cut,
    )


def assume(
    options: Namespace, config: DictConfig, limits: Mapping[str, int], log: Mapping[str, float] | None
) -> tuple[Lengths, list[str]]:
    """Return the given lengths, else those of the log, else the longest allowed ones."""
    notes = []
    if log is not None:
        lengths = of_log(log, limits)
    else:
        lengths = Lengths(config.data.max_prompt_length, config.data.max_response_length, limits)
        if options.response is not None:
            draws = {kind: min(options.response, limit) for kind, limit in limits.items()}
            lengths = replace(lengths, draws=draws, spread=SPREAD, group_spread=SPREAD)
        else:
            notes.append("lengths that are not given are the longest that the configuration allows")
    given = {kind: options.regenerated if kind == KINDS[2] else options.collider for kind in limits}
    changes: dict[str, Any] = {"draws": {**lengths.draws, **{k: v for k, v in given.items() if v is not None}}}
    for name, option in (("common", "alike"), *((n, n) for n in ("question", "response", "equal_rewards", "episodes"))):
        if getattr(options, option) is not None:
            changes[name] = getattr(options, option)
    return replace(lengths, **changes), notes
