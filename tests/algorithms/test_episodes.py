"""Section 2 (GC2PO): numbers by hand, and a referee in plain Python loops."""

import math
import random
import statistics

import pytest
import torch

from gcpo.algorithms import episode_reward, token_advantage

NAN = math.nan


def t(x, dtype=torch.float64):
    return torch.tensor(x, dtype=dtype)


def test_episode_reward_by_hand():
    """Row 0, two episodes: (1 + .9 (.5 + .8 * 1)) / 2 = 1.085 and (1 + .9 (1 + 0)) / 2 = .95.

    Row 1, one episode, not the first column: 0 + .9 (1 + .8) = 1.62, the most that the process part can
    reach. Row 2 has none.
    """
    reward = episode_reward(
        t([1.0, 0.0, 1.0]),
        t([[0.5, 1.0, NAN], [NAN, 1.0, math.inf], [NAN, NAN, NAN]]),
        t([[1.0, 0.0, NAN], [NAN, 1.0, NAN], [NAN, NAN, NAN]]),
        t([[1, 1, 0], [0, 1, 0], [0, 0, 0]]),
    )
    torch.testing.assert_close(reward, t([[1.085, 0.95, 0.0], [0.0, 1.62, 0.0], [0.0, 0.0, 0.0]]))


def test_episode_reward_weights():
    """(2 + .5 (.4 + .25 * .8)) / 1 = 2.3."""
    reward = episode_reward(
        t([2.0]),
        t([[0.4]]),
        t([[0.8]]),
        t([[True]], torch.bool),
        robustness_weight=0.5,
        effectiveness_weight=0.25,
    )
    torch.testing.assert_close(reward, t([[2.3]]))


def group_of_two(total_0, total_1, eps=1e-6):
    """A^ of two values: half their difference over the unbiased deviation |difference| / sqrt 2."""
    half = (total_0 - total_1) / 2
    return half / (abs(half) * 2**0.5 + eps), -half / (abs(half) * 2**0.5 + eps)


def test_token_advantage_by_hand():
    """Row 0: episode 0 (R = 1.2) has surprises 1 and 3: r = .3, .9. Episode 1 (R = .8) has none: .4, .4
    evenly.

    T = 4, r~ = 2. Row 1: one token of four inside episode 0 (R = 1), T = 1, r~ = 1; one token outside any
    episode, and padding. Ratios of row 0: r T / r~ = .6, 1.8, .8, .8; of row 1: 1, and A^ for the token
    outside.
    """
    advantage = token_advantage(
        t([[1.2, 0.8], [1.0, NAN]]),
        torch.tensor([[0, 0, 1, 1], [-1, 0, 5, 1]]),
        t([[-1.0, -3.0, 0.0, 0.0], [NAN, -2.0, NAN, -math.inf]]),
        torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
    )
    a, b = group_of_two(2.0, 1.0)
    torch.testing.assert_close(advantage, t([[0.6 * a, 1.8 * a, 0.8 * a, 0.8 * a], [b, b, 0.0, 0.0]]))


def test_length_correction_off_by_hand():
    """A right response of four tokens (R = 2, r~ / T = .5) against a wrong one of one token (R = 1, r~ / T =
    1).

    With the factor T_i the long one leads, without it loses; the tokens' ratios stay 1 in either case.
    """
    arguments = (
        t([[2.0], [1.0]]),
        torch.tensor([[0, 0, 0, 0], [0, -1, -1, -1]]),
        -torch.ones(2, 4).double(),
        torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]]),
    )
    a, b = group_of_two(2.0, 1.0)
    torch.testing.assert_close(token_advantage(*arguments), t([[a, a, a, a], [b, 0, 0, 0]]))
    a, b = group_of_two(0.5, 1.0)
    torch.testing.assert_close(token_advantage(*arguments, length_correction=False), t([[a, a, a, a], [b, 0, 0, 0]]))


@pytest.mark.parametrize(
    ("trim", "tokens", "cut"), [(0.05, 39, 0), (0.05, 40, 1), (0.05, 80, 2), (0.3, 20, 3), (0.0, 7, 0)]
)
def test_trim_drops_floor_of_half_the_share_on_each_side(trim, tokens, cut):
    """Surprises 1, 4, 9, ..: the mean without the cut lowest and highest squares, over their sum, times T."""
    squares = [float((j + 1) ** 2) for j in range(tokens)]
    order = random.Random(0).sample(range(tokens), tokens)
    log_prob = t([[-squares[j] for j in order], [-1.0] * tokens])
    index, mask = torch.zeros(2, tokens, dtype=torch.long), torch.ones(2, tokens)
    advantage = token_advantage(t([[1.0], [0.5]]), index, log_prob, mask, trim=trim, max_ratio=1e9)
    kept = squares[cut : tokens - cut]
    total = tokens * sum(kept) / len(kept) / sum(squares)
    a, b = group_of_two(total, 0.5)
    expected = [a * squares[j] / sum(squares) * tokens / total for j in order]
    torch.testing.assert_close(advantage, t([expected, [b] * tokens]))


