"""Eq. 12 and Eq. 13: numbers by hand, and a referee in 60-digit decimals."""

import math
from decimal import Decimal, localcontext

import pytest
import torch

from gcpo.algorithms import causal_kl, causal_reference

NAN = math.nan


def logs(x, dtype=torch.float64):
    return torch.tensor(x, dtype=dtype).log()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # One response, one token: p_0 = .5, p_1 = .3, p_q = .4.
        ({}, 0.5),  # .5 - .4 + .4
        ({"projection": "exclusive"}, 0.6),  # .5 - .3 + .4
        ({"reduction": "sum"}, 0.1),  # .5 - .8 + .4
        ({"reduction": "sum", "projection": "exclusive"}, 0.6),
        # Marginal draws .2 and .3: p_c is the mean .4 of the shared ones.
        ({"log_p_marginal": logs([[[0.2], [0.3]]])}, 0.55),  # .4 - .25 + .4
        ({"log_p_marginal": logs([[[0.2], [0.3]]]), "projection": "exclusive"}, 0.55),
        ({"log_p_marginal": logs([[[0.2], [0.3]]]), "reduction": "sum"}, 0.3),  # .4 - .5 + .4
        (
            {"log_p_marginal": logs([[[0.2], [NAN]]]), "valid_marginal": torch.tensor([[1, 0]])},
            0.6,
        ),  # .4 - .2 + .4
    ],
)
def test_reference_by_hand(options, expected):
    log_ref, floored, has_reference = causal_reference(logs([[[0.5], [0.3]]]), logs([[0.4]]), **options)
    torch.testing.assert_close(log_ref.exp(), torch.tensor([[expected]], dtype=torch.float64))
    assert floored.tolist() == [[False]] and has_reference.tolist() == [True]


def test_there_is_no_cap_at_one():
    log_ref, _, _ = causal_reference(logs([[[1.0], [0.2]]]), logs([[0.9]]))
    torch.testing.assert_close(log_ref.exp(), torch.tensor([[1.3]], dtype=torch.float64))  # 1 - .6 + .9


def test_floor_by_hand():
    """Raw .1 - .5 + .2 = -.2 for p_q = .2: delta .002. Raw below 0 for p_q = 1e-5: delta 1e-6.

    For p_q = .2 again, raw .103 - .3 + .2 = .003 stays and raw .101 - .3 + .2 = .001 does not.
    """
    p_0, p_1 = [0.1, 0.1, 0.103, 0.101], [0.9, 0.9, 0.497, 0.499]
    collider, query = logs([[p_0, p_1]]), logs([[0.2, 1e-5, 0.2, 0.2]])
    log_ref, floored, _ = causal_reference(collider, query)
    torch.testing.assert_close(log_ref.exp(), torch.tensor([[2e-3, 1e-6, 3e-3, 2e-3]], dtype=torch.float64))
    assert floored.tolist() == [[True, True, False, True]]
    # Half of p_q and half of everything as floors.
    log_ref, floored, _ = causal_reference(collider, query, relative_floor=0.5)
    torch.testing.assert_close(log_ref.exp(), torch.tensor([[0.1, 5e-6, 0.1, 0.1]], dtype=torch.float64))
    log_ref, floored, _ = causal_reference(collider, query, floor=0.5)
    torch.testing.assert_close(log_ref.exp(), torch.full((1, 4), 0.5, dtype=torch.float64))
    assert floored.all()


def test_without_floors_nothing_breaks():
    """Both floors 0: a negative mixture is log 0; the divergence from it is the cap, its gradient zero."""
    log_ref, floored, _ = causal_reference(logs([[[0.1], [0.9]]]), logs([[0.2]]), floor=0.0, relative_floor=0.0)
    assert log_ref.tolist() == [[-math.inf]] and floored.tolist() == [[True]]
    log_prob = torch.tensor([[-1.0]], dtype=torch.float64, requires_grad=True)
    kl = causal_kl(log_prob, log_ref)
    kl.sum().backward()
    assert kl.tolist() == [[10.0]] and log_prob.grad.tolist() == [[0.0]]


