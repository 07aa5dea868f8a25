"""Steps 1 to 5 and Eq. 11: numbers by hand, and a referee in plain Python loops."""

import math
import random
import statistics

import pytest
import torch

from gcpo.algorithms import (
    causal_diagnostics,
    causal_target,
    causal_weight,
    conditioned_target,
    group_mean_target,
)

NAN = math.nan
Z = [[1.0, 0.0], [0.0, 1.0]]  # zbar = (1/2, 1/2)
CONDITIONED = [
    [[[2.0, 0.0], [4.0, 0.0]], [[0.0, 2.0], [2.0, 2.0]]],
    [[[NAN, NAN], [1.0, 1.0]], [[1.0, 4.0], [4.0, 1.0]]],
]
VALID = [[[1, 1], [1, 1]], [[0, 1], [1, 1]]]


def t(x, dtype=torch.float64):
    return torch.tensor(x, dtype=dtype)


@pytest.mark.parametrize(
    ("projection", "expected"),
    [
        # i=0: Zbar (3,0); all four (2,1); part (1,-1).  i=1: Zbar (1,1); all three (6/3,6/3); part (-1,-1).
        ("inclusive", [[1.5, -0.5], [-0.5, -0.5]]),
        # i=0: l=1 alone (1,2); part (2,-2).  i=1: l=1 alone (5/2,5/2); part (-3/2,-3/2).
        ("exclusive", [[2.5, -1.5], [-1.0, -1.0]]),
    ],
)
def test_target_by_hand(projection, expected):
    target, has_target = causal_target(t(Z), t(CONDITIONED), t(VALID, torch.bool), projection=projection)
    torch.testing.assert_close(target, t(expected))
    assert has_target.tolist() == [True, True]


@pytest.mark.parametrize("projection", ["inclusive", "exclusive"])
def test_target_with_leave_one_out_draws_by_hand(projection):
    """Zbar' is the mean of z_marginal: (1,1) and, of its one valid sample, (0,8). Zbar takes every draw:
    (2,1), (2,2).

    Parts (1,0) and (2,-6); the projection has no say.
    """
    z_marginal = t([[[[1.0, 0.0], [1.0, 2.0]]], [[[0.0, 8.0], [NAN, math.inf]]]])
    target, has_target = causal_target(
        t(Z),
        t(CONDITIONED),
        t(VALID),
        projection=projection,
        z_marginal=z_marginal,
        valid_marginal=t([[[1, 1]], [[1, 0]]]),
    )
    torch.testing.assert_close(target, t([[1.5, 0.5], [2.5, -5.5]]))
    assert has_target.tolist() == [True, True]


def test_rows_without_a_target():
    """Draw 0 gone; every other draw gone; everything gone: what is missing depends on the projection."""
    z, z_conditioned = torch.ones(3, 2), torch.ones(3, 2, 2, 2)
    valid = t([[[0, 0], [1, 1]], [[1, 1], [0, 0]], [[0, 0], [0, 0]]], torch.bool)
    z_conditioned[~valid] = NAN
    for projection, has in (("inclusive", [False, True, False]), ("exclusive", [False, False, False])):
        target, has_target = causal_target(z, z_conditioned, valid, projection=projection)
        assert has_target.tolist() == has
        # Row 1, inclusive: Zbar equals Zbar', so the target is zbar.
        assert torch.equal(target, torch.where(has_target[:, None], z, 0))
    z_marginal, valid_marginal = torch.full((3, 1, 2, 2), 4.0), t([[[1, 0]], [[0, 0]], [[1, 1]]], torch.bool)
    target, has_target = causal_target(z, z_conditioned, valid, z_marginal=z_marginal, valid_marginal=valid_marginal)
    assert has_target.tolist() == [True, False, False]
    assert target.tolist() == [[-2.0, -2.0], [0.0, 0.0], [0.0, 0.0]]  # 1 - 4 + 1


def test_single_draws():
    """One shared draw: the printed target is zbar to the bit, the exclusive one absent; marginals help."""
    g = torch.Generator().manual_seed(3)
    z, z_conditioned = torch.randn(4, 6, generator=g), torch.randn(4, 1, 3, 6, generator=g)
    target, has_target = causal_target(z, z_conditioned)
    assert has_target.all() and torch.equal(target, group_mean_target(z))
    target, has_target = causal_target(z, z_conditioned, projection="exclusive")
    assert not has_target.any() and not target.any()
    z_marginal = torch.randn(4, 1, 3, 6, generator=g)
    target, has_target = causal_target(z, z_conditioned, z_marginal=z_marginal)
    assert has_target.all()
    torch.testing.assert_close(target, z_conditioned.mean((1, 2)) - z_marginal.mean((1, 2)) + z.mean(0))


