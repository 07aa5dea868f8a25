"""Checks of the lengths of prompts and responses against the model's context and the token budgets."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, open_dict

from gcpo.methods.gcpo.settings import GCPOConfig
from gcpo.reading import ACTOR, ROLLOUT, get
from gcpo.settings import ConfigError

_PROMPT, _RESPONSE = "data.max_prompt_length", "data.max_response_length"


def longest_prompt(config: DictConfig, gcpo: GCPOConfig) -> int:
    """Return the tokens of the longest prompt with candidates: the question, blocks with labels, and fixed texts.

    The labels and fixed texts are counted as one token per character, an upper bound for plain text.
    """
    n = get(config, f"{ROLLOUT}.n")
    blocks = gcpo.blocks
    count = n + (gcpo.reference.collider_context == "append")
    label = max(len(blocks.candidate.format(label=n)), len(blocks.collider))
    return get(config, _PROMPT) + len(blocks.intro + blocks.outro) + count * (blocks.max_tokens + label)


def check_lengths(config: DictConfig, gcpo: GCPOConfig, model: Any) -> None:
    """Check that everything generated and scored fits, and fill in ``rollout.max_model_len`` if it is null.

    Args:
        config: the run's configuration; may be changed.
        gcpo: the resolved ``gcpo`` group.
        model: transformers' configuration of the model, or ``None`` if it is unknown.

    Raises:
        ConfigError: a prompt with its response is longer than the context or a token budget.
    """
    rollout = config.actor_rollout_ref.rollout
    prompt, response = get(config, _PROMPT), get(config, _RESPONSE)
    need, longest_row = prompt + response, prompt + response
    if gcpo.needs_rollout:
        with_blocks = longest_prompt(config, gcpo)
        longest_row = max(need, with_blocks + response)
        need = max(need, with_blocks + max(gcpo.collider.max_tokens, gcpo.regenerated.max_tokens))
    context = getattr(model, "max_position_embeddings", None)
    if context is not None and prompt + response > context:
        raise ConfigError(
            f"{_PROMPT} + {_RESPONSE} is {prompt + response}, the model's context {context}: make one of them smaller"
        )
    limit = rollout.get("max_model_len") or context
    if limit is not None and max(need, longest_row) > limit:
        raise ConfigError(
            f"a prompt with {rollout.n} candidates can take {max(need, longest_row)} tokens with its response, and the "
            f"context is {limit}: lower gcpo.blocks.max_tokens (now {gcpo.blocks.max_tokens}), "
            "gcpo.collider.max_tokens or gcpo.regenerated.max_tokens, or raise "
            f"{ROLLOUT}.max_model_len as far as the model allows"
        )
    _check_budgets(config, gcpo, prompt + response, longest_row)
    if rollout.get("max_model_len") is None:
        with open_dict(config):
            rollout.max_model_len = max(need, longest_row)


def _check_budgets(config: DictConfig, gcpo: GCPOConfig, row: int, longest_row: int) -> None:
    """Check that no row is longer than a micro-batch, at which verl would stop within a step."""
    budget = gcpo.scoring.max_token_len_per_gpu or get(config, f"{ACTOR}.ppo_max_token_len_per_gpu")
    if not gcpo.is_grpo and longest_row > budget:
        raise ConfigError(
            f"the longest context to score takes {longest_row} tokens, a micro-batch holds {budget}: raise "
            "gcpo.scoring.max_token_len_per_gpu or lower gcpo.blocks.max_tokens"
        )
    budgets = [f"{ACTOR}.ppo_max_token_len_per_gpu", f"{ROLLOUT}.log_prob_max_token_len_per_gpu"]
    if get(config, f"{ACTOR}.use_kl_loss"):
        budgets.append("actor_rollout_ref.ref.log_prob_max_token_len_per_gpu")
    for key in budgets if get(config, f"{ACTOR}.use_dynamic_bsz") else []:
        if get(config, key) is not None and row > get(config, key):
            raise ConfigError(
                f"a prompt and its response can take {row} tokens ({_PROMPT} + {_RESPONSE}), and {key} is "
                f"{get(config, key)}: set {key}={row} or more"
            )
