"""The tokens of a step: a method's hooks are called as in a run, with a server and an engine that count tokens.

Prompts, requests and packs are made by the code of the run. Only the texts are random (`gcpo.tools.cost.texts`).
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gcpo.methods.base import Batch, Engine, Method, Run, SampledGroup, Sampling, Term
from gcpo.methods.fields import DATA_SOURCE, PROMPTS, RESPONSES, REWARD_MODEL, Field
from gcpo.methods.gcpo.draws import KINDS
from gcpo.methods.gcpo.fields import KL_MASK, KL_WEIGHT
from gcpo.methods.stations import parts_of
from gcpo.scoring import PrefixForest
from gcpo.scoring.branches import EpisodeRequest, pack_requests
from gcpo.scoring.requests import Score, ScoreRequest
from gcpo.scoring.tree import common_prefix
from gcpo.tools.cost.texts import (
    ANSWER,
    ANSWERS,
    END,
    Lengths,
    Texts,
    Tokenizer,
    drawn,
    with_answer,
)


@dataclass(frozen=True)
class Step:
    """The settings of a step that do not belong to the method.

    Attributes:
        run: the settings that methods read.
        questions: number of questions of a step.
        epochs: passes over the batch in the update.
        recomputed: whether the backward pass recomputes the layers (gradient checkpointing).
        cache_block: tokens of a block of the prefix cache; 0: no cache.
        servers: number of generation servers. The responses to a question are spread over them, all other requests
            of a group go to one server.
    """

    run: Run
    questions: int
    epochs: int = 1
    recomputed: bool = False
    cache_block: int = 16
    servers: int = 1


class Server:
    """A generator of texts with random lengths for the prompts of one group, with vLLM's prefix cache."""

    def __init__(self, simulation: Simulation) -> None:
        self.simulation, lengths = simulation, simulation.lengths
        common = lengths.common if lengths.common_draws is None else lengths.common_draws
        self.texts = Texts(common, lengths.draws.get(KINDS[0], lengths.response), simulation.rng)
        self.draws = 0
        self._seen: list[Any] = []
        self._last: tuple[Sequence[int], str] = ([], "")

    def cached(self, prompt: Sequence[int]) -> int:
        """Return the number of cached tokens of a prompt in whole blocks without the last token; cache it."""
        shared, block = len(prompt), self.simulation.step.cache_block
        if prompt is not self._last[0]:
            ids: Any = np.asarray(prompt)
            shared = max((common_prefix(ids, seen) for seen in self._seen), default=0)
            self._seen.append(ids)
            self._last = prompt, self._kind(ids)
        return min(shared, len(prompt) - 1) // block * block if block else 0

    async def __call__(self, prompt: list[int], params: dict[str, Any]) -> Any:
        """Return the fields of verl's ``TokenOutput`` that methods read."""
        cached, limit = self.cached(prompt), params["max_tokens"]
        kind, self.draws = self._last[1], self.draws + 1
        length = self.simulation.draw_length(kind)
        # A draw that is not cut ends with `END`, whatever its length.
        ids = self.texts.ids(limit, limit) if length is None else self.texts.ids(min(length, limit), limit + 1)
        if self.simulation.answers:
            with_answer(ids)
        self.simulation.count_generation(kind, [ids], prompt, cached)
        return SimpleNamespace(token_ids=ids, stop_reason="completed", extra_fields={"num_cached_tokens": cached})

    def _kind(self, ids: np.ndarray) -> str:
        """Return the kind of a prompt. Shared draws come first; a prompt with the label of a draw is a regeneration."""
        settings = self.simulation.method.settings
        if not self.simulation.method.samples:
            return ""
        label = self.simulation.tokenizer.encode(settings.blocks.collider)
        if np.asarray(label).tobytes() in ids.tobytes():
            return KINDS[2]
        return KINDS[0] if self.draws < settings.collider.num_draws else KINDS[1]


