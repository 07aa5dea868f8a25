"""The compression penalty by hand: from the scores of a response to its advantages, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from gcpo.episodes import Episodes
from gcpo.methods.base import Outcome
from gcpo.methods.l2t.check import check
from gcpo.methods.l2t.credit import FittingCredit
from gcpo.methods.l2t.fields import COUNTS, PENALTY
from gcpo.methods.l2t.probes import ProbedRow
from gcpo.methods.l2t.scoring import score_rows
from gcpo.methods.l2t.settings import L2TConfig
from gcpo.scoring.requests import Score, ScoreRequest
from gcpo.settings import ConfigError

NAN = math.nan


def t(x: Any) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64)


# ---- C of an episode -------------------------------------------------------------------------------------------------


class World:
    """An engine and its scorer; the weights are one number, and log pi of token v is -1 + 0.01 v times it."""

    tokens, weight, passes = 0, 0.0, 0

    @contextmanager
    def moved(self, sign: int) -> Iterator[float]:
        self.weight = 0.5 * sign
        yield 0.5
        self.weight = 0.0

    def __call__(self, requests: list[ScoreRequest]) -> list[Score]:
        self.passes += 1
        return [
            Score(
                -1 + 0.01 * self.weight * request.target,
                gradient_square=torch.tensor([2.0 + end - start for start, end in request.gradient_of]),
            )
            for request in requests
        ]


def make_rows() -> list[ProbedRow]:
    """Episodes of 2 and 3 tokens and an end token; nothing is asked about the second row."""
    prompt, response = torch.tensor([1, 2]), torch.tensor([10, 11, 12, 13, 14, 3])
    episodes = Episodes(((0, 2), (2, 5)), False, False)
    pieces = [[torch.tensor([90]), torch.tensor([91]), torch.tensor([7, 8])], [torch.zeros(0).long()] * 3]
    return [ProbedRow(prompt, response, episodes, (math.inf, math.inf), own) for own in pieces]


@pytest.mark.parametrize(
    ("penalty", "values", "passes", "unshared"),
    [
        # |g|^2 is 4 and 5, the step .1: .4^2 and .5^2.
        ("one_step", [0.16, 0.25], 1, 8),
        # The slopes are .01 * (10 + 11) and .01 * (12 + 13 + 14), their squares times .01.
        ("released", [0.01 * 0.21**2, 0.01 * 0.39**2], 3, 16),
        ("off", None, 1, 0),
    ],
)
def test_penalty_of_a_row(penalty: str, values: list[float] | None, passes: int, unshared: int) -> None:
    """The token behind the last episode is in none; probes have contexts of 3, 5 and 8 tokens and an answer of 2."""
    world = World()
    config = L2TConfig.parse({"penalty": penalty, "step_size": 0.1, "episodes": {"max_episodes": 3}}, "l2t")
    found = score_rows(make_rows(), config, world, world)  # pyright: ignore[reportArgumentType]
    assert world.passes == passes
    assert found[COUNTS][0][1] * 2 == 16 + 6 + unshared
    if values is None:
        assert PENALTY not in found
        return
    torch.testing.assert_close(found[PENALTY][0], t([*values, NAN]), equal_nan=True, rtol=1e-5, atol=0)
    assert found[PENALTY][1].isnan().all()


# ---- from C to advantages --------------------------------------------------------------------------------------------


def credit_of(penalty: torch.Tensor | None, probability: torch.Tensor, **settings: Any) -> tuple[list, dict]:
    """The group of two responses of the reference numbers: surprises 1 and 3, then 2; and 1, 1."""
    index, old = torch.tensor([[0, 0, 1], [0, 0, -1]]), t([[-1.0, -3.0, -2.0], [-1.0, -1.0, 0.0]])
    credit = FittingCredit(L2TConfig.parse(settings, "l2t"), [[0, 1]], probability, index, old, penalty)
    mask = t([[1, 1, 1], [1, 1, 0]])
    rewards = t([[0, 0, 1.0], [0, 0, 0]])
    return credit.advantages(Outcome(torch.zeros(2, 3).double(), rewards, mask, None)).tolist(), credit.metrics()


GAINS = t([[0.1, 0.3, 0.6], [0.4, 0.3, NAN]])
"""Gains of .2 and .3, and of -.1."""


def test_without_a_penalty() -> None:
    """The reference numbers."""
    found, metrics = credit_of(None, GAINS)
    torch.testing.assert_close(
        t(found), t([[0.2500128, 0.7500383, 1.1212693], [-0.7071068, -0.7071068, 0]]), rtol=5e-6, atol=5e-6
    )
    assert not [name for name in metrics if "penalty" in name]
    assert credit_of(t([[0.0, 0.0], [0.0, NAN]]), GAINS)[0] == found


def test_with_a_penalty() -> None:
    """R = .5 + .8 (.2 - .6 * .25) = .54 and .5 + .8 (.3 - .6 * .5) = .5; R = .8 (-.1 - .6 * .5) = -.32. r = .135, .405,
    .5 with mean .3466667, and -.16, -.16: the first has A^ = .7071 and ratios .3894231, 1.1682692, 1.4423077."""
    found, metrics = credit_of(t([[0.25, 0.5], [0.5, NAN]]), GAINS)
    a = 0.5**0.5
    wanted = [[a * 0.3894231, a * 1.1682692, a * 1.4423077], [-a, -a, 0]]
    torch.testing.assert_close(t(found), t(wanted), rtol=5e-6, atol=5e-6)
    assert metrics["l2t/penalty/mean"] == pytest.approx(1.25 / 3) and metrics["l2t/penalty/max"] == 0.5
    assert metrics["l2t/negative_frac"] == 0.5 and metrics["l2t/clamped_frac"] == 0


def test_a_penalty_that_turns_signs() -> None:
    """C = 2 in the second episode: R = .54 and .5 + .8 (.3 - 1.2) = -.22, r = .135, .405, -.22 with mean .1066667: the
    last ratio is clamped to 0. With C = 4: R = -1.18, the mean is negative, and all tokens get A^. Both are counted."""
    a = 0.5**0.5
    found, metrics = credit_of(t([[0.25, 2.0], [0.5, NAN]]), GAINS)
    torch.testing.assert_close(t(found[0]), a * t([1.265625, 3.796875, 0.0]), rtol=1e-5, atol=1e-5)
    assert (metrics["l2t/negative_frac"], metrics["l2t/clamped_frac"]) == (0.5, pytest.approx(1 / 5))
    found, metrics = credit_of(t([[0.25, 4.0], [0.0, NAN]]), GAINS)
    torch.testing.assert_close(t(found), t([[-a] * 3, [a, a, 0]]), rtol=1e-5, atol=1e-5)
    assert (metrics["l2t/negative_frac"], metrics["l2t/clamped_frac"]) == (1.0, 0.0)


def test_a_question_without_an_answer_has_no_penalty() -> None:
    """Its gain is unknown; outcomes alone count: R = .5, .5 and 0."""
    nothing = torch.full((2, 3), NAN).double()
    found, metrics = credit_of(nothing[:, 1:], nothing)
    assert found == credit_of(None, nothing)[0] and found[0][2] > 0
    assert "l2t/penalty/mean" not in metrics


# ---- what is refused -------------------------------------------------------------------------------------------------

FSDP = "actor_rollout_ref.actor.fsdp_config"
FP32 = {f"{FSDP}.mixed_precision.param_dtype": "fp32"}


@pytest.mark.parametrize(
    ("penalty", "changes", "model", "says"),
    [
        ("one_step", {"actor_rollout_ref.model.use_fused_kernels": True}, {}, "set actor_rollout_ref.model.use_fused"),
        ("one_step", {f"{FSDP}.ulysses_sequence_parallel_size": 2}, {}, "ulysses_sequence_parallel_size is 2"),
        ("one_step", {}, {"final_logit_softcapping": 30.0}, "this model has final_logit_softcapping=30.0"),
        ("one_step", {}, {"final_logit_softcapping": None, "logits_scaling": 1.0}, None),
        ("released", {}, {}, f"{FSDP}.mixed_precision.param_dtype is bf16"),
        ("released", {**FP32, f"{FSDP}.model_dtype": "bf16"}, {}, f"{FSDP}.model_dtype is bf16"),
        ("released", FP32, {"final_logit_softcapping": 30.0}, None),
        ("off", {"actor_rollout_ref.model.use_fused_kernels": True}, {"logit_scale": 2.0}, None),
    ],
)
def test_refused(penalty: str, changes: dict, model: dict, says: str | None) -> None:
    config = OmegaConf.create({})
    for key, value in changes.items():
        OmegaConf.update(config, key, value)
    arguments = (config, L2TConfig.parse({"penalty": penalty}, "l2t"), SimpleNamespace(**model))
    if says is None:
        check(*arguments)
        check(*arguments[:2], None)
        return
    with pytest.raises(ConfigError, match=says) as error:
        check(*arguments)
    assert "\n" not in str(error.value)
