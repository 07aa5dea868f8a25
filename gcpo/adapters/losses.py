"""The parts of Eq. 10 that verl's ``ppo_loss`` does not have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict
from torch.nn.utils.rnn import pad_sequence
from verl.trainer.ppo.core_algos import agg_loss, kl_penalty
from verl.utils import tensordict_utils as tu
from verl.utils.metric import AggregationType, Metric
from verl.workers.utils.padding import no_padding_2_padding

from gcpo.algorithms import causal_kl

PARTS = ("policy", "beta", "kappa")
KAPPA_TOKENS = "gcpo/tokens/trained/kappa_rows"


def _kappa_term(
    log_prob: torch.Tensor, data: TensorDict, settings: dict[str, Any], num_tokens: int | None
) -> tuple[torch.Tensor, dict[str, Metric]]:
    """kappa times the aggregated KL' of Eq. 12, normalised like verl normalises the policy term of the same rows."""
    padded = data.select("gcpo_log_ref", "gcpo_kl_mask", "gcpo_kl_weight").to_padded_tensor()
    log_ref, mask = padded["gcpo_log_ref"], padded["gcpo_kl_mask"].bool()
    return _aggregate(log_prob, log_ref, mask, padded["gcpo_kl_weight"], data, settings, num_tokens)


def _aggregate(
    log_prob: torch.Tensor,
    log_ref: torch.Tensor,
    mask: torch.Tensor,
    weight: torch.Tensor,
    data: TensorDict,
    settings: dict[str, Any],
    num_tokens: int | None,
) -> tuple[torch.Tensor, dict[str, Metric]]:
    # verl multiplies by the mask, and 0 * NaN is NaN, in the loss and in its gradient. Values outside the mask are
    # therefore replaced before the divergence is taken.
    log_prob, log_ref = (torch.where(mask, values, 0) for values in (log_prob, log_ref))
    kl = weight * causal_kl(log_prob, log_ref, max_kl=settings["max_kl"])
    loss = agg_loss(
        loss_mat=kl,
        loss_mask=mask,
        loss_agg_mode=settings["loss_agg_mode"],
        dp_size=data["dp_size"],
        batch_num_tokens=num_tokens,
        global_batch_size=data["global_batch_size"],
        loss_scale_factor=settings["loss_scale_factor"],
    )
    return settings["kappa"] * loss, {"gcpo/kl_loss": Metric(AggregationType.SUM, loss)}


def causal_kl_loss(
    model_output: dict[str, torch.Tensor],
    data: TensorDict,
    dp_group: Any = None,
    *,
    settings: dict[str, Any],
    num_tokens: int | None,
) -> tuple[torch.Tensor, dict[str, Metric]]:
    """Loss of the conditioned rows: kappa * KL'(y_i | x_i), Eq. 10 and 12.

    Args:
        model_output: ``log_probs``, nested over context and response.
        data: conditioned rows of ``conditioned_batch``.
        dp_group: unused; verl passes it.
        settings: ``kappa``, ``max_kl``, ``loss_agg_mode``, ``loss_scale_factor``.
        num_tokens: response tokens of the plain rows over all ranks.
    """
    loss, metrics = _kappa_term(no_padding_2_padding(model_output["log_probs"], data), data, settings, num_tokens)
    return loss, metrics | _trained_tokens(data)


def _trained_tokens(data: TensorDict) -> dict[str, Metric]:
    """Tokens of a micro-batch of the conditioned pass, rows of two tokens that stand for nothing among them."""
    # verl sums over micro-batches and takes the mean over ranks.
    tokens = data["input_ids"].values().numel() * data["dp_size"]
    return {KAPPA_TOKENS: Metric(AggregationType.SUM, tokens)}


def packed_causal_kl_loss(
    model_output: dict[str, torch.Tensor],
    data: TensorDict,
    dp_group: Any = None,
    *,
    settings: dict[str, Any],
    num_tokens: int | None,
) -> tuple[torch.Tensor, dict[str, Metric]]:
    """``causal_kl_loss`` of one pack of ``conditioned_packs``, whose responses stand one after another."""
    lengths = data["gcpo_lengths"].values().tolist()

    def rows(flat: torch.Tensor) -> torch.Tensor:
        return pad_sequence(flat.split(lengths), batch_first=True)

    log_prob, log_ref, mask = (
        rows(nested.values()) for nested in (model_output["log_probs"], data["gcpo_log_ref"], data["gcpo_kl_mask"])
    )
    weight = data["gcpo_kl_weight"].values().unsqueeze(1)
    loss, metrics = _aggregate(log_prob, log_ref, mask.bool(), weight, data, settings, num_tokens)
    return loss, metrics | _trained_tokens(data)


def gcpo_loss(
    model_output: dict[str, torch.Tensor],
    data: TensorDict,
    dp_group: Any = None,
    *,
    base: Callable,
    config: Any,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """verl's loss on the plain rows, with what GCPO adds to it there.

    With ``reference.policy_condition: query`` the kappa term is over the same rows. While a part is measured, that part
    alone is returned.

    Args:
        base: verl's ``ppo_loss`` with its configuration bound.
        config: verl's actor configuration.
    """
    settings = tu.get_non_tensor_data(data, "gcpo", None)
    part = tu.get_non_tensor_data(data, "gcpo_part", None)
    if not settings:
        return base(model_output=model_output, data=data, dp_group=dp_group)
    on_query = settings["kappa"] > 0 and settings["policy_condition"] == "query"
    log_prob = no_padding_2_padding(model_output["log_probs"], data) if on_query or part else None
    if part == "kappa":
        return _kappa_term(log_prob, data, settings, data["batch_num_tokens"])
    if part == "beta":
        return _beta_term(log_prob, data, config), {}
    loss, metrics = base(model_output=model_output, data=data, dp_group=dp_group)
    if part == "policy":
        return (loss - _beta_term(log_prob, data, config) if config.use_kl_loss else loss), {}
    if on_query:
        kappa_loss, kappa_metrics = _kappa_term(log_prob, data, settings, data["batch_num_tokens"])
        return loss + kappa_loss, {**metrics, **kappa_metrics}
    return loss, metrics


def _beta_term(log_prob: torch.Tensor, data: TensorDict, config: Any) -> torch.Tensor:
    """The share of verl's loss that is beta * KL(pi_theta || pi_ref)."""
    padded = data.select("response_mask", "ref_log_prob").to_padded_tensor()
    kl = kl_penalty(logprob=log_prob, ref_logprob=padded["ref_log_prob"], kl_penalty=config.kl_loss_type)
    return config.kl_loss_coef * agg_loss(
        loss_mat=kl,
        loss_mask=padded["response_mask"].bool(),
        loss_agg_mode=config.loss_agg_mode,
        dp_size=data["dp_size"],
        batch_num_tokens=data["batch_num_tokens"],
        global_batch_size=data["global_batch_size"],
        loss_scale_factor=config.loss_scale_factor,
    )
