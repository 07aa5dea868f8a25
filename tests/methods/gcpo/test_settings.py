"""The ``gcpo:`` group: presets, parsing, and values that are refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import gcpo.config
from gcpo.methods.gc2po.settings import GC2POConfig
from gcpo.methods.gcpo.presets import PRESETS
from gcpo.methods.gcpo.settings import GCPOConfig, GCPOSettings
from gcpo.settings import ConfigError, Settings

YAML = Path(gcpo.config.__file__).parent / "base.yaml"


def resolve(n: int = 8, response_length: int = 100, **config: Any) -> GCPOConfig:
    return GCPOConfig.from_config(config, n=n, response_length=response_length)


@pytest.mark.parametrize(
    ("preset", "scheme", "shared", "leave_one_out", "generations", "source", "target", "subsample"),
    [
        ("paper", "shared", 8, 0, 8, "response", "projection", 1.0),
        ("balanced", "leave_one_out", 1, 1, 1, "prompt", "projection", 0.5),
        ("light", "leave_one_out", 1, 1, 1, "prompt", "group_mean", 0.25),
    ],
)
def test_presets(
    preset: str,
    scheme: str,
    shared: int,
    leave_one_out: int,
    generations: int,
    source: str,
    target: str,
    subsample: float,
) -> None:
    """The paper's, and those of the study: states of prompts; the group's mean and no context for Upsilon."""
    config = resolve(preset=preset)
    found = config.collider
    assert (found.scheme, found.num_draws, config.leave_one_out_draws) == (scheme, shared, leave_one_out)
    assert (found.num_generations, config.features.source, found.projection) == (generations, source, "inclusive")
    assert (config.weighting.target, config.reference.subsample) == (target, subsample)
    assert config.needs_generations == (preset == "paper")
    assert config.causal_target_on == (preset != "light")
    assert found.max_tokens == config.regenerated.max_tokens == config.blocks.max_tokens == 100


def test_a_given_value_wins_over_the_preset() -> None:
    """A field that is set stays; another draws option brings its own number of leave-one-out draws."""
    config = resolve(preset="paper", collider={"num_draws": 3, "scheme": "leave_one_out"}, blocks={"max_tokens": 7})
    assert config.collider.num_draws == 3 and config.leave_one_out_draws == 1 and config.blocks.max_tokens == 7
    assert resolve(preset="balanced", collider={"scheme": "shared", "num_draws": 2}).leave_one_out_draws == 0


@pytest.mark.parametrize("off", ["off", False, {"target": "off"}, {"target": False}])
def test_weighting_off(off: Any) -> None:
    """`off` is a string on the command line and False in yaml; with kappa = 0 the run is GRPO and draws nothing."""
    config = resolve(weighting=off)
    assert not config.weighting_on and config.needs_rollout and not config.needs_generations
    assert resolve(weighting=off, kappa=0).is_grpo
    assert not resolve(weighting=off, kappa=0.0).needs_rollout


def test_group_mean_needs_no_draws() -> None:
    """Without kappa a target made of the group's own states needs no generation, only a forward."""
    config = resolve(weighting={"target": "group_mean"}, kappa=0)
    assert config.weighting_on and not config.needs_rollout and not config.is_grpo


