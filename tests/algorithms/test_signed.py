"""L2T's rewards and token advantages: numbers by hand, and a referee in plain Python loops."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from gcpo.algorithms import fitting_gain_reward, signed_cases, token_advantage

NAN = math.nan
EPS = 1e-6


def t(x, dtype=torch.float64):
    return torch.tensor(x, dtype=dtype)


GROUP = (
    torch.tensor([[0, 0, 1], [0, 0, -1]]),
    t([[-1.0, -3.0, -2.0], [-1.0, -1.0, NAN]]),
    torch.tensor([[1, 1, 1], [1, 1, 0]]),
)
"""Surprises 1 and 3 in one episode, 2 in the next; and 1, 1 in the only episode of the other response."""


def test_reward_by_hand():
    """1/2 + .8 * .2 = .66 and 1/2 + .8 * .3 = .74; 0 + .8 * -.1 = -.08; a response without episodes has none."""
    gain = t([[0.2, 0.3], [-0.1, NAN], [NAN, NAN]])
    mask = t([[1, 1], [1, 0], [0, 0]])
    reward = fitting_gain_reward(t([1.0, 0.0, 1.0]), gain, mask)
    torch.testing.assert_close(reward, t([[0.66, 0.74], [-0.08, 0.0], [0.0, 0.0]]))


def test_reward_with_a_penalty():
    """2/2 + .5 (.2 - .25 * .4) = 1.05, and the second episode, in the third column: 2/2 + .5 (0 - .25) = .875."""
    reward = fitting_gain_reward(
        t([2.0]),
        t([[0.2, NAN, 0.0]]),
        torch.tensor([[True, False, True]]),
        alpha=0.5,
        penalty=t([[0.4, NAN, 1.0]]),
        beta=0.25,
    )
    torch.testing.assert_close(reward, t([[1.05, 0.0, 0.875]]))


def test_reference_numbers():
    """r = .165, .495, .74, r~ = 1.4 / 3; and -.04, -.04. A^ = +-.7071068 but for eps; the ratios of the first are
    r / r~, the second's tokens all get A^."""
    reward = t([[0.66, 0.74], [-0.08, 0.0]])
    advantage = token_advantage(reward, *GROUP, length_correction=False, signed=True)
    torch.testing.assert_close(
        advantage, t([[0.2500128, 0.7500383, 1.1212693], [-0.7071068, -0.7071068, 0.0]]), rtol=5e-6, atol=5e-6
    )
    even, clamped = signed_cases(reward, *GROUP)
    assert even.tolist() == [False, True] and not clamped.any()


def test_a_sum_of_zero():
    """r = .3, -.1, -.2: r~ is 0, every token gets A^."""
    index, mask = torch.tensor([[0, 1, 2], [0, -1, -1]]), torch.tensor([[1, 1, 1], [1, 0, 0]])
    arguments = (t([[0.3, -0.1, -0.2], [1.0, NAN, NAN]]), index, -torch.ones(2, 3).double(), mask)
    advantage = token_advantage(*arguments, length_correction=False, signed=True)
    low, high = -(0.5**0.5), 0.5**0.5
    torch.testing.assert_close(advantage, t([[low, low, low], [high, 0.0, 0.0]]), rtol=1e-5, atol=1e-5)
    assert signed_cases(*arguments)[0].tolist() == [True, False]
    empty = (*arguments[:3], torch.zeros(2, 3))
    assert not token_advantage(*empty, signed=True).any() and not signed_cases(*empty)[0].any()


def test_clamped_tokens_by_hand():
    """r = 1.5, -.5, r~ = .5: ratios 3 and -1 become 2 and 0. r = 9.5, .5, .5, r~ = 3.5: ratios 2.71, 1/7, 1/7; the
    first becomes 2. With ``max_ratio`` below 1 the tokens of a response with r~ <= eps still get A^."""
    index = torch.tensor([[0, 1, -1, -1], [0, 1, 1, -1], [0, -1, -1, -1]])
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    arguments = (t([[1.5, -0.5], [9.5, 1.0], [-1.0, 0.0]]), index, -torch.ones(3, 4).double(), mask)
    means = [0.5, 3.5, -1.0]
    a, b, c = ((m - 1.0) / (statistics.stdev(means) + EPS) for m in means)
    advantage = token_advantage(*arguments, length_correction=False, max_ratio=2.0, signed=True)
    torch.testing.assert_close(advantage, t([[2 * a, 0.0, 0.0, 0.0], [2 * b, b / 7, b / 7, b], [c, 0.0, 0.0, 0.0]]))
    even, clamped = signed_cases(*arguments, max_ratio=2.0)
    assert even.tolist() == [False, False, True]
    assert clamped.nonzero().tolist() == [[0, 0], [0, 1], [1, 0]]
    assert token_advantage(*arguments, length_correction=False, max_ratio=0.5, signed=True)[2, 0] == c


