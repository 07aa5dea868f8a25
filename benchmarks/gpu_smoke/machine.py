"""The device of the check: its clock, memory and limits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.packing import resident


class Machine:
    """A device: its clock, memory and limits."""

    def __init__(self, *, cpu: bool) -> None:
        self.device = "cpu" if cpu else "cuda"
        self.dtype, self.exact = (torch.float32, torch.float64) if cpu else (torch.bfloat16, torch.float32)
        self.name = "CPU" if cpu else torch.cuda.get_device_name()

    @contextmanager
    def measured(self, found: dict[str, Any], name: str) -> Iterator[None]:
        """Put seconds and peak MiB of a block into ``found``, or that it ran out of memory."""
        self._synchronize(reset=True)
        start = time.perf_counter()
        try:
            yield
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            found[name] = {"seconds": None, "peak MiB": "out of memory"}
            return
        self._synchronize()
        peak = resident("VmHWM") if self.device == "cpu" else torch.cuda.max_memory_allocated()
        found[name] = {"seconds": time.perf_counter() - start, "peak MiB": round(peak / 2**20)}

    def _synchronize(self, *, reset: bool = False) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
            if reset:
                torch.cuda.reset_peak_memory_stats()
        elif reset:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again

    def limits(self) -> dict[str, float]:
        """FLOP per second of a large product, and bytes per second of a large copy."""
        size = 1024 if self.device == "cpu" else 8192
        a = torch.randn(size, size, dtype=self.dtype, device=self.device)
        source = torch.empty(size * size * 8, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return {
            "FLOP/s": 2 * size**3 / self._best(lambda: a @ a),
            "bytes/s": 2 * source.numel() / self._best(lambda: target.copy_(source)),
        }

    def _best(self, work: Callable[[], Any]) -> float:
        seconds: dict[str, Any] = {}
        for attempt in range(6):
            with self.measured(seconds, str(attempt)):
                work()
        return min(one["seconds"] for one in seconds.values())


def shares(
    seconds: float | None, tokens: int, pairs: int, model: Any, element: int, limits: dict[str, float]
) -> dict[str, float]:
    """What a packed scoring pass makes of the limits: FLOP without the head, and the weights read once.

    Args:
        seconds: of the pass; ``None``: it ran out of memory.
        tokens: that it read.
        pairs: of a token and a key that it sees.
        model: a Qwen2 model.
        element: bytes of a weight.
        limits: those of `Machine.limits`.
    """
    if seconds is None:
        return {}
    weights = sum(p.numel() for p in model.model.layers.parameters())
    depth, width = model.config.num_hidden_layers, model.config.hidden_size
    flop = 2 * weights * tokens + 4 * depth * width * pairs
    return {
        "of the product": flop / seconds / limits["FLOP/s"],
        "of the copy": weights * element / seconds / limits["bytes/s"],
    }