class CountingEngine(Engine):
    """An engine that packs the requested sequences, counts their tokens, and answers with zeros."""

    layers = 1000  # The model is not loaded, so the configuration may name any layer.
    hidden_size = 1
    step = 1

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.counts: defaultdict[str, float] = defaultdict(float)

    def scorer(self, layer: int, **options: Any) -> Scorer:
        """See `Engine.scorer`."""
        return Scorer(partial(self._trees, options))

    def perturbed_scorer(self, layer: int, **options: Any) -> Scorer:
        """See `Engine.perturbed_scorer`."""
        return Scorer(partial(self._episodes, options["max_tokens"]))

    def gather(self, values: list[Any]) -> list[Any]:
        """Return the values of the only rank."""
        return values

    def keep_last_layer(self) -> None:
        """Keep nothing: there are no weights."""

    def moved(self, sign: int) -> AbstractContextManager[float]:
        """Move nothing."""
        return nullcontext(1.0)

    def tree_problem(self) -> None:
        """Return None, since every model counts as able to run on packed trees."""

    def _trees(self, options: Mapping[str, Any], requests: Sequence[ScoreRequest]) -> list[Score]:
        sequences = [torch.cat([request.context, request.target]) for request in requests]
        self.counts["scored"] += packed_tokens(sequences, options["max_tokens"], **options)
        self.counts["scored_unshared"] += sum(map(len, sequences))
        return [
            Score(
                torch.zeros(len(r.target)) if r.log_probs else None,
                None if r.state_at is None else torch.zeros(1),
                torch.zeros(len(r.gradient_of)) if r.gradient_of else None,
            )
            for r in requests
        ]

    def _episodes(self, budget: int, requests: Sequence[EpisodeRequest]) -> list[Any]:
        self.counts["scored"] += sum(len(pack.pack) for pack in pack_requests(requests, budget))
        self.counts["scored_unshared"] += sum(request.unshared for request in requests)
        shapes = [(1 + len(r.ends), (len(r.asked), r.noise.shape[1])) for r in requests]
        return [
            SimpleNamespace(states=torch.zeros(k, 1), divergence=torch.zeros(shape).double()) for k, shape in shapes
        ]


@dataclass
class Scorer:
    """A scorer of a `CountingEngine`, which counts the tokens; a method that reads the scorer's own counts reads 0."""

    answer: Callable[[Sequence[Any]], list[Any]]
    tokens = path_tokens = branch_tokens = unshared_tokens = 0

    def __call__(self, requests: Sequence[Any]) -> list[Any]:
        """Return the answers, in the order of the requests."""
        return self.answer(requests)


class GroupBatch(Batch):
    """The rows of one group, in memory."""

    step = 1

    def __init__(self, rows: list[dict[Field, Any]]) -> None:
        self.rows, self.size = rows, len(rows)
        self.groups = {"group": list(range(self.size))}
        self.response_lengths = [len(row[RESPONSES]) for row in rows]

    def fetch(self, rows: Sequence[int], fields: Sequence[Field]) -> dict[Field, list[Any]]:
        """See `Batch.fetch`."""
        return {name: [self.rows[row][name] for row in rows] for name in fields}

    def put(self, rows: Sequence[int], fields: Mapping[Field, Sequence[Any]]) -> None:
        """See `Batch.put`."""
        for name, values in fields.items():
            for row, value in zip(rows, values, strict=True):
                self.rows[row][name] = value


def packed_tokens(
    sequences: Sequence[Tensor], budget: int, *, min_shared: int = 8, packing: str = "tree", **_: Any
) -> int:
    """Return the number of tokens that go through the model.

    Raises:
        BudgetError: a sequence is longer than the budget.
    """
    if packing == "dense" or not sequences:
        return sum(map(len, sequences))
    return sum(map(len, PrefixForest(sequences, min_shared=min_shared).packs(budget)))


def kappa_rows(rows: Sequence[Mapping[Field, Any]], term: Term) -> Iterator[Tensor]:
    """Yield the sequences (x_i, y_i) of the second pass of an update; every valid context has a reference."""
    for row in rows:
        context = term.context({**row, KL_MASK: (row[KL_WEIGHT] > 0).long()})
        if context is not None:
            yield torch.cat([context, row[RESPONSES]])


