"""Rows and samples that are missing: whatever stands in their places, NaN included, reaches no other number.

The referee is plain Python in float64, written from the equations; inputs are drawn by hypothesis.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gcpo.algorithms import (
    causal_advantage,
    causal_diagnostics,
    causal_kl,
    causal_reference,
    causal_target,
    causal_weight,
    conditioned_target,
    episode_reward,
    token_advantage,
)

FILLERS = (math.nan, math.inf, -math.inf, 1e30, 0.0)
numbers = st.floats(-3, 3, allow_nan=False, width=32)
fillers = st.sampled_from(FILLERS)
checked = settings(max_examples=150, deadline=None)


@st.composite
def groups(draw: st.DrawFn) -> dict[str, Any]:
    """A group with states, samples and masks; a single response, no sample at all and zero vectors among them."""
    n, slots, marginal, m, d = (draw(st.integers(low, high)) for low, high in ((1, 4), (1, 3), (0, 2), (1, 2), (1, 3)))

    def table(*shape: int) -> torch.Tensor:
        size = math.prod(shape)
        flat = draw(st.lists(numbers, min_size=size, max_size=size))
        return torch.tensor(flat, dtype=torch.float64).view(shape)

    def mask(*shape: int) -> torch.Tensor:
        size = math.prod(shape)
        return torch.tensor(draw(st.lists(st.booleans(), min_size=size, max_size=size))).view(shape)

    z = table(n, d)
    if draw(st.booleans()):
        z[0] = 0
    return {
        "z": z,
        "conditioned": table(n, slots + marginal, m, d),
        "valid": mask(n, slots + marginal, m),
        "slots": slots,
        "projection": draw(st.sampled_from(["inclusive", "exclusive"])),
        "filler": draw(fillers),
        "advantage": table(n),
    }


def arguments(group: dict[str, Any], filler: float) -> dict[str, Any]:
    """Of ``causal_target``, with ``filler`` where a sample is not valid."""
    values = torch.where(group["valid"].unsqueeze(-1), group["conditioned"], filler)
    slots, marginal = group["slots"], values.shape[1] > group["slots"]
    return {
        "z_conditioned": values[:, :slots],
        "valid": group["valid"][:, :slots],
        "projection": group["projection"],
        "z_marginal": values[:, slots:] if marginal else None,
        "valid_marginal": group["valid"][:, slots:] if marginal else None,
    }


def mean_of(rows: list[list[float]]) -> list[float] | None:
    return [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)] if rows else None


def referee_target(group: dict[str, Any], i: int) -> list[float] | None:
    """t_i of Steps 1 to 4."""
    cells = group["conditioned"][i].tolist()
    there = group["valid"][i].tolist()
    slots = group["slots"]

    def samples(chosen: range) -> list[list[float]]:
        return [cells[at][k] for at in chosen for k in range(len(there[at])) if there[at][k]]

    if len(cells) > slots:
        inside, outside = samples(range(slots)), samples(range(slots, len(cells)))
    else:
        inside = samples(range(1))
        outside = samples(range(0 if group["projection"] == "inclusive" else 1, slots))
    a, b, z_bar = mean_of(inside), mean_of(outside), mean_of(group["z"].tolist())
    if a is None or b is None:
        return None
    return [x - y + w for x, y, w in zip(a, b, z_bar, strict=True)]


def referee_similarity(z: list[float], t: list[float], similarity: str, sigma: float) -> float:
    distance = math.dist(z, t)
    if similarity == "euclidean":
        return 1 / (1 + distance)
    if similarity == "gaussian":
        return 1.0 if sigma == 0 else math.exp(-((distance / sigma) ** 2) / 2)
    length = math.hypot(*z) * math.hypot(*t)
    return math.fsum(x * y for x, y in zip(z, t, strict=True)) / length if length else 0.0


@checked
@given(groups(), st.sampled_from(["cosine", "euclidean", "gaussian"]))
def test_target_weight_and_advantage_against_the_referee(group: dict[str, Any], similarity: str) -> None:
    """Steps 1 to 4, Eq. 11, and both forms of B; the placeholder of a row without a target enters no mean."""
    target, has_target = causal_target(group["z"], **arguments(group, group["filler"]))
    wanted = [referee_target(group, i) for i in range(len(group["z"]))]
    assert has_target.tolist() == [t is not None for t in wanted] and target.dtype == torch.float64
    for row, t in zip(target.tolist(), wanted, strict=True):
        assert row == pytest.approx(t if t is not None else [0.0] * len(row), abs=1e-12)

    states = group["z"].tolist()
    distances = sorted(math.dist(z, t) for z, t in zip(states, wanted, strict=True) if t is not None)
    sigma = (distances[(len(distances) - 1) // 2] + distances[len(distances) // 2]) / 2 if distances else 0.0
    placeholder = torch.where(has_target.unsqueeze(-1), target, group["filler"])
    weight = causal_weight(group["z"], placeholder, has_target, alpha=1.5, similarity=similarity)
    expected = [
        1.0 if t is None else 1.5 * referee_similarity(z, t, similarity, sigma)
        for z, t in zip(states, wanted, strict=True)
    ]
    # Near 0 a length or a distance is only rounding, and so are a direction and a ratio of distances.
    lengths = [math.hypot(*t) for t in wanted if t is not None] if similarity == "cosine" else [sigma]
    if all(length > 1e-6 for length in lengths):
        assert weight.tolist() == pytest.approx(expected, abs=1e-6)

    filled = torch.where(has_target, weight, group["filler"])
    known = [u for u, t in zip(weight.tolist(), wanted, strict=True) if t is not None]
    signed = causal_advantage(group["advantage"], filled, form="signed", has_target=has_target)
    for b, a, u, t in zip(signed.tolist(), group["advantage"].tolist(), weight.tolist(), wanted, strict=True):
        shift = 0.0 if t is None else u - math.fsum(known) / len(known)
        assert b == pytest.approx(a * (1 + (a > 0) * shift - (a < 0) * shift), abs=1e-9)
    product = causal_advantage(group["advantage"], weight, has_target=has_target)
    assert torch.equal(product, group["advantage"] * weight)


@checked
@given(groups())
def test_fillers_change_nothing(group: dict[str, Any]) -> None:
    """Every function of the features gives the same for one filler as for another, bit for bit."""
    with_zeros, with_filler = arguments(group, 0.0), arguments(group, group["filler"])
    for one, other in zip(
        causal_target(group["z"], **with_zeros), causal_target(group["z"], **with_filler), strict=True
    ):
        assert torch.equal(one, other)
    for one, other in zip(conditioned_target(**with_zeros), conditioned_target(**with_filler), strict=True):
        assert torch.equal(one, other)
    found = causal_diagnostics(group["z"], **with_zeros), causal_diagnostics(group["z"], **with_filler)
    for name, value in found[0].items():
        assert torch.equal(value.nan_to_num(7.0), found[1][name].nan_to_num(7.0)), name


@checked
@given(st.data())
def test_reference_against_the_referee(data: st.DataObject) -> None:
    """Eq. 13 with draws missing in any place, and KL' of Eq. 12."""
    slots, marginal, tokens = (data.draw(st.integers(low, high)) for low, high in ((0, 3), (0, 2), (1, 3)))
    size = slots + marginal
    logs = st.floats(-6, 0, width=32)
    table = data.draw(st.lists(st.lists(logs, min_size=tokens, max_size=tokens), min_size=size, max_size=size))
    query = data.draw(st.lists(logs, min_size=tokens, max_size=tokens))
    valid = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    projection, filler = data.draw(st.sampled_from(["inclusive", "exclusive"])), data.draw(fillers)
    log_p = torch.tensor([row if ok else [filler] * tokens for row, ok in zip(table, valid, strict=True)])
    log_p = log_p.double().view(1, size, tokens)
    there = torch.tensor(valid, dtype=torch.bool).view(1, size)
    log_query = torch.tensor([query], dtype=torch.float64)
    log_ref, floored, has_reference = causal_reference(
        log_p[:, :slots],
        log_query,
        there[:, :slots],
        projection=projection,
        log_p_marginal=log_p[:, slots:] if marginal else None,
        valid_marginal=there[:, slots:] if marginal else None,
    )
    if marginal:
        inside, outside = range(slots), range(slots, size)
    else:
        inside, outside = range(min(slots, 1)), range(0 if projection == "inclusive" else 1, slots)
    inside, outside = ([at for at in chosen if valid[at]] for chosen in (inside, outside))
    assert bool(has_reference) == bool(inside and outside) and log_ref.dtype == torch.float64
    kl = causal_kl(log_query, log_ref)
    for j in range(tokens):
        if not (inside and outside):
            assert float(log_ref[0, j]) == query[j] and not floored[0, j] and float(kl[0, j]) == 0
            continue
        p_c = math.fsum(math.exp(table[at][j]) for at in inside) / len(inside)
        subtracted = math.fsum(math.exp(table[at][j]) for at in outside) / len(outside)
        raw, delta = p_c - subtracted + math.exp(query[j]), max(1e-6, 0.01 * math.exp(query[j]))
        assert math.exp(float(log_ref[0, j])) == pytest.approx(max(raw, delta), rel=1e-9, abs=1e-12)
        log_rho = min(max(math.log(max(raw, delta)) - query[j], -20), 20)
        assert float(kl[0, j]) == pytest.approx(min(math.exp(log_rho) - log_rho - 1, 10), rel=1e-6, abs=1e-9)


