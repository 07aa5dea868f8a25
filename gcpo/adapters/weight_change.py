"""The change of a layer's weights since the start, and forward passes under weights that are moved along it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from verl.utils.device import get_device_id

RELATIVE_STEP = 3e-3
"""Norm of the move, relative to the norm of the weights. In float32 it keeps the error of a central difference small:
rounding errors grow with its inverse, the error of the formula with its square."""


class WeightChange:
    """The change D of the trained weights of a module since this object was created.

    All ranks of the default process group must call it together.

    Args:
        module: a part of ``root``.
        root: the whole model, sharded by FSDP2 or not at all.
    """

    def __init__(self, module: torch.nn.Module, root: torch.nn.Module) -> None:
        self.module, self.root = module, root
        self.start = [weight.cpu().clone() for weight in self._weights()]

    @torch.no_grad()
    def _weights(self) -> list[torch.Tensor]:
        """Return the shards of this rank; what a forward pass has gathered is freed, so that it is gathered again."""
        for part in self.root.modules():
            if isinstance(part, FSDPModule):
                part.reshard()
        weights = [weight for weight in self.module.parameters() if weight.requires_grad]
        return [weight.to_local() if isinstance(weight, DTensor) else weight.detach() for weight in weights]

    @contextmanager
    def moved(self, sign: int) -> Iterator[float]:
        """Move the weights by ``sign * step * D`` inside the ``with`` block, and restore them, bit for bit.

        Yields:
            The step, the same for both signs: ``RELATIVE_STEP`` times the norm of the weights over that of D; 1 if D
            is 0.
        """
        weights = self._weights()
        changes = [weight - start.to(weight) for weight, start in zip(weights, self.start, strict=True)]
        norm, size = self._norms(changes), self._norms(weights)
        step = RELATIVE_STEP * size / norm if norm else 1.0
        before = [weight.clone() for weight in weights]
        try:
            for weight, change in zip(weights, changes, strict=True):
                weight.add_(change, alpha=sign * step)
            yield step
        finally:
            for weight, value in zip(self._weights(), before, strict=True):
                weight.copy_(value)

    @staticmethod
    def _norms(tensors: list[torch.Tensor]) -> float:
        """Return the norm of tensors that are sharded over the ranks."""
        local = sum(float(tensor.double().square().sum()) for tensor in tensors)
        square = torch.tensor(local, device=get_device_id())
        torch.distributed.all_reduce(square)
        return float(square.sqrt())
