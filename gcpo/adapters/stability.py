"""Checks of every optimizer step in the actor's engine, and signs of a collapse in the trainer's metrics."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from tensordict import TensorDict
from torch.distributed.tensor import DTensor
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from gcpo.adapters.schema import extra_info
from gcpo.faults import RunStoppedError
from gcpo.notices import TOTAL_STEPS
from gcpo.stability import ENTROPY, SKIPPED_UPDATES, WEIGHT_CHANGE, StabilityConfig, StabilityMonitor, describe

logger = logging.getLogger(__name__)

SETTINGS = "gcpo_stability"
"""Non-tensor entry of a training batch whose updates are checked: ``stability.non_finite``."""
SAMPLED_WEIGHTS = 2**20
"""Number of weights per rank whose change is measured."""

_ADVICE = (
    "a smaller actor_rollout_ref.actor.optim.lr is the usual way out; gcpo.stability.non_finite=skip leaves out such "
    "updates and goes on"
)


# ---- the engine ------------------------------------------------------------------------------------------------------


_Engine: Any = FSDPEngineWithLMHead  # verl's decorator hides the class from type checkers


class StableEngine(_Engine):
    """verl's engine, which checks each optimizer step of a batch that has ``SETTINGS``."""

    _losses: list[float] | None = None
    """Losses of the micro-batches of the current update; ``None`` outside checked updates."""

    def train_batch(self, data: TensorDict, loss_function: Callable) -> dict[str, Any]:
        """Run verl's update and add ``stability/...`` to its metrics.

        Raises:
            RunStoppedError: the loss, the gradient norm or a weight is not finite, and ``non_finite`` is ``stop``. The
                weights are those before the update, except in the last case.
        """
        settings = tu.get_non_tensor_data(data, SETTINGS, None)
        if not settings:
            return super().train_batch(data, loss_function)
        self._losses, self._update = [], {}
        # With fp16, a scaler tries scales that overflow, and skips those updates by design.
        self._stop_on_non_finite = settings == "stop" and getattr(self, "scaler", None) is None
        try:
            output = super().train_batch(data, loss_function)
        finally:
            self._losses = None
        output["metrics"].update({name: [value] for name, value in self._update.items()})
        return output

    def forward_backward_batch(
        self, data: TensorDict, loss_function: Callable | None, forward_only: bool = False
    ) -> dict[str, Any]:
        """Run verl's passes and keep the losses of a checked update."""
        output = super().forward_backward_batch(data, loss_function, forward_only)
        if self._losses is not None and not forward_only:
            self._losses.extend(float(loss) for loss in output["loss"])
        return output

    def optimizer_step(self) -> float:
        """Run verl's step, with checks of the loss before it and of the gradient norm and weights after it."""
        if self._losses is None:
            return super().optimizer_step()
        loss = sum(self._losses)
        # Share the check among ranks, so that no rank waits for another that has stopped.
        (bad_losses,) = self._over_ranks([float(not math.isfinite(loss))])
        if bad_losses and self._stop_on_non_finite:
            self._stop(f"the loss is {loss}" if not math.isfinite(loss) else "the loss of another rank is not finite")
        before = self._weight_sample()
        grad_norm = super().optimizer_step()
        skipped = not math.isfinite(grad_norm)
        if skipped and self._stop_on_non_finite:
            self._stop(f"the gradient norm is {grad_norm}")
        self._update = {SKIPPED_UPDATES: float(skipped), WEIGHT_CHANGE: self._weight_change(before)}
        return grad_norm

    def _stop(self, why: str) -> None:
        self.optimizer.zero_grad()
        raise RunStoppedError(
            f"{why}, so the weights were not updated and none were saved or sent to the server; {_ADVICE}"
        )

    def _shards(self) -> list[torch.Tensor]:
        """Return this rank's shard of every trained weight."""
        weights = [weight for weight in self.module.parameters() if weight.requires_grad]
        return [(w.to_local() if isinstance(w, DTensor) else w).detach() for w in weights]

    def _weight_sample(self) -> torch.Tensor:
        """Return a sample of about ``SAMPLED_WEIGHTS`` of this rank's weights, float32; a full copy is too large."""
        shards = [shard.reshape(-1) for shard in self._shards()]
        # An odd stride avoids sampling the same columns of every row.
        stride = max(1, sum(shard.numel() for shard in shards) // SAMPLED_WEIGHTS) | 1
        return torch.cat([shard[::stride].float() for shard in shards]) if shards else torch.zeros(0)

    def _weight_change(self, before: torch.Tensor) -> float:
        """Compute ||after - before|| / ||before|| over the samples of all ranks.

        Raises:
            RunStoppedError: a weight is not finite.
        """
        after = self._weight_sample()
        # Check all weights by their largest value, so that on a GPU the host waits only once.
        largest = [torch.linalg.vector_norm(shard, math.inf).float() for shard in self._shards() if shard.numel()]
        finite = not largest or bool(torch.isfinite(torch.stack(largest)).all())
        scale = float(before.abs().max()) if before.numel() else 0.0
        scale = scale if math.isfinite(scale) and scale > 0 else 1.0
        changed, whole = ((x.double() / scale).square().sum().item() for x in (after.double() - before, before))
        bad, changed, whole = self._over_ranks([float(not finite), changed * scale**2, whole * scale**2])
        if bad and self._stop_on_non_finite:
            raise RunStoppedError(
                f"weights are not finite after an update, and none were saved or sent to the server; {_ADVICE}"
            )
        return math.sqrt(changed / whole) if whole > 0 else math.inf if changed > 0 else 0.0

    def _over_ranks(self, values: list[float]) -> list[float]:
        """Return the sums over all ranks."""
        total = torch.tensor(values, dtype=torch.float64, device=get_device_id())
        torch.distributed.all_reduce(total)
        return total.tolist()


# ---- the trainer -----------------------------------------------------------------------------------------------------


class StableTrainer(PPOTrainerSync):
    """verl's synchronous trainer, whose updates are checked and whose metrics include the signs of a collapse."""

    @cached_property
    def stability(self) -> StabilityConfig:
        """``gcpo.stability``, which applies to every mode."""
        return StabilityConfig.parse((self.config.get("gcpo") or {}).get("stability") or {}, "gcpo.stability")

    @cached_property
    def stability_monitor(self) -> StabilityMonitor:
        """The monitor of the steps of this start."""
        actor, groups = self.config.actor_rollout_ref.actor, self.config.data.train_batch_size
        return StabilityMonitor(
            self.stability,
            groups=groups,
            vocabulary=len(self.tokenizer),
            rows=groups * self.config.actor_rollout_ref.rollout.n,
            loss_agg_mode=actor.loss_agg_mode,
            loss_scale_factor=actor.loss_scale_factor,
        )

    def _update_actor(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """Run verl's update, in which the engine checks each optimizer step."""
        with extra_info(batch, SETTINGS, self.stability.non_finite):
            batch = super()._update_actor(batch, metrics)
        for name in (SKIPPED_UPDATES, WEIGHT_CHANGE):
            if f"actor/{name}" in metrics:
                metrics[name] = metrics.pop(f"actor/{name}")
        return batch

    def _validate(self) -> dict[str, float]:
        """Run verl's validation and pass its accuracy to the monitor."""
        metrics = super()._validate()
        self.stability_monitor.held_out(metrics)
        return metrics

    def _compute_metrics(self, batch: KVBatchMeta, metrics: dict, *args: Any, **kwargs: Any) -> None:
        """Add the number of steps of the run and the signs of a collapse to verl's metrics."""
        super()._compute_metrics(batch, metrics, *args, **kwargs)
        metrics[TOTAL_STEPS] = self.total_training_steps
        found = self.stability_monitor.step(metrics)
        metrics.update(found)
        if found.keys() - {ENTROPY} or metrics.get(SKIPPED_UPDATES):
            logger.warning("gcpo: step %s: %s", self.global_steps, "; ".join(describe(metrics)))
