"""Divergences, answers, rewards and advantages, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from gcpo.algorithms import answer_divergence
from gcpo.methods.gc2po.credit import (
    GroupAnswers,
    GroupEpisodes,
    batch_metrics,
    effectiveness,
    empirical_terms,
    gaussian_noise,
    group_advantage,
    group_answers,
    group_noise,
)
from gcpo.methods.gc2po.settings import GC2POConfig

NAN = math.nan


def config(**raw) -> GC2POConfig:
    return GC2POConfig.from_config(raw, n=4)


def test_divergence_by_hand() -> None:
    """q = (3/4, 1/4) against (1/2, 1/2): 3/4 log 3/2 + 1/4 log 1/2; scores need not be normalised."""
    scores = torch.log(torch.tensor([[0.75, 0.25], [0.5, 0.5], [3.0, 1.0]]))
    found = answer_divergence(scores)
    assert found.tolist() == pytest.approx([0.75 * math.log(1.5) + 0.25 * math.log(0.5), 0.0], abs=1e-7)


def test_a_model_whose_answers_do_not_change_is_robust() -> None:
    """The same scores under every perturbation: divergence 0 and robustness 1, exactly; one answer alone too."""
    scores = torch.randn(3, 1, 4).expand(3, 5, 4)
    assert answer_divergence(scores).tolist() == [[0.0] * 4] * 3
    assert answer_divergence(torch.randn(2, 5, 1)).tolist() == [[0.0] * 4] * 2
    assert (answer_divergence(torch.randn(50, 5, 3)) >= 0).all()


def test_effectiveness_by_hand() -> None:
    """|(0,3) - (0,4)| / 4 = 1/4; no change: 0; a change of more than the norm: 1; a state of norm 0 before."""
    states = torch.tensor([[0.0, 4.0], [0.0, 3.0], [0.0, 3.0], [9.0, 0.0], [0.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    assert effectiveness(states).tolist() == [0.25, 0.0, 1.0, 1.0, 0.0, 1.0]


def test_a_collapsed_model_has_no_effect() -> None:
    """The same state everywhere: effectiveness 0."""
    assert effectiveness(torch.full((4, 8), 2.5)).tolist() == [0.0] * 3


def test_noise() -> None:
    """Gaussian: the mean norm is sigma, a seed repeats itself. Group: a share of the way, to the last state of a
    candidate that has fewer."""
    noise = gaussian_noise(7, 20, 30, 64, 0.1)
    assert noise.shape == (20, 30, 64) and float(noise.norm(dim=-1).mean()) == pytest.approx(0.1, rel=0.02)
    assert torch.equal(noise, gaussian_noise(7, 20, 30, 64, 0.1))
    assert not torch.equal(noise, gaussian_noise(8, 20, 30, 64, 0.1))
    states = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    others = [torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 2.0], [1.0, 5.0], [9.0, 9.0]])]
    assert group_noise(states, others, 0.5).tolist() == [[[2.0, 0.0], [0.0, 1.0]], [[1.5, -0.5], [0.0, 2.0]]]


def test_answers() -> None:
    """The gold one first, then by frequency; what `normalize` makes the same is one answer, written as most write it;
    responses without an answer do not count."""
    responses = [
        "\\boxed{7}",
        "so \\boxed{\\frac{1}{2}}",
        "\\boxed{\\dfrac12}",
        "\\boxed{\\frac{1}{2}}",
        "none",
        "\\boxed{9}",
    ]
    found = group_answers(responses, "8", 3)
    assert found.candidates == ("8", "\\frac{1}{2}", "7") and found.distinct == 4 and found.counts == (3, 1, 1)
    assert group_answers(responses[::-1], "8", 3) == found
    assert group_answers(["\\boxed{08}"], "8", 4) == GroupAnswers(("8",), (1,), 1)
    assert group_answers(["\\boxed{1}"], ["2", "3"], 4).candidates == ("2", "1")
    assert group_answers(["\\boxed{1}"], {"inputs": []}, 4).candidates == ("1",)


def test_no_parsable_answer() -> None:
    """Without any answer the group says so; an empty box is none."""
    found = group_answers(["nothing", "\\boxed{}", "\\boxed{1"], "5", 4)
    assert not found.parsable and found.candidates == ("5",) and found.counts == ()
    assert not group_answers([], None, 4).parsable


def test_the_ablation_by_hand() -> None:
    """Counts 2, 1, 1: sum of squares 3/8, entropy 1.5 log 2 over log 3."""
    robustness, effect = empirical_terms((2, 1, 1))
    assert robustness == pytest.approx(0.375) and effect == pytest.approx(1.5 * math.log(2) / math.log(3))
    assert empirical_terms((5,)) == (1.0, 0.0)


def group(**changes) -> GroupEpisodes:
    """Two responses: two episodes of two tokens and one outside; one episode of three tokens, and padding."""
    values = {
        "divergence": torch.tensor([[0.0, math.log(2.0), NAN], [math.log(4.0), NAN, NAN]], dtype=torch.float64),
        "effectiveness": torch.tensor([[0.5, 1.0, NAN], [0.25, NAN, NAN]], dtype=torch.float64),
        "index": torch.tensor([[0, 0, 1, 1, -1], [0, 0, 0, -1, -1]]),
        "old_log_prob": torch.tensor([[-1.0, -3.0, -2.0, -2.0, -1.0], [-1.0, -1.0, -2.0, 0.0, 0.0]]),
        "answers": GroupAnswers(("1", "2"), (1, 1), 2),
    }
    return GroupEpisodes(**{**values, **changes})


MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def test_a_group_by_hand() -> None:
    """Robustness 1, 1/2 and 1/4; R_0 = (1 + .9 (1 + .4))/2, (1 + .9 (.5 + .8))/2; R_1 = .9 (.25 + .2)."""
    result = group_advantage(group(), torch.tensor([1.0, 0.0]), MASK, config())
    assert result.robustness.flatten().tolist() == pytest.approx([1.0, 0.5, 0.0, 0.25, 0.0, 0.0])
    reward = [[1.13, 1.085, 0.0], [0.405, 0.0, 0.0]]
    torch.testing.assert_close(result.reward, torch.tensor(reward, dtype=torch.float64))
    # r_tilde 2.215 and 0.405; shares 1/4, 3/4 | 1/2, 1/2 and 1/4, 1/4, 1/2. Half of sqrt 2 is what two responses get.
    size = math.sqrt(0.5)
    tokens = [[1.13 / 4, 1.13 * 3 / 4, 1.085 / 2, 1.085 / 2], [0.25, 0.25, 0.5]]
    first = [size * r * 4 / 2.215 for r in tokens[0]] + [size]
    second = [-size * r * 3 for r in tokens[1]] + [0.0, 0.0]
    torch.testing.assert_close(result.advantage, torch.tensor([first, second]), rtol=1e-5, atol=1e-6)
    assert not result.shifted


def test_episodes_that_were_not_asked_for() -> None:
    """They get the mean robustness of their response's others, and 1 where none was asked for."""
    divergence = torch.tensor([[NAN, math.log(2.0), NAN], [NAN, NAN, NAN]])
    result = group_advantage(group(divergence=divergence), torch.tensor([1.0, 0.0]), MASK, config())
    assert result.robustness.tolist() == [[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]


def test_group_permutation_and_padding() -> None:
    """Rows in another order give rows in that order; more padding on either axis changes nothing."""
    outcome = torch.tensor([1.0, 0.0])
    plain = group_advantage(group(), outcome, MASK, config()).advantage
    swapped = {
        name: getattr(group(), name).flip(0) for name in ("divergence", "effectiveness", "index", "old_log_prob")
    }
    result = group_advantage(group(**swapped), outcome.flip(0), MASK.flip(0), config())
    torch.testing.assert_close(result.advantage.flip(0), plain)
    pad = torch.nn.functional.pad
    wide = group(
        divergence=pad(group().divergence, (0, 4), value=NAN),
        effectiveness=pad(group().effectiveness, (0, 4), value=NAN),
        index=pad(group().index, (0, 3), value=-1),
        old_log_prob=pad(group().old_log_prob, (0, 3)),
    )
    result = group_advantage(wide, outcome, pad(MASK, (0, 3)), config())
    assert torch.equal(result.advantage[:, :5], plain) and not result.advantage[:, 5:].any()


def test_negative_outcomes_are_lifted() -> None:
    """Outcomes of -1 and 0 give what 0 and 1 give."""
    lifted = group_advantage(group(), torch.tensor([0.0, -1.0]), MASK, config())
    plain = group_advantage(group(), torch.tensor([1.0, 0.0]), MASK, config())
    assert torch.equal(lifted.advantage, plain.advantage) and lifted.shifted and not plain.shifted


def test_no_reward_at_all() -> None:
    """Weights and outcome 0: advantages 0, never NaN; an empty response too."""
    nothing = config(reward={"robustness_weight": 0.0})
    assert group_advantage(group(), torch.zeros(2), MASK, nothing).advantage.tolist() == [[0.0] * 5] * 2
    empty = group(index=torch.tensor([[0, 0, 1, 1, -1], [-1] * 5]))
    result = group_advantage(empty, torch.tensor([1.0, 0.0]), MASK * torch.tensor([[1], [0]]), config())
    assert result.advantage.isfinite().all() and not result.advantage[1].any() and not result.exists[1].any()


def test_counterfactual_off() -> None:
    """Everything else equal: the terms come from the group's answers and are the same for every episode."""
    answers = GroupAnswers(("1", "2"), (3, 1), 2)
    off = config(counterfactual="off")
    nothing = torch.full((2, 3), NAN)
    result = group_advantage(
        group(answers=answers, divergence=nothing, effectiveness=nothing), torch.tensor([1.0, 0.0]), MASK, off
    )
    robustness, effect = 10 / 16, -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2)
    assert result.robustness.tolist() == [[robustness, robustness, 0.0], [robustness, 0.0, 0.0]]
    process = 0.9 * (robustness + 0.8 * effect)
    expected = [[(1 + process) / 2] * 2 + [0.0], [process, 0.0, 0.0]]
    torch.testing.assert_close(result.reward.double(), torch.tensor(expected, dtype=torch.float64))


def test_metrics() -> None:
    """Means over episodes that exist; correlations over responses; the share of the groups that fell back."""
    result = group_advantage(group(), torch.tensor([1.0, 0.0]), MASK, config())
    found = batch_metrics([result], [MASK], [group()], fallbacks=3)
    assert found["gc2po/fallback/groups_frac"] == 0.75
    assert found["gc2po/robustness/mean"] == pytest.approx(1.75 / 3) and found["gc2po/robustness/min"] == 0.25
    assert found["gc2po/episodes/mean"] == 1.5 and found["gc2po/answers/per_group"] == 2.0
    assert found["gc2po/reward/process"] == pytest.approx((1.215 + 0.405) / 2)
    assert found["gc2po/reward/correctness_correlation"] == pytest.approx(1.0)
    first, second = result.advantage[0], result.advantage[1, :3]
    assert found["gc2po/advantage/spread_in_response"] == pytest.approx(float(first.std() + second.std()) / 2)
    assert batch_metrics([], [], [], fallbacks=2) == {"gc2po/fallback/groups_frac": 1.0}