@pytest.mark.parametrize(("draws", "generations"), [(0, 2), (2, 0), (0, 0)])
def test_no_draws_at_all(draws, generations):
    target, has_target = causal_target(torch.ones(3, 2), torch.ones(3, draws, generations, 2))
    assert not has_target.any() and torch.equal(target, torch.zeros(3, 2))
    none = causal_diagnostics(torch.ones(3, 2), torch.ones(3, draws, generations, 2))
    assert none["shift"].isnan() and none["split_half"].isnan()


def _mean(vectors, d):
    return [sum(v[c] for v in vectors) / len(vectors) for c in range(d)] if vectors else None


def _referee(z, z_conditioned, valid, projection, z_marginal, valid_marginal):
    """Steps 1 to 4 with lists: Zbar_i, Zbar'_i and t_i of each response, None where there is none."""
    n, d, rows = len(z), len(z[0]), []
    for i in range(n):
        drawn = [(draw, v) for draw, ms in enumerate(z_conditioned[i]) for m, v in enumerate(ms) if valid[i][draw][m]]
        if z_marginal is None:
            inside = _mean([v for draw, v in drawn if draw == 0], d)
            outside = _mean([v for draw, v in drawn if draw >= 1 or projection == "inclusive"], d)
        else:
            inside = _mean([v for _, v in drawn], d)
            outside = _mean(
                [v for k, ms in enumerate(z_marginal[i]) for m, v in enumerate(ms) if valid_marginal[i][k][m]],
                d,
            )
        both = inside is not None and outside is not None
        mean = _mean(z, d)
        rows.append((outside, [a - b + c for a, b, c in zip(inside, outside, mean, strict=True)] if both else None))
    return rows


def _random_group(seed, marginal, n=4, draws=3, generations=2, d=5):
    """A group with about half of its samples invalid, NaN and infinity in their places."""
    g = torch.Generator().manual_seed(seed)

    def samples(number):
        x = torch.randn(n, number, generations, d, generator=g, dtype=torch.float64)
        valid = torch.rand(n, number, generations, generator=g) > 0.5
        x[~valid] = math.nan if seed % 2 else math.inf
        return x, valid

    z = torch.randn(n, d, generator=g, dtype=torch.float64)
    z_conditioned, valid = samples(draws)
    z_marginal, valid_marginal = samples(2) if marginal else (None, None)
    return z, z_conditioned, valid, {"z_marginal": z_marginal, "valid_marginal": valid_marginal}


@pytest.mark.parametrize("marginal", [False, True])
@pytest.mark.parametrize("projection", ["inclusive", "exclusive"])
def test_target_against_loops(marginal, projection):
    seen = set()
    for seed in range(12):
        z, z_conditioned, valid, other = _random_group(seed, marginal)
        target, has_target = causal_target(z, z_conditioned, valid, projection=projection, **other)
        lists = [None if x is None else x.tolist() for x in (z, z_conditioned, valid, *other.values())]
        rows = _referee(*lists[:3], projection, *lists[3:])
        expected = t([[0.0] * 5 if row is None else row for _, row in rows])
        torch.testing.assert_close(target, expected)
        assert has_target.tolist() == [row is not None for _, row in rows]
        seen.update(has_target.tolist())

        target, has_target = conditioned_target(z_conditioned, valid, projection=projection, **other)
        expected = t([[0.0] * 5 if outside is None else outside for outside, _ in rows])
        torch.testing.assert_close(target, expected)
        assert has_target.tolist() == [outside is not None for outside, _ in rows]
    assert seen == {True, False}


@pytest.mark.parametrize("marginal", [False, True])
def test_permuting_responses_permutes_targets_and_weights(marginal):
    z, z_conditioned, valid, other = _random_group(5, marginal, n=6)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    moved = {k: None if v is None else v[order] for k, v in other.items()}
    target, has_target = causal_target(z, z_conditioned, valid, **other)
    target_2, has_target_2 = causal_target(z[order], z_conditioned[order], valid[order], **moved)
    torch.testing.assert_close(target_2, target[order])
    assert torch.equal(has_target_2, has_target[order])
    for similarity in ("cosine", "euclidean", "gaussian"):
        weight = causal_weight(z, target, has_target, similarity=similarity)
        weight_2 = causal_weight(z[order], target_2, has_target_2, similarity=similarity)
        torch.testing.assert_close(weight_2, weight[order])


