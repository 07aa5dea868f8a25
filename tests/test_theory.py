"""Eq. 1 to 5 on a linear-Gaussian collider, where every expectation has a closed form.

Given q: y_0, y_1 ~ N(mu, 1) independent, y_2 = y_0 + 2 y_1 + N(0, 1), the collider. A predictor of y_0 from
x = {q, y_1, y_2} is f = c + u y_1 + v y_2. Deviations from the mean are e_0, e_1, e_2 (the noise of y_2),
independent and of variance 1, so that everything is a vector of coefficients on (1, e_0, e_1, e_2) and E[g h]
is a dot product.

These tests show what the theorems say for squared error and where they stop; they say nothing about language
models. The second half tests the colliders of `benchmarks.theory` against closed forms.
"""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from benchmarks.theory import PREDICTORS as NAMES
from benchmarks.theory import Binary, Gaussian, compare, simulate
from gcpo.algorithms import causal_target

MU = Fraction(3, 2)
Y0, Y1, Y2 = (MU, 1, 0, 0), (MU, 0, 1, 0), (3 * MU, 1, 2, 1)
PI_Q = (MU, 0, 0, 0)  # pi*(q) = E[y_0 | q]


def add(*vectors):
    return tuple(sum(x) for x in zip(*vectors, strict=True))


def scale(c, vector):
    return tuple(c * x for x in vector)


def minus(a, b):
    return add(a, scale(-1, b))


def square(a):
    """E[a^2]."""
    return sum(x * x for x in a)


def predictor(c, u, v):
    return add((c, 0, 0, 0), scale(u, Y1), scale(v, Y2))


def phi(f):
    """E[f | q, y_1]: e_0 and e_2 average out."""
    return (f[0], 0, f[2], 0)


def psi(f):
    return minus(f, phi(f))


def risk(f):
    return square(minus(Y0, f))


# E[y_0 | y_1, y_2]: y_2 - 2 y_1 is y_0 and noise of its variance, so half of its deviation is y_0's.
BEST = predictor(MU / 2, Fraction(-1), Fraction(1, 2))
PREDICTORS = [(c, u, v) for c in (-1, 0, 2) for u in (-2, Fraction(-1, 2), 1) for v in (-1, Fraction(1, 4), 1, 3)]


def test_best_predictor_is_the_conditional_expectation():
    """Its residual is orthogonal to all that x holds; no predictor of the grid does better."""
    for known in ((1, 0, 0, 0), Y1, Y2):
        assert sum(a * b for a, b in zip(minus(Y0, BEST), known, strict=True)) == 0
    assert risk(BEST) == Fraction(1, 2) < min(risk(predictor(*p)) for p in PREDICTORS)


def test_equation_1():
    """Phi pi* = pi*(q), for y_0 is independent of y_1 given q; and Phi is a projection, orthogonal to Psi."""
    assert phi(BEST) == PI_Q
    for p in PREDICTORS:
        f = predictor(*p)
        assert phi(phi(f)) == phi(f)
        assert sum(a * b for a, b in zip(phi(f), psi(f), strict=True)) == 0


@pytest.mark.parametrize("p", PREDICTORS)
def test_theorem_1(p):
    """risk(f) - risk(Psi f + pi*(q)) is |Phi f - pi*(q)|^2, never negative."""
    f = predictor(*p)
    gain = risk(f) - risk(add(psi(f), PI_Q))
    assert gain == square(minus(phi(f), PI_Q)) >= 0


@pytest.mark.parametrize("p", PREDICTORS)
def test_corollary_2_holds_where_psi_f_is_close_enough(p):
    """risk(pi*(q)) - risk(Psi f + pi*(q)) is |Psi f*|^2 - |Psi f - Psi f*|^2: of either sign."""
    f = predictor(*p)
    gain = risk(PI_Q) - risk(add(psi(f), PI_Q))
    assert gain == square(psi(BEST)) - square(minus(psi(f), psi(BEST)))
    # Psi f = v (e_0 + e_2) and Psi f* has v = 1/2: close enough is 0 <= v <= 1.
    assert (gain >= 0) == (0 <= p[2] <= 1)


def test_corollary_2_fails():
    """v = -1, the collider read with the wrong sign: risk (1 + 1)^2 + 1 = 5, where pi*(q) has 1."""
    f = predictor(0, 0, -1)
    assert square(minus(psi(f), psi(BEST))) > square(psi(BEST))
    assert risk(PI_Q) == 1 and risk(add(psi(f), PI_Q)) == 5
    assert risk(f) > 5  # Theorem 1 still holds


