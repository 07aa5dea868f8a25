"""Training data of the warm start: the recipe, worked solutions as token ids, and their batches."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Container, Hashable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from examples.arithmetic.task import LEVELS, OPERATIONS, NoisySolver, Question, Solution, draw_question, work_out
from examples.tasks.base import Solver
from gcpo.collider.prompts import CandidatePrompts


@dataclass(frozen=True)
class BaseRecipe:
    """All values that determine a model, except for its task; a changed value causes a new model."""

    version: int = 2
    """Increased when a code change changes the model."""
    vocab_size: int = 352
    hidden_size: int = 96
    intermediate_size: int = 256
    layers: int = 3
    heads: int = 3
    context: int = 2048
    initializer_range: float = 0.08
    plain_examples: int = 24_000
    plain_first: float = 0.6
    """Fraction of the plain examples that come before any example with candidates."""
    candidate_examples: int = 9_000
    max_blocks: int = 8
    batch_tokens: int = 1024
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    warmup: float = 0.05
    seed: int = 11

    @property
    def hash(self) -> str:
        """Return a hash that identifies the recipe."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Recipe(BaseRecipe):
    """The recipe of the quick start, with the errors of its solver."""

    forget_carry: float = 0.3
    forget_borrow: float = 0.6
    miscount: float = 0.02


class Arithmetic(Solver[Question, Solution]):
    """The quick start's questions and its solver, for the warm start."""

    def __init__(self, recipe: Recipe, levels: Sequence[int] = LEVELS) -> None:
        self.solver = NoisySolver(recipe.forget_carry, recipe.forget_borrow, recipe.miscount)
        self.levels = levels

    def warm_question(self, rng: random.Random) -> Question:
        return draw_question(rng, rng.choice(self.levels), rng.choice(OPERATIONS))

    def sample_texts(self, rng: random.Random) -> tuple[str, str]:
        question = self.warm_question(rng)
        return question.text, work_out(question).text

    def alone(self, question: Question, rng: random.Random) -> Solution:
        return self.solver.solve(question, rng)

    def candidate(self, question: Question, rng: random.Random, skill: float) -> Solution:
        solver = self.solver
        others = NoisySolver(solver.forget_carry * skill, solver.forget_borrow * skill, solver.miscount * 2)
        return others.solve(question, rng)

    def joint(self, question: Question, rng: random.Random, seen: Sequence[Solution]) -> Solution:
        return self.solver.solve(question, rng, _carries(seen))

    def target(self, question: Question, rng: random.Random, seen: Sequence[Solution]) -> Solution:
        return replace(self.solver, miscount=0.0).solve(question, rng, _carries(seen))


def _carries(solutions: Sequence[Solution]) -> frozenset[int]:
    """Columns whose carry one of the solutions applies."""
    return frozenset(column for one in solutions for column, kept in enumerate(one.carries) if kept)


@dataclass(frozen=True)
class Example:
    """Token ids of a prompt and of its target response."""

    prompt: list[int]
    response: list[int]

    @property
    def size(self) -> int:
        return len(self.prompt) + len(self.response)


def make_examples(
    recipe: BaseRecipe, tokenizer: Any, excluded: Container[Hashable], solver: Solver[Any, Any]
) -> list[list[Example]]:
    """Return the plain examples and those with candidates, without excluded questions."""
    rng = random.Random(recipe.seed)
    prompts = CandidatePrompts(tokenizer)

    def question() -> Any:
        while True:
            drawn = solver.warm_question(rng)
            if drawn.key not in excluded:
                return drawn

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    def plain(asked: Any) -> Example:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": asked.text}], add_generation_prompt=True, tokenize=False
        )
        return Example(encode(prompt), [*encode(solver.alone(asked, rng).text), tokenizer.eos_token_id])

    def with_candidates(asked: Any) -> Example:
        count = rng.randint(1, recipe.max_blocks)
        skill = rng.choice((0.2, 0.5, 1.0, 1.3))
        seen = [solver.candidate(asked, rng, skill) for _ in range(count)]
        labels = rng.sample(range(recipe.max_blocks), count)
        blocks = [prompts.candidate_block(k, encode(one.text)) for k, one in zip(labels, seen, strict=True)]
        if rng.random() < 0.5:
            seen.append(solver.joint(asked, rng, seen))
            blocks[rng.randrange(count)] = prompts.collider_block(encode(seen[-1].text))
        target = solver.target(asked, rng, seen)
        frame = prompts.frame([{"role": "user", "content": asked.text}])
        return Example(prompts.join(frame, blocks), [*encode(target.text), tokenizer.eos_token_id])

    return [
        [plain(question()) for _ in range(recipe.plain_examples)],
        [with_candidates(question()) for _ in range(recipe.candidate_examples)],
    ]


def make_batches(examples: Sequence[Example], budget: int, rng: random.Random) -> list[list[Example]]:
    """Return batches of examples of about the same length, at most ``budget`` tokens with padding, in random order."""
    batches: list[list[Example]] = []
    for example in sorted(examples, key=lambda e: (e.size // 4, rng.random())):
        width = max([example.size, *(e.size for e in batches[-1])]) if batches else example.size
        if not batches or width * (len(batches[-1]) + 1) > budget:
            batches.append([])
        batches[-1].append(example)
    rng.shuffle(batches)
    return batches


def collate(items: Sequence[Sequence[Example]]) -> dict[str, Any]:
    """Convert one batch of ``make_batches`` to tensors; the loss covers only the responses."""
    import torch

    (batch,) = items
    width = max(example.size for example in batch)
    rows = [(e.prompt, e.response, width - e.size) for e in batch]
    return {
        "input_ids": torch.tensor([p + r + [0] * pad for p, r, pad in rows]),
        "labels": torch.tensor([[-100] * len(p) + r + [-100] * pad for p, r, pad in rows]),
        "attention_mask": torch.tensor([[1] * (len(p) + len(r)) + [0] * pad for p, r, pad in rows]),
    }