@checked
@given(st.integers(1, 3), st.integers(1, 3), fillers, st.randoms(use_true_random=False))
def test_episodes_that_do_not_exist(n: int, k: int, filler: float, random: Any) -> None:
    """Neither the scores of an episode that is not there, nor tokens outside the response, reach a number."""
    generator = torch.Generator().manual_seed(random.randrange(2**31))
    exists = torch.rand(n, k, generator=generator) > 0.4
    outcome, robustness, effectiveness = (
        torch.rand(n, *rest, generator=generator).double() for rest in ((), (k,), (k,))
    )
    index = torch.randint(-1, k, (n, 5), generator=generator)
    index = torch.where(exists.gather(1, index.clamp(min=0)), index, -1)
    mask = torch.rand(n, 5, generator=generator) > 0.3
    log_prob = -torch.rand(n, 5, generator=generator).double()

    def advantages(value: float) -> torch.Tensor:
        reward = episode_reward(
            outcome, torch.where(exists, robustness, value), torch.where(exists, effectiveness, value), exists
        )
        assert not reward[~exists].any()
        return token_advantage(
            torch.where(exists, reward, value), index, torch.where(mask, log_prob, value), mask.long()
        )

    clean = advantages(0.0)
    assert torch.equal(clean, advantages(filler)) and clean.isfinite().all() and clean.dtype == torch.float64


