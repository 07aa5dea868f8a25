"""The warning for a first step without any reward."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from tensordict import NonTensorStack, TensorDict

from gcpo.adapters.trainer import MethodTrainer
from gcpo.adapters.zero_rewards import zero_reward_warning
from tests.adapters.memory_queue import MemoryQueue

KEYS = [f"{group}_{session}_0" for group in "abcd" for session in range(2)]


class Letters:
    """One token for every character."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(map(chr, ids))


def batch_of(monkeypatch, responses, *, truth="72", source="openai/gsm8k", scores=(), padding=()):
    queue = MemoryQueue().install(monkeypatch)
    rows = len(responses)
    values = [scores[row] if row < len(scores) else 0.0 for row in range(rows)]
    fields = {
        "responses": torch.nested.as_nested_tensor(
            [torch.tensor([ord(letter) for letter in text]) for text in responses], layout=torch.jagged
        ),
        "rm_scores": torch.nested.as_nested_tensor(
            [torch.tensor([0.0] * (len(text) - 1) + [value]) for text, value in zip(responses, values, strict=True)],
            layout=torch.jagged,
        ),
        "reward_model": NonTensorStack(*[{"ground_truth": truth}] * rows),
        "extra_fields": NonTensorStack(*[{"reward_extra_info": {"reward_error": 0.0}}] * rows),
    }
    if source is not None:
        fields["data_source"] = NonTensorStack(*[source] * rows)
    tags = [{"is_padding": row in padding} for row in range(rows)]
    queue.kv_batch_put(KEYS[:rows], "train", TensorDict(fields, batch_size=rows), tags)
    return queue.meta(KEYS[:rows], "train")


def test_three_examples(monkeypatch):
    """One of a group: the end of its response, the extracted answer and the right one."""
    responses = [f"{'long ' * 100}end {row}\n#### 7{row}" if row < 4 else f"it is 7{row}" for row in range(8)]
    shown = zero_reward_warning(batch_of(monkeypatch, responses), Letters(), ours=True)
    first, *examples = shown
    assert first.startswith("every reward of the first step is 0 (8 responses)")
    assert len(examples) == 3
    for line, row, answer in zip(examples, (0, 2, 4), ("'70'", "'72'", "none"), strict=True):
        assert repr(responses[row][-200:]) in line and len(line) < 400
        assert f"extracted answer: {answer}; right answer: '72'" in line


@pytest.mark.parametrize(
    ("source", "truth", "response", "says"),
    [
        ("mine", "7", r"so \boxed{8}", "extracted answer: '8'; right answer: '7'"),
        ("mine", "7", "so 7", "extracted answer: none; right answer: '7'"),
        ("taco", '{"inputs": ["1"], "outputs": ["1"]}', "```python\nx\n```", "extracted answer: 'x'; right answer: '{"),
        ("searchR1_nq", "7", "so 7", "extracted answer: none (the data set searchR1_nq is question answering"),
        (None, "7", "so 7", "extracted answer: none; right answer: '7'"),
        ("mine", "x" * 500, "so 7", "right answer: 'xxx"),
    ],
)
def test_what_is_shown(monkeypatch, source, truth, response, says):
    batch = batch_of(monkeypatch, [response], truth=truth, source=source)
    shown = " ".join(zero_reward_warning(batch, Letters(), ours=True))
    assert says in shown and len(shown) < 800
    assert "extracted" not in " ".join(zero_reward_warning(batch, Letters(), ours=False))


@pytest.mark.parametrize("score", [1.0, 0.25, -1.0])
def test_any_reward_is_enough(monkeypatch, score):
    assert zero_reward_warning(batch_of(monkeypatch, ["no"] * 3, scores=[0, 0, score]), Letters(), ours=True) == []


def test_padding_rows_do_not_count(monkeypatch):
    batch = batch_of(monkeypatch, ["no"] * 3, scores=[0, 0, 1.0], padding=[2])
    assert "(2 responses)" in zero_reward_warning(batch, Letters(), ours=True)[0]
    assert zero_reward_warning(batch_of(monkeypatch, ["no"], padding=[0]), Letters(), ours=True) == []


def test_only_the_first_step_is_looked_at(monkeypatch, caplog):
    class Trainer(MethodTrainer):
        method = SimpleNamespace(name="gcpo")

        def __init__(self):
            function = SimpleNamespace(path="pkg://gcpo.rewards")
            self.config = SimpleNamespace(reward=SimpleNamespace(custom_reward_function=function))
            self.tokenizer, self.global_steps = Letters(), 1

    for first, warnings in ((0.0, 1), (1.0, 0)):
        caplog.clear()
        trainer = Trainer()
        with caplog.at_level(logging.WARNING):
            trainer._count_reward_errors(batch_of(monkeypatch, ["no"], scores=[first]), {})
            trainer._count_reward_errors(batch_of(monkeypatch, ["no"]), {})
        assert sum("every reward of the first step is 0" in record.message for record in caplog.records) == warnings