def test_max_ratio_by_hand():
    """Surprises 97, 1, 1, 1 of 100 and R = 1: ratios 3.88, .04, .04, .04; the bound 2 holds the first."""
    arguments = (
        t([[1.0], [0.0]]),
        torch.zeros(2, 4, dtype=torch.long),
        t([[-97.0, -1.0, -1.0, -1.0], [-1.0] * 4]),
        torch.ones(2, 4),
    )
    a, _ = group_of_two(1.0, 0.0)
    torch.testing.assert_close(token_advantage(*arguments)[0], a * t([3.88, 0.04, 0.04, 0.04]))
    torch.testing.assert_close(token_advantage(*arguments, max_ratio=2.0)[0], a * t([2.0, 0.04, 0.04, 0.04]))


def test_a_reward_of_zero_moves_no_token_inside_an_episode():
    """r = 0 over max(0, eps) is 0; a token outside any episode still gets A^."""
    advantage = token_advantage(t([[0.0], [1.0]]), torch.tensor([[0, -1], [0, 0]]), -torch.ones(2, 2), torch.ones(2, 2))
    a, b = group_of_two(0.0, 1.0)
    torch.testing.assert_close(advantage, t([[0.0, a], [b, b]]))


def test_a_group_of_one():
    """Mean 0, deviation 1: A^ = r~ / (1 + eps) with r~ = 3, spread 1 : 2."""
    advantage = token_advantage(t([[3.0]]), torch.tensor([[0, 0]]), t([[-1.0, -2.0]]), torch.ones(1, 2))
    torch.testing.assert_close(advantage, t([[2.0, 4.0]]) / (1 + 1e-6))


def test_empty_responses_and_empty_tensors():
    """An empty response enters the group with r~ = 0 and gets zeros."""
    advantage = token_advantage(
        t([[1.0], [7.0]]), torch.tensor([[0, 0], [0, 0]]), -torch.ones(2, 2), torch.tensor([[1, 1], [0, 0]])
    )
    a, _ = group_of_two(1.0, 0.0)
    torch.testing.assert_close(advantage, t([[a, a], [0.0, 0.0]]))
    none = token_advantage(torch.zeros(2, 0), -torch.ones(2, 3).long(), torch.zeros(2, 3), torch.ones(2, 3))
    assert torch.equal(none, torch.zeros(2, 3))
    assert token_advantage(torch.zeros(2, 1), torch.zeros(2, 0).long(), torch.zeros(2, 0), torch.zeros(2, 0)).shape == (
        2,
        0,
    )


def test_surprise_that_is_negative_or_infinite():
    """A log-probability of 1e-8 counts as 0; one of minus infinity takes (nearly) its whole episode."""
    advantage = token_advantage(
        t([[1.0], [2.0]]), torch.zeros(2, 2).long(), t([[1e-8, -1.0], [-math.inf, -1.0]]), torch.ones(2, 2)
    )
    a, b = group_of_two(1.0, 2.0)
    torch.testing.assert_close(advantage[0], t([0.0, 2 * a]))
    torch.testing.assert_close(advantage[1], t([2 * b, 0.0]), rtol=1e-3, atol=1e-3)


def _referee(reward, index, log_prob, mask, trim, length_correction, max_ratio):
    """Section 2 token by token with lists."""
    n, eps, shares, means, lengths = len(reward), 1e-6, [], [], []
    for i in range(n):
        r = {}
        for k in range(len(reward[i])):
            tokens = [j for j in range(len(mask[i])) if mask[i][j] and index[i][j] == k]
            surprise = {j: -log_prob[i][j] for j in tokens}
            whole = sum(surprise.values())
            for j in tokens:
                r[j] = reward[i][k] * (surprise[j] / whole if whole > 0 else 1 / len(tokens))
        cut = math.floor(trim / 2 * len(r))
        kept = sorted(r.values())[cut : len(r) - cut]
        shares.append(r)
        lengths.append(len(r))
        means.append(sum(kept) / len(kept) if kept else 0.0)
    whole = [m * length for m, length in zip(means, lengths, strict=True)]
    entered = whole if length_correction else means
    mean, std = (statistics.mean(entered), statistics.stdev(entered)) if n > 1 else (0.0, 1.0)
    out = []
    for i in range(n):
        a = (entered[i] - mean) / (std + eps)
        row = []
        for j in range(len(mask[i])):
            if not mask[i][j]:
                row.append(0.0)
            elif j in shares[i]:
                row.append(a * min(shares[i][j] * lengths[i] / max(whole[i], eps), max_ratio))
            else:
                row.append(a)
        out.append(row)
    return out


