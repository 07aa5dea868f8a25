"""A toy task for the search: a right response is the letters ``abc`` and then an end, each letter a step.

Tokens are the codes of letters; the end is token 0.
"""

from __future__ import annotations

from collections.abc import Sequence

from gcpo.selftraining.search import Judged, Proposal, Request
from gcpo.selftraining.settings import SearchSettings, StepSettings, TestSearchSettings

END = 0
STEPS = StepSettings(min_characters=1, reject_repeated=False)


def tokens(text: str) -> tuple[int, ...]:
    """``.`` is the end."""
    return tuple(END if letter == "." else ord(letter) for letter in text)


def text_of(given: Sequence[int]) -> str:
    return "".join(chr(token) for token in given if token != END)


def proposal(text: str) -> Proposal:
    return Proposal(tokens(text), text.replace(".", ""), text.endswith("."))


def grade(texts: Sequence[tuple[int, str]]) -> list[bool]:
    return [text == "abc" for _, text in texts]


class Script:
    """A policy and a value model that answer from tables, and write down what they are asked.

    ``steps`` maps a partial response to the steps that are proposed after it, in turn; ``values`` maps a partial
    response to its value, 0 where it is missing.
    """

    def __init__(self, steps: dict[str, list[str]], values: dict[str, float]) -> None:
        self.steps, self.values = steps, values
        self.asked: list[list[Request]] = []
        self.judged: list[list[Judged]] = []
        self._turns: dict[tuple[int, str], int] = {}

    def propose(self, requests: Sequence[Request]) -> list[Proposal]:
        self.asked.append(list(requests))
        return [self._step(request) for request in requests]

    def _step(self, request: Request) -> Proposal:
        before = text_of(request.prefix)
        if request.whole:
            rest = before
            while rest in self.steps and not rest.endswith("."):
                rest += self.steps[rest][0]
            return proposal(rest[len(before) :])
        turn = self._turns.get((request.question, before), 0)
        self._turns[request.question, before] = turn + 1
        choices = self.steps.get(before, [""])
        return proposal(choices[turn % len(choices)])

    def value(self, judged: Sequence[Judged]) -> list[float]:
        self.judged.append(list(judged))
        return [self.values.get(text_of(one.tokens), 0.0) for one in judged]


def settings(**given: object) -> SearchSettings:
    return SearchSettings.parse(given, "search")


def test_settings(**given: object) -> TestSearchSettings:
    return TestSearchSettings.parse(given, "test_search")


test_settings.__test__ = False  # type: ignore[attr-defined]