def test_rows_without_a_reference():
    """No draw 0; no other draw; nothing. Rows without a reference hold p_q itself, below every floor too."""
    collider = torch.full((3, 2, 1), -1.0)
    valid = torch.tensor([[0, 1], [1, 0], [0, 0]])
    collider[valid == 0] = NAN
    query = torch.tensor([[-0.5], [-30.0], [-30.0]])
    log_ref, floored, has_reference = causal_reference(collider, query, valid)
    assert has_reference.tolist() == [False, True, False]
    assert floored.tolist() == [[False], [True], [False]]  # row 1 is p_q = e^-30, under the floor
    torch.testing.assert_close(log_ref, torch.tensor([[-0.5], [math.log(1e-6)], [-30.0]]))
    _, _, has_reference = causal_reference(collider, query, valid, projection="exclusive")
    assert has_reference.tolist() == [False, False, False]
    marginal, valid_marginal = torch.full((3, 1, 1), -2.0), torch.tensor([[1], [0], [1]])
    _, _, has_reference = causal_reference(
        collider, query, valid, log_p_marginal=marginal, valid_marginal=valid_marginal
    )
    assert has_reference.tolist() == [True, False, False]
    log_ref, floored, has_reference = causal_reference(torch.zeros(3, 0, 1), query)
    assert torch.equal(log_ref, query) and not floored.any() and not has_reference.any()


def test_a_single_shared_draw_is_the_query():
    collider, query = torch.full((2, 1, 3), -0.3), torch.tensor([[-0.1, -1.0, -5.0], [-2.0, -3.0, -4.0]])
    log_ref, floored, has_reference = causal_reference(collider, query)
    torch.testing.assert_close(log_ref, query)
    assert has_reference.all() and not floored.any()
    log_ref, _, has_reference = causal_reference(collider, query, projection="exclusive")
    assert torch.equal(log_ref, query) and not has_reference.any()


def _referee(collider, query, valid, marginal, valid_marginal, projection, reduction):
    """Eq. 13 for one response with decimals: (log_ref, floored) per token, or None."""
    kept = [draw for draw in range(len(collider)) if valid[draw]]
    if marginal is None:
        inside = [collider[0]] if valid[0] else []
        outside = [collider[draw] for draw in kept if draw >= 1 or projection == "inclusive"]
    else:
        inside = [collider[draw] for draw in kept]
        outside = [row for row, v in zip(marginal, valid_marginal, strict=True) if v]
    if not inside or not outside:
        return None
    tokens = []
    with localcontext() as context:
        context.prec = 60
        for j in range(len(query)):
            p_c = sum(Decimal(row[j]).exp() for row in inside) / len(inside)
            subtracted = sum(Decimal(row[j]).exp() for row in outside)
            if reduction == "mean":
                subtracted /= len(outside)
            p_q = Decimal(query[j]).exp()
            raw, delta = p_c - subtracted + p_q, max(Decimal("1e-6"), Decimal("0.01") * p_q)
            tokens.append((float(max(raw, delta).ln()), raw < delta))
    return tokens


