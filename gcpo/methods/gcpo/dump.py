"""GCPO's part of the rollout dump: Upsilon, the kappa term, log rho of every token, the draws and their prompts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gcpo.algorithms import causal_kl
from gcpo.collider.prompts import CandidatePrompts
from gcpo.methods.base import Batch, Dump
from gcpo.methods.fields import RESPONSES
from gcpo.methods.gcpo import fields as own
from gcpo.methods.gcpo.credit import CausalCredit
from gcpo.methods.gcpo.rollout import dumped_draws
from gcpo.methods.gcpo.settings import GCPOConfig
from gcpo.methods.stations import brief
from gcpo.tokens import TokenReader, plain_decoder


def dump_batch(config: GCPOConfig, batch: Batch, credit: CausalCredit | None, prompts: CandidatePrompts | None) -> Dump:
    """Return the columns of the responses and the draws that the rollout kept.

    Args:
        config: the resolved settings.
        batch: the rows after the update.
        credit: Upsilon, or ``None`` if weighting is off.
        prompts: builder of the prompts; ``None``: no draws are dumped.
    """
    dump = Dump()
    if credit is not None:
        dump.columns = {"upsilon": brief(credit.weight), "has_target": credit.has_target.tolist()}
    if config.reference_on:
        dump.columns["kappa_kl"] = [None] * batch.size
        for rows, data in zip(batch.groups.values(), batch.by_group(own.LOG_RHO, own.KL_MASK), strict=True):
            for row, log_rho, mask in zip(rows, data[own.LOG_RHO], data[own.KL_MASK], strict=True):
                dump.columns["kappa_kl"][row] = mean_kl(log_rho[mask.bool()], config.reference.max_kl)
    if prompts is not None:
        _add_draws(dump, batch, prompts)
        if config.reference_on:
            _add_tokens(dump, batch, prompts.tokenizer)
    return dump


def mean_kl(log_rho: Tensor, max_kl: float) -> float | None:
    """Return the mean of KL' over the tokens of a response with a kappa term [K], or ``None`` if K is 0."""
    kl = causal_kl(torch.zeros_like(log_rho)[None], log_rho[None], max_kl=max_kl)
    return brief(kl.mean()[None])[0]


def _add_draws(dump: Dump, batch: Batch, prompts: CandidatePrompts) -> None:
    """Add the draws, and to them and the responses of their groups the text ``block`` that stands in prompts."""
    decode = plain_decoder(prompts.tokenizer)
    dump.columns["block"] = [None] * batch.size
    for (uid, rows), data in zip(batch.groups.items(), batch.by_group(RESPONSES, *own.DUMP), strict=True):
        draws = dumped_draws(*(data[name][0] for name in own.DUMP))
        for draw in draws:
            seen = draw["outcome"] == "ok" and draw["kind"] != "regenerated"
            block = decode(prompts.trim(draw["token_ids"])) if seen else None
            dump.draws.append({"uid": uid, "row": rows[0], **draw, "block": block})
        for row, response in zip(rows if draws else (), data[RESPONSES], strict=False):
            dump.columns["block"][row] = decode(prompts.trim(response.tolist()))


def _add_tokens(dump: Dump, batch: Batch, tokenizer: Any) -> None:
    """Add the texts of the tokens and their log rho to the responses with a kappa term whose draws are dumped."""
    reader, names = TokenReader(tokenizer), ("tokens", "log_rho")
    dump.columns |= {name: [None] * batch.size for name in names}
    for row in (row for row, block in enumerate(dump.columns["block"]) if block is not None):
        data = batch.fetch([row], (RESPONSES, own.LOG_RHO, own.KL_MASK))
        (response,), (log_rho,), (mask,) = data.values()
        if not mask.any():
            continue
        text, spans = reader.read(response.tolist())
        # Tokens that form one character together have its span; the first one gets the character.
        ends = [0, *(end for _, end in spans)]
        tokens = [text[max(start, before) : end] for before, (start, end) in zip(ends, spans, strict=False)]
        values = brief(log_rho.where(mask.bool(), torch.nan))
        for name, value in zip(names, (tokens, values), strict=True):
            dump.columns[name][row] = value
