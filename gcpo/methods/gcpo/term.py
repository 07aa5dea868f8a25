"""The kappa term of Eq. 10: the KL divergence to the causal reference, over the rows (x_i, y_i)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gcpo.algorithms import causal_kl
from gcpo.methods.base import Term
from gcpo.methods.fields import Field, split
from gcpo.methods.gcpo.fields import CONTEXT_LENGTHS, CONTEXTS, KL_MASK, KL_WEIGHT, LOG_REF
from gcpo.methods.gcpo.settings import GCPOConfig


class KappaTerm(Term):
    """kappa * KL'(y_i | x_i) of Eq. 12.

    Args:
        config: the resolved settings.
        max_tokens: largest number of tokens of a row of the second pass.
    """

    name = "kappa"
    loss_metric = "gcpo/kl_loss"
    tokens_metric = "gcpo/tokens/trained/kappa_rows"
    columns = (LOG_REF, KL_MASK, KL_WEIGHT)

    def __init__(self, config: GCPOConfig, max_tokens: int) -> None:
        self.weight, self.max_kl = config.kappa, config.reference.max_kl
        self.on_plain_rows = config.reference.policy_condition == "query"
        self.inputs = () if self.on_plain_rows else (CONTEXTS, CONTEXT_LENGTHS)
        self.num_shared = config.collider.num_draws
        self.max_tokens, self.packing = max_tokens, config.scoring.packing
        self.min_shared = config.scoring.min_shared_tokens

    def context(self, row: Mapping[Field, Any]) -> Tensor | None:
        """Return x_{i,0}, or the first valid shared context; ``None`` without a reference."""
        lengths = row[CONTEXT_LENGTHS]
        present = torch.nonzero(lengths[: self.num_shared] > 0).flatten()
        if not len(present) or not bool(row[KL_MASK].any()):
            return None
        return split(row[CONTEXTS], lengths)[int(present[0])]

    def loss(self, log_prob: Tensor, columns: Mapping[Field, Tensor]) -> tuple[Tensor, Tensor]:
        """Return KL' of every token [R, T] and its mask, bool [R, T]."""
        mask = columns[KL_MASK].bool()
        # verl multiplies by the mask, and 0 * NaN is NaN, in the loss and in its gradient. Values outside the mask are
        # therefore replaced before the divergence is computed.
        log_prob, log_ref = (torch.where(mask, values, 0) for values in (log_prob, columns[LOG_REF]))
        return columns[KL_WEIGHT] * causal_kl(log_prob, log_ref, max_kl=self.max_kl), mask