def _referee(reward, index, log_prob, mask, trim, length_correction, max_ratio):
    """Section 3 token by token with lists; the advantages, and how many responses and tokens the rules met."""
    shares, means, even, clamped = [], [], 0, 0
    for i in range(len(reward)):
        r = {}
        for k in range(len(reward[i])):
            tokens = [j for j in range(len(mask[i])) if mask[i][j] and index[i][j] == k]
            surprise = [-log_prob[i][j] for j in tokens]
            for j, s in zip(tokens, surprise, strict=True):
                r[j] = reward[i][k] * (s / sum(surprise) if sum(surprise) > 0 else 1 / len(tokens))
        cut = math.floor(trim / 2 * len(r))
        kept = sorted(r.values())[cut : len(r) - cut]
        shares.append(r)
        means.append(sum(kept) / len(kept) if kept else 0.0)
    entered = [m * len(r) if length_correction else m for m, r in zip(means, shares, strict=True)]
    out = []
    for i, r in enumerate(shares):
        a = (entered[i] - statistics.mean(entered)) / (statistics.stdev(entered) + EPS)
        total, row = means[i] * len(r), []
        even += bool(r) and total <= EPS
        for j in range(len(mask[i])):
            ratio = 1.0
            if j in r and total > EPS:
                ratio = r[j] * len(r) / total
                clamped += not 0 <= ratio <= max_ratio
                ratio = min(max(ratio, 0.0), max_ratio)
            row.append(a * ratio if mask[i][j] else 0.0)
        out.append(row)
    return out, even, clamped


def _random_group(seed, n=4, episodes=3, tokens=50):
    """Ragged responses with rewards of either sign, NaN wherever nothing may look."""
    g = torch.Generator().manual_seed(seed)
    reward = torch.randn(n, episodes, generator=g, dtype=torch.float64) + 0.4
    index = torch.randint(-1, episodes, (n, tokens), generator=g)
    log_prob = -3 * torch.rand(n, tokens, generator=g, dtype=torch.float64) ** 3
    log_prob[index == 1] *= seed % 3 > 0
    mask = torch.arange(tokens) < torch.randint(0 if seed % 2 else 1, tokens + 1, (n, 1), generator=g)
    log_prob[~mask], index[~mask] = NAN, 77
    return reward, index, log_prob, mask


@pytest.mark.parametrize("options", [(0.05, False, 10.0), (0.2, False, 2.0), (0.0, True, 10.0)])
def test_against_loops(options):
    trim, length_correction, max_ratio = options
    met = [0, 0]
    for seed in range(10):
        group = _random_group(seed)
        wanted, even, clamped = _referee(*(x.tolist() for x in group), *options)
        advantage = token_advantage(
            *group, trim=trim, length_correction=length_correction, max_ratio=max_ratio, signed=True
        )
        torch.testing.assert_close(advantage, t(wanted))
        found = signed_cases(*group, trim=trim, max_ratio=max_ratio)
        assert [int(x.sum()) for x in found] == [even, clamped]
        met = [met[0] + even, met[1] + clamped]
    assert min(met) > 5


def test_rewards_of_at_least_zero():
    """Where no rule acts, ``signed`` changes nothing, bit for bit."""
    for seed in range(6):
        reward, *group = _random_group(seed)
        reward = reward.abs() + 0.1
        assert not any(x.any() for x in signed_cases(reward, *group, max_ratio=1e9))
        plain, signed = (token_advantage(reward, *group, max_ratio=1e9, signed=flag) for flag in (False, True))
        assert torch.equal(plain, signed)


def test_permutation_and_padding():
    reward, index, log_prob, mask = _random_group(2)
    options = {"length_correction": False, "signed": True}
    advantage, cases = (
        token_advantage(reward, index, log_prob, mask, **options),
        signed_cases(reward, index, log_prob, mask),
    )
    order = torch.tensor([2, 3, 1, 0])
    moved = (reward[order], index[order], log_prob[order], mask[order])
    torch.testing.assert_close(token_advantage(*moved, **options), advantage[order])
    assert all(torch.equal(a, b[order]) for a, b in zip(signed_cases(*moved), cases, strict=True))
    wide = (
        torch.cat([reward, torch.full((4, 2), NAN).double()], 1),
        torch.cat([index, torch.full((4, 3), 9)], 1),
        torch.cat([log_prob, torch.full((4, 3), math.inf).double()], 1),
        torch.cat([mask, torch.zeros(4, 3, dtype=torch.bool)], 1),
    )
    padded = token_advantage(*wide, **options)
    torch.testing.assert_close(padded[:, :50], advantage)
    assert not padded[:, 50:].any() and not signed_cases(*wide)[1][:, 50:].any()


@pytest.mark.parametrize(("given", "returned"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_dtypes_and_no_gradient(given, returned):
    one = torch.ones(2, 1, dtype=given, requires_grad=True)
    reward = fitting_gain_reward(one[:, 0], one, torch.ones(2, 1), penalty=one)
    advantage = token_advantage(
        one, torch.zeros(2, 3).long(), -torch.ones(2, 3, dtype=given), torch.ones(2, 3), signed=True
    )
    for out in (reward, advantage):
        assert out.dtype == returned and not out.requires_grad


def test_errors_name_the_argument():
    reward, index, log_prob, mask = torch.zeros(2, 1), torch.zeros(2, 3).long(), torch.zeros(2, 3), torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"penalty has shape \[2, 3\] where \[n=2, K=1\]"):
        fitting_gain_reward(torch.zeros(2), reward, torch.ones(2, 1), penalty=log_prob)
    with pytest.raises(ValueError, match=r"gain has shape \[2, 1\] where \[n=3, K\]"):
        fitting_gain_reward(torch.zeros(3), reward, torch.ones(2, 1))
    with pytest.raises(ValueError, match=r"trim is 1.0 where a number in \[0, 1\)"):
        signed_cases(reward, index, log_prob, mask, trim=1.0)
    with pytest.raises(ValueError, match=r"response_mask has shape \[2, 2\]"):
        signed_cases(reward, index, log_prob, mask[:, :2])