def test_equation_3_without_squares_is_only_a_difference_of_means():
    """E[Y - f] - E[Y - g] = E[g] - E[f] takes either sign: as printed, Theorem 1 fails for a high f."""
    high, low = predictor(10, 0, 0), predictor(-10, 0, 0)
    printed = [add(psi(f), PI_Q)[0] - f[0] for f in (high, low)]
    assert printed[0] < 0 < printed[1]


def test_leave_one_out_draws_recover_psi_and_shared_draws_do_not():
    """Four responses, y_n = sum y_k + N(0, 1), the feature the best predictor of y_i from x_i.

    y_n less the sum of the others is y_i + noise, so Psi f* = (y_n - E[y_n | q, others]) / 2. Averaged over
    many shared draws, which saw y_i, it is (y_i - mu) / 2 against leave-one-out draws, which did not, and 0
    against the shared draws themselves. As zbar is mu here, the targets of the former predict y_i with a
    quarter of the risk of pi*(q).
    """
    g = torch.Generator().manual_seed(0)
    mu, draws = 1.5, 20_000
    y = mu + torch.tensor([1.0, -2.0, 0.5, 0.5], dtype=torch.float64)  # their mean is mu
    others = y.sum() - y
    shared = (y.sum() + torch.randn(draws, generator=g, dtype=torch.float64)).expand(4, draws)
    noise = 2**0.5 * torch.randn(4, draws, generator=g, dtype=torch.float64)  # of y_i and of y_n
    leave_one_out = others[:, None] + mu + noise

    def features(y_n):
        return (mu + (y_n - others[:, None] - mu) / 2)[:, :, None, None]

    target, _ = causal_target(y[:, None], features(shared), z_marginal=features(leave_one_out))
    torch.testing.assert_close(target[:, 0], mu + (y - mu) / 2, rtol=0, atol=0.03)
    assert ((y - target[:, 0]) ** 2).mean() < 0.3 * ((y - mu) ** 2).mean()
    few = features(shared[:, :32])
    parts = [causal_target(y[:, None], few.roll(first, 1))[0] - mu for first in range(32)]
    torch.testing.assert_close(torch.stack(parts).mean(0), torch.zeros(4, 1, dtype=torch.float64))


# ---- the colliders of benchmarks/theory.py ---------------------------------------------------------------------------

COLLIDERS = [Gaussian(0.7, 4, mean=2.0), Gaussian((1, -2, 0.5), 3, mean=-1.0), Binary(0.6, 3, 0.3), Binary(1.0, 5)]


@pytest.mark.parametrize("p", PREDICTORS)
def test_the_benchmark_computes_the_numbers_above(p):
    """The collider above, y_2 = y_0 + 2 y_1 + N(0, 1)."""
    collider, f = Gaussian((1, 2), 2, mean=1.5), np.array(predictor(*p), dtype=float)
    assert collider.variables.tolist() == [list(map(float, y)) for y in (Y0, Y1, Y2)]
    assert collider.prior() == pytest.approx(np.array(PI_Q, dtype=float))
    assert collider.predictor("optimum") == pytest.approx(np.array(BEST, dtype=float))
    assert collider.psi(f) == pytest.approx(np.array(psi(predictor(*p)), dtype=float))
    assert collider.removed(f) == pytest.approx(float(square(minus(phi(predictor(*p)), PI_Q))), abs=1e-12)


@pytest.mark.parametrize("collider", COLLIDERS)
def test_both_theorems_for_any_predictor(collider):
    """Theorem 1 removes |Phi f - pi*(q)|^2; Corollary 2 gains |Psi f*|^2 - |Psi f - Psi f*|^2; shared draws gain 0."""
    best, prior, signs = collider.psi(collider.predictor("optimum")), collider.prior(), set()
    for seed in range(20):
        mix = np.random.default_rng(seed).normal(size=collider.n + 1)
        f = mix[0] * prior + mix[1:] @ collider.variables[1:]  # the prior is a constant
        own = collider.psi(f)
        assert collider.removed(f) == pytest.approx(collider.square(f - own - prior)) and collider.removed(f) >= 0
        gain = collider.square(best) - collider.square(own - best)
        assert collider.gain(f) == pytest.approx(gain)
        assert collider.gain(f, 4) == pytest.approx(gain - collider.square(own) / 4)
        assert collider.removed(f, 4) == pytest.approx(collider.removed(f) - collider.square(own) / 4)
        assert min(collider.shared(f, 4), collider.shared(f, 4, inclusive=False)) >= collider.risk(prior)
        signs.add(gain > 0)
    assert signs == {True, False}


