"""Eq. 8 and B = A * Upsilon: numbers worked out by hand, and verl's own function as the referee."""

import pytest
import torch

from gcpo.algorithms import causal_advantage, causal_weight, group_relative_advantage


def test_numbers_by_hand():
    """Group 7 holds 1, 0: mean 1/2, std sqrt(1/2). Group -3 holds 3, 1, 2: mean 2, std 1. 40 is alone."""
    rewards = torch.tensor([1.0, 3.0, 0.0, 1.0, 5.0, 2.0], dtype=torch.float64)
    group = torch.tensor([7, -3, 7, -3, 40, -3])
    half, one = 0.5 / (0.5**0.5 + 1e-6), 1 / (1 + 1e-6)
    expected = torch.tensor([half, one, -half, -one, 5 * one, 0.0], dtype=torch.float64)
    torch.testing.assert_close(group_relative_advantage(rewards, group), expected)


def test_without_std_and_with_another_eps():
    rewards, group = torch.tensor([3.0, 1.0, 2.0, 5.0]), torch.tensor([0, 0, 0, 1])
    plain = group_relative_advantage(rewards, group, norm_by_std=False)
    torch.testing.assert_close(plain, torch.tensor([1.0, -1.0, 0.0, 5.0]))
    # std 1 and eps 1: the deviations halve; so does the reward of the group of one.
    shrunk = group_relative_advantage(rewards, group, eps=1.0)
    torch.testing.assert_close(shrunk, torch.tensor([0.5, -0.5, 0.0, 2.5]))


def test_equal_rewards_have_no_advantage():
    rewards = torch.full((4,), 0.25)
    assert torch.equal(group_relative_advantage(rewards, torch.zeros(4, dtype=torch.long)), torch.zeros(4))


def _verl(rewards, group, norm_by_std):
    """verl's value for one response token that carries the whole reward."""
    core_algos = pytest.importorskip("verl.trainer.ppo.core_algos")
    advantage, _ = core_algos.compute_grpo_outcome_advantage(
        rewards.clone().unsqueeze(-1),
        torch.ones(len(rewards), 1),
        group.numpy(),
        norm_adv_by_std_in_grpo=norm_by_std,
    )
    return advantage.squeeze(-1)


@pytest.mark.parametrize("norm_by_std", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bit_for_bit_verl(norm_by_std, dtype):
    """Shuffled labels, groups of one to nine, graded, binary and equal rewards; no tolerance."""
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        group = torch.cat([torch.full((k,), 11 * k - 40) for k in range(1, 10)])
        group = group[torch.randperm(len(group), generator=g)]
        rewards = torch.randn(len(group), generator=g, dtype=dtype)
        if seed % 3 == 1:
            rewards = (rewards > 0).to(dtype)
        if seed % 3 == 2:
            rewards = torch.full_like(rewards, 0.1)
        ours = group_relative_advantage(rewards, group, norm_by_std=norm_by_std)
        assert torch.equal(ours, _verl(rewards, group, norm_by_std))


@pytest.mark.parametrize("form", ["product", "signed"])
def test_a_weight_of_one_is_verl_bit_for_bit(form):
    """No target at all, and alpha = 1 on targets that are met, are both plain GRPO."""
    g = torch.Generator().manual_seed(0)
    rewards, group, z = (
        torch.randn(8, generator=g),
        torch.zeros(8, dtype=torch.long),
        torch.randn(8, 5, generator=g),
    )
    advantage = group_relative_advantage(rewards, group)
    no_target = causal_weight(z, torch.zeros_like(z), torch.zeros(8, dtype=torch.bool))
    met = causal_weight(z, z, alpha=1.0, similarity="euclidean")
    for weight in (no_target, met):
        assert torch.equal(causal_advantage(advantage, weight, form=form), _verl(rewards, group, True))


def test_product_and_signed_by_hand():
    """The weights' mean is 2: signed gives 1 (1 - 1/2), -1 (1 - 1/2), 2 (1 + 0), and 0 stays 0."""
    advantage, weight = torch.tensor([1.0, -1.0, 2.0, 0.0]), torch.tensor([1.5, 2.5, 2.0, 2.0])
    torch.testing.assert_close(causal_advantage(advantage, weight), torch.tensor([1.5, -2.5, 4.0, 0.0]))
    signed = causal_advantage(advantage, weight, form="signed")
    torch.testing.assert_close(signed, torch.tensor([0.5, -0.5, 2.0, 0.0]))


def test_rows_may_be_permuted():
    g = torch.Generator().manual_seed(1)
    rewards, group = torch.randn(12, generator=g), torch.randint(0, 4, (12,), generator=g)
    weight, order = torch.rand(12, generator=g), torch.randperm(12, generator=g)
    moved = group_relative_advantage(rewards[order], group[order])
    torch.testing.assert_close(moved, group_relative_advantage(rewards, group)[order])
    for form in ("product", "signed"):
        moved = causal_advantage(rewards[order], weight[order], form=form)
        torch.testing.assert_close(moved, causal_advantage(rewards, weight, form=form)[order])


@pytest.mark.parametrize(
    ("given", "returned"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.int64, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_dtypes_and_no_gradient(given, returned):
    rewards = torch.tensor([1, 0, 3], dtype=given)
    if given.is_floating_point:
        rewards.requires_grad_()
    advantage = group_relative_advantage(rewards, torch.tensor([0, 0, 0], dtype=torch.int32))
    weighted = causal_advantage(advantage, torch.ones(3, requires_grad=True))
    for out in (advantage, weighted):
        assert out.dtype == returned and not out.requires_grad
    # Worked out in float32, not in the input's type.
    exact = group_relative_advantage(torch.tensor([1.0, 0.0, 3.0], dtype=torch.float64), torch.zeros(3).long())
    torch.testing.assert_close(advantage.double(), exact, rtol=1e-6, atol=1e-6)


def test_nothing_in_nothing_out_and_inputs_are_left_alone():
    assert group_relative_advantage(torch.zeros(0), torch.zeros(0, dtype=torch.long)).shape == (0,)
    rewards = torch.tensor([1.0, 2.0])
    group_relative_advantage(rewards, torch.tensor([0, 0]))
    assert rewards.tolist() == [1.0, 2.0]


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"group has shape \[2\] where \[B=3\] is expected"):
        group_relative_advantage(torch.zeros(3), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"rewards has shape \[3, 1\] where \[B\]"):
        group_relative_advantage(torch.zeros(3, 1), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="group has dtype torch.float32"):
        group_relative_advantage(torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match=r"weight has shape \[2\] where \[n=3\]"):
        causal_advantage(torch.zeros(3), torch.zeros(2))
    with pytest.raises(ValueError, match="form is 'sum' where one of 'product', 'signed' is expected"):
        causal_advantage(torch.zeros(3), torch.zeros(3), form="sum")
