"""A term of a method outside its mask."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu

from gcpo.adapters.term import UPDATE, UpdateSettings, _aggregate
from gcpo.methods.gcpo.fields import KL_MASK, KL_WEIGHT, LOG_REF
from gcpo.methods.gcpo.settings import GCPOConfig
from gcpo.methods.gcpo.term import KappaTerm


@pytest.mark.parametrize("mode", ["seq-mean-token-mean", "seq-mean-token-sum", "token-mean"])
@pytest.mark.parametrize("filler", [math.nan, math.inf, -math.inf])
def test_values_outside_the_mask_reach_neither_loss_nor_gradient(mode: str, filler: float) -> None:
    """verl multiplies by the mask, and 0 * NaN is NaN."""
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    term = KappaTerm(GCPOConfig.from_config({"kappa": 0.5}, n=4, response_length=8), 100)
    data = TensorDict({}, batch_size=[])
    tu.assign_non_tensor(data, dp_size=1, global_batch_size=2, **{UPDATE: UpdateSettings(mode, None)})
    found = []
    for value in (0.0, filler):
        log_prob = torch.tensor([[-1.0, -2.0, value], [value, -1.0, value]], requires_grad=True)
        log_ref = torch.where(mask.bool(), torch.tensor([[-1.5, -1.0, 0.0]] * 2), value)
        columns = {LOG_REF: log_ref, KL_MASK: mask, KL_WEIGHT: torch.tensor([[2.0], [1.0]])}
        loss, _ = _aggregate(log_prob, columns, data, term, 2)
        loss.backward()
        found.append((loss.detach(), log_prob.grad))
    assert found[0][0] > 0 and torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert found[1][1][mask.bool()].all() and not found[1][1][~mask.bool()].any()
