"""GVPO's loss and advantages: numbers by hand, the gradient, and what must change nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gcpo.algorithms import gvpo_advantage, gvpo_loss


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


BY_HAND = [
    # beta, R, D, d, loss
    (1.0, [1, 0], [0, 0], [-0.5, 0.5], 0.25),
    (0.1, [1, 0, 0, 1], [2, -1, 0, 3], [-0.4, 0.3, 0.4, -0.3], 0.25 / 3),
    (0.1, [1, 1, 1, 1], [1, 0, 0, -1], [0.1, 0, 0, -0.1], 0.01 / 3),
]


@pytest.mark.parametrize(("beta", "rewards", "log_ratio", "difference", "loss"), BY_HAND)
def test_by_hand(beta, rewards, log_ratio, difference, loss):
    ratio = vector(*log_ratio).requires_grad_()
    found = gvpo_loss(vector(*rewards), ratio, beta=beta)
    found.backward()
    assert found.shape == () and found.item() == pytest.approx(loss, abs=1e-12)
    expected = beta * vector(*difference) / (len(rewards) - 1)
    assert ratio.grad is not None
    torch.testing.assert_close(ratio.grad, expected)
    advantage = gvpo_advantage(vector(*rewards), ratio, beta=beta)
    torch.testing.assert_close(advantage, -vector(*difference))
    assert not advantage.requires_grad


def test_the_optimum_of_theorem_3_1():
    """pi* is proportional to exp(R / beta); there the loss is 0."""
    rewards, beta = vector(1, 1, 0), 0.5
    policy = (rewards / beta).softmax(0)
    torch.testing.assert_close(policy, vector(0.4683105, 0.4683105, 0.0633789), atol=1e-7, rtol=0)
    log_ratio = (policy * 3).log()
    torch.testing.assert_close(log_ratio - log_ratio[0], vector(0, 0, -2))
    assert gvpo_loss(rewards, log_ratio, beta=beta).item() == pytest.approx(0, abs=1e-15)
    torch.testing.assert_close(gvpo_advantage(rewards, log_ratio, beta=beta), vector(0, 0, 0))


@pytest.mark.parametrize("n", [2, 3, 8])
def test_gradient(n):
    """Finite differences of the loss, and the policy-gradient loss whose constant advantages have the same gradient."""
    generator = torch.Generator().manual_seed(n)
    rewards, log_ratio = torch.randn(2, n, generator=generator, dtype=torch.float64)
    log_ratio.requires_grad_()
    assert torch.autograd.gradcheck(lambda ratio: gvpo_loss(rewards, ratio, beta=0.3), log_ratio)
    (gradient,) = torch.autograd.grad(gvpo_loss(rewards, log_ratio, beta=0.3), log_ratio)
    surrogate = -0.3 / (n - 1) * (gvpo_advantage(rewards, log_ratio, beta=0.3) * log_ratio).sum()
    torch.testing.assert_close(gradient, torch.autograd.grad(surrogate, log_ratio)[0])


def test_what_changes_nothing():
    """A constant added to all rewards or all log-ratios, and the order of the group."""
    generator = torch.Generator().manual_seed(0)
    rewards, log_ratio = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    loss, advantage = gvpo_loss(rewards, log_ratio), gvpo_advantage(rewards, log_ratio)
    torch.testing.assert_close(gvpo_loss(rewards + 7, log_ratio - 3), loss)
    torch.testing.assert_close(gvpo_advantage(rewards + 7, log_ratio - 3), advantage)
    order = torch.randperm(6, generator=generator)
    torch.testing.assert_close(gvpo_loss(rewards[order], log_ratio[order]), loss)
    torch.testing.assert_close(gvpo_advantage(rewards[order], log_ratio[order]), advantage[order])
    assert advantage.sum().item() == pytest.approx(0, abs=1e-12)


def test_a_small_beta_is_reinforce_with_a_mean_baseline():
    rewards, log_ratio = vector(1, 0, 0, 1), vector(2, -1, 0, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(gvpo_loss(rewards, log_ratio, beta=1e-9), log_ratio)
    torch.testing.assert_close(gradient / 1e-9, -(rewards - 0.5) / 3, atol=1e-8, rtol=0)


@pytest.mark.parametrize("n", [0, 1])
def test_small_groups(n):
    rewards, log_ratio = torch.ones(n), torch.full((n,), 5.0, requires_grad=True)
    loss = gvpo_loss(rewards, log_ratio)
    loss.backward()
    assert loss.item() == 0 and log_ratio.grad is not None and log_ratio.grad.tolist() == [0.0] * n
    assert gvpo_advantage(rewards, log_ratio).tolist() == [0.0] * n


def test_types_and_errors():
    assert gvpo_loss(torch.tensor([1, 0]), torch.zeros(2, dtype=torch.bfloat16)).dtype == torch.float32
    assert gvpo_advantage(vector(1, 0), torch.zeros(2)).dtype == torch.float64
    rewards = torch.tensor([1.0, 0.0], requires_grad=True)
    assert not gvpo_loss(rewards, torch.zeros(2)).requires_grad
    for function in (gvpo_advantage, gvpo_loss):
        with pytest.raises(ValueError, match="log_ratio"):
            function(torch.ones(3), torch.ones(2))
        with pytest.raises(ValueError, match="beta"):
            function(torch.ones(2), torch.ones(2), beta=-1)
        assert math.isfinite(float(function(torch.ones(2), torch.ones(2)).sum()))
