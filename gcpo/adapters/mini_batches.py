"""Mini-batches of an update: their rows, and the hook of a method before each of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.utils import tensordict_utils as tu
from verl.utils.metric import AggregationType, Metric
from verl.utils.seqlen_balancing import calculate_workload, get_seqlen_balanced_partitions
from verl.workers.engine_workers import TrainingWorker
from verl.workers.utils.padding import no_padding_2_padding, response_from_nested

from gcpo.adapters import hooks
from gcpo.adapters.schema import from_data, is_padding, session_of, to_columns
from gcpo.faults import RunStoppedError
from gcpo.methods.base import Engine, Method


def whole_mini_batches(batch: KVBatchMeta, n: int, questions: int, ranks: int) -> list[int]:
    """Return an order of the rows in which every mini-batch holds whole groups, balanced over mini-batches and ranks.

    Args:
        batch: verl's batch.
        n: rows of a group.
        questions: groups of a mini-batch.
        ranks: data-parallel ranks; each takes the next rows of the batch and cuts its own into mini-batches.

    Raises:
        RunStoppedError: there is no such order.
    """
    groups: dict[str, list[int]] = {}
    for row, key in enumerate(batch.keys):
        groups.setdefault(session_of(key)[0], []).append(row)
    padding = sum(map(is_padding, batch.tags))
    if padding or any(len(rows) != n for rows in groups.values()) or len(groups) % questions or questions * n % ranks:
        raise RunStoppedError(
            f"the batch has {len(batch) - padding} responses to {len(groups)} questions and {padding} rows of padding, "
            f"which cannot be split into mini-batches of {questions} questions with {n} responses over {ranks} ranks; "
            "the log of the agent loop tells why a response is missing"
        )
    loads = calculate_workload(torch.tensor([tag["seq_len"] for tag in batch.tags], dtype=torch.int64)).tolist()
    members = list(groups.values())
    sums = [int(sum(loads[row] for row in rows)) for rows in members]
    parts: list[list[int]] = [[] for _ in range(ranks)]
    for chosen in _partitions(sums, len(groups) // questions):
        rows = [row for group in chosen for row in members[group]]
        for rank, part in enumerate(_partitions([int(loads[row]) for row in rows], ranks)):
            parts[rank] += [rows[index] for index in part]
    return [row for part in parts for row in part]


def _partitions(loads: list[int], count: int) -> Any:
    """Return the indices of ``count`` parts of equal size."""
    return get_seqlen_balanced_partitions(loads, k_partitions=count, equal_size=True)


class MethodTrainingWorker(TrainingWorker):
    """verl's training worker, which calls the method before every mini-batch of an update.

    Attributes:
        method: set by the actor's worker.
        method_engine: what the method's hooks are given.
    """

    method: Method
    method_engine: Engine
    _updates = 0

    def train_mini_batch(self, data: TensorDict) -> TensorDict:
        """Run verl's update of a batch."""
        self._updates = 0
        return super().train_mini_batch(data)

    def train_batch(self, data: TensorDict) -> TensorDict:
        """Run verl's optimizer step on a mini-batch, after the hook of the method."""
        if not self.method.mini_batch_inputs:
            return super().train_batch(data)
        metrics: dict[str, float] = {}
        rows = from_data(data, self.method.mini_batch_inputs)
        log_probs = self._log_probs(data) if self._updates else None
        fields = hooks.call(self.method, "before_mini_batch", rows, log_probs, self.method_engine, metrics)
        data.update(to_columns(fields, len(data)))
        loss = self.loss_fn
        if not self._updates:
            self.loss_fn = partial(_loss_at_old, base=loss, name=f"{self.method.name}/log_ratio_at_old")
        try:
            output = super().train_batch(data)
        finally:
            self.loss_fn = loss
        self._updates += 1
        if output is not None:
            tu.get(output, "metrics").update(metrics)
        return output

    def _log_probs(self, data: TensorDict) -> list[torch.Tensor]:
        """Return the log-probabilities of every response under the current weights."""
        # A copy, because verl writes the sizes of the micro-batches of its pass into the batch.
        view = data.copy()
        tu.assign_non_tensor(view, compute_loss=False, calculate_entropy=False)
        found = self.infer_batch(view)["log_probs"]
        return list(response_from_nested(found, data["response_mask"]).unbind())


def _loss_at_old(
    model_output: dict[str, Any], data: TensorDict, dp_group: Any = None, *, base: Callable, name: str
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Compute the loss, and the largest |log(pi_theta / pi_old)| of a response before the first step of a batch.

    It is 0 but for the rounding of the two passes.
    """
    loss, metrics = base(model_output=model_output, data=data, dp_group=dp_group)
    padded = data.select("old_log_probs", "response_mask").to_padded_tensor()
    difference = no_padding_2_padding(model_output["log_probs"].detach(), data) - padded["old_log_probs"]
    largest = (difference * padded["response_mask"]).sum(-1).abs().max()
    return loss, {**metrics, name: Metric(AggregationType.MAX, largest)}
