"""Eq. 10 through our trainer's update, verl's worker and our engine: the same loss and gradient whatever the split.

The reference is ``tests/adapters/problem.py``: float64, plain loops, one sequence at a time. What this does not show is
where the batch comes from (``test_trainer.py``), nor vLLM and Ray (``tests/end_to_end``).
"""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.adapters import problem
from tests.adapters.problem import KAPPA, PARTS, ROWS, SIZE
from tests.adapters.ranks import build_worker, pack, recorded_gradients, run_on_ranks, weights, whole

PADDING = 12
PADDING_LENGTH = 16
"""verl's padding rows have 128 tokens, which would leave no choice about the micro-batches of so small a batch."""
ONE, THREE = 1, 3

OVERRIDES = (
    "device=cpu",
    "gcpo.preset=balanced",
    f"gcpo.kappa={KAPPA}",
    f"gcpo.reference.max_kl={problem.MAX_KL}",
    "gcpo.metrics.grad_norm_every=0",
    f"actor_rollout_ref.rollout.n={SIZE}",
    f"actor_rollout_ref.actor.kl_loss_coef={problem.BETA}",
    f"actor_rollout_ref.actor.clip_ratio={problem.CLIP}",
    f"actor_rollout_ref.actor.clip_ratio_c={problem.DUAL_CLIP}",
)


@pytest.fixture(scope="module")
def rows(tiny_model: Path) -> list[dict[str, Any]]:
    return problem.make_rows(str(tiny_model))


@pytest.fixture(scope="module")
def config(tiny_model: Path, recipe_config: Any) -> Any:
    """The recipe's own configuration over the tiny model."""
    return recipe_config(*OVERRIDES, f"actor_rollout_ref.model.path={tiny_model}")


# ---- on a rank ----------------------------------------------------------------------------------------------------


def advantages(lengths: list[int], estimator: str, upsilon: torch.Tensor | None, form: str = "product") -> torch.Tensor:
    """B [rows, T], as verl's advantage stage asks its registry for it; rows beyond the problem's are padding rows."""
    import numpy as np
    from verl import DataProto
    from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories

    from gcpo.adapters.registry import causal_weights

    mask = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    rewards = torch.zeros(len(lengths), max(lengths))
    for row, length in enumerate(lengths[:ROWS]):
        mask[row, :length] = 1
        rewards[row, length - 1] = problem.REWARDS[row]
    keys = [f"g{row // SIZE}_{row % SIZE}_0" if row < ROWS else f"pad_{row}_0" for row in range(len(lengths))]
    data = DataProto.from_single_dict(
        {
            "token_level_rewards": rewards,
            "response_mask": mask,
            "uid": np.array([key.rsplit("_", 2)[0] for key in keys], dtype=object),
        }
    )
    if upsilon is not None:
        upsilon = torch.cat([upsilon, torch.ones(len(lengths) - ROWS)])
    with causal_weights(upsilon, form):
        data = compute_advantage_for_multi_trajectories(data, keys, estimator, config={})
    return data.batch["advantages"]


def training_rows(
    rows: list[dict[str, Any]], padding: int = 0, estimator: str = "gcpo", upsilon: tuple | None = problem.UPSILON
) -> list[dict[str, torch.Tensor]]:
    """The rows as fields of the batch that is updated on, and verl's padding rows among them."""
    from verl.trainer.ppo import padding_utils

    fields = []
    for row in rows:
        response, lengths = row["response"], [len(context) for context in row["contexts"]]
        sequence, mask = torch.cat([row["prompt"], response]), torch.ones_like(response)
        fields.append(
            {
                "prompts": row["prompt"],
                "responses": response,
                "response_mask": mask,
                "loss_mask": mask,
                "input_ids": sequence,
                "position_ids": torch.arange(len(sequence)),
                "old_log_probs": row["old"],
                "ref_log_prob": row["ref"],
                "gcpo_contexts": torch.cat(row["contexts"]) if sum(lengths) else torch.zeros(1, dtype=torch.long),
                "gcpo_context_lengths": torch.tensor(lengths),
                "gcpo_log_ref": row["log_ref"],
                "gcpo_kl_mask": mask * int(row["has_reference"]),
            }
        )
    padding_utils.SYNTHETIC_PADDING_SEQ_LEN = PADDING_LENGTH
    for _ in range(padding):
        row, _ = padding_utils.construct_minimal_padding_template(fields[0], {}, 2)
        one = torch.zeros(1)
        row |= {"old_log_probs": one - 2, "ref_log_prob": one - 1, "gcpo_log_ref": one - 3, "gcpo_kl_mask": one.long()}
        # What the trainer leaves of the contexts of a padding row.
        row |= {"gcpo_contexts": torch.zeros(1, dtype=torch.long), "gcpo_context_lengths": torch.zeros(3).long()}
        fields.append({name: row[name] for name in fields[0]})
    lengths = [len(row["responses"]) for row in fields]
    weighted = advantages(lengths, estimator, None if upsilon is None else torch.tensor(upsilon))
    for row, length, values in zip(fields, lengths, weighted, strict=True):
        row["advantages"] = values[:length]
    # Padding rows fall between the others when verl balances the ranks.
    return fields[::2] + fields[1::2] if padding else fields


def budget(fields: list[dict[str, torch.Tensor]], minis: int, world: int, micro: int) -> tuple[int, int]:
    """Token budgets that cut the plain rows and the conditioned rows of a rank's mini-batch into ``micro``."""
    if micro == ONE:
        return 4096, 4096

    def conditioned(row: dict[str, torch.Tensor]) -> int:
        present = row["gcpo_context_lengths"][: problem.NUM_SHARED]
        present = present[present > 0]
        return int(present[0]) + len(row["responses"]) if row["gcpo_kl_mask"].any() else 2

    share = len(fields) // world // minis
    parts = [fields[at : at + share] for at in range(0, len(fields), share)]
    totals = [max(sum(size(row) for row in part) for part in parts) for size in (plain_length, conditioned)]
    return (totals[0] - 1) // 2, (totals[1] - 1) // 2


def plain_length(row: dict[str, torch.Tensor]) -> int:
    return len(row["input_ids"])


def make_trainer(config: Any, worker: Any, fields: list[dict[str, torch.Tensor]], *, minis: int, step: int = 1) -> Any:
    """Our trainer, whose worker group is ``worker`` with these rows."""
    from types import SimpleNamespace

    from gcpo.adapters.trainer import GCPOTrainer
    from gcpo.config import GCPOConfig

    config = copy.deepcopy(config)
    config.actor_rollout_ref.actor.ppo_mini_batch_size = ROWS // SIZE // minis if minis == 1 else 1
    trainer = object.__new__(GCPOTrainer)
    trainer.config, trainer.global_steps = config, step
    trainer.gcpo = GCPOConfig.from_config(config.gcpo, n=SIZE, response_length=8)
    trainer.actor_rollout_wg = SimpleNamespace(
        update_actor=lambda batch: worker.update_actor(pack(fields, **copy.deepcopy(batch.extra_info)))
    )
    return trainer
