"""The presets of the group ``gcpo``, and the check of values that cannot work together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gcpo.settings import ConfigError, plain

if TYPE_CHECKING:
    from gcpo.methods.gcpo.settings import GCPOConfig, GCPOSettings

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {
        "collider": {"scheme": "shared", "num_draws": None, "num_generations": None},
        "features": {"source": "response"},
        "weighting": {"target": "projection"},
        "reference": {"subsample": 1.0},
    },
    "balanced": {
        "collider": {"scheme": "leave_one_out", "num_draws": 1, "num_generations": 1},
        "features": {"source": "prompt"},
        "weighting": {"target": "projection"},
        "reference": {"subsample": 0.5},
    },
    "light": {
        "collider": {"scheme": "leave_one_out", "num_draws": 1, "num_generations": 1},
        "features": {"source": "prompt"},
        "weighting": {"target": "group_mean"},
        "reference": {"subsample": 0.25},
    },
}
"""The values of fields left ``null``; ``None`` here means n."""


def fill(settings: GCPOSettings, *, n: int, response_length: int) -> dict[str, Any]:
    """Replace ``None`` by the preset's value, or by a value that follows from the run."""
    values, preset = plain(settings), PRESETS[settings.preset]
    groups = {
        "collider": {**preset["collider"], "projection": "inclusive", "max_tokens": response_length},
        "regenerated": {"max_tokens": response_length},
        "blocks": {"max_tokens": response_length},
        **{name: preset[name] for name in ("features", "weighting", "reference")},
    }
    for name, defaults in groups.items():
        for key, default in defaults.items():
            if values[name][key] is None:
                values[name][key] = n if default is None else default
    collider = values["collider"]
    if collider["num_leave_one_out_draws"] is None:
        collider["num_leave_one_out_draws"] = int(collider["scheme"] == "leave_one_out")
    return values


def check(config: GCPOConfig, *, n: int) -> None:
    """Refuse values that do not work together."""
    collider = config.collider
    if not config.is_grpo and n < 2:
        raise ConfigError(f"actor_rollout_ref.rollout.n is {n}: GCPO compares the responses of a group, set n >= 2")
    if not config.needs_rollout:
        return
    if collider.scheme == "shared" and collider.num_draws < 2:
        raise ConfigError(
            "gcpo.collider.num_draws is 1: L = 1 with shared draws makes the causal part zero by construction; set "
            "++gcpo.collider.num_draws=2 or more, or ++gcpo.collider.scheme=leave_one_out"
        )
    if collider.scheme == "leave_one_out" and collider.num_leave_one_out_draws < 1:
        raise ConfigError(
            "gcpo.collider.num_leave_one_out_draws is 0: the scheme leave_one_out needs at least one draw per "
            "response, set it to 1"
        )
    if collider.num_draws > n:
        raise ConfigError(
            f"gcpo.collider.num_draws is {collider.num_draws}: L = {collider.num_draws} is more than the {n} responses "
            f"of a group; set it to {n} or less"
        )
    if config.preset == "paper" and config.features.source != "response":
        raise ConfigError(
            "gcpo.features.source is prompt: preset paper takes Z from regenerated responses; use another preset"
        )
