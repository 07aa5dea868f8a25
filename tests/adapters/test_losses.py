"""The kappa term's loss outside its mask."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu

from gcpo.adapters.losses import _aggregate


@pytest.mark.parametrize("mode", ["seq-mean-token-mean", "seq-mean-token-sum", "token-mean"])
@pytest.mark.parametrize("filler", [math.nan, math.inf, -math.inf])
def test_values_outside_the_mask_reach_neither_loss_nor_gradient(mode: str, filler: float) -> None:
    """verl multiplies by the mask, and 0 * NaN is NaN."""
    mask = torch.tensor([[True, True, False], [False, False, False]])
    data = TensorDict({}, batch_size=[])
    tu.assign_non_tensor(data, dp_size=1, global_batch_size=2)
    settings = {"kappa": 0.5, "max_kl": 10.0, "loss_agg_mode": mode, "loss_scale_factor": None}
    found = []
    for value in (0.0, filler):
        log_prob = torch.tensor([[-1.0, -2.0, value], [value, -1.0, value]], requires_grad=True)
        log_ref = torch.where(mask, torch.tensor([[-1.5, -1.0, 0.0]] * 2), value)
        weight = torch.tensor([[2.0], [1.0]])
        loss, _ = _aggregate(log_prob, log_ref, mask, weight, data, settings, 2)
        loss.backward()
        found.append((loss.detach(), log_prob.grad))
    assert found[0][0] > 0 and torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert found[1][1][mask].all() and not found[1][1][~mask].any()
