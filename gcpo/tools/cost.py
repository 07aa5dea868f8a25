"""What a training step takes in tokens, for GRPO and for GCPO with any settings.

Groups are simulated: lengths are drawn, and everything that follows from them is what a run does. The blocks stand in
the order of ``leave_one_out_plan``, prompts are made as in ``gcpo.collider``, vLLM's prefix cache is asked prompt by
prompt, contexts are packed by ``gcpo.scoring`` under the token budget. The names of the counts are those of a run's
metrics without ``gcpo/tokens/``, as far as a run has them.

A sequence is a tuple of segments (name, tokens). Two sequences share the segments that they both begin with.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise
from statistics import NormalDist
from typing import Any

import numpy as np

from gcpo.collider.plan import Block, leave_one_out_plan
from gcpo.methods.gcpo.settings import BlocksConfig, GCPOConfig
from gcpo.scoring.tree import BudgetError, chains_of, cheapest_cuts, shared_stretches, shared_with_previous

Segment = tuple[tuple[str, int], int]
Path = tuple[Segment, ...]

KINDS = ("response", "collider", "leave_one_out", "regenerated")
"""What is generated: responses, shared collider draws, leave-one-out draws, regenerated responses."""

PIECES = 16
"""Answers to one question begin with about so many pieces in common, and part between them."""

CHARACTERS_PER_TOKEN = 4
"""Of the fixed texts, where no tokenizer says better."""


@dataclass(frozen=True)
class Lengths:
    """Mean tokens.

    Attributes:
        question: of a plain prompt, chat template included.
        response: of a response; likewise ``collider``, ``leave_one_out`` and ``regenerated`` of the extra generations
            that are neither cut nor lost.
        spread: standard deviation of the lengths of a group around its mean, over the mean of all.
        group_spread: standard deviation of the means of the groups' responses, over the mean of all.
        question_range: the shortest and the longest question; ``None``: all have the mean length.
        answer: of a response from its last ``\\boxed{`` on, for ``blocks.truncation: answer``.
        alike: with which two answers to one question begin in common, mean over pairs.
        alike_draws: with which two collider draws of a group do; ``None``: as many as answers.
    """

    question: float
    response: float
    collider: float
    leave_one_out: float
    regenerated: float
    spread: float = 0.0
    group_spread: float = 0.0
    question_range: tuple[float, float] | None = None
    answer: float = 12.0
    alike: float = 0.0
    alike_draws: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name == "question_range" or value is None:
                continue
            least = 0 if name.endswith("spread") or name.startswith("alike") else 1
            if not (math.isfinite(value) and value >= least):
                raise ValueError(f"the length {name} is {value}; it must be a number of at least {least}")


@dataclass(frozen=True)
class Texts:
    """Tokens of what stands in a prompt besides the question and the answers.

    Attributes:
        intro: between the question and the first block.
        tail: behind the last block, to the end of the prompt.
        label: of a candidate's label; ``label_start`` of them are the same for all candidates.
        collider_label: of a collider draw's label.
        question_end: of a plain prompt behind the question.
    """

    intro: float
    tail: float
    label: float
    label_start: float
    collider_label: float
    question_end: float

    @classmethod
    def estimated(cls, blocks: BlocksConfig, question_end: float = 5.0) -> Texts:
        """By the number of characters."""
        intro, outro, label, collider = (
            len(text) / CHARACTERS_PER_TOKEN
            for text in (blocks.intro, blocks.outro, blocks.candidate.format(label=1), blocks.collider)
        )
        start = len(blocks.candidate.partition("{label}")[0]) / CHARACTERS_PER_TOKEN
        return cls(intro, outro + question_end, label, start, collider, question_end)


@dataclass(frozen=True)
class Step:
    """What else a run's configuration says about a step.

    Attributes:
        groups: questions of a step.
        n: responses of a question.
        max_response: longest response in tokens.
        budget: tokens of a micro-batch.
        epochs: passes over the batch in the update.
        reference_policy: whether there is a KL term to a reference policy, which then scores every response.
        recomputed: whether the backward pass runs the layers once more (gradient checkpointing).
        cache_block: tokens of a block of the prefix cache; 0: there is no cache.
        servers: copies of the model that generate; the responses of a question are spread over them, everything else of
            a group stays on one.
    """

    groups: int
    n: int
    max_response: int
    budget: int
    epochs: int = 1
    reference_policy: bool = False
    recomputed: bool = False
    cache_block: int = 16
    servers: int = 1


@dataclass(frozen=True)
class Shares:
    """What does not come out as planned.

    Attributes:
        equal_rewards: share of the groups whose rewards are all equal.
        cut: share of the draws of a kind that reach the limit without an end, and are left out.
        lost: share of those that fail or are empty; they have no tokens.
    """

    equal_rewards: float = 0.0
    cut: Mapping[str, float] = field(default_factory=dict)
    lost: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Weights:
    """Cost of a token beside that of one in a forward pass.

    A generated token is one of few in its pass, which reads all of the model's weights for them.
    """

    generated: float = 8.0
    prefilled: float = 1.0
    forward: float = 1.0
    backward: float = 2.0


# ---- lengths ------------------------------------------------------------------------------------------------------


def ragged(mean: float, spread: float, limit: float, rng: np.random.Generator, size: int = 64) -> Iterator[int]:
    """Lengths without end: log-normal, at most ``limit``, at least 1, of this mean over every ``size`` of them."""
    lengths = _lengths(_multipliers(spread, size), mean, limit)
    while True:
        yield from (int(length) for length in rng.permutation(lengths))


def ragged_groups(lengths: Lengths, limit: float, groups: int, n: int, rng: np.random.Generator) -> list[list[int]]:
    """Lengths of the responses [groups][n]: log-normal around log-normal means of the groups."""
    inside = _multipliers(lengths.spread, groups * n)
    shape = (
        rng.permutation(inside).reshape(groups, n)
        * rng.permutation(_multipliers(lengths.group_spread, groups))[:, None]
    )
    return _lengths(shape.flatten(), lengths.response, limit).reshape(groups, n).tolist()


def ragged_questions(lengths: Lengths, groups: int, rng: np.random.Generator) -> list[int]:
    """Lengths of the questions: even on both sides of the mean, as far as the range goes."""
    mean, (low, high) = lengths.question, lengths.question_range or (lengths.question, lengths.question)
    below = (high - mean) / (high - low) if high > low else 0.0
    at = (np.arange(groups) + 0.5) / groups
    values = np.where(
        at < below,
        low + (mean - low) * at / max(below, 1e-9),
        mean + (high - mean) * (at - below) / max(1 - below, 1e-9),
    )
    return rng.permutation(_rounded(values)).tolist()


def _multipliers(spread: float, size: int) -> np.ndarray:
    """Quantiles of a log-normal distribution of mean 1."""
    sigma, normal = math.sqrt(math.log1p(spread**2)), NormalDist()
    return np.exp([sigma * normal.inv_cdf((k + 0.5) / size) - sigma**2 / 2 for k in range(size)])


def _lengths(shape: np.ndarray, mean: float, limit: float) -> np.ndarray:
    """Whole lengths between 1 and ``limit`` of this shape and this mean."""
    low, high = 0.0, 100.0 * limit  # what the shape is scaled by
    for _ in range(60):
        middle = (low + high) / 2
        if np.clip(middle * shape, 1, limit).mean() < mean:
            low = middle
        else:
            high = middle
    return _rounded(np.clip(high * shape, 1, limit))


def _rounded(values: np.ndarray) -> np.ndarray:
    """Whole numbers whose running sum follows that of ``values``."""
    return np.diff(np.round(np.concatenate([[0.0], values.cumsum()]))).astype(int)


def whole(value: float) -> Iterator[int]:
    """Whole numbers without end whose mean is ``value``."""
    return (round((k + 1) * value) - round(k * value) for k in count())


def block_text(length: int, limit: int, blocks: BlocksConfig, answer: float) -> float:
    """Tokens of a response in a block: without the end token, and cut.

    Args:
        length: of the response; at ``limit`` it has no end token.
        limit: longest response.
        blocks: how blocks are cut.
        answer: see ``Lengths``.
    """
    text = length - 1 if length < limit else length
    if blocks.truncation == "answer":
        text = min(text, answer)
    return min(text, blocks.max_tokens)


# ---- sequences ----------------------------------------------------------------------------------------------------


def tokens_of(path: Path) -> int:
    """Tokens of a sequence."""
    return sum(tokens for _, tokens in path)


def shared_tokens(a: Path, b: Path) -> int:
    """Tokens that two sequences both begin with."""
    shared = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        shared += x[1]
    return shared


def packed_tokens(paths: Sequence[Path], budget: float, min_shared: int = 1) -> int:
    """Tokens that go through the model where shared stretches go through it once, in packs of at most ``budget``.

    Raises:
        BudgetError: a sequence is longer than the budget.
    """
    order = sorted(paths)
    lengths = [tokens_of(path) for path in order]
    if lengths and max(lengths) > budget:
        raise BudgetError(f"a sequence of {max(lengths)} tokens does not fit into the token budget of {budget}")
    common = [0, *(shared_tokens(a, b) for a, b in pairwise(order))][: len(order)]
    nodes, leaves = shared_stretches(lengths, common, min_shared)
    shared = shared_with_previous(nodes, chains_of(nodes, leaves))
    total = sum(lengths) - sum(shared)
    # A cut between two trees repeats nothing.
    roots = [*(k for k, tokens in enumerate(shared) if not tokens), len(order)]
    for start, end in pairwise(roots):
        if sum(lengths[start:end]) - sum(shared[start:end]) > budget:
            cuts = cheapest_cuts(lengths[start:end], shared[start:end], budget)
            total += sum(shared[start + cut] for cut in cuts[:-1])
    return total


class PrefixCache:
    """vLLM's prefix cache of one server, without the limit of its memory.

    Args:
        block: tokens of a block; 0: nothing is cached.
    """

    def __init__(self, block: int) -> None:
        self.block = block
        self._seen: dict[Any, Any] = {}

    def cached(self, path: Path) -> int:
        """Tokens of a prompt that are there already, in whole blocks and never the last one; then it is there too."""
        node, shared = self._seen, 0
        for segment in path:
            if segment in node:
                shared += segment[1]
            node = node.setdefault(segment, {})
        if not self.block:
            return 0
        return min(shared, tokens_of(path) - 1) // self.block * self.block


# ---- one group ----------------------------------------------------------------------------------------------------


class AlikeTexts:
    """Texts that begin alike as samples of one model do.

    They part at forks, which stand at the ends of pieces of equal length. At a fork every text goes one of two ways by
    chance, so that those that take the same way still go on together.

    Args:
        alike: tokens with which two texts begin in common, in the mean.
        tokens: of a text, in the mean.
        rng: where the forks are, and who goes which way.
    """

    def __init__(self, alike: float, tokens: float, rng: np.random.Generator) -> None:
        self.rng = rng
        self.piece = max(1, round(alike / PIECES))
        self.pieces = 0 if alike < 1 else max(1, round(tokens / self.piece))
        self.share = _fork_share(alike / self.piece, self.pieces)
        self._forks: dict[int, bool] = {}
        self._next: dict[tuple[int, int], int] = {}
        self._sizes: dict[int, int] = {}
        self._ends: set[int] = set()

    def text(self, own: tuple[str, int], tokens: int) -> Path:
        """A text of about so many tokens; one that goes every way of another is the same and ends where that ends."""
        if not self.pieces:
            return _path((*own, tokens))
        node, at, path = 0, 0, []
        while node not in self._ends and (at < tokens or self._goes_on(node)):
            if node not in self._forks:
                self._forks[node] = bool(self.rng.random() < self.share)
            way = int(self.rng.integers(2)) if self._forks[node] else 0
            node = self._next.setdefault((node, way), len(self._next) + 1)
            size = self._sizes.setdefault(node, min(self.piece, max(1, tokens - at)))
            path.append(("alike", node, size))
            at += size
        self._ends.add(node)
        return _path(*path)

    def _goes_on(self, node: int) -> bool:
        """Whether a text went beyond the node."""
        return (node, 0) in self._next or (node, 1) in self._next


def _fork_share(common: float, pieces: int) -> float:
    """Share of the places with a fork, so that two texts have ``common`` of their ``pieces`` in common in the mean."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        together = 1 - middle / 2
        if sum(together**k for k in range(1, pieces + 1)) > common:
            low = middle
        else:
            high = middle
    return high


class _Group:
    """The segments of one group."""

    def __init__(
        self,
        config: GCPOConfig,
        step: Step,
        answer: float,
        fixed: Mapping[str, Iterator[int]],
        question: int,
        responses: list[int],
        alike: Mapping[str, AlikeTexts],
    ) -> None:
        self.config, self.answer, self.responses, self.alike = config, answer, responses, alike
        self.texts: dict[tuple[str, int], Path] = {}
        self.collider_label, end = next(fixed["collider_label"]), next(fixed["question_end"])
        self.head = _path(("question", 0, question - end), ("intro", 0, next(fixed["intro"])))
        self.plain = _path(("question", 0, question - end), ("question end", 0, end))
        self.tail = _path(("tail", 0, next(fixed["tail"])))
        start = next(fixed["label_start"])
        rest = [max(0, next(fixed["label"]) - start) for _ in responses]
        texts = [block_text(length, step.max_response, config.blocks, answer) for length in responses]
        self.blocks = [_path(("label", 0, start), ("candidate", k, rest[k] + text)) for k, text in enumerate(texts)]

    def draw(self, number: int, length: int) -> Path:
        """The block of a collider draw."""
        text = block_text(length, self.config.collider.max_tokens, self.config.blocks, self.answer)
        return (*_path(("joint", 0, self.collider_label)), *self.text("draw", number, text))

    def prompt(self, candidates: Sequence[int]) -> Path:
        """A prompt with these candidates."""
        return (*self.head, *(segment for k in candidates for segment in self.blocks[k]), *self.tail)

    def context(self, order: Sequence[Block], collider: Path) -> Path:
        """x_{i,l}, with ``collider`` where the order has a collider draw."""
        blocks = (self.blocks[k] if kind == "candidate" else collider for kind, k in order)
        return (*self.head, *(segment for block in blocks for segment in block), *self.tail)

    def response(self, i: int) -> Path:
        """Response i."""
        return self.text("response", i, self.responses[i])

    def text(self, name: str, number: int, tokens: int) -> Path:
        """An answer to the question, which begins like others of its kind."""
        if (name, number) not in self.texts:
            tree = self.alike["draws" if name == "draw" else "answers"]
            self.texts[name, number] = tree.text((name, number), tokens)
        return self.texts[name, number]


def _path(*segments: tuple[str, int, float]) -> Path:
    return tuple(((name, number), round(tokens)) for name, number, tokens in segments if round(tokens) > 0)


def length_limits(config: GCPOConfig, step: Step) -> dict[str, int]:
    """The most tokens that a generation of every kind can have."""
    draw = config.collider.max_tokens
    limits = (step.max_response, draw, draw, config.regenerated.max_tokens)
    return dict(zip(KINDS, limits, strict=True))


class GroupSimulator:
    """Counts the tokens of group after group.

    Args:
        config: resolved settings of GCPO; with ``weighting: off`` and ``kappa: 0`` it is GRPO.
        step: the rest of the configuration.
        lengths: mean lengths.
        texts: tokens of the fixed texts.
        shares: what does not come out as planned.
        groups: how many groups there will be.
        seed: of the lengths, the block orders, and the draws that are not valid.

    Raises:
        ValueError: a mean length is more than what the configuration lets through.
    """

    def __init__(
        self, config: GCPOConfig, step: Step, lengths: Lengths, texts: Texts, shares: Shares, groups: int, seed: int
    ) -> None:
        self.config, self.step, self.lengths, self.shares = config, step, lengths, shares
        self.rng = np.random.default_rng(seed)
        self.fixed = {name: whole(tokens) for name, tokens in vars(texts).items()}
        self.parting = np.random.default_rng([seed, len(KINDS)])
        self.due = {kind: [self.rng.random(), self.rng.random()] for kind in KINDS}
        self.limits = length_limits(config, step)
        for kind, limit in self.limits.items():
            if getattr(lengths, kind) > limit:
                raise ValueError(
                    f"the mean length {kind} is {getattr(lengths, kind):g}, and it is cut at {limit} tokens"
                )
        questions = ragged_questions(lengths, groups, self.rng)
        responses = ragged_groups(lengths, step.max_response, groups, step.n, self.rng)
        self.groups = iter(list(zip(questions, responses, strict=True)))
        self.ragged = {
            kind: ragged(getattr(lengths, kind), lengths.spread, limit, np.random.default_rng([seed, k]))
            for k, (kind, limit) in enumerate(self.limits.items())
            if kind != "response"
        }

    def group(self, *, equal_rewards: bool) -> Counter[str]:
        """Tokens of the next group.

        Raises:
            BudgetError: a context with its response is longer than the token budget.
        """
        config, n = self.config, self.step.n
        question, responses = next(self.groups)
        lengths = self.lengths
        alike_draws = lengths.alike if lengths.alike_draws is None else lengths.alike_draws
        alike = {
            "answers": AlikeTexts(lengths.alike, lengths.response, self.parting),
            "draws": AlikeTexts(alike_draws, lengths.collider, self.parting),
        }
        group = _Group(config, self.step, lengths.answer, self.fixed, question, responses, alike)
        counts = Counter({f"{what}/{kind}": 0 for what in ("generated", "prefilled", "cached") for kind in KINDS})
        cache = PrefixCache(self.step.cache_block)
        self._plain(group, cache, counts)
        scored = {"response": self._state_paths(group), "context": [], "regenerated": []}
        trained: list[Path] = []
        if config.needs_rollout and (config.reference_on or not equal_rewards):
            weighted = self._weighted(n)
            contexts, outputs = self._generate(group, cache, counts, weighted, equal_rewards)
            scored["context"] = self._context_paths(group, contexts, weighted)
            scored["regenerated"] = outputs
            if config.reference_on and config.reference.policy_condition == "collider":
                for i in weighted:
                    first = next((path for path in contexts[i][: config.collider.num_draws] if path), None)
                    trained += [(*first, *group.response(i))] if first else []
        for kind, paths in scored.items():
            counts[f"scored_unshared/{kind}"] = sum(map(tokens_of, paths))
        budget = config.scoring.max_token_len_per_gpu or self.step.budget
        counts["scored"] = self._through_the_model([path for paths in scored.values() for path in paths], budget)
        counts["trained/kappa_rows"] = self._through_the_model(trained, budget) * self.step.epochs
        counts["trained/kappa_rows_unshared"] = sum(map(tokens_of, trained)) * self.step.epochs
        self._measured(counts)
        return counts

    def _plain(self, group: _Group, cache: PrefixCache, counts: Counter[str]) -> None:
        n, prompt, tokens = self.step.n, tokens_of(group.plain), sum(group.responses)
        counts["generated/response"] = tokens
        counts["prefilled/response"] = n * prompt
        cache.cached(group.plain)  # the first one on every server finds nothing
        counts["cached/response"] = max(0, n - self.step.servers) * cache.cached(group.plain)
        counts["scored/old"] = n * prompt + tokens
        counts["scored/reference"] = counts["scored/old"] * self.step.reference_policy
        counts["trained/plain"] = counts["scored/old"] * self.step.epochs

    def _weighted(self, n: int) -> list[int]:
        """The responses that have a kappa term."""
        if not self.config.reference_on:
            return []
        count = max(1, round(self.config.reference.subsample * n))
        return sorted(self.rng.choice(n, count, replace=False).tolist())

    def _generate(
        self, group: _Group, cache: PrefixCache, counts: Counter[str], weighted: Sequence[int], equal_rewards: bool
    ) -> tuple[list[list[Path]], list[Path]]:
        """Contexts [n][L + L'], empty where there is none, and what is fed back of the regenerated responses."""
        config, n = self.config, self.step.n
        num_shared, num_leave_one_out = config.collider.num_draws, config.leave_one_out_draws
        sizes = [tokens_of(block) for block in group.blocks]
        wanted = list(range(n)) if config.causal_target_on and not equal_rewards else weighted
        plan = leave_one_out_plan(
            n,
            num_shared + num_leave_one_out,
            lengths=sizes,
            permutation=self.rng.permutation(n).tolist(),
            leaves=wanted or None,
        )
        chosen = plan.depth_first() if wanted else ()

        def generate(kind: str, prompt: Path) -> int | None:
            """Length of a generation, ``None`` of one that is not valid."""
            length, valid = self._length(kind)
            counts[f"generated/{kind}"] += length
            counts[f"prefilled/{kind}"] += tokens_of(prompt)
            counts[f"cached/{kind}"] += cache.cached(prompt)
            return length if valid else None

        everyone = group.prompt(plan.collider_order())
        shared = sorted((generate("collider", everyone) for _ in range(num_shared)), key=lambda length: length is None)
        leave_one_out = {
            i: [generate("leave_one_out", group.prompt(plan.candidate_order(i))) for _ in range(num_leave_one_out)]
            for i in chosen
        }
        contexts: list[list[Path]] = [[() for _ in range(plan.draws)] for _ in range(n)]
        for i in chosen:
            for slot, length in enumerate([*shared, *leave_one_out[i]]):
                if length is None:
                    continue
                collider = group.draw(slot if slot < num_shared else plan.draws * (i + 1) + slot, length)
                appended = config.reference.collider_context == "append" and 0 < slot < num_shared
                if appended and shared[0] is not None:
                    collider = (*group.draw(0, shared[0]), *collider)
                contexts[i][slot] = group.context(plan.orders[i][slot], collider)
        outputs: list[Path] = []
        if config.needs_generations and not equal_rewards:
            for path in (path for i in chosen for path in contexts[i] if path):
                for _ in range(config.collider.num_generations):
                    length = generate("regenerated", path)
                    if length is not None:
                        output = group.text("output", len(outputs), length)
                        outputs.append((*path, *output) if self._with_prompt else output)
        return contexts, outputs

    def _length(self, kind: str) -> tuple[int, bool]:
        """Tokens of the next draw, and whether it is valid: every so manyth is cut, or lost."""
        for at, (share, tokens) in enumerate(((self.shares.cut, self.limits[kind]), (self.shares.lost, 0))):
            self.due[kind][at] += share.get(kind, 0.0)
            if self.due[kind][at] >= 1:
                self.due[kind][at] -= 1
                return tokens, False
        return next(self.ragged[kind]), True

    @property
    def _with_prompt(self) -> bool:
        return self.config.features.input == "prompt_response"

    def _state_paths(self, group: _Group) -> list[Path]:
        """What is fed back for the states of the responses."""
        if not self.config.weighting_on:
            return []
        prompt = group.plain if self._with_prompt else ()
        return [(*prompt, *group.response(i)) for i in range(self.step.n)]

    def _context_paths(self, group: _Group, contexts: Sequence[Sequence[Path]], weighted: Sequence[int]) -> list[Path]:
        """Contexts with the response where it is scored, and without where the prompt's state alone is wanted."""
        prompt_states = self.config.causal_target_on and self.config.features.source == "prompt"
        paths: list[Path] = []
        for i, row in enumerate(contexts):
            if i in weighted or prompt_states:
                response = group.response(i) if i in weighted else ()
                paths += [(*path, *response) for path in row if path]
        return paths

    def _through_the_model(self, paths: Sequence[Path], budget: float) -> int:
        if self.config.scoring.packing == "dense":
            return sum(map(tokens_of, paths))
        return packed_tokens(paths, budget, self.config.scoring.min_shared_tokens)

    def _measured(self, counts: Counter[str]) -> None:
        """Passes whose gradients are measured and thrown away (``metrics.grad_norm_every``), a part of them a step."""
        every = self.config.metrics.grad_norm_every
        if not every or self.config.is_grpo:
            return
        on_context = self.config.reference_on and self.config.reference.policy_condition == "collider"
        plain = 1 + self.step.reference_policy + (self.config.reference_on and not on_context)
        counts["trained/measured"] = (plain * counts["trained/plain"] + counts["trained/kappa_rows"]) / every


# ---- a step -------------------------------------------------------------------------------------------------------


def step_tokens(
    config: GCPOConfig,
    step: Step,
    lengths: Lengths,
    texts: Texts,
    shares: Shares | None = None,
    *,
    simulated: int = 64,
    seed: int = 0,
) -> dict[str, float]:
    """Expected tokens of a step by what is done with them.

    Args:
        config: resolved settings of GCPO; with ``weighting: off`` and ``kappa: 0`` it is GRPO.
        step: the rest of the configuration.
        lengths: mean lengths.
        texts: tokens of the fixed texts.
        shares: what does not come out as planned.
        simulated: groups that are simulated.
        seed: of the simulation.

    Raises:
        BudgetError: a context with its response is longer than the token budget.
    """
    shares = shares or Shares()
    simulator = GroupSimulator(config, step, lengths, texts, shares, simulated, seed)
    equal = round(shares.equal_rewards * simulated)
    total: Counter[str] = Counter()
    for k in range(simulated):
        total.update(simulator.group(equal_rewards=k < equal))
    return {name: step.groups * tokens / simulated for name, tokens in total.items()}


def sum_of(tokens: Mapping[str, float], name: str) -> float:
    """The count ``name`` and all below it."""
    return sum(value for key, value in tokens.items() if f"{key}/".startswith(f"{name}/"))


def stage_costs(tokens: Mapping[str, float], step: Step, weights: Weights) -> dict[str, float]:
    """Cost of every stage of a step in forward tokens."""
    prefilled = sum_of(tokens, "prefilled") - sum_of(tokens, "cached")
    trained = sum(tokens.get(f"trained/{name}", 0.0) for name in ("plain", "kappa_rows", "measured"))
    return {
        "generation": weights.generated * sum_of(tokens, "generated") + weights.prefilled * prefilled,
        "scoring": weights.forward * sum_of(tokens, "scored"),
        "training": (weights.forward * (1 + step.recomputed) + weights.backward) * trained,
    }
