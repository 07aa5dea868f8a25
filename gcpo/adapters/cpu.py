"""verl on the CPU: its platform interface, and a patch for its engine."""

from __future__ import annotations

import random
import resource
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import psutil
import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry, set_platform


class CPUDeviceModule(ModuleType):
    """``torch.cpu`` with the functions of an accelerator module that verl calls and ``torch.cpu`` lacks."""

    def __init__(self) -> None:
        super().__init__("gcpo.adapters.cpu.device_module", self.__class__.__doc__)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    @staticmethod
    def empty_cache() -> None:
        """Do nothing, since there is no caching allocator."""

    @staticmethod
    def ipc_collect() -> None:
        """Do nothing, since there are no IPC handles."""

    @staticmethod
    def mem_get_info(device: Any = None) -> tuple[int, int]:
        """Return (free, total) bytes of main memory."""
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    @staticmethod
    def memory_allocated(device: Any = None) -> int:
        """Return the resident bytes of this process."""
        return psutil.Process().memory_info().rss

    memory_reserved = memory_allocated

    @staticmethod
    def max_memory_allocated(device: Any = None) -> int:
        """Return the largest resident set of this process so far, in bytes."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    max_memory_reserved = max_memory_allocated

    @staticmethod
    def set_per_process_memory_fraction(fraction: float, device: Any = None) -> None:
        """Do nothing, since main memory is not divided."""

    @staticmethod
    def get_device_name(device: Any = None) -> str:
        """Return the name that verl's FLOP counter looks up."""
        return "CPU"

    @staticmethod
    def get_rng_state(device: Any = None) -> torch.Tensor:
        """Return the state of the CPU generator."""
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: torch.Tensor, device: Any = None) -> None:
        """Set the state of the CPU generator."""
        torch.set_rng_state(state)

    @staticmethod
    def manual_seed(seed: int) -> None:
        """Seed the CPU generator."""
        torch.manual_seed(seed)

    manual_seed_all = manual_seed


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    """CPU with gloo. Ray's "GPU" resource is a logical resource: one per worker process."""

    _module = CPUDeviceModule()

    @property
    def device_name(self) -> str:
        return "cpu"

    @property
    def vendor_name(self) -> str:
        return "cpu"

    @property
    def device_module(self) -> ModuleType:
        return self._module

    def is_available(self) -> bool:
        return True

    def current_device(self) -> str:
        """Return the name instead of an index, since ``tensor.to(0)`` would mean an accelerator."""
        return "cpu"

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        return None

    def synchronize(self, device_index: int | None = None) -> None:
        return None

    def manual_seed(self, seed: int) -> None:
        random.seed(seed)
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        self.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        return None

    def empty_cache(self) -> None:
        return None

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str):
        yield

    def profiler_start(self) -> None:
        return None

    def profiler_stop(self) -> None:
        return None

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self) -> bool:
        """Return False, since weights reach vLLM through shared memory."""
        return False

    def cudart(self) -> Any:
        return None


def activate() -> None:
    """Make the CPU verl's platform, even if verl chose a platform before it loaded the plug-in."""
    set_platform(PlatformCPU())


def pageable_reference() -> None:
    """Make verl offload the reference model to pageable memory, since without an accelerator pinning has no use.

    A test fails when verl no longer needs this patch.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy
    from verl.workers.engine.fsdp import transformer_impl

    class PageableOffloadPolicy(CPUOffloadPolicy):
        def __init__(self, pin_memory: bool = False) -> None:
            super().__init__(pin_memory=False)

    setattr(transformer_impl, "CPUOffloadPolicy", PageableOffloadPolicy)  # noqa: B010  (verl exports no such name)
