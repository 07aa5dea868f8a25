"""The probes of a response: the answer, its tokens, and the places that are asked about."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gcpo.episodes import Episodes
from gcpo.methods.base import Run
from gcpo.methods.l2t.probes import ProbedRow, RowReader, pieces_of, right_answer
from gcpo.methods.l2t.settings import L2TConfig, ProbeConfig
from gcpo.settings import ConfigError
from gcpo.tokens import control_ids

RUN = Run(n=4, response_length=64, prompt_length=48)


@pytest.mark.parametrize(
    ("source", "truth", "answer"),
    [
        ("gcpo/arithmetic", " 801 ", "801"),
        ("gcpo/arithmetic", 12, "12"),
        ("gcpo/arithmetic", ["3", "4"], "3"),
        ("gcpo/arithmetic", ["", "4"], "4"),
        ("gcpo/arithmetic", None, None),
        ("gcpo/arithmetic", "", None),
        ("gcpo/arithmetic", [], None),
        ("mbpp", {"inputs": ["1"], "outputs": ["2"]}, None),
    ],
)
def test_right_answer(source: str, truth: Any, answer: str | None) -> None:
    assert right_answer(source, truth) == answer


def test_a_token_over_the_border_belongs_to_the_answer() -> None:
    """A tokenizer that merges the bracket with the digit behind it."""
    vocabulary = ["box{", "box", "{8", "0", "}"]

    def encode(text: str) -> list[int]:
        ids = []
        while text:
            token = next(t for t in sorted(vocabulary, key=len, reverse=True) if text.startswith(t) and
                         not (t == "box{" and text.startswith("box{8")))  # fmt: skip
            ids.append(vocabulary.index(token))
            text = text[len(token) :]
        return ids

    probe = ProbeConfig(close_think="}", text="box{", suffix="}")
    assert encode("box{") == [0] and encode("box{80}") == [1, 2, 3, 4]
    assert pieces_of("80", probe, encode) == [[4], [], [1, 2, 3, 4]]
    assert pieces_of("0", probe, encode) == [[4], [0], [3, 4]]


def row(*, thinking: tuple[float, float], pieces: list[list[int]]) -> ProbedRow:
    episodes = Episodes(((0, 2), (2, 5)), False, False)
    return ProbedRow(
        torch.tensor([1, 2]), torch.tensor([10, 11, 12, 13, 14, 15]), episodes, thinking, [*map(torch.tensor, pieces)]
    )


def test_requests() -> None:
    """One before the first episode and one after each; an open thinking part is closed first."""
    pieces = [[90], [91], [7, 8]]
    found = row(thinking=(0, 4), pieces=pieces).requests()
    assert [request.context.tolist() for request in found] == [
        [1, 2, 90, 91],
        [1, 2, 10, 11, 90, 91],
        [1, 2, 10, 11, 12, 13, 14, 91],
    ]
    assert all(request.target.tolist() == [7, 8] and request.log_probs for request in found)
    never = row(thinking=(float("inf"), float("inf")), pieces=pieces).requests()
    assert [request.context.tolist()[-2:] for request in never] == [[2, 91], [11, 91], [14, 91]]
    assert row(thinking=(0, 4), pieces=[[], [], []]).requests() == []


@pytest.mark.parametrize(
    ("prompt", "response", "open_at"),
    [
        ("q", "1 2 3", []),
        ("q", "<think> 1 </think> 2", [1, 2]),
        ("q<think>", "1 </think> 2", [0, 1]),
        ("q<think>", "1 2", [0, 1, 2]),
        ("q<think></think>", "1 2", []),
    ],
)
def test_where_the_thinking_part_is_open(tokenizer: Any, prompt: str, response: str, open_at: list[int]) -> None:
    """Places are words; the thinking part is open behind each of ``open_at`` words."""
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    reader = RowReader(L2TConfig(), tokenizer, control_ids(tokenizer))
    start, end = reader._thinking(encode(prompt), encode(response))
    words = response.split(" ")
    places = [len(encode(" ".join(words[:k]))) for k in range(len(words) + 1)]
    assert [k for k, place in enumerate(places) if start <= place < end] == open_at


@pytest.mark.parametrize(
    ("settings", "run", "says"),
    [
        ({}, {"n": 1}, "rollout.n is 1: L2T compares"),
        ({}, {"norm_by_std": False}, "norm_adv_by_std_in_grpo is False"),
        ({"max_token_len_per_gpu": 100}, {}, "l2t.max_token_len_per_gpu=2"),
        ({"penalty": "fisher"}, {}, "l2t.penalty is 'fisher'; "),
        ({"beta": -1}, {}, "l2t.beta is -1; it must be at least 0"),
        ({"step_size": -1}, {}, "l2t.step_size is -1; it must be at least 0"),
        ({"alpha": -1}, {}, "l2t.alpha is -1; it must be at least 0"),
        ({"probes": {}}, {}, "did you mean l2t.probe?"),
    ],
)
def test_refused(settings: dict, run: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says.replace("?", r"\?")) as error:
        L2TConfig.from_config(settings, Run(**{"n": 4, "response_length": 64, "prompt_length": 48, **run}))
    assert "\n" not in str(error.value)


def test_off_in_yaml() -> None:
    """``off`` without quotes is a boolean there."""
    assert L2TConfig.from_config({"penalty": False}, RUN).penalty == "off"
