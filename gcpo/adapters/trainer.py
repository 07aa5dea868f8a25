"""One trainer for all methods, over verl's synchronous one: it calls the method's hooks at the stations of a step."""

from __future__ import annotations

import gc
import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import ray
import torch
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.debug import marked_timer
from verl.utils.seqlen_balancing import calculate_workload, get_seqlen_balanced_partitions

from gcpo.adapters import hooks
from gcpo.adapters.checkpoints import WholeCheckpoints
from gcpo.adapters.dump import DumpingTrainer
from gcpo.adapters.liveness import WatchedTrainer
from gcpo.adapters.mini_batches import whole_mini_batches
from gcpo.adapters.registry import credited
from gcpo.adapters.schema import (
    QueueBatch,
    extra_info,
    from_data,
    is_padding,
    method_fields,
    queue_get,
    queue_put,
    session_of,
    to_columns,
)
from gcpo.adapters.stability import StableTrainer
from gcpo.adapters.term import UPDATE, UpdateSettings
from gcpo.adapters.worker import METHOD_CALL, MethodWorker
from gcpo.adapters.zero_rewards import zero_reward_warning
from gcpo.checks import check_run
from gcpo.faults import RunStoppedError
from gcpo.methods.fields import EXTRA_FIELDS, INDEX, RAW_PROMPT
from gcpo.methods.stations import parts_of
from gcpo.notices import notice
from gcpo.reading import OUR_REWARD

logger = logging.getLogger(__name__)

_ACTOR_ROLES = (Role.Actor, Role.ActorRollout, Role.ActorRolloutRef)