REFUSED = [
    ({"kapa": 0.1}, "gcpo.kapa is not a setting.*gcpo.kappa"),
    ({"collider": {"num_draw": 2}}, "gcpo.collider.num_draw .*num_draws"),
    ({"preset": "fast"}, "gcpo.preset.*paper, balanced, light"),
    ({"alpha": "two"}, "gcpo.alpha.*number"),
    ({"alpha": -1}, "gcpo.alpha"),
    ({"alpha": float("nan")}, "gcpo.alpha"),
    ({"kappa": float("inf")}, "gcpo.kappa"),
    ({"kappa": True}, "gcpo.kappa"),
    ({"seed": 1.5}, "gcpo.seed.*whole"),
    ({"blocks": {"drop_think": "yes"}}, "gcpo.blocks.drop_think.*true or false"),
    ({"blocks": {"candidate": "[Answer]"}}, "gcpo.blocks.candidate.*label"),
    ({"blocks": {"max_tokens": 0}}, "gcpo.blocks.max_tokens"),
    ({"collider": 3}, "gcpo.collider must be a group"),
    ({"collider": {"scheme": "shared", "num_draws": 1}}, "L = 1 with shared draws"),
    ({"collider": {"num_draws": 9}}, "L = 9 is more than the 8"),
    ({"collider": {"num_draws": 0}}, "gcpo.collider.num_draws"),
    ({"collider": {"num_generations": 0}}, "gcpo.collider.num_generations"),
    ({"collider": {"scheme": "leave_one_out", "num_leave_one_out_draws": 0}}, "gcpo.collider.num_leave_one_out_draws"),
    ({"regenerated": {"max_tokens": 0}}, "gcpo.regenerated.max_tokens"),
    ({"weighting": {"similarity": "dot"}}, "gcpo.weighting.similarity"),
    ({"advantage": {"form": "sum"}}, "gcpo.advantage.form"),
    ({"reference": {"max_kl": 0}}, "gcpo.reference.max_kl"),
    ({"reference": {"floor": 0}}, "gcpo.reference.floor"),
    ({"reference": {"relative_floor": 1}}, "gcpo.reference.relative_floor"),
    ({"metrics": {"graded_fraction": 2}}, "gcpo.metrics.graded_fraction"),
    ({"metrics": {"dump_fraction": -0.1}}, "gcpo.metrics.dump_fraction"),
    ({"metrics": {"max_missing": 1.5}}, "gcpo.metrics.max_missing"),
    ({"metrics": {"max_missing": float("nan")}}, "gcpo.metrics.max_missing"),
    ({"weighting": {"missing": "zero"}}, "gcpo.weighting.missing.*mean, one"),
    ({"scoring": {"max_token_len_per_gpu": 0}}, "gcpo.scoring.max_token_len_per_gpu"),
    ({"preset": "paper", "features": {"source": "prompt"}}, "gcpo.features.source"),
    ({"collider": {"draws": "shared"}}, "gcpo.collider.draws has a new name: write gcpo.collider.scheme$"),
    ({"collider": {"num_marginal_draws": 1}}, "write gcpo.collider.num_leave_one_out_draws$"),
    ({"collider": {"cache_tokens": 6400}}, "gcpo.collider.cache_tokens has been removed: .*prefix-cache"),
    ({"conditioned": {"max_tokens": 9}}, "gcpo.conditioned has a new name: write gcpo.regenerated$"),
    ({"features": {"context": "response"}}, "write gcpo.features.input$"),
    ({"reference": {"policy_context": "query"}}, "write gcpo.reference.policy_condition$"),
    ({"reference": {"fraction": 0.5}}, "write gcpo.reference.subsample$"),
    ({"weighting": {"control": "mean"}}, "write gcpo.weighting.ablation$"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED, ids=[str(c) for c, _ in REFUSED])
def test_impossible_values_are_refused(config: dict, message: str) -> None:
    """Each gives one sentence that names the setting."""
    with pytest.raises(ConfigError, match=message):
        resolve(**config)


def test_a_group_of_one_is_refused() -> None:
    """n = 1 leaves nothing to compare, except for plain GRPO."""
    with pytest.raises(ConfigError, match="rollout.n is 1"):
        resolve(n=1)
    assert resolve(n=1, weighting="off", kappa=0).is_grpo


def test_the_yaml_has_every_field_and_the_defaults() -> None:
    """base.yaml shows exactly the fields of the class, with their defaults."""
    assert yaml.safe_load(YAML.read_text())["gcpo"] == GCPOSettings().to_dict()


def test_a_resolved_configuration_stays_as_it_is() -> None:
    """Workers are given the resolved values and resolve them again."""
    for preset in PRESETS:
        config = resolve(preset=preset)
        assert resolve(**config.to_dict()) == GCPOConfig.from_config(config, n=8, response_length=5) == config


def test_every_field_is_documented() -> None:
    """A page about the settings can be made from the classes."""

    def undocumented(cls: type[Settings], where: str) -> Iterator[str]:
        for name, field in cls.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
                yield from undocumented(field.annotation, f"{where}.{name}")
            elif not field.description:
                yield f"{where}.{name}"

    for cls in (GCPOSettings, GC2POConfig):
        assert [*undocumented(cls, cls.__name__)] == []
