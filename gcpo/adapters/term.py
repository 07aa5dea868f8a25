"""A method's additional loss term, in a second backward pass before each optimizer step or on verl's rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorData
from torch.nn.utils.rnn import pad_sequence
from verl.trainer.ppo.core_algos import agg_loss, kl_penalty
from verl.utils import tensordict_utils as tu
from verl.utils.metric import AggregationType, Metric
from verl.workers.utils.padding import no_padding_2_padding

from gcpo.adapters.schema import from_data
from gcpo.adapters.scoring import attention_for, can_share, packed_batch, with_fillers
from gcpo.methods.base import Term
from gcpo.methods.fields import RESPONSES, Field
from gcpo.scoring.rows import members, pack_rows

UPDATE = "gcpo_update"
"""Non-tensor entry of a training batch: `UpdateSettings`."""
PART = "gcpo_part"
"""Non-tensor entry while the gradient of one part of the loss is measured: its name."""
_LENGTHS = "gcpo_lengths"
"""Column of a pack: the lengths of its responses."""


@dataclass(frozen=True)
class UpdateSettings:
    """Settings of one update, which the driver sends with the batch.

    Attributes:
        loss_agg_mode: verl's setting.
        loss_scale_factor: verl's setting.
        parts: parts of the loss whose gradient norms are measured before the step.
    """

    loss_agg_mode: str
    loss_scale_factor: float | None
    parts: tuple[str, ...] = ()


def update_of(data: TensorDict) -> UpdateSettings | None:
    """Return the settings of the update that a batch is trained in, or ``None`` if no method defines a term."""
    update: Any = tu.get_non_tensor_data(data, UPDATE, None)
    return update


# ---- the rows of the second pass -------------------------------------------------------------------------------------


def term_batch(engine: Any, data: TensorDict, term: Term) -> tuple[TensorDict, bool]:
    """Pack the rows of the term.

    Args:
        engine: a ``GCPOFSDPEngine``.
        data: training rows with the fields of the term.
        term: the method's term; rows for which its ``context`` is ``None`` are omitted.

    Returns:
        A batch of `packed_batch` with the columns of the term, flat in the order of the labels, and whether its rows
        are trees. All ranks have equally many rows.
    """
    found = from_data(data, [RESPONSES, *term.inputs, *term.columns])
    rows = [dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True)]
    chosen = [(context, row) for row in rows if (context := term.context(row)) is not None]
    is_tree = can_share(engine, term.packing)
    packs = pack_rows(
        [torch.cat([context, row[RESPONSES]]) for context, row in chosen],
        [len(context) for context, _ in chosen],
        [None] * len(chosen),
        budget=term.max_tokens if is_tree else None,
        min_shared=term.min_shared,
    )
    inside = [[chosen[i][1] for i in sequences] for sequences in members(packs)]
    everything = with_fillers(engine, packs, is_tree=is_tree)
    fillers = len(everything) - len(packs)
    columns = {
        str(field): [torch.cat([row[field] for row in rows]) for rows in inside]
        + [torch.zeros(1, dtype=field.dtype)] * fillers
        for field in term.columns
    }
    columns[_LENGTHS] = [torch.tensor([len(row[RESPONSES]) for row in rows]) for rows in inside]
    columns[_LENGTHS] += [torch.ones(1, dtype=torch.int64)] * fillers
    batch = packed_batch(everything, **columns)
    for key, value in data.items():
        if isinstance(value, NonTensorData) and key not in batch.keys():
            batch[key] = value
    return batch, is_tree


def term_pass(engine: Any, data: TensorDict, term: Term, run: Callable[[TensorDict, Callable], dict]) -> dict[str, Any]:
    """Run forward and backward passes over the rows of the term.

    Args:
        engine: a ``GCPOFSDPEngine``.
        data: training rows.
        term: the method's term.
        run: verl's pass over a batch with a loss.
    """
    batch, is_tree = term_batch(engine, data, term)
    loss = partial(packed_term_loss, term=term, num_tokens=data["batch_num_tokens"])
    with attention_for(engine, is_tree=is_tree):
        return run(batch, loss)


# ---- losses ----------------------------------------------------------------------------------------------------------


def packed_term_loss(
    model_output: dict[str, torch.Tensor],
    data: TensorDict,
    dp_group: Any = None,
    *,
    term: Term,
    num_tokens: int | None,
) -> tuple[torch.Tensor, dict[str, Metric]]:
    """Compute the term of one pack of concatenated responses.

    Args:
        model_output: ``log_probs``, nested, in the order of the labels.
        data: a micro-batch of `term_batch`.
        dp_group: unused; verl passes it.
        term: the method's term.
        num_tokens: response tokens of verl's rows over all ranks.
    """
    lengths = _flat(data, _LENGTHS).tolist()

    def rows(flat: torch.Tensor) -> torch.Tensor:
        return pad_sequence(list(flat.split(lengths)), batch_first=True)

    def column(field: Field) -> torch.Tensor:
        values = _flat(data, field)
        return rows(values) if field.shape == "[T]" else values.unsqueeze(1)

    columns = {field: column(field) for field in term.columns}
    loss, metrics = _aggregate(rows(_flat(model_output, "log_probs")), columns, data, term, num_tokens)
    # verl sums over micro-batches and takes the mean over ranks. Filler rows are counted.
    tokens = _flat(data, "input_ids").numel() * data["dp_size"]
    return loss, {**metrics, term.tokens_metric: Metric(AggregationType.SUM, tokens)}


def _flat(data: Any, name: str) -> torch.Tensor:
    """Return the values of a nested entry."""
    return data[name].values()


def _aggregate(
    log_prob: torch.Tensor,
    columns: Mapping[Field, torch.Tensor],
    data: TensorDict,
    term: Term,
    num_tokens: int | None,
) -> tuple[torch.Tensor, dict[str, Metric]]:
    """Compute the term, normalised as verl normalises the policy term of the same rows."""
    values, mask = term.loss(log_prob, columns)
    update = update_of(data)
    assert update is not None
    loss = agg_loss(
        loss_mat=values,
        loss_mask=mask,
        loss_agg_mode=update.loss_agg_mode,
        dp_size=data["dp_size"],
        batch_num_tokens=num_tokens,
        global_batch_size=data["global_batch_size"],
        loss_scale_factor=update.loss_scale_factor,  # pyright: ignore[reportArgumentType]  (verl divides by any number)
    )
    return term.weight * loss, {term.loss_metric: Metric(AggregationType.SUM, loss)}


def method_loss(
    model_output: dict[str, torch.Tensor],
    data: TensorDict,
    dp_group: Any = None,
    *,
    base: Callable,
    config: Any,
    term: Term | None,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Compute verl's loss on its rows plus a term on the same rows.

    While a part is measured, only that part is returned.

    Args:
        base: verl's ``ppo_loss`` with its configuration bound.
        config: verl's actor configuration.
        term: the method's term.
    """
    part = tu.get_non_tensor_data(data, PART, None)
    if update_of(data) is None:
        return base(model_output=model_output, data=data, dp_group=dp_group)
    on_these_rows = term is not None and term.on_plain_rows
    log_prob: Any = no_padding_2_padding(model_output["log_probs"], data) if on_these_rows or part else None
    if part == "beta":
        return _beta_term(log_prob, data, config), {}
    if term is not None and (part == term.name or (on_these_rows and part is None)):
        padded = data.select(*map(str, term.columns)).to_padded_tensor()
        columns = {field: padded[field] for field in term.columns}
        own_loss, own_metrics = _aggregate(log_prob, columns, data, term, data["batch_num_tokens"])
        if part is not None:
            return own_loss, own_metrics
        loss, metrics = base(model_output=model_output, data=data, dp_group=dp_group)
        return loss + own_loss, {**metrics, **own_metrics}
    loss, metrics = base(model_output=model_output, data=data, dp_group=dp_group)
    if part == "policy":
        return (loss - _beta_term(log_prob, data, config) if config.use_kl_loss else loss), {}
    return loss, metrics


def _beta_term(log_prob: Any, data: TensorDict, config: Any) -> torch.Tensor:
    """Return the part of verl's loss that is beta * KL(pi_theta || pi_ref)."""
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
