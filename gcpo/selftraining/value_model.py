"""The value model: a causal language model, a linear layer on the logits of the last token, and its regression."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gcpo.selftraining.settings import ValueSettings

HEAD_FILE = "value_head.pt"
BATCH_TOKENS = 16_384
"""Tokens with padding that are judged together."""


class ValueModel(nn.Module):
    """V(question, partial solution), as the released code has it: Linear(vocabulary -> 1) on the last logits."""

    def __init__(self, body: Any, max_tokens: int) -> None:
        """
        Args:
            body: a causal language model of transformers.
            max_tokens: longest input; of a longer one the question and the last tokens are kept.
        """
        super().__init__()
        self.body, self.max_tokens = body, max_tokens
        self.head = nn.Linear(body.config.get_text_config().vocab_size, 1)

    @classmethod
    def load(cls, path: str | Path, max_tokens: int, seed: int = 0) -> ValueModel:
        """From a folder that `save` made, or from a language model, with a new head drawn from ``seed``."""
        from transformers import AutoModelForCausalLM

        torch.manual_seed(seed)
        model = cls(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), max_tokens)
        head = Path(path) / HEAD_FILE
        if head.is_file():
            model.head.load_state_dict(torch.load(head, map_location="cpu", weights_only=True))
        return model.to("cuda" if torch.cuda.is_available() else "cpu")

    def save(self, folder: Path) -> None:
        """Write the body as transformers does, and the head beside it."""
        self.body.save_pretrained(folder)
        torch.save(self.head.state_dict(), folder / HEAD_FILE)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[B] values of left-padded [B, T] inputs."""
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        logits = self.body(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=positions,
            logits_to_keep=1,
            use_cache=False,
        ).logits
        return self.head(logits[:, -1].float()).squeeze(-1)

    def of(self, inputs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Tensor:
        """[B] values, with gradient, of questions and partial solutions as token ids."""
        rows = [self._cut(list(question), list(tokens)) for question, tokens in inputs]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        device = self.head.weight.device
        return self(ids.to(device), mask.to(device))

    def _cut(self, question: list[int], tokens: list[int]) -> list[int]:
        room = max(self.max_tokens - len(question), 1)
        return question + tokens[-room:]

    @torch.no_grad()
    def judge(self, inputs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[float]:
        """Values between 0 and 1 in the order of the inputs."""
        self.eval()
        values = [0.0] * len(inputs)
        order = sorted(range(len(inputs)), key=lambda index: -len(inputs[index][0]) - len(inputs[index][1]))
        while order:
            longest = min(len(inputs[order[0]][0]) + len(inputs[order[0]][1]), self.max_tokens)
            count = max(BATCH_TOKENS // max(longest, 1), 1)
            batch, order = order[:count], order[count:]
            for index, value in zip(batch, self.of([inputs[i] for i in batch]).clamp(0, 1).tolist(), strict=True):
                values[index] = value
        return values


def batches(count: int, size: int, rng: random.Random) -> Iterator[list[int]]:
    """The numbers below ``count`` in random order, ``size`` at a time."""
    order = list(range(count))
    rng.shuffle(order)
    yield from (order[start : start + size] for start in range(0, count, size))


def regress(
    model: ValueModel,
    inputs: Sequence[tuple[Sequence[int], Sequence[int]]],
    targets: Sequence[float],
    settings: ValueSettings,
    seed: int,
) -> list[float]:
    """Fit the model to the targets: mean squared error, AdamW.

    Args:
        model: changed in place.
        inputs: questions and partial solutions as token ids.
        targets: their values.
        settings: epochs, learning rate, batch size.
        seed: of the order.

    Returns:
        The mean loss of each epoch, taken while it trains.
    """
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
    model.train()
    losses = []
    for _ in range(settings.epochs):
        total = 0.0
        for batch in batches(len(inputs), settings.batch_size, rng):
            target = torch.tensor([targets[index] for index in batch], device=model.head.weight.device)
            loss = nn.functional.mse_loss(model.of([inputs[index] for index in batch]), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        losses.append(total / len(inputs))
    return losses
