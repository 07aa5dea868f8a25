"""Training data of the policy and of the value model, from trees and from plain samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gcpo.algorithms import process_values
from gcpo.seeding import request_seed
from gcpo.selftraining.search import Proposal, Propose, Request, Result
from gcpo.selftraining.settings import FilterSettings, FirstValueSettings
from gcpo.selftraining.tree import value_labels

Grade = Callable[[Sequence[tuple[int, str]]], Sequence[bool]]
"""Whether the answers of whole responses are right; each is given with the index of its question."""


@dataclass(frozen=True)
class Solution:
    """A whole response.

    Attributes:
        question: index of the question.
        tokens: the response, with its end.
        text: the same.
        value: what the search found for it; 1 without a search.
        right: whether its answer is right.
    """

    question: int
    tokens: tuple[int, ...]
    text: str
    value: float
    right: bool


@dataclass(frozen=True)
class Label:
    """A partial solution and the value that the value model is to give it."""

    question: int
    tokens: tuple[int, ...]
    value: float


# ---- from trees ------------------------------------------------------------------------------------------------------


def grade_results(results: Sequence[Result], questions: Sequence[int], grade: Grade) -> None:
    """Set ``right`` of the ends and the answers of all trees; a response that has no end is wrong."""
    nodes = [
        (question, node)
        for question, result in zip(questions, results, strict=True)
        for node in dict.fromkeys([*result.ends, result.answer])
    ]
    rights = grade([(question, node.text + node.completion_text) for question, node in nodes])
    for (_, node), right in zip(nodes, rights, strict=True):
        node.right = bool(right) and node.completed


def solutions_of(result: Result, question: int) -> list[Solution]:
    """The ends of a graded tree as whole responses; those that have no end are left out."""
    return [
        Solution(question, end.tokens + end.completion, end.text + end.completion_text, end.value, bool(end.right))
        for end in result.ends
        if end.completed
    ]


def labels_of(result: Result, question: int, rule: Any) -> list[Label]:
    """`gcpo.selftraining.tree.value_labels` of a graded tree."""
    return [Label(question, node.tokens, value) for node, value in value_labels(result.root, result.ends, rule)]


def choose_solutions(solutions: Sequence[Solution], settings: FilterSettings) -> tuple[list[Solution], dict[str, int]]:
    """The solutions that the policy is trained on: right, different, of enough value and length.

    Returns:
        The solutions, and how many were left out, by reason.
    """
    chosen: dict[tuple[int, tuple[int, ...]], Solution] = {}
    dropped = {"wrong": 0, "same": 0, "low_value": 0, "short": 0}
    for solution in solutions:
        key = (solution.question, solution.tokens)
        reasons = {
            "wrong": not solution.right,
            "same": key in chosen,
            "low_value": solution.value < settings.min_value,
            "short": len(solution.text) < settings.min_characters,
        }
        reason = next((name for name, holds in reasons.items() if holds), None)
        if reason is None:
            chosen[key] = solution
        else:
            dropped[reason] += 1
    return list(chosen.values()), dropped


# ---- from samples ----------------------------------------------------------------------------------------------------


def sample_solutions(
    questions: Sequence[tuple[int, str]],
    n: int,
    temperature: float,
    seed: tuple[Any, ...],
    propose: Propose,
    grade: Grade,
) -> list[Solution]:
    """``n`` graded samples of each question; those that have no end are wrong.

    Args:
        questions: index and name of each.
        n: samples of a question.
        temperature: of the sampling.
        seed: with the question's name and the number of the sample it makes the seed of a request.
        propose: the policy.
        grade: the rule-based reward.
    """
    requests = [
        Request(question, (), request_seed(*seed, key, number), temperature, whole=True)
        for question, key in questions
        for number in range(n)
    ]
    return _graded(requests, propose(requests), grade)


def _graded(requests: Sequence[Request], proposals: Sequence[Proposal], grade: Grade) -> list[Solution]:
    pairs = list(zip(requests, proposals, strict=True))
    rights = grade([(request.question, proposal.text) for request, proposal in pairs])
    return [
        Solution(request.question, proposal.tokens, proposal.text, 1.0, bool(right) and proposal.finished)
        for (request, proposal), right in zip(pairs, rights, strict=True)
    ]


def first_labels(
    questions: Sequence[tuple[int, str]],
    settings: FirstValueSettings,
    seed: int,
    *,
    propose: Propose,
    grade: Grade,
    split: Callable[[tuple[int, ...]], list[int]],
    decode: Callable[[tuple[int, ...]], str],
) -> list[Label]:
    """Labels of the first value model by rollouts (ours; the paper's come from a data set).

    A right solution of K steps has v_k = k / K. In a wrong solution, step k is wrong if no rollout from there reaches
    the right answer, and then all later steps are; m_k of a right step is the shortest rollout that does, and m_k of a
    wrong one is that of the nearest right step less one. The values are `gcpo.algorithms.process_values`.

    Args:
        questions: index and name of each.
        settings: how many.
        seed: of the run.
        propose: the policy.
        grade: the rule-based reward.
        split: ends of the steps of a response.
        decode: text of tokens without control tokens.
    """
    temperature = settings.temperature
    solutions = sample_solutions(questions, settings.samples, temperature, (seed, "first"), propose, grade)
    solutions = list({(one.question, one.tokens): one for one in solutions if one.tokens}.values())
    names = dict(questions)
    prefixes = dict.fromkeys(
        (one.question, one.tokens[:end]) for one in solutions if not one.right for end in split(one.tokens)[:-1]
    )
    requests = [
        Request(
            question, tokens, request_seed(seed, "rollout", names[question], tokens, number), temperature, whole=True
        )
        for question, tokens in prefixes
        for number in range(settings.rollouts)
    ]
    proposals = propose(requests)
    whole = [
        Proposal(request.prefix + one.tokens, decode(request.prefix) + one.text, one.finished)
        for request, one in zip(requests, proposals, strict=True)
    ]
    distances: dict[tuple[int, tuple[int, ...]], int] = {}
    for request, rollout in zip(requests, _graded(requests, whole, grade), strict=True):
        if rollout.right:
            key = (request.question, request.prefix)
            steps = len(split(rollout.tokens)) - len(split(request.prefix))
            distances[key] = min(steps, distances.get(key, steps))
    labels = (label for solution in solutions for label in _labels(solution, split(solution.tokens), distances))
    return list({(label.question, label.tokens): label for label in labels}.values())


def _labels(solution: Solution, ends: Sequence[int], distances: dict[tuple[int, tuple[int, ...]], int]) -> list[Label]:
    wrong: list[bool] = []
    remaining: list[int] = []
    nearest = len(ends)
    for number, end in enumerate(ends, start=1):
        if solution.right:
            distance: int | None = len(ends) - number
        else:
            distance = None if any(wrong) else distances.get((solution.question, solution.tokens[:end]))
        wrong.append(distance is None)
        nearest = nearest if distance is None else distance
        remaining.append(max(nearest - 1, 0) if distance is None else distance)
    values = process_values(torch.tensor(wrong), torch.tensor(remaining, dtype=torch.float64)).tolist()
    return [Label(solution.question, solution.tokens[:end], value) for end, value in zip(ends, values, strict=True)]