class OwnFieldsTrainer(PPOTrainerSync):
    """verl's synchronous trainer; its stages fetch no field of a method, and the update those that it reads.

    A worker fetches every field that the batch names, for every one of its rows. The fields of a method hold contexts,
    generations and states of a whole group, and most of verl's stages read none of them.
    """

    update_inputs: Collection[str] = ()

    @contextmanager
    def _only_verls_fields(self, batch: KVBatchMeta, keep: Collection[str] = ()) -> Iterator[None]:
        before = batch.fields
        known = before
        if known is None:
            # What one row has, all have.
            known = list(queue_get(batch, None, batch.keys[:1]).keys())
        own = method_fields()
        batch.fields = [name for name in known if name not in own or name in keep]
        try:
            yield
        finally:
            batch.fields = before

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        with self._only_verls_fields(batch):
            return super()._compute_old_log_prob(batch, metrics)

    def _compute_ref_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        with self._only_verls_fields(batch):
            return super()._compute_ref_log_prob(batch, metrics)

    def _compute_values(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        with self._only_verls_fields(batch):
            return super()._compute_values(batch, metrics)

    def _update_critic(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        with self._only_verls_fields(batch):
            return super()._update_critic(batch, metrics)

    def _update_actor(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        with self._only_verls_fields(batch, self.update_inputs):
            return super()._update_actor(batch, metrics)


class MethodTrainer(WholeCheckpoints, StableTrainer, DumpingTrainer, OwnFieldsTrainer, WatchedTrainer):
    """The trainer mode of every method.

    Between verl's old log-probabilities and its advantages the actor scores what the method asks about; the method's
    credit then goes to the advantage estimator, and its fields to the update.
    """

    _rewards_seen = False

    def __init__(self, config: Any) -> None:
        check_run(config)
        self.method = hooks.make_method(config)
        super().__init__(config)

    @property
    def trainer_mode(self) -> str:
        """verl compares the mode with "sync" to choose its buffer and what goes into a checkpoint."""
        return "sync"

    @trainer_mode.setter
    def trainer_mode(self, value: str) -> None:
        if value != self.method.name:
            raise ValueError(f"this trainer was made for the mode {self.method.name}, not {value!r}")

    # ---- set-up ---------------------------------------------------------------------------------------------------

    def _setup(self) -> None:
        hooks.send_to_workers(self.method, self.config)
        super()._setup()

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        for role in _ACTOR_ROLES:
            if role in self.role_worker_mapping:
                self.role_worker_mapping[role] = ray.remote(MethodWorker)

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

    # ---- layout ---------------------------------------------------------------------------------------------------

    def _balance_batch(self, batch: KVBatchMeta, metrics: dict, *args: Any, **kwargs: Any) -> KVBatchMeta:
        """verl's balancing, of rows in an order that does not depend on which response came first."""
        known = from_data(queue_get(batch, [INDEX, RAW_PROMPT]), [INDEX, RAW_PROMPT])
        # verl's own agent-loop manager does not number questions that are alike.
        questions = getattr(getattr(self, "agent_loop_manager", None), "questions", None)
        occurrence = questions.of_uid if questions is not None else {}
        names = []
        for index, prompt, key in zip(known[INDEX], known[RAW_PROMPT], batch.keys, strict=True):
            uid, session = session_of(key)
            names.append((str(index), str(prompt), occurrence.get(uid, 0), session))
        batch.reorder(sorted(range(len(names)), key=names.__getitem__))
        batch = super()._balance_batch(batch, metrics, *args, **kwargs)
        if self.method.whole_groups:
            self._keep_groups_together(batch, metrics)
        if self.method.whole_mini_batches:
            actor, ranks = self.config.actor_rollout_ref.actor, max(self.actor_rollout_wg._dispatch_info["actor"]) + 1
            batch.reorder(whole_mini_batches(batch, self.method.run.n, actor.ppo_mini_batch_size, ranks))
        self._clear_padding(batch)
        return batch

    def _keep_groups_together(self, batch: KVBatchMeta, metrics: dict) -> None:
        """Reorder rows so that a group's meet on one rank in one mini-batch, where they share prefixes.

        The balance is over whole groups then. A batch whose groups do not divide evenly, because sessions failed or
        rows were added, stays as verl balanced it: less is shared, nothing else changes.
        """
        # Padding rows are counted with their group here: the batch is not whole then.
        groups: dict[str, list[int]] = {}
        for row, key in enumerate(batch.keys):
            groups.setdefault(session_of(key)[0], []).append(row)
        actor, size = self.config.actor_rollout_ref.actor, self.config.actor_rollout_ref.rollout.n
        ranks = max(self.actor_rollout_wg._dispatch_info["actor"]) + 1
        share = actor.ppo_mini_batch_size * size // ranks
        whole = all(len(rows) == size for rows in groups.values()) and not len(batch) % share and not share % size
        metrics[f"{self.method.name}/balance/whole_groups"] = float(whole)
        if not whole:
            return
        workload = calculate_workload(torch.tensor([tag["seq_len"] for tag in batch.tags], dtype=torch.int64))
        members = list(groups.values())
        loads = [int(workload[rows].sum()) for rows in members]
        parts: Any = get_seqlen_balanced_partitions(loads, k_partitions=len(batch) // share, equal_size=True)
        in_order = [sorted(rows, key=lambda row: session_of(batch.keys[row])[1]) for rows in members]
        batch.reorder([row for part in parts for group in part for row in in_order[group]])

    def _clear_padding(self, batch: KVBatchMeta) -> None:
        """Padding rows are copies of a real row, with its fields; the method gives them fields of their own."""
        keys = [key for key, tag in zip(batch.keys, batch.tags, strict=True) if is_padding(tag)]
        rows = hooks.call(self.method, "empty_fields", len(keys)) if keys and self.method.samples else []
        if rows and rows[0]:
            columns = {field: [row[field] for row in rows] for field in rows[0] if field.dtype is not None}
            queue_put(batch, keys, to_columns(columns, len(keys)))

    # ---- score and credit -----------------------------------------------------------------------------------------

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """verl's old log-probabilities, then the method's scoring and credit, which may read them."""
        self._count_reward_errors(batch, metrics)
        batch = super()._compute_old_log_prob(batch, metrics)
        rows, name = QueueBatch(batch, self.global_steps), self.method.name
        if self.method.score_inputs:
            with marked_timer(f"{name}_score", self.timing_raw, color="blue"):
                hooks.call(self.method, "before_score", rows, self.tokenizer, metrics)
                self._score(batch)
        with marked_timer(f"{name}_credit", self.timing_raw, color="brown"):
            self._credit = hooks.call(self.method, "credit", rows, metrics)
        return batch

    def _score(self, batch: KVBatchMeta) -> None:
        request = KVBatchMeta(
            partition_id=batch.partition_id,
            keys=list(batch.keys),
            tags=list(batch.tags),
            fields=[str(field) for field in self.method.score_inputs],
            extra_info={METHOD_CALL: self.global_steps},
        )
        self.actor_rollout_wg.score(request)

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """verl's advantage stage; the estimator finds the credit of this batch."""
        with credited(self._credit):
            batch = super()._compute_advantage(batch, metrics)
        if self._credit is not None:
            metrics.update(self._credit.metrics())
        return batch

    # ---- update ---------------------------------------------------------------------------------------------------

    @property
    def update_inputs(self) -> Collection[str]:
        """The method's fields that the update reads."""
        term = self.method.term()
        of_term = () if term is None else (*term.inputs, *term.columns)
        return (*of_term, *self.method.mini_batch_inputs)

    def _update_actor(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """verl's update, with the method's own term of the loss; see ``GCPOFSDPEngine``."""
        term = hooks.call(self.method, "term")
        measures = hooks.call(self.method, "measures_gradients", self.global_steps)
        if term is None and not measures:
            batch = super()._update_actor(batch, metrics)
            self._name_metrics(metrics)
            return batch
        name, actor = self.method.name, self.config.actor_rollout_ref.actor
        parts = tuple(parts_of(term, actor.use_kl_loss)) if measures else ()
        update = UpdateSettings(actor.loss_agg_mode, actor.loss_scale_factor, parts)
        with extra_info(batch, UPDATE, update):
            batch = super()._update_actor(batch, metrics)
        self._name_metrics(metrics)
        if term is not None:
            # verl's metrics are means over the updates of a step.
            updates = len(batch) // (actor.ppo_mini_batch_size * self.method.run.n) * actor.ppo_epochs
            metrics[term.tokens_metric] = metrics.get(term.tokens_metric, 0.0) * updates
        lengths = [tag["seq_len"] for tag in batch.tags if not is_padding(tag)]
        metrics[f"{name}/tokens/trained/plain"] = float(sum(lengths) * actor.ppo_epochs)
        return batch

    def _name_metrics(self, metrics: dict) -> None:
        """Take verl's prefix off the metrics of the method."""
        for key in [key for key in metrics if key.startswith(f"actor/{self.method.name}/")]:
            metrics[key.removeprefix("actor/")] = metrics.pop(key)

    # ---- report ---------------------------------------------------------------------------------------------------

    def _count_reward_errors(self, batch: KVBatchMeta, metrics: dict) -> None:
        """Responses that the reward function could not grade, and the means of what it said of the others.

        A step in which it graded none ends the run.
        """
        data = queue_get(batch, [EXTRA_FIELDS])
        infos = [
            entry.get("reward_extra_info", {})
            for entry, tag in zip(list(data[EXTRA_FIELDS]), batch.tags, strict=True)
            if not is_padding(tag)
        ]
        errors = [info.get("reward_error", 0.0) for info in infos]
        for name in ("acc", "format"):
            values = [float(info[name]) for info in infos if name in info]
            if values:
                metrics[f"{self.method.name}/reward/{name}"] = sum(values) / len(values)
        metrics[f"{self.method.name}/reward/errors"] = float(sum(errors))
        reward = self.config.reward.custom_reward_function.path
        if errors and sum(errors) == len(errors):
            raise RunStoppedError(
                f"the reward function {reward} raised or returned no finite number on all {len(errors)} responses of "
                f'step {self.global_steps}; the first causes are in the log of the agent loop ("gcpo: the reward '
                'function")'
            )
        if not self._rewards_seen:
            self._rewards_seen = True
            for line in zero_reward_warning(batch, self.tokenizer, ours=reward == OUR_REWARD):
                notice(logger, line)
