"""What the ``gc2po`` group is refused for."""

from __future__ import annotations

import pytest

from gcpo.methods.gc2po.settings import GC2POConfig
from gcpo.settings import ConfigError


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"perturbation": {"draws": 0}}, "gc2po.perturbation.draws is 0; it must be at least 1"),
        ({"perturbation": {"sigma": -0.1}}, "gc2po.perturbation.sigma is -0.1; it must be at least 0"),
        ({"perturbation": {"sigma": float("nan")}}, "gc2po.perturbation.sigma is nan; it must be a finite number"),
        ({"perturbation": {"distribution": "uniform"}}, "choose one of gaussian, group"),
        ({"layer": 3}, "the last of the model's hidden states"),
        ({"layer": -1}, "the last of the model's hidden states"),
        ({"layer": 7}, "the model has hidden states 0 to 3"),
        ({"layer": -5}, "the model has hidden states 0 to 3"),
        ({"intervention": "lm_head", "layer": 4}, "the model has hidden states 0 to 3"),
        ({"intervention": "lm_head", "layer": 1, "perturbation": {"distribution": "group"}}, "set it to null"),
        ({"answers": {"max_answers": 1}}, "gc2po.answers.max_answers is 1; it must be at least 2"),
        ({"answers": {"prompt": ""}}, "gc2po.answers.prompt is ''; write a text"),
        ({"episodes": {"max_perturbed": 0}}, "gc2po.episodes.max_perturbed is 0; it must be at least 1"),
        ({"episodes": {"separator": "("}}, "is not a regular expression"),
        ({"episodes": {"separator": "x*"}}, "also matches nothing at all"),
        ({"reward": {"trim": 1}}, "gc2po.reward.trim"),
        ({"reward": {"robustness_weight": -1}}, "gc2po.reward.robustness_weight"),
        ({"counterfactual": "maybe"}, "write true or false"),
        ({"sigma": 0.1}, "gc2po.sigma is not a setting"),
        ({"form": "head"}, "gc2po.form has a new name: write gc2po.intervention$"),
        ({"intervention": "inject"}, "choose one of hidden_state, lm_head$"),
        ({"episodes": {"scored": 2}}, "gc2po.episodes.scored has a new name: write gc2po.episodes.max_perturbed$"),
        ({"perturbation": {"law": "group"}}, "write gc2po.perturbation.distribution$"),
    ],
)
def test_refused(raw: dict, message: str) -> None:
    """One sentence that names the setting, for a model of three layers."""
    with pytest.raises(ConfigError, match=message):
        GC2POConfig.from_config(raw, n=8, depth=3)


def test_a_group_of_one() -> None:
    with pytest.raises(ConfigError, match="rollout.n is 1"):
        GC2POConfig.from_config({}, n=1)


def test_layers() -> None:
    """Two thirds of the depth with ``hidden_state``, the last with ``lm_head``; negative ones count from the end."""
    assert [GC2POConfig().layer_of(depth) for depth in (1, 2, 3, 24, 28)] == [0, 1, 2, 16, 19]
    assert GC2POConfig(intervention="lm_head").layer_of(3) == 3
    assert GC2POConfig(layer=-2).layer_of(3) == 2


def test_switches_and_the_way_back() -> None:
    """on and off as the command line and yaml give them; the dictionary gives the same again."""
    for value, wanted in (("off", False), (False, False), ("on", True), (True, True)):
        made = GC2POConfig.from_config({"counterfactual": value, "reward": {"length_correction": value}}, n=2)
        assert made.counterfactual is wanted and made.reward.length_correction is wanted
        assert GC2POConfig.from_config(made.to_dict(), n=2) == made


def test_what_needs_answers() -> None:
    """Answers are scored by the model where something is perturbed and injected."""
    assert GC2POConfig().needs_answers
    for raw in ({"intervention": "lm_head"}, {"counterfactual": False}, {"perturbation": {"sigma": 0}}):
        assert not GC2POConfig.from_config(raw, n=2).needs_answers