@pytest.mark.parametrize("n", [2, 3, 8])
@pytest.mark.parametrize("s", [0.3, 1.0, 2.5])
def test_gaussian_collider_in_closed_form(s, n):
    collider = Gaussian(s, n)
    best, alone, believed = (collider.predictor(name) for name in NAMES)
    assert best == pytest.approx([0, s * s / (1 + s * s), *[0] * (n - 1), s / (1 + s * s)])
    assert alone == pytest.approx([0, *[s * s / (n * s * s + 1)] * n, s / (n * s * s + 1)])
    assert believed == pytest.approx([0, 1, *[0] * (n - 1), 1 / s])
    size = s * s / (1 + s * s)
    assert collider.risk(best) == pytest.approx(1 - size) and collider.gain(best) == pytest.approx(size)
    assert collider.gain(best, 1) == pytest.approx(0) and collider.gain(best, 5) == pytest.approx(0.8 * size)
    assert collider.removed(best) == pytest.approx(0) and collider.removed(believed) == pytest.approx(0)
    assert collider.removed(alone) == pytest.approx(s**4 * (n - 1) / (n * s * s + 1) ** 2)
    assert collider.square(collider.psi(alone)) == pytest.approx(s * s * (s * s + 1) / (n * s * s + 1) ** 2)
    assert collider.gain(believed) == pytest.approx(1 - 1 / s**2)  # Corollary 2 fails for s < 1
    own = (s / (1 + s * s)) ** 2
    assert collider.shared(best, 1) == 1 and collider.shared(best, 4) == pytest.approx(1 + own * 3 / 4)
    assert collider.shared(best, 4, inclusive=False) == pytest.approx(1 + own * 4 / 3)


@pytest.mark.parametrize("n", [3, 5])
@pytest.mark.parametrize("s", [0.25, 0.5, 1.0])
def test_binary_collider_in_closed_form(s, n):
    """At p = 1/2, with t the probability that the other responses tie, so that y_0 is their majority."""
    collider, t = Binary(s, n), math.comb(n - 1, n // 2) / 2 ** (n - 1)
    best, alone, believed = (collider.predictor(name) for name in NAMES)
    assert collider.square(np.ones(2 ** (n + 1))) == pytest.approx(1)
    assert collider.gain(best) == pytest.approx(t * s**2 / 4) and collider.removed(best) == pytest.approx(0)
    assert collider.risk(alone) == pytest.approx((1 - (s * t) ** 2) / 4)
    assert collider.removed(alone) == pytest.approx(s**4 * t**2 * (1 - t) / 4)
    assert collider.gain(believed) == pytest.approx(t * (s / 2 - 1 / 4))  # Corollary 2 fails for s < 1/2


def test_binary_collider_by_hand():
    """n = 3, p = 0.3, s = 0.6: where y_1 and y_2 differ, y_3 = 1 has odds 0.3 * 0.8 to 0.7 * 0.2; elsewhere none."""
    collider = Binary(0.6, 3, 0.3)
    best = collider.predictor("optimum")
    for (_, one, two, joint), value in zip(collider.variables.T, best, strict=True):
        odds = {1: 0.24 / 0.38, 0: 0.06 / 0.62}
        assert value == pytest.approx(odds[joint] if one != two else 0.3)


@pytest.mark.parametrize("name", ["optimum", "joint answer alone"])
def test_causal_target_has_the_computed_risk(name):
    """`causal_target` on samples, with leave-one-out and with shared draws."""
    collider, found = Gaussian(2.0, 3), simulate(2.0, 3, name, 3, groups=4000)
    f = collider.predictor(name)
    exact = {
        "leave_one_out": collider.projected(f, 3),
        "inclusive": collider.shared(f, 3),
        "exclusive": collider.shared(f, 3, inclusive=False),
    }
    assert {kind: mean for kind, (mean, _) in found.items()} == pytest.approx(exact, rel=0.05)
    assert found["leave_one_out"][0] < 0.95 < found["inclusive"][0] < found["exclusive"][0]


def test_the_table_of_the_benchmark():
    """n = 2, s = 1: y_0 + y_1 + noise over 3, so 1/9 is removed, Psi f has 2/9, and pi*(q) loses 4/9."""
    row = compare(Gaussian(1, 2))["joint answer alone"]
    assert row == pytest.approx(
        {"risk": 2 / 3, "projected": 5 / 9, "removed": 1 / 9, "gain": 4 / 9, "draws_removed": 2, "draws_gain": 1 / 2}
    )
