"""Gradients with respect to the language-model head: numbers by hand, autograd, finite differences."""

from __future__ import annotations

import pytest
import torch

from gcpo.algorithms import compression, head_gradient_square


def t(x):
    return torch.tensor(x, dtype=torch.float64)


def test_by_hand():
    """V = 2, p = 1/2. Segment 0: (1/2, -1/2) x 2, so 4 * 1/4 * 2 = 2. Segment 1: two tokens with other labels cancel.
    Segment 2: two equal tokens, 4 times the square of one, 1/2 * (1 + 4). Segment 3: no tokens."""
    states = t([[2.0, 0.0], [1.0, 1.0], [1.0, 1.0], [1.0, 2.0], [1.0, 2.0], [9.0, 9.0]])
    labels, segment = torch.tensor([0, 0, 1, 1, 1, 0]), torch.tensor([0, 1, 1, 2, 2, -1])
    found = head_gradient_square(states, torch.zeros(6, 2).double(), labels, segment, 4)
    torch.testing.assert_close(found, t([2.0, 0.0, 10.0, 0.0]))


def random_case(tokens=11, size=5, vocabulary=7, segments=3):
    g = torch.Generator().manual_seed(3)
    states = torch.randn(tokens, size, generator=g, dtype=torch.float64)
    weight = torch.randn(vocabulary, size, generator=g, dtype=torch.float64)
    labels = torch.randint(0, vocabulary, (tokens,), generator=g)
    return states, weight, labels, torch.randint(-1, segments, (tokens,), generator=g)


@pytest.mark.parametrize("at_once", [256, 2])
def test_against_autograd_and_finite_differences(monkeypatch, at_once):
    """In one piece and in several; also the slope along the gradient itself, which is its square."""
    monkeypatch.setattr(compression, "AT_ONCE", at_once)
    states, weight, labels, segment = random_case()
    found = head_gradient_square(states, states @ weight.T, labels, segment, 3)
    for k in range(3):

        def log_pi(w, k=k):
            return (states @ w.T).log_softmax(-1).gather(1, labels[:, None])[segment == k].sum()

        gradient = torch.func.grad(log_pi)(weight)
        torch.testing.assert_close(found[k], gradient.square().sum())
        slope = (log_pi(weight + 1e-5 * gradient) - log_pi(weight - 1e-5 * gradient)) / 2e-5
        torch.testing.assert_close(found[k], slope, rtol=1e-6, atol=0)


def test_invariances():
    """The order of the tokens, a constant in the logits and the numbers of the segments do not matter."""
    states, weight, labels, segment = random_case()
    logits = states @ weight.T
    found = head_gradient_square(states, logits, labels, segment, 3)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(1))
    moved = head_gradient_square(states[order], logits[order] + 5, labels[order], segment[order], 3)
    torch.testing.assert_close(moved, found)
    renamed = head_gradient_square(states, logits, labels, torch.where(segment < 0, -1, 2 - segment), 3)
    torch.testing.assert_close(renamed, found.flip(0))


def test_dtypes_and_errors():
    states, logits, labels = torch.ones(2, 3), torch.zeros(2, 4), torch.zeros(2).long()
    found = head_gradient_square(states.bfloat16().requires_grad_(), logits.bfloat16(), labels, labels, 1)
    assert found.dtype == torch.float32 and not found.requires_grad
    with pytest.raises(ValueError, match=r"logits has shape \[3, 4\] where \[T=2, V\]"):
        head_gradient_square(states, torch.zeros(3, 4), labels, labels, 1)
    with pytest.raises(ValueError, match="segment has dtype torch.float32"):
        head_gradient_square(states, logits, labels, labels.float(), 1)
