"""The value model learns a toy, does not see padding, and comes back from the disk."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from gcpo.selftraining.settings import ValueSettings
from gcpo.selftraining.value_model import HEAD_FILE, ValueModel, batches, regress

Inputs = list[tuple[list[int], list[int]]]


def make_inputs(count: int, seed: int = 0) -> Inputs:
    rng = random.Random(seed)
    return [
        ([5, 6] * rng.randrange(1, 5), [rng.randrange(3, 60) for _ in range(rng.randrange(1, 9))]) for _ in range(count)
    ]


@pytest.fixture
def model(tiny_model: Path) -> ValueModel:
    return ValueModel.load(tiny_model, 32)


def test_it_learns_and_saves(model: ValueModel, tmp_path: Path) -> None:
    """An eighth of the length as target; the model of a folder gives the same values."""
    inputs = make_inputs(64)
    targets = [len(tokens) / 8 for _, tokens in inputs]
    losses = regress(model, inputs, targets, ValueSettings(epochs=30, learning_rate=3e-3, batch_size=16), seed=0)
    assert len(losses) == 30 and losses[-1] < 0.01 < losses[0]
    values = model.judge(inputs)
    assert sum((a - b) ** 2 for a, b in zip(values, targets, strict=True)) / 64 < 0.01
    model.save(tmp_path)
    assert (tmp_path / HEAD_FILE).is_file()
    assert ValueModel.load(tmp_path, 32).judge(inputs) == pytest.approx(values, abs=1e-6)


def test_padding_and_order_do_not_matter(model: ValueModel, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(12)
    with torch.no_grad():
        alone = [model.of([one]).clamp(0, 1).item() for one in inputs]
        together = model.of(inputs).clamp(0, 1).tolist()
    assert together == pytest.approx(alone, abs=1e-5)
    monkeypatch.setattr("gcpo.selftraining.value_model.BATCH_TOKENS", 25)
    sizes: list[int] = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda ids, mask: sizes.append(ids.numel()) or forward(ids, mask))
    assert model.judge(inputs) == pytest.approx(alone, abs=1e-5)
    assert len(sizes) > 3 and max(sizes) <= 25
    assert model.judge([]) == []


def test_the_value_is_that_of_the_last_token(model: ValueModel) -> None:
    """Linear(vocabulary -> 1) on the logits of the last token of question and solution."""
    question, tokens = make_inputs(1)[0]
    with torch.no_grad():
        logits = model.body(input_ids=torch.tensor([question + tokens])).logits[0, -1]
        expected = model.head.weight[0] @ logits + model.head.bias[0]
        assert model.of([(question, tokens)]).item() == pytest.approx(expected.item(), abs=1e-5)
        assert model.of([([7, 8], tokens)]).item() != pytest.approx(expected.item(), abs=1e-5)


def test_a_long_input_keeps_the_question_and_its_last_tokens(model: ValueModel) -> None:
    question, tokens = [5, 6], list(range(10, 60))
    with torch.no_grad():
        assert model.of([(question, tokens)]).item() == model.of([(question, tokens[-30:])]).item()


def test_the_loss_is_the_mean_squared_error(model: ValueModel) -> None:
    """The first epoch with one batch reports the loss before the step, in double check with the values."""
    inputs = make_inputs(5)
    with torch.no_grad():
        values = model.of(inputs)
    (loss,) = regress(model, inputs, [0.5] * 5, ValueSettings(epochs=1, batch_size=8), seed=0)
    assert loss == pytest.approx(((values - 0.5) ** 2).mean().item(), rel=1e-4)


def test_batches() -> None:
    """Every number once an epoch, the last batch smaller."""
    found = list(batches(7, 3, random.Random(0)))
    assert [len(batch) for batch in found] == [3, 3, 1] and sorted(sum(found, [])) == list(range(7))
    assert list(batches(7, 3, random.Random(1))) != found