def test_a_row_without_a_target_keeps_its_advantage() -> None:
    """Upsilon = 1.8, 1.9, none, 1.7: the mean of the three is 1.8, and the third row is 1, not 0.4."""
    weight = torch.tensor([1.8, 1.9, 1.0, 1.7], dtype=torch.float64)
    has_target = torch.tensor([True, True, False, True])
    found = causal_advantage(torch.ones(4), weight, form="signed", has_target=has_target)
    assert found.tolist() == pytest.approx([1.0, 1.1, 1.0, 0.9]) and found.dtype == torch.float64
    down = causal_advantage(-torch.ones(4), weight, form="signed", has_target=has_target)
    assert down.tolist() == pytest.approx([-1.0, -0.9, -1.0, -1.1])
    nobody = torch.zeros(4, dtype=torch.bool)
    kept = causal_advantage(torch.ones(4), torch.full((4,), math.nan), form="signed", has_target=nobody)
    assert torch.equal(kept, torch.ones(4))
    with pytest.raises(ValueError, match=r"has_target has shape \[3\] where \[n=4\]"):
        causal_advantage(torch.ones(4), weight, has_target=torch.ones(3))


@pytest.mark.parametrize("similarity", ["cosine", "euclidean", "gaussian"])
@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_lengths_do_not_overflow(similarity: str, size: float) -> None:
    """Squares of float32 states of this size leave its range; the similarities are those of float64."""
    z, target = torch.tensor([[3.0, 1.0], [1.0, -2.0], [0.0, 0.0]]), torch.tensor([[1.0, 1.0], [2.0, 0.0], [1.0, 0.0]])
    found = causal_weight(size * z, size * target, similarity=similarity)
    exact = causal_weight(size * z.double(), size * target.double(), similarity=similarity)
    torch.testing.assert_close(found, exact.float())