class Simulation:
    """A simulation of a step with all hooks of the method.

    Args:
        method: the method; a plain `Method` means GRPO.
        step: settings of the step.
        lengths: lengths and frequencies.
        tokenizer: of the model.
        groups: number of groups.

    Raises:
        ValueError: a mean length is above its limit.
    """

    def __init__(self, method: Method, step: Step, lengths: Lengths, tokenizer: Tokenizer, groups: int) -> None:
        self.method, self.step, self.lengths, self.tokenizer = method, step, lengths, tokenizer
        self.rng, self.engine = np.random.default_rng(0), CountingEngine(tokenizer)
        self.counts = self.engine.counts
        blocks = getattr(method.settings, "blocks", None)
        self.answers = blocks is None or blocks.truncation == "answer"  # whether texts need a final answer
        self.limits = {"response": step.run.response_length} | draw_limits(method.settings)
        for kind, limit in self.limits.items():
            mean = lengths.draws.get(kind, lengths.response)
            if mean > limit:
                raise ValueError(f"the mean length {kind} is {mean:g}, and it is cut at {limit} tokens")
        self._lengths: dict[str, list[int]] = {kind: [] for kind in self.limits}
        self._cut = dict.fromkeys(self.limits, 0.5)
        means = drawn(lengths.response, lengths.group_spread, self.limits["response"], groups, self.rng)
        questions = drawn(lengths.question, lengths.spread, 1 << 30, groups, self.rng)
        self.groups = list(zip(questions, means, strict=True))
        method.start_rollout(Sampling(tokenizer, {}, None, frozenset({END})))
        method.start_actor(self.engine)

    def run(self) -> dict[str, float]:
        """Return the tokens of a step by stage.

        Raises:
            BudgetError: a sequence is longer than the token budget.
        """
        equal = round(self.lengths.equal_rewards * len(self.groups))
        for number, (question, mean) in enumerate(self.groups):
            self._group(number, question, mean, equal_rewards=number < equal)
        return {name: self.step.questions * tokens / len(self.groups) for name, tokens in self.counts.items()}

    def _group(self, number: int, question: int, mean: int, *, equal_rewards: bool) -> None:
        method, run = self.method, self.step.run
        messages, prompt = self.tokenizer.question(question)
        responses, server = self._responses(mean), Server(self)
        known = {PROMPTS: torch.tensor(prompt), REWARD_MODEL: {"ground_truth": str(ANSWER)}, DATA_SOURCE: ""}
        rows: list[dict[Field, Any]] = [{**known, RESPONSES: torch.tensor(response)} for response in responses]
        server.cached(prompt)  # The first response on each server is not cached.
        cached = max(0, run.n - self.step.servers) * server.cached(prompt)
        self.count_generation("response", responses, prompt * run.n, cached)
        if method.samples:
            rewards = [float(k == 0 and not equal_rewards) for k in range(run.n)]
            # Draws of code are not graded.
            group = SampledGroup(messages, responses, rewards, (number,), "code", grade=_no_grade)
            for row, fields in zip(rows, asyncio.run(method.on_group(group, server)), strict=True):
                row.update(fields)
        batch = GroupBatch(rows)
        method.before_score(batch, self.tokenizer, {})
        if method.score_inputs:
            method.score(batch.fetch(range(run.n), method.score_inputs), self.engine)
        plain = sum(map(len, responses)) + run.n * len(prompt)
        self.counts["scored/old"] += plain
        self.counts["scored/reference"] += plain * run.use_kl_loss
        self._update(rows, plain * self.step.epochs)

    def _responses(self, mean: int) -> list[list[int]]:
        limit, lengths = self.limits["response"], self.lengths
        texts = Texts(lengths.common, lengths.response, self.rng)
        sizes = drawn(mean, lengths.spread, limit, self.step.run.n, self.rng)
        responses = [texts.ids(size, limit) for size in sizes]
        if self.answers:
            for k, ids in enumerate(responses):
                # Longer responses have more episodes.
                episodes = int(lengths.episodes * len(ids) / lengths.response + self.rng.random())
                with_answer(ids, k % ANSWERS, 1 if self.method.samples else episodes)
        return responses

    def _update(self, rows: Sequence[Mapping[Field, Any]], plain: int) -> None:
        """Count the passes with gradient; in step 0 all parts whose gradients are ever measured are measured."""
        self.counts["trained/plain"] += plain
        term = self.method.term()
        parts = parts_of(term, self.step.run.use_kl_loss) if self.method.measures_gradients(0) else []
        tokens = 0
        if term is not None and not term.on_plain_rows:
            sequences = list(kappa_rows(rows, term))
            tokens = packed_tokens(sequences, term.max_tokens, min_shared=term.min_shared, packing=term.packing)
            tokens *= self.step.epochs
            self.counts["trained/kappa_rows"] += tokens
            self.counts["trained/kappa_rows_unshared"] += sum(map(len, sequences)) * self.step.epochs
        for part in parts:
            passed = tokens if term is not None and part == term.name and not term.on_plain_rows else plain
            self.counts["trained/measured"] += passed / self.method.settings.metrics.grad_norm_every

    def count_generation(self, kind: str, texts: Sequence[Sequence[int]], prompt: Sequence[int], cached: int) -> None:
        """Count generated texts and the tokens of their prompts."""
        self.counts[f"generated/{kind}"] += sum(map(len, texts))
        self.counts[f"prefilled/{kind}"] += len(prompt)
        self.counts[f"cached/{kind}"] += cached

    def draw_length(self, kind: str) -> int | None:
        """Return the length of the next draw; ``None`` if it is cut."""
        self._cut[kind] += self.lengths.cut.get(kind, 0.0)
        if self._cut[kind] >= 1:
            self._cut[kind] -= 1
            return None
        if not self._lengths[kind]:
            mean = self.lengths.draws[kind]
            self._lengths[kind] = drawn(
                mean, self.lengths.spread, self.limits[kind], min(16, len(self.groups)), self.rng
            )
        return self._lengths[kind].pop()


async def _no_grade(_: Any) -> None:
    return None


def draw_limits(settings: Any) -> dict[str, int]:
    """Return the length limit of every kind of draw; empty for a method without draws."""
    collider = getattr(settings, "collider", None)
    if collider is None:
        return {}
    return dict(zip(KINDS, (collider.max_tokens, collider.max_tokens, settings.regenerated.max_tokens), strict=True))
