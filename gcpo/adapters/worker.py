"""verl's actor worker with the scoring hook of a method and the loss of its own term."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import ray
import torch
from tensordict import TensorDict
from verl.single_controller.base.decorator import Dispatch, make_nd_compute_dataproto_dispatch_fn, register
from verl.utils import tensordict_utils as tu
from verl.workers.engine_workers import ActorRolloutRefWorker

from gcpo.adapters import hooks
from gcpo.adapters.engine import backbone
from gcpo.adapters.mini_batches import MethodTrainingWorker
from gcpo.adapters.perturbed import EpisodeScorer
from gcpo.adapters.schema import from_data, to_columns
from gcpo.adapters.scoring import PackScorer, can_share
from gcpo.adapters.term import method_loss
from gcpo.adapters.weight_change import WeightChange
from gcpo.methods.base import Engine
from gcpo.weight_socket import cluster_token, own_socket

METHOD_CALL = "gcpo_step"
"""Non-tensor entry of a batch that is scored: the step."""


class ActorEngine(Engine):
    """The engine of a worker's actor.

    Args:
        worker: after verl's ``init_model``.
    """

    def __init__(self, worker: Any) -> None:
        self._engine, self._worker = worker.actor.engine, worker
        model = worker.actor.model_config
        self.tokenizer, self.hidden_size = model.tokenizer, model.hf_config.hidden_size
        self.layers = len(backbone(self._engine.module).layers)
        self.step = 0

    def scorer(self, layer: int, *, packing: str = "tree", max_tokens: int, min_shared: int = 8) -> Any:
        """See `Engine.scorer`."""
        is_tree = can_share(self._engine, packing)
        options = {"is_tree": is_tree, "max_tokens": max_tokens, "min_shared": min_shared}
        return PackScorer(self._engine, layer=layer, **self._common(), **options)

    def perturbed_scorer(self, layer: int, **options: Any) -> Any:
        """See `Engine.perturbed_scorer`; the options are those of `EpisodeScorer`."""
        return EpisodeScorer(self._engine, layer=layer, **self._common(), **options)

    def _common(self) -> dict[str, Any]:
        settings = {
            "use_remove_padding": self._engine.use_remove_padding,
            "use_fused_kernels": self._worker.actor.engine_config.use_fused_kernels,
        }
        return {"settings": settings, "temperature": self._worker.method.run.temperature}

    def gather(self, values: list[Any]) -> list[Any]:
        """The lists of all ranks as one."""
        group = self._engine.get_data_parallel_group()
        parts: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(parts, values, group=group)
        return [value for part in parts for value in part]

    def keep_last_layer(self) -> None:
        """See `Engine.keep_last_layer`; a checkpoint is loaded later, so D does not begin at a resumed step."""
        self._change = WeightChange(backbone(self._engine.module).layers[-1], self._engine.module)

    def moved(self, sign: int) -> AbstractContextManager[float]:
        """See `Engine.moved`."""
        return self._change.moved(sign)

    def tree_problem(self) -> str | None:
        """Of the engine, which probes the model once."""
        return self._engine.tree_problem


def use_threads(threads: int | None) -> None:
    """Let PyTorch use so many threads, or fewer if the ranks would need more cores than there are; ``None``: no change.

    The driver and the servers wait while an actor computes, so more than one core is free then.
    """
    if threads:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, min(threads, cores // torch.distributed.get_world_size())))


class MethodWorker(ActorRolloutRefWorker):
    """Actor, rollout and reference in one worker, for any method."""

    actor_worker_cls = MethodTrainingWorker
    # After `init_model`; verl declares classes that lack what it uses of them.
    actor: Any
    rollout: Any

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)  # pyright: ignore[reportAttributeAccessIssue]  (verl adds it later)
    def init_model(self) -> None:
        """verl's set-up; then weights go to a socket of this Ray cluster, and the method is told of its engine."""
        super().init_model()
        # See gcpo.weight_socket.
        token, handle = cluster_token(), getattr(self.rollout, "zmq_handle", None)
        if token and handle:
            self.rollout.zmq_handle = own_socket(handle, ray.get_runtime_context().get_job_id(), token)
        self.method = hooks.received(self.config)
        engines: list[Any] = [worker.engine for worker in (self.actor, self.ref) if worker is not None]
        for engine in engines if self.method.run.padding_free else []:
            engine.use_padding_free()
        if self._is_actor:
            use_threads(self.method.run.actor_threads)
            term = self.actor.engine.term = hooks.call(self.method, "term")
            self.actor.engine.method_name = self.method.name
            config = self.loss_fn.keywords["config"]
            self.actor.set_loss_fn(partial(method_loss, base=self.loss_fn, config=config, term=term))
            self.scoring_engine = ActorEngine(self)
            self.actor.method, self.actor.method_engine = self.method, self.scoring_engine
            hooks.call(self.method, "start_actor", self.scoring_engine)

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="actor"))
    def score(self, data: TensorDict) -> TensorDict:
        """The method's scoring hook on the rows of this rank, under the weights that sampled.

        Args:
            data: the method's ``score_inputs``; non-tensor ``METHOD_CALL``.

        Returns:
            The fields that the method makes, nested.
        """
        step: Any = tu.get_non_tensor_data(data, METHOD_CALL, 0)
        self.scoring_engine.step = step
        rows = from_data(data, self.method.score_inputs)
        with self.actor.engine.eval_mode():
            fields = hooks.call(self.method, "score", rows, self.scoring_engine)
        return to_columns(fields, len(data))