def _random_group(seed, n=4, episodes=3, tokens=50):
    """Ragged responses, episodes of any size, NaN wherever nothing may look; row 3 is empty for odd seeds."""
    g = torch.Generator().manual_seed(seed)
    reward = torch.rand(n, episodes, generator=g, dtype=torch.float64)
    index = torch.randint(-1, episodes, (n, tokens), generator=g)
    log_prob = -3 * torch.rand(n, tokens, generator=g, dtype=torch.float64) ** 3
    log_prob[index == 1] *= seed % 3 > 0  # episode 1 may have no surprise
    length = torch.randint(1, tokens + 1, (n, 1), generator=g)
    length[3] = 0 if seed % 2 else tokens
    mask = torch.arange(tokens) < length
    log_prob[~mask], index[~mask] = NAN, 77
    return reward, index, log_prob, mask


@pytest.mark.parametrize("options", [(0.05, True, 10.0), (0.2, False, 10.0), (0.0, True, 1.5), (0.9, True, 3.0)])
def test_token_advantage_against_loops(options):
    for seed in range(8):
        group = _random_group(seed)
        trim, length_correction, max_ratio = options
        advantage = token_advantage(*group, trim=trim, length_correction=length_correction, max_ratio=max_ratio)
        torch.testing.assert_close(advantage, t(_referee(*(x.tolist() for x in group), *options)))


def test_permutation_and_padding():
    reward, index, log_prob, mask = _random_group(2)
    advantage = token_advantage(reward, index, log_prob, mask)
    order = torch.tensor([2, 3, 1, 0])
    moved = token_advantage(reward[order], index[order], log_prob[order], mask[order])
    torch.testing.assert_close(moved, advantage[order])
    wide = token_advantage(
        torch.cat([reward, torch.full((4, 2), NAN).double()], 1),
        torch.cat([index, torch.full((4, 3), 9)], 1),
        torch.cat([log_prob, torch.full((4, 3), math.inf).double()], 1),
        torch.cat([mask, torch.zeros(4, 3, dtype=torch.bool)], 1),
    )
    torch.testing.assert_close(wide[:, :50], advantage)
    assert not wide[:, 50:].any()


@pytest.mark.parametrize(("given", "returned"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_dtypes_and_no_gradient(given, returned):
    one = torch.ones(2, 1, dtype=given, requires_grad=True)
    reward = episode_reward(one[:, 0], one, one, torch.ones(2, 1))
    advantage = token_advantage(one, torch.zeros(2, 3).long(), -torch.ones(2, 3, dtype=given), torch.ones(2, 3))
    for out in (reward, advantage):
        assert out.dtype == returned and not out.requires_grad


def test_errors_name_the_argument():
    reward, index, log_prob, mask = (
        torch.zeros(2, 1),
        torch.zeros(2, 3).long(),
        torch.zeros(2, 3),
        torch.ones(2, 3),
    )
    with pytest.raises(ValueError, match=r"episode_index has shape \[3, 3\] where \[n=2, T\]"):
        token_advantage(reward, torch.zeros(3, 3).long(), log_prob, mask)
    with pytest.raises(ValueError, match=r"response_mask has shape \[2, 2\] where \[n=2, T=3\]"):
        token_advantage(reward, index, log_prob, mask[:, :2])
    with pytest.raises(ValueError, match="episode_index has dtype torch.float32"):
        token_advantage(reward, index.float(), log_prob, mask)
    with pytest.raises(ValueError, match="episode_index holds 1 where episode_reward has 1 columns"):
        token_advantage(reward, index + 1, log_prob, mask)
    with pytest.raises(ValueError, match=r"trim is 1.0 where a number in \[0, 1\)"):
        token_advantage(reward, index, log_prob, mask, trim=1.0)
    with pytest.raises(ValueError, match=r"effectiveness has shape \[2, 3\] where \[n=2, K=1\]"):
        episode_reward(torch.zeros(2), reward, log_prob, reward)
