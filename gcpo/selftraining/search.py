"""MCTS*, the tree search of ReST-MCTS*, for many questions at once.

The search of one question is a generator: it yields the steps that the policy is to propose, or the partial solutions
that the value model is to judge, and is sent the answers. `search_together` advances the generators of all questions
and joins their demands in one call of the policy or of the value model. Every request has a seed of its own, so a
question has the same tree alone and beside others.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

from gcpo.seeding import request_seed
from gcpo.selftraining.settings import SearchSettings, StepSettings
from gcpo.selftraining.tree import Node, answer_node, back_up, best_child, end_leaves


@dataclass(frozen=True)
class Request:
    """A continuation that the policy is asked for.

    Attributes:
        question: index of the question.
        prefix: tokens of the response so far.
        seed: of the sampling.
        temperature: 0 is greedy.
        whole: whether the rest of the response is asked for and not one step.
    """

    question: int
    prefix: tuple[int, ...]
    seed: int
    temperature: float
    whole: bool = False


@dataclass(frozen=True)
class Proposal:
    """A continuation. ``finished``: the policy has ended the response with it. No tokens: there is none."""

    tokens: tuple[int, ...]
    text: str
    finished: bool


@dataclass(frozen=True)
class Judged:
    """A partial solution that the value model is asked about."""

    question: int
    tokens: tuple[int, ...]


Propose = Callable[[Sequence[Request]], Sequence[Proposal]]
Value = Callable[[Sequence[Judged]], Sequence[float]]
Demand = list[Request] | list[Judged]
Search = Generator[Demand, Any, Node]


@dataclass(frozen=True)
class Result:
    """A finished search: the root of its tree, the ends, and the node that the search answers with."""

    root: Node
    ends: list[Node]
    answer: Node


class TreeSearch:
    """The search of one question."""

    def __init__(
        self, question: int, key: str, settings: SearchSettings, steps: StepSettings, max_tokens: int, seed: int
    ) -> None:
        """
        Args:
            question: index of the question, for the requests.
            key: names the question in the seeds, wherever it stands.
            settings: of the search.
            steps: of the steps.
            max_tokens: longest response; a node that is as long is an end.
            seed: of the run.
        """
        self.question, self.settings, self.steps, self.max_tokens = question, settings, steps, max_tokens
        self._seed = (seed, "search", key)
        self._requests = 0
        self._random = random.Random(request_seed(*self._seed, "ties"))
        self._values: dict[tuple[int, ...], float] = {}

    def run(self) -> Search:
        """Search, and finish the ends that the policy has not finished; returns the root."""
        root = Node()
        for _ in range(self.settings.iterations):
            node = root
            while node.children:
                node = self._best_child(node)
            if node.value >= self.settings.end_gate:
                node.ended = True
                if self.settings.stop_at_gate:
                    break
            if not node.ended:
                yield from self._expand(node)
            if node.children:
                yield from self._simulate(self._best_child(node))
            back_up(node)
        yield from self._complete(root)
        return root

    def _best_child(self, node: Node) -> Node:
        settings = self.settings
        return best_child(node, self._random, exploration=settings.exploration, unvisited=settings.unvisited)

    def _expand(self, node: Node) -> Generator[Demand, Any, None]:
        """Add the different proposals as children; a node without any is an end."""
        proposals = yield from self._proposals(node.tokens, node.text, self.settings.branch)
        for proposal in {proposal.tokens: proposal for proposal in proposals}.values():
            tokens = node.tokens + proposal.tokens
            child = Node(tokens, node.text + proposal.text, node, finished=proposal.finished)
            child.ended = proposal.finished or len(tokens) >= self.max_tokens
            node.children.append(child)
        node.ended = not node.children
        values = yield from self._judge([child.tokens for child in node.children])
        for child, value in zip(node.children, values, strict=True):
            child.value = value

    def _simulate(self, child: Node) -> Generator[Demand, Any, None]:
        """Mix the best value of a few greedy steps from ``child`` into its value."""
        tokens, text, ended, best = child.tokens, child.text, child.ended, 0.0
        if ended:
            best = child.value
        for _ in range(0 if ended else self.settings.roll_forward_steps):
            proposals = yield from self._proposals(tokens, text, self.settings.roll_branch)
            if not proposals:
                break
            values = yield from self._judge([tokens + proposal.tokens for proposal in proposals])
            value, index = max((value, -index) for index, value in enumerate(values))
            best, chosen = max(best, value), proposals[-index]
            tokens, text = tokens + chosen.tokens, text + chosen.text
            if chosen.finished or len(tokens) >= self.max_tokens:
                break
        child.value = (1 - self.settings.alpha) * child.value + self.settings.alpha * best
        child.visits += 1

    def _complete(self, root: Node) -> Generator[Demand, Any, None]:
        """Let the policy finish the ends and the answer; what is left out of the response would not be graded."""
        gate = self.settings.end_gate
        nodes = list(dict.fromkeys([*end_leaves(root, gate), answer_node(root, gate)]))
        for node in nodes:
            node.completed = node.finished
        open_nodes = [node for node in nodes if not node.finished and len(node.tokens) < self.max_tokens]
        if not open_nodes:
            return
        answers = yield [Request(self.question, node.tokens, 0, 0.0, whole=True) for node in open_nodes]
        for node, answer in zip(open_nodes, answers, strict=True):
            node.completion, node.completion_text, node.completed = answer.tokens, answer.text, answer.finished

    def _proposals(self, tokens: tuple[int, ...], text: str, count: int) -> Generator[Demand, Any, list[Proposal]]:
        """At most ``count`` accepted steps; a rejected one is asked for again, ``tries`` times in all."""
        accepted: dict[int, Proposal] = {}
        for _ in range(self.settings.tries):
            missing = [index for index in range(count) if index not in accepted]
            if not missing:
                break
            answers = yield [self._request(tokens) for _ in missing]
            fits = [(index, step) for index, step in zip(missing, answers, strict=True) if self._fits(step, text)]
            accepted.update(fits)
        return [accepted[index] for index in sorted(accepted)]

    def _request(self, tokens: tuple[int, ...]) -> Request:
        self._requests += 1
        return Request(self.question, tokens, request_seed(*self._seed, self._requests), self.settings.temperature)

    def _fits(self, step: Proposal, text: str) -> bool:
        stripped = step.text.strip()
        if not step.tokens or step.finished:
            return bool(step.tokens)
        repeated = self.steps.reject_repeated and stripped in text
        return len(stripped) >= self.steps.min_characters and not repeated

    def _judge(self, partial: list[tuple[int, ...]]) -> Generator[Demand, Any, list[float]]:
        """Values between 0 and 1; each partial solution is judged once."""
        new = [tokens for tokens in dict.fromkeys(partial) if tokens not in self._values]
        if new:
            values = yield [Judged(self.question, tokens) for tokens in new]
            self._values.update(zip(new, (min(max(value, 0.0), 1.0) for value in values), strict=True))
        return [self._values[tokens] for tokens in partial]


def search_together(searches: Sequence[TreeSearch], propose: Propose, value: Value) -> list[Result]:
    """Run the searches side by side.

    Args:
        searches: one for each question.
        propose: the policy.
        value: the value model.

    Returns:
        The results in the order of ``searches``.
    """
    running = {index: search.run() for index, search in enumerate(searches)}
    roots: dict[int, Node] = {}
    demands: dict[int, Demand] = {}

    def advance(index: int, answers: Any) -> None:
        try:
            demands[index] = running[index].send(answers)
        except StopIteration as stop:
            demands.pop(index, None)
            roots[index] = stop.value

    for index in running:
        advance(index, None)
    while demands:
        # Values first: the policy is then asked for the steps of all questions in one call.
        judged = [index for index, demand in demands.items() if isinstance(demand[0], Judged)]
        chosen = judged or list(demands)
        call: Callable[[Any], Sequence[Any]] = value if judged else propose
        joined = [one for index in chosen for one in demands[index]]
        answers = iter(call(joined))
        for index, count in [(index, len(demands[index])) for index in chosen]:
            advance(index, [next(answers) for _ in range(count)])
    gates = [search.settings.end_gate for search in searches]
    return [
        Result(roots[index], end_leaves(roots[index], gate), answer_node(roots[index], gate))
        for index, gate in enumerate(gates)
    ]
