"""Texts with random lengths, and a tokenizer that supports them."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import numpy as np
from scipy.optimize import brentq

END = 1 << 20
"""The id that ends a response. No vocabulary contains this id or higher ones: each stands for a private character, ids
from `SPELLED` on for one of ``_TEXTS``."""
_FIRST, SPELLED = END + 1, END + 0xF000
_TEXTS = ["\n \n", "\\boxed{", "}", *map(str, range(10))]
_PRIVATE = 0xF0000 - END
_DRAWN = re.compile("([\U000f0000-\U000fefff]+)")
CHARACTERS_PER_TOKEN = 4
"""Characters per token of a prompt's fixed texts if the model's tokenizer is not available."""
PIECES = 16
"""Mean number of pieces that answers to one question share at their beginning; they diverge only between pieces."""
ANSWER, ANSWERS = 1000, 3
"""The right final answer, and the number of different final answers to a question."""


@dataclass(frozen=True)
class Lengths:
    """Mean lengths in tokens, and frequencies.

    Attributes:
        question: the plain prompt, including the chat template.
        response: response.
        draws: generations over the responses of a group, by kind, without cut draws.
        spread: standard deviation of the lengths in a group, over the mean.
        group_spread: standard deviation of the groups' mean responses, over the mean.
        common: tokens that two responses to one question begin with in common, mean over pairs.
        common_draws: the same for two draws of a group; ``None``: as ``common``.
        episodes: episodes of a response.
        equal_rewards: fraction of groups with equal rewards.
        cut: fraction of the draws of each kind that reach the limit, and are excluded.

    Raises:
        ValueError: a mean is below 1, or a spread is negative.
    """

    question: float
    response: float
    draws: Mapping[str, float] = field(default_factory=dict)
    spread: float = 0.0
    group_spread: float = 0.0
    common: float = 0.0
    common_draws: float | None = None
    episodes: float = 8.0
    equal_rewards: float = 0.0
    cut: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        numbers = {name: value for name, value in vars(self).items() if isinstance(value, float | int)} | dict(
            self.draws
        )
        for name, value in numbers.items():
            least = 0 if "spread" in name or "common" in name or name == "equal_rewards" else 1
            if not (math.isfinite(value) and value >= least):
                raise ValueError(f"the length {name} is {value}; it must be a number of at least {least}")


def drawn(mean: float, spread: float, limit: int, count: int, rng: np.random.Generator) -> list[int]:
    """Return lengths [count] from 1 to ``limit`` with this mean: quantiles of a log-normal distribution, shuffled."""
    sigma = math.sqrt(math.log1p(spread**2))
    shape = np.exp([sigma * NormalDist().inv_cdf((k + 0.5) / count) for k in range(count)])

    def surplus(scale: float) -> float:
        return np.clip(scale * shape, 1, limit).mean() - mean

    lengths = np.clip(_root(surplus, 1e-9, 1e9 * limit) * shape, 1, limit)
    # Rounded such that the running sum, and therefore the mean, is preserved.
    return rng.permutation(np.diff(np.round(np.concatenate([[0.0], lengths.cumsum()])))).astype(int).tolist()


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    return float(brentq(function, low, high))  # pyright: ignore[reportArgumentType]


class Texts:
    """Token ids of answers to one question, which share prefixes as samples of one model do.

    Texts consist of pieces. At a fork, which follows some of the pieces, every text takes one of two branches at
    random; texts in the same branch stay equal.

    Args:
        common: length of the common prefix of two texts in tokens, mean over pairs.
        tokens: mean tokens of a text.
        rng: the generator of forks and branches.
    """

    def __init__(self, common: float, tokens: float, rng: np.random.Generator) -> None:
        self.rng, self.count, self.alike = rng, 0, common >= 1
        self.piece = max(1, round(common / PIECES))
        powers, wanted = np.arange(1, max(1, round(tokens / self.piece)) + 1), common / self.piece
        # The probability that two texts that are equal so far are still equal one piece later.
        together = 1.0 if wanted >= len(powers) else _root(lambda p: (p**powers).sum() - wanted, 0.0, 1.0)
        self.fork = 2 * (1 - together)
        self._next: dict[tuple[int, bool], int] = {}
        self._forks: dict[int, bool] = {}
        self._ends: dict[int, int] = {}

    def ids(self, length: int, limit: int) -> list[int]:
        """Return a text of about ``length`` tokens; the last token is `END` if ``length`` is below ``limit``."""
        self.count += 1
        own = _FIRST + 2 + self.count
        size = length - (length < limit)
        ids = self._shared(size) if self.alike else [own] * size
        return [*ids, END] if length < limit else ids + [own] * (limit - len(ids))

    def _shared(self, size: int) -> list[int]:
        """Return a text that may copy an earlier one: a text with all its branches is equal and ends where it ends."""
        node, ids = 0, []
        while node not in self._ends and (not ids or len(ids) < size or self._goes_on(node)):
            fork = self._forks.setdefault(node, bool(self.rng.random() < self.fork))
            way = fork and bool(self.rng.random() < 0.5)
            node = self._next.setdefault((node, way), len(self._next) + 1)
            ids += [_FIRST + way] * self.piece
        return ids[: self._ends.setdefault(node, max(size, len(ids) - self.piece + 1))]

    def _goes_on(self, node: int) -> bool:
        return (node, False) in self._next or (node, True) in self._next


def with_answer(ids: list[int], number: int = 0, episodes: int = 1) -> list[int]:
    """Write a boxed answer at the end of ``ids`` and blank lines between episodes, without changing the length."""
    end = len(ids) - (ids[-1] == END)
    answer = spelled("\\boxed{", *str(ANSWER + number), "}")
    start = max(0, end - len(answer))
    ids[start:end] = answer[: end - start]
    for at in np.linspace(0, start, max(1, episodes) + 1)[1:-1].astype(int):
        ids[at] = spelled("\n \n")[0]
    return ids


def spelled(*texts: str) -> list[int]:
    """Return the ids that stand for the given members of ``_TEXTS``."""
    return [SPELLED + _TEXTS.index(text) for text in texts]


class Tokenizer:
    """The model's tokenizer, which also decodes and encodes random texts.

    Args:
        inner: a Hugging Face tokenizer; ``None``: fixed texts take one token per four characters.
        options: options of ``apply_chat_template``.
    """

    eos_token_id = pad_token_id = END
    chat_template = "drawn"

    def __init__(self, inner: Any = None, options: Mapping[str, Any] | None = None) -> None:
        self.inner, self.options = inner, options or {}

    def question(self, tokens: int) -> tuple[list[dict[str, str]], list[int]]:
        """Return a question as messages, and its plain prompt of ``tokens`` or, if longer, of the template's tokens."""
        letter = chr(_FIRST + _PRIVATE)
        frame = len(self._prompt([{"role": "user", "content": letter}])) - 1
        messages = [{"role": "user", "content": letter * max(1, tokens - frame)}]
        return messages, self._prompt(messages)

    def _prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        text = self.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **self.options)
        return self.encode(text)

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]], **options: Any) -> str:
        """Apply the model's template, or append 20 characters to the question without one."""
        if self.inner is not None:
            return self.inner.apply_chat_template(messages, **options)
        return "".join(message["content"] for message in messages) + "." * 20

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Return token ids; a character of a random text is one token."""
        ids: list[int] = []
        for k, part in enumerate(_DRAWN.split(text)):
            if k % 2:
                ids += [ord(character) - _PRIVATE for character in part]
            elif self.inner is not None:
                ids += self.inner.encode(part, add_special_tokens=False)
            else:
                starts = range(0, len(part), CHARACTERS_PER_TOKEN)
                ids += [zlib.crc32(part[at : at + CHARACTERS_PER_TOKEN].encode()) % END for at in starts]
        return ids

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        """Return the text of random ids; ids of the model's vocabulary have none."""
        known = [int(token) for token in ids if token > END]
        return "".join(chr(token + _PRIVATE) if token < SPELLED else _TEXTS[token - SPELLED] for token in known)

    def batch_decode(self, rows: Sequence[Sequence[int]], **options: Any) -> list[str]:
        """Decode every row."""
        return [self.decode(row, **options) for row in rows]