@pytest.mark.parametrize("marginal", [False, True])
@pytest.mark.parametrize("projection", ["inclusive", "exclusive"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reference_against_decimals(marginal, projection, reduction):
    """Ragged draws with NaN in their gaps, log-probabilities from 0 to -700."""
    seen = set()
    for seed in range(6):
        g = torch.Generator().manual_seed(seed)

        def draws(number, g=g):
            scale = torch.tensor([1.0, 5.0, 700.0], dtype=torch.float64)[
                torch.randint(0, 3, (4, number, 6), generator=g)
            ]
            log_p = -torch.rand(4, number, 6, generator=g, dtype=torch.float64) * scale
            valid = torch.rand(4, number, generator=g) > 0.4
            log_p[~valid] = NAN
            return log_p, valid

        (collider, valid), query = draws(3), -4 * torch.rand(4, 6, generator=g, dtype=torch.float64)
        other = draws(2) if marginal else (None, None)
        log_ref, floored, has_reference = causal_reference(
            collider,
            query,
            valid,
            projection=projection,
            reduction=reduction,
            log_p_marginal=other[0],
            valid_marginal=other[1],
        )
        for i in range(4):
            rest = [None if x is None else x[i].tolist() for x in other]
            tokens = _referee(collider[i].tolist(), query[i].tolist(), valid[i].tolist(), *rest, projection, reduction)
            seen.add(tokens is None)
            assert bool(has_reference[i]) == (tokens is not None)
            if tokens is None:
                tokens = [(x, False) for x in query[i].tolist()]
            torch.testing.assert_close(log_ref[i].tolist(), [x for x, _ in tokens], rtol=1e-9, atol=1e-9)
            assert floored[i].tolist() == [f for _, f in tokens]
            seen.update(("floored", f) for _, f in tokens)
    assert seen == {True, False, ("floored", True), ("floored", False)}


@pytest.mark.parametrize("shift", [-100.0, -700.0, -5000.0])
def test_tiny_probabilities_keep_their_digits(shift):
    """.5 - .4 + .4 times e^shift: without an absolute floor the shift is added, whatever exp can hold."""
    log_ref, floored, _ = causal_reference(logs([[[0.5], [0.3]]]) + shift, logs([[0.4]]) + shift, floor=0.0)
    torch.testing.assert_close(log_ref, logs([[0.5]]) + shift, rtol=1e-12, atol=1e-12)
    assert not floored.any()
    # With the floor: 1e-6 to the bit of its logarithm.
    log_ref, floored, _ = causal_reference(logs([[[0.5], [0.3]]]) + shift, logs([[0.4]]) + shift)
    assert log_ref.tolist() == [[math.log(1e-6)]] and floored.all()


def test_probabilities_of_exactly_zero():
    """log 0 everywhere: floored. log 0 for the query alone: p_c - mean + 0 = .5 - .4."""
    none = torch.full((1, 2, 1), -math.inf)
    log_ref, floored, _ = causal_reference(none, none[:, 0])
    assert floored.all() and log_ref.item() == pytest.approx(math.log(1e-6))
    log_ref, floored, _ = causal_reference(logs([[[0.5], [0.3]]]), none[:, 0])
    torch.testing.assert_close(log_ref.exp(), torch.tensor([[0.1]], dtype=torch.float64))
    assert not floored.any()


def test_float32_differences_are_taken_in_float64():
    """p_c and p_q of .9, draws of .9 as well: what is left is .9 to all of float32's digits."""
    log_p = torch.full((1, 3, 4), 0.9).log()
    log_ref, _, _ = causal_reference(log_p, log_p[:, 0])
    assert log_ref.dtype == torch.float32
    torch.testing.assert_close(log_ref, log_p[:, 0], rtol=0, atol=1e-8)


def test_shared_draws_average_to_the_query():
    """Averaged over which draw is called l = 0, the reference of shared draws is p_q (nothing is floored)."""
    g = torch.Generator().manual_seed(0)
    collider = (0.4 + 0.1 * torch.rand(3, 4, 5, generator=g, dtype=torch.float64)).log()
    query = (0.3 + 0.1 * torch.rand(3, 5, generator=g, dtype=torch.float64)).log()
    for projection in ("inclusive", "exclusive"):
        turned = [causal_reference(collider.roll(s, 1), query, projection=projection) for s in range(4)]
        assert not any(floored.any() for _, floored, _ in turned)
        probabilities = torch.stack([log_ref.exp() for log_ref, _, _ in turned])
        torch.testing.assert_close(probabilities.mean(0), query.exp())
        assert (probabilities - query.exp()).abs().mean() > 0.01


def test_exclusive_is_inclusive_times_l_over_l_minus_1():
    collider, query = logs([[[0.5], [0.3], [0.4]]]), logs([[0.4]])
    parts = [causal_reference(collider, query, projection=p)[0].exp() - query.exp() for p in ("inclusive", "exclusive")]
    torch.testing.assert_close(parts[1], parts[0] * 3 / 2)


@pytest.mark.parametrize("marginal", [False, True])
@pytest.mark.parametrize("fill", [0.0, NAN, math.inf])
def test_masked_draws_more_tokens_and_the_order_of_rows(marginal, fill):
    g = torch.Generator().manual_seed(4)
    collider, query = -torch.rand(3, 2, 5, generator=g), -torch.rand(3, 5, generator=g)
    extra = {"log_p_marginal": -torch.rand(3, 2, 5, generator=g)} if marginal else {}
    narrow = causal_reference(collider, query, **extra)

    def pad(x):
        """One more draw and two more tokens, in which anything may stand."""
        wide = torch.full((3, 3, 7), fill)
        wide[:, :2, :5] = x
        return wide

    valid = torch.tensor([[1, 1, 0]] * 3)
    wide_extra = {k: pad(v) for k, v in extra.items()} | ({"valid_marginal": valid} if marginal else {})
    wide_query = torch.cat([query, torch.full((3, 2), -1.0)], 1)
    wide = causal_reference(pad(collider), wide_query, valid, **wide_extra)
    order = torch.tensor([2, 0, 1])
    moved = causal_reference(collider[order], query[order], **{k: v[order] for k, v in extra.items()})
    for a, b, c in zip(narrow, wide, moved, strict=True):
        torch.testing.assert_close(b[:, :5] if b.ndim == 2 else b, a)
        assert torch.equal(c, a[order])


def test_kl_and_its_gradient_by_hand():
    """rho = 2: 2 - log 2 - 1, slope 1 - rho = -1. rho = 1: 0 and 0. rho = 1/2: log 2 - 1/2, slope 1/2."""
    log_prob = logs([[0.2, 0.4, 0.8]]).requires_grad_()
    kl = causal_kl(log_prob, logs([[0.4, 0.4, 0.4]]))
    expected = torch.tensor([[1 - math.log(2), 0.0, math.log(2) - 0.5]], dtype=torch.float64)
    torch.testing.assert_close(kl, expected)
    kl.sum().backward()
    torch.testing.assert_close(log_prob.grad, torch.tensor([[-1.0, 0.0, 0.5]], dtype=torch.float64))


def test_no_gradient_beyond_the_clamps():
    """log rho 3 gives e^3 - 4 = 16 > 10; -9 gives 8 + e^-9 and slope 1 - e^-9; all others give 10."""
    log_rho = torch.tensor([[3.0, -9.0, -11.0, 25.0, -25.0, math.inf, -math.inf]], dtype=torch.float64)
    log_prob = torch.full((1, 7), -1.0, dtype=torch.float64, requires_grad=True)
    kl = causal_kl(log_prob, log_rho - 1)
    small = math.exp(-9)
    expected = torch.tensor([[10, 8 + small, 10, 10, 10, 10, 10]], dtype=torch.float64)
    torch.testing.assert_close(kl, expected)
    kl.sum().backward()
    torch.testing.assert_close(log_prob.grad, torch.tensor([[0, 1 - small, 0, 0, 0, 0, 0]], dtype=torch.float64))
    # Without a cap in reach the clamp of log rho alone: e^20 - 21 above, 19 + e^-20 below, no slope either.
    log_prob.grad = None
    kl = causal_kl(log_prob, log_rho - 1, max_kl=1e12)
    kl.sum().backward()
    assert kl[0, 3].item() == pytest.approx(math.exp(20) - 21) and kl[0, 4].item() == pytest.approx(19 + math.exp(-20))
    assert log_prob.grad[0, 3:].tolist() == [0.0] * 4
    assert log_prob.grad[0, 0].item() == pytest.approx(1 - math.exp(3))


def test_gradient_flows_through_log_prob_alone():
    log_prob, log_ref = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    causal_kl(log_prob, log_ref).sum().backward()
    assert log_prob.grad.abs().sum() > 0 and log_ref.grad is None
    collider, query = torch.randn(2, 2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    assert not causal_reference(collider, query)[0].requires_grad


def test_gradcheck():
    g = torch.Generator().manual_seed(0)
    log_ref = -3 * torch.rand(3, 4, generator=g, dtype=torch.float64)
    log_prob = (-3 * torch.rand(3, 4, generator=g, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: causal_kl(x, log_ref), (log_prob,))


def test_close_to_the_reference_float32_keeps_its_digits():
    """x^2 / 2 + x^3 / 6 for x = 1e-4: 5.00017e-9, where exp(x) - x - 1 in float32 has no digit left."""
    kl = causal_kl(torch.tensor([[-1e-4]]), torch.zeros(1, 1))
    assert kl.item() == pytest.approx(5.00017e-9, rel=1e-2)


@pytest.mark.parametrize(("given", "returned"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_dtypes(given, returned):
    log_prob = torch.tensor([[-1.0, -2.0]], dtype=given, requires_grad=True)
    log_ref, floored, has_reference = causal_reference(log_prob.unsqueeze(1), log_prob)
    assert (log_ref.dtype, floored.dtype, has_reference.dtype) == (returned, torch.bool, torch.bool)
    kl = causal_kl(log_prob, log_ref + 1)
    kl.sum().backward()
    assert kl.dtype == returned and log_prob.grad.dtype == given


def test_errors_name_the_argument():
    collider, query = torch.zeros(2, 3, 4), torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"log_p_query has shape \[2, 5\] where \[n=2, T=4\]"):
        causal_reference(collider, torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"valid has shape \[3, 2\] where \[n=2, L=3\]"):
        causal_reference(collider, query, torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"log_p_marginal has shape \[2, 4\] where \[n=2, K, T=4\]"):
        causal_reference(collider, query, log_p_marginal=query)
    with pytest.raises(ValueError, match="valid_marginal is given without log_p_marginal"):
        causal_reference(collider, query, valid_marginal=torch.ones(2, 1))
    with pytest.raises(ValueError, match="projection is 'x' where one of 'inclusive', 'exclusive'"):
        causal_reference(collider, query, projection="x")
    with pytest.raises(ValueError, match="reduction is 'max' where one of 'mean', 'sum'"):
        causal_reference(collider, query, reduction="max")
    with pytest.raises(ValueError, match="floor is -1.0"):
        causal_reference(collider, query, floor=-1.0)
    with pytest.raises(ValueError, match=r"log_ref has shape \[2, 3\] where \[n=2, T=4\]"):
        causal_kl(query, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="max_kl is -1 where"):
        causal_kl(query, query, max_kl=-1)