def _pad(x, valid, fill):
    """One more draw and one more generation, all masked out."""
    n, draws, generations, d = x.shape
    wide = torch.full((n, draws + 1, generations + 1, d), fill, dtype=x.dtype)
    wide[:, :draws, :generations] = x
    mask = torch.zeros(n, draws + 1, generations + 1, dtype=torch.bool)
    mask[:, :draws, :generations] = valid
    return wide, mask


@pytest.mark.parametrize("fill", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("marginal", [False, True])
def test_masked_samples_change_nothing(marginal, fill):
    z, z_conditioned, valid, other = _random_group(8, marginal, draws=5, generations=3)
    wide, mask = _pad(z_conditioned, valid, fill)
    wide_other = dict(other)
    if marginal:
        wide_other["z_marginal"], wide_other["valid_marginal"] = _pad(*other.values(), fill)
    for projection in ("inclusive", "exclusive"):
        narrow = causal_target(z, z_conditioned, valid, projection=projection, **other)
        padded = causal_target(z, wide, mask, projection=projection, **wide_other)
        for a, b in zip(narrow, padded, strict=True):
            torch.testing.assert_close(a, b)
        narrow = causal_diagnostics(z, z_conditioned, valid, projection=projection, **other)
        padded = causal_diagnostics(z, wide, mask, projection=projection, **wide_other)
        for name in narrow:
            torch.testing.assert_close(narrow[name], padded[name], equal_nan=True)


@pytest.mark.parametrize("projection", ["inclusive", "exclusive"])
def test_shared_draws_average_to_nothing(projection):
    """Averaged over which draw is called l = 0, the causal part of shared draws is zero."""
    z, z_conditioned, _, _ = _random_group(0, False, draws=4, generations=3)
    z_conditioned = z_conditioned.nan_to_num(posinf=0.5)
    parts = [causal_target(z, z_conditioned.roll(shift, 1), projection=projection)[0] - z.mean(0) for shift in range(4)]
    torch.testing.assert_close(torch.stack(parts).mean(0), torch.zeros_like(z))
    assert torch.stack(parts).abs().mean() > 0.1  # while no single one of them is


@pytest.mark.parametrize("draws", [2, 3, 8])
def test_exclusive_is_inclusive_times_l_over_l_minus_1(draws):
    g = torch.Generator().manual_seed(draws)
    z = torch.randn(3, 4, generator=g, dtype=torch.float64)
    z_conditioned = torch.randn(3, draws, 2, 4, generator=g, dtype=torch.float64)
    inclusive = causal_target(z, z_conditioned)[0] - z.mean(0)
    exclusive = causal_target(z, z_conditioned, projection="exclusive")[0] - z.mean(0)
    torch.testing.assert_close(exclusive, inclusive * draws / (draws - 1))


def test_cosine_by_hand():
    """(3,4)·(4,3) / 25 = 24/25; a right angle; the opposite; a zero on either side; tiny and huge vectors."""
    z = t([[3.0, 4.0], [1.0, 0.0], [1.0, 2.0], [0.0, 0.0], [1.0, 1.0], [3e-30, 4e-30], [3e30, 4e30]])
    target = t([[4.0, 3.0], [0.0, 5.0], [-2.0, -4.0], [1.0, 1.0], [0.0, 0.0], [4e-30, 3e-30], [4e30, 3e30]])
    expected = [1.92, 0.0, -2.0, 0.0, 0.0, 1.92, 1.92]
    for dtype in (torch.float32, torch.float64):
        torch.testing.assert_close(causal_weight(z.to(dtype), target.to(dtype)), t(expected, dtype))
    clamped = causal_weight(z, target, clamp_at_zero=True)
    torch.testing.assert_close(clamped, t([1.92, 0.0, 0.0, 0.0, 0.0, 1.92, 1.92]))


def test_euclidean_by_hand():
    """Distances 5 and 0: alpha / 6 and alpha."""
    weight = causal_weight(t([[3.0, 4.0], [1.0, 1.0]]), t([[0.0, 0.0], [1.0, 1.0]]), alpha=3.0, similarity="euclidean")
    torch.testing.assert_close(weight, t([0.5, 3.0]))


def test_gaussian_by_hand():
    """Distances 1, 2, 4, 9, of which 9 has no target: sigma = 2 and similarities e^-1/8, e^-1/2, e^-2.

    With all four rows the middle two are 2 and 4: sigma = 3 and e^-1/18, e^-2/9, e^-8/9, e^-9/2.
    """
    z, target = torch.zeros(4, 2, dtype=torch.float64), t([[1.0, 0.0], [0.0, 2.0], [4.0, 0.0], [0.0, 9.0]])
    three = causal_weight(z, target, t([1, 1, 1, 0]), alpha=2.0, similarity="gaussian")
    torch.testing.assert_close(three, t([2 * math.exp(-1 / 8), 2 * math.exp(-1 / 2), 2 * math.exp(-2), 1.0]))
    four = causal_weight(z, target, alpha=1.0, similarity="gaussian")
    torch.testing.assert_close(four, t([math.exp(-x) for x in (1 / 18, 2 / 9, 8 / 9, 9 / 2)]))


def test_gaussian_with_a_sigma_of_zero():
    """Median 0 while one distance is 5: similarity 1 for all; nobody with a target: weight 1 for all."""
    z, target = torch.zeros(3, 1), torch.tensor([[0.0], [0.0], [5.0]])
    assert causal_weight(z, target, alpha=2.5, similarity="gaussian").tolist() == [2.5, 2.5, 2.5]
    none = torch.zeros(3, dtype=torch.bool)
    assert causal_weight(z, target, none, alpha=2.5, similarity="gaussian").tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("similarity", ["cosine", "euclidean", "gaussian"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 2.0])
def test_weight_against_loops_and_rows_without_a_target(similarity, alpha):
    """A row without a target weighs exactly 1, whatever stands in it, and has no say in the others."""
    rng = random.Random(similarity)
    for _ in range(5):
        n, d = 7, 3
        z = [[rng.gauss(0, 1) for _ in range(d)] for _ in range(n)]
        target = [[rng.gauss(0, 1) for _ in range(d)] for _ in range(n)]
        has = [rng.random() > 0.3 for _ in range(n)]
        distance = [math.dist(a, b) for a, b in zip(z, target, strict=True)]
        sigma = statistics.median([x for x, h in zip(distance, has, strict=True) if h])
        expected = []
        for i in range(n):
            dot = sum(a * b for a, b in zip(z[i], target[i], strict=True))
            value = {
                "cosine": dot / math.hypot(*z[i]) / math.hypot(*target[i]),
                "euclidean": 1 / (1 + distance[i]),
                "gaussian": math.exp(-(distance[i] ** 2) / (2 * sigma**2)),
            }[similarity]
            expected.append(alpha * value if has[i] else 1.0)
        masked = t([row if h else [math.nan] * d for row, h in zip(target, has, strict=True)])
        weight = causal_weight(t(z), masked, t(has, torch.bool), alpha=alpha, similarity=similarity)
        torch.testing.assert_close(weight, t(expected))
        assert [w == 1.0 for w, h in zip(weight.tolist(), has, strict=True) if not h] == [True] * has.count(False)


def test_group_mean_target():
    assert group_mean_target(t(Z)).tolist() == [[0.5, 0.5], [0.5, 0.5]]


def test_diagnostics_by_hand():
    """Parts (1,-1) and (-1,-1), each of length sqrt 2, over |zbar| = sqrt 1/2: shift 2. cos(e_i, (1,1)) =
    sqrt 1/2.

    Row 0 has two generations at l = 0 but one draw at l >= 1 only: no halves.
    """
    out = causal_diagnostics(t(Z), t(CONDITIONED), t(VALID, torch.bool))
    torch.testing.assert_close(out["shift"], t(2.0))
    torch.testing.assert_close(out["cos_to_mean"], t([0.5**0.5, 0.5**0.5]))
    assert out["split_half"].isnan()


@pytest.mark.parametrize("projection", ["inclusive", "exclusive"])
def test_split_half_of_shared_draws_by_hand(projection):
    """l = 0 has generations 1, 2, 4 with the middle one invalid; draws 1 (invalid), 2, 3 follow.

    Even: e_x 1 - draw 2 = (1,0) - (0,1) = (1,-1). Odd: (4,0) - draw 3 (3,1) = (1,-1) scaled: (1,-1). Cosine
        1. Turning
    draw 3 into (5,-1) gives (-1,1): cosine -1; into (3,-1) gives (1,1): cosine 0.
    """
    for last, expected in (([3.0, 1.0], 1.0), ([5.0, -1.0], -1.0), ([3.0, -1.0], 0.0)):
        x = torch.full((1, 4, 3, 2), NAN, dtype=torch.float64)
        x[0, 0, 0], x[0, 0, 2] = t([1.0, 0.0]), t([4.0, 0.0])
        x[0, 2, 1] = t([0.0, 1.0])
        x[0, 3, 0], x[0, 3, 2] = t(last) + 1, t(last) - 1  # two generations with this mean
        out = causal_diagnostics(torch.ones(1, 2), x, ~x.isnan().any(-1), projection=projection)
        torch.testing.assert_close(out["split_half"], t(expected))


def test_split_half_of_leave_one_out_draws_by_hand():
    """Draws 0 and 2 of Zbar, (3,0) and (0,2), against marginal draws (1,0) and (0,1): (2,0) and (0,1), cosine
    0.

    With (0,4) for the last one the odd half is (0,-2), still at a right angle; with (-2,2) it is (2,0):
    cosine 1.
    """
    x = torch.full((1, 3, 1, 2), NAN, dtype=torch.float64)
    x[0, 0, 0], x[0, 2, 0] = t([3.0, 0.0]), t([0.0, 2.0])
    for last, expected in (([0.0, 1.0], 0.0), ([0.0, 4.0], 0.0), ([-2.0, 2.0], 1.0)):
        z_marginal = t([[[[1.0, 0.0]], [last]]])
        out = causal_diagnostics(torch.ones(1, 2), x, ~x.isnan().any(-1), z_marginal=z_marginal)
        torch.testing.assert_close(out["split_half"], t(expected))
    alone = causal_diagnostics(torch.ones(1, 2), x, ~x.isnan().any(-1), z_marginal=z_marginal[:, :1])
    assert alone["split_half"].isnan() and not alone["shift"].isnan()


def test_split_half_tells_signal_from_noise():
    """Noise around a common point: about 0 (64 dimensions: sd 1/8 a row); a shift 3 sd wide: near 1."""
    g = torch.Generator().manual_seed(0)
    z, noise = torch.randn(16, 64, generator=g), torch.randn(16, 4, 2, 64, generator=g)
    marginal = torch.randn(16, 4, 2, 64, generator=g)
    effect = 3 * torch.randn(16, 1, 1, 64, generator=g)
    assert causal_diagnostics(z, noise, z_marginal=marginal)["split_half"].abs() < 0.12
    assert causal_diagnostics(z, noise + effect, z_marginal=marginal)["split_half"] > 0.9
    assert causal_diagnostics(z, noise)["split_half"].abs() < 0.12
    noise[:, 0] += effect[:, 0]
    assert causal_diagnostics(z, noise)["split_half"] > 0.85


@pytest.mark.parametrize(
    ("given", "returned"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
)
def test_dtypes_and_no_gradient(given, returned):
    z, _, _, _ = _random_group(2, False)
    z = z.to(given).requires_grad_()
    z_conditioned = torch.randn(4, 2, 2, 5).to(given).requires_grad_()
    target, _ = causal_target(z, z_conditioned)
    outs = [target, causal_weight(z, target), group_mean_target(z), conditioned_target(z_conditioned)[0]]
    outs += causal_diagnostics(z, z_conditioned).values()
    assert all(x.dtype == returned and not x.requires_grad for x in outs)
    exact, _ = causal_target(z.double(), z_conditioned.double())
    torch.testing.assert_close(target.double(), exact, rtol=1e-5, atol=1e-6)


def test_errors_name_the_argument():
    z, z_conditioned = torch.zeros(3, 4), torch.zeros(3, 2, 1, 4)
    with pytest.raises(ValueError, match=r"z_conditioned has shape \[2, 2, 1, 4\] where \[n=3, L, M, d=4\]"):
        causal_target(z, z_conditioned[:2])
    with pytest.raises(ValueError, match=r"z_conditioned has shape \[3, 2, 4\]"):
        causal_target(z, z_conditioned.squeeze(2))
    with pytest.raises(ValueError, match=r"valid has shape \[3, 2\] where \[n=3, L=2, M=1\]"):
        causal_target(z, z_conditioned, torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"z_marginal has shape \[3, 2, 1, 5\] where \[n=3, K, M=1, d=4\]"):
        causal_target(z, z_conditioned, z_marginal=torch.zeros(3, 2, 1, 5))
    with pytest.raises(ValueError, match="valid_marginal is given without z_marginal"):
        causal_target(z, z_conditioned, valid_marginal=torch.ones(3, 2, 1))
    with pytest.raises(ValueError, match="projection is 'all' where one of 'inclusive', 'exclusive'"):
        causal_target(z, z_conditioned, projection="all")
    with pytest.raises(ValueError, match="similarity is 'dot' where one of 'cosine', 'euclidean', 'gaussian'"):
        causal_weight(z, z, similarity="dot")
    with pytest.raises(ValueError, match=r"target has shape \[3, 5\] where \[n=3, d=4\]"):
        causal_weight(z, torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"has_target has shape \[2\] where \[n=3\]"):
        causal_weight(z, z, torch.ones(2))
