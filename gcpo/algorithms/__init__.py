"""The method's equations as pure functions on tensors, which import only torch."""

from gcpo.algorithms.advantage import causal_advantage, group_relative_advantage
from gcpo.algorithms.compression import head_gradient_square
from gcpo.algorithms.episodes import (
    answer_divergence,
    episode_reward,
    fitting_gain_reward,
    signed_cases,
    token_advantage,
)
from gcpo.algorithms.gvpo import gvpo_advantage, gvpo_loss
from gcpo.algorithms.process_values import process_values, uct
from gcpo.algorithms.reference import causal_kl, causal_reference
from gcpo.algorithms.weighting import (
    causal_diagnostics,
    causal_target,
    causal_weight,
    conditioned_target,
    group_mean_target,
)

__all__ = [
    "answer_divergence",
    "causal_advantage",
    "causal_diagnostics",
    "causal_kl",
    "causal_reference",
    "causal_target",
    "causal_weight",
    "conditioned_target",
    "episode_reward",
    "fitting_gain_reward",
    "group_mean_target",
    "group_relative_advantage",
    "gvpo_advantage",
    "gvpo_loss",
    "head_gradient_square",
    "process_values",
    "signed_cases",
    "token_advantage",
    "uct",
]
