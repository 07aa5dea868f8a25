"""`process_values` and `uct`: numbers by hand, and every case that has no numbers."""

from __future__ import annotations

import math

import pytest
import torch

from gcpo.algorithms import process_values, uct


def values(wrong: list[float], remaining: list[float]) -> list[float]:
    return process_values(
        torch.tensor(wrong, dtype=torch.float64), torch.tensor(remaining, dtype=torch.float64)
    ).tolist()


def test_a_right_path_rises_evenly() -> None:
    """v_k = k / K; the tensors may be of integers and booleans."""
    assert values([0, 0, 0, 0], [3, 2, 1, 0]) == pytest.approx([0.25, 0.5, 0.75, 1])
    given = process_values(torch.zeros(3, dtype=torch.bool), torch.tensor([2, 1, 0]))
    assert given.dtype == torch.float32 and given.tolist() == pytest.approx([1 / 3, 2 / 3, 1])


@pytest.mark.parametrize(("at", "value"), [(1, 0.0), (2, 0.0), (3, 0.25), (4, 0.5)])
def test_the_first_wrong_step(at: int, value: float) -> None:
    """(k - 2) / K at a wrong step k after right ones, not below 0."""
    wrong = [float(k == at) for k in range(1, 5)]
    found = values(wrong, [3, 2, 1, 0])
    assert found[: at - 1] == pytest.approx([k / 4 for k in range(1, at)])
    assert found[at - 1] == pytest.approx(value)


def test_uneven_distances_and_an_uncertain_step() -> None:
    """By hand: 1/4; 1/4 + (3/4)/2 = 5/8; 5/8 + (3/8)/3 * (1 - 1.5) = 9/16."""
    assert values([0, 0, 0.75], [3, 1, 2]) == pytest.approx([0.25, 0.625, 0.5625])


def test_values_stay_between_0_and_1() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        wrong = torch.rand(12, generator=generator, dtype=torch.float64).round()
        remaining = torch.randint(0, 5, (12,), generator=generator)
        found = process_values(wrong, remaining)
        assert found.dtype == torch.float64 and bool(((found >= 0) & (found <= 1)).all())


def test_no_steps() -> None:
    assert process_values(torch.zeros(0), torch.zeros(0)).shape == (0,)


@pytest.mark.parametrize(
    ("wrong", "remaining", "message"),
    [([0.0, 0.0], [1.0], "K=2"), ([2.0], [0.0], "outside"), ([0.0], [-1.0], "below 0"), ([math.nan], [0.0], "outside")],
)
def test_refusals(wrong: list[float], remaining: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        process_values(torch.tensor(wrong), torch.tensor(remaining))


def test_uct() -> None:
    """.5 + .5 sqrt(2 ln 4 / 2), and the bonus of a child without visits."""
    assert uct(0.5, 2, 4, exploration=0.5) == pytest.approx(1.0887050, abs=1e-7)
    assert uct(0.4, 0, 4) == pytest.approx(1.3)
    assert uct(0.4, 0, 0, unvisited=0.2) == pytest.approx(0.6)
    assert uct(0.4, 1, 1) == uct(0.4, 1, 0) == 0.4
    with pytest.raises(ValueError, match="visits is -1"):
        uct(0.4, -1, 4)
    with pytest.raises(ValueError, match="parent_visits is -1"):
        uct(0.4, 1, -1)
