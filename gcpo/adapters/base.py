"""What the trainers of GCPO and GC2PO share over verl's synchronous one."""

from __future__ import annotations

import gc
import logging
from typing import Any, ClassVar

import ray
import torch
import transfer_queue as tq
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.utils.seqlen_balancing import calculate_workload, get_seqlen_balanced_partitions

from gcpo.adapters.checkpoints import WholeCheckpoints
from gcpo.adapters.fetching import OwnFieldsTrainer
from gcpo.adapters.liveness import WatchedTrainer
from gcpo.adapters.stability import StableTrainer
from gcpo.adapters.zero_rewards import zero_reward_warning
from gcpo.checks.reading import OUR_REWARD
from gcpo.faults import RunStoppedError
from gcpo.notices import notice

logger = logging.getLogger(__name__)

_ACTOR_ROLES = (Role.Actor, Role.ActorRollout, Role.ActorRolloutRef)


class GroupTrainer(WholeCheckpoints, StableTrainer, OwnFieldsTrainer, WatchedTrainer):
    """verl's synchronous trainer with our worker, rows in an order of their own, reward errors counted, and whole
    checkpoints."""

    mode: ClassVar[str]
    """Name of the trainer mode, and what its metrics begin with."""
    worker_class: ClassVar[type]
    """The actor's worker."""
    _rewards_seen = False

    @property
    def trainer_mode(self) -> str:
        """verl compares the mode with "sync" to choose its buffer and what goes into a checkpoint."""
        return "sync"

    @trainer_mode.setter
    def trainer_mode(self, value: str) -> None:
        if value != self.mode:
            raise ValueError(f"{type(self).__name__} is the trainer mode {self.mode}, not {value!r}")

    # ---- set-up ---------------------------------------------------------------------------------------------------

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        for role in _ACTOR_ROLES:
            if role in self.role_worker_mapping:
                self.role_worker_mapping[role] = ray.remote(self.worker_class)

    def _build_replay_buffer(self) -> ReplayBuffer:
        buffer = super()._build_replay_buffer()
        if self.config.trainer.device == "cpu":
            # A step of the embedded task is shorter than verl's two seconds between looks.
            buffer.poll_interval = 0.1
        return buffer

    def on_train_begin(self) -> None:
        super().on_train_begin()
        # What stands at the start stays; a full collection that looks at all of it takes half a second every few steps.
        gc.collect()
        gc.freeze()

    # ---- rows -----------------------------------------------------------------------------------------------------

    def _balance_batch(self, batch: KVBatchMeta, metrics: dict, *args: Any, **kwargs: Any) -> KVBatchMeta:
        """verl's balancing, of rows in an order that does not depend on which response came first."""
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["index", "raw_prompt"])
        # verl's own agent-loop manager does not number questions that are alike.
        questions = getattr(getattr(self, "agent_loop_manager", None), "questions", None)
        occurrence = questions.of_uid if questions is not None else {}
        names = []
        for i, prompt, key in zip(list(data["index"]), list(data["raw_prompt"]), batch.keys, strict=True):
            uid, session, _ = key.rsplit("_", 2)
            names.append((str(i), str(prompt), occurrence.get(uid, 0), int(session)))
        batch.reorder(sorted(range(len(names)), key=names.__getitem__))
        return super()._balance_batch(batch, metrics, *args, **kwargs)

    def _keep_groups_together(self, batch: KVBatchMeta, metrics: dict) -> None:
        """Reorder rows so that a group's meet on one rank in one mini-batch, where they share prefixes.

        The balance is over whole groups then. A batch whose groups do not divide evenly, because sessions failed or
        rows were added, stays as verl balanced it: less is shared, nothing else changes.
        """
        groups: dict[str, list[int]] = {}
        for row, key in enumerate(batch.keys):
            groups.setdefault(key.rsplit("_", 2)[0], []).append(row)
        actor = self.config.actor_rollout_ref.actor
        size = self.config.actor_rollout_ref.rollout.n
        ranks = max(self.actor_rollout_wg._dispatch_info["actor"]) + 1
        share = actor.ppo_mini_batch_size * size // ranks
        whole = all(len(rows) == size for rows in groups.values()) and not len(batch) % share and not share % size
        metrics[f"{self.mode}/balance/whole_groups"] = float(whole)
        if not whole:
            return
        workload = calculate_workload(torch.tensor([tag["seq_len"] for tag in batch.tags], dtype=torch.int64))
        members = list(groups.values())
        loads = [int(workload[rows].sum()) for rows in members]
        parts = get_seqlen_balanced_partitions(loads, k_partitions=len(batch) // share, equal_size=True)
        session = {row: int(key.rsplit("_", 2)[1]) for row, key in enumerate(batch.keys)}
        batch.reorder([row for part in parts for group in part for row in sorted(members[group], key=session.get)])

    @staticmethod
    def _groups(batch: KVBatchMeta) -> dict[str, list[int]]:
        """The rows of every group, in the order of the batch; padding rows, which are copies, are in none."""
        groups: dict[str, list[int]] = {}
        for row, (key, tag) in enumerate(zip(batch.keys, batch.tags, strict=True)):
            if not tag.get("is_padding", False):
                groups.setdefault(key.rsplit("_", 2)[0], []).append(row)
        return groups

    def _count_reward_errors(self, batch: KVBatchMeta, metrics: dict) -> None:
        """Responses that the reward function could not grade, and the means of what it said of the others apart.

        A step in which it graded none ends the run.
        """
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["extra_fields"])
        found = [
            entry.get("reward_extra_info", {})
            for entry, tag in zip(list(data["extra_fields"]), batch.tags, strict=True)
            if not tag.get("is_padding", False)
        ]
        errors = [info.get("reward_error", 0.0) for info in found]
        for name in ("acc", "format"):
            values = [float(info[name]) for info in found if name in info]
            if values:
                metrics[f"{self.mode}/reward/{name}"] = sum(values) / len(values)
        metrics[f"{self.mode}/reward/errors"] = float(sum(errors))
        if errors and sum(errors) == len(errors):
            raise RunStoppedError(
                f"the reward function {self.config.reward.custom_reward_function.path} raised or returned no finite "
                f"number on all {len(errors)} responses of step {self.global_steps}; the first causes are in the log "
                'of the agent loop ("gcpo: the reward function")'
            )
        self._warn_of_zero_rewards(batch)

    def _warn_of_zero_rewards(self, batch: KVBatchMeta) -> None:
        """Look at the rewards of the first step of this run."""
        if not self._rewards_seen:
            self._rewards_seen = True
            ours = self.config.reward.custom_reward_function.path == OUR_REWARD
            for line in zero_reward_warning(batch, self.tokenizer, ours=ours):
                notice(logger, line)
