"""Each patch of the CPU profile: the code it mends still needs it, and the patch mends it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gcpo import cpu

pytestmark = pytest.mark.skipif(not cpu.is_cpu_profile(), reason="the CPU profile is not installed here")


def run(code: str) -> str:
    """Run ``code`` in a process of its own, where nothing is patched unless it says so."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()[-1]


def test_vllm_version() -> None:
    """There is no distribution ``vllm``; patched, it has the CPU build's version, and others are as before."""
    code = """
import importlib.metadata as m
from gcpo.cpu import patches
try: m.version("vllm"); before = "found"
except m.PackageNotFoundError: before = "missing"
patches.vllm_version(); patches.vllm_version()
try: m.version("no-such-distribution"); other = "found"
except m.PackageNotFoundError: other = "missing"
print(before, m.version("vllm"), other, m.version("verl"))
"""
    assert run(code) == "missing 0.32.0+cpu missing 0.9.1"


def test_process_group_backend() -> None:
    """torch refuses a device that is named twice; patched, the second name is dropped."""
    code = """
import os, torch
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="{port}", RANK="0", WORLD_SIZE="1")
from gcpo.cpu import patches
try: torch.distributed.init_process_group("cpu:gloo,cpu:gloo"); before = "accepted"
except ValueError: before = "refused"
patches.process_group_backend()
torch.distributed.init_process_group("cpu:gloo,cpu:gloo")
print(before, "accepted")
"""
    from tests.adapters.ranks import free_port

    assert run(code.replace("{port}", str(free_port()))) == "refused accepted"


def test_reference_offload() -> None:
    """verl asks for pinned memory, which torch cannot give without an accelerator; patched, it is not asked for."""
    code = """
import torch
try: torch.zeros(1).pin_memory(); pinned = torch.zeros(1).pin_memory().is_pinned()
except Exception: pinned = False
import gcpo.adapters
from verl.workers.engine.fsdp import transformer_impl
policy = transformer_impl.CPUOffloadPolicy(pin_memory=True)
print(pinned, policy.pin_memory, "CPUOffloadPolicy(pin_memory=True)" in open(transformer_impl.__file__).read())
"""
    assert run(code) == "False False True"


def test_vllm_linear() -> None:
    """vLLM's dispatch empties the weight of a linear layer; patched, it stays, and the layer uses it."""
    code = """
import torch
from gcpo.cpu import patches
patches.vllm_version()
from vllm.model_executor.layers import utils
def layer():
    made = torch.nn.Linear(64, 64, bias=False)
    utils.dispatch_cpu_unquantized_gemm(made, remove_weight=True)
    return made
before = layer().weight.numel()
patches.vllm_linear()
made = layer()
with torch.no_grad(): made.weight.fill_(1.0)
print(before, made.weight.numel(), made.cpu_linear(torch.ones(1, 64), made.weight, None)[0, 0].item())
"""
    assert run(code) == "0 4096 64.0"


def test_the_platform_is_ours() -> None:
    """verl's platform is the CPU, also for a module that asked before the plug-in was loaded."""
    code = """
import verl
from verl.plugin.platform import get_platform
from verl.utils.device import get_device_name, get_torch_device
device = get_torch_device()
free, total = device.mem_get_info()
print(type(get_platform()).__name__, get_device_name(), 0 < free <= total, device.max_memory_allocated() > 0)
"""
    assert run(code) == "PlatformCPU cpu True True"


def test_profile_rules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """VERL_PLATFORM decides; else vLLM's CPU build and no accelerator. On a GPU nothing of the CPU is used."""
    monkeypatch.setenv("VERL_PLATFORM", "nvidia")
    assert not cpu.is_cpu_profile()
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    assert cpu.is_cpu_profile()
    monkeypatch.delenv("VERL_PLATFORM")
    device = tmp_path / "nvidiactl"
    device.touch()
    monkeypatch.setattr(cpu, "_ACCELERATOR_FILES", (str(device),))
    assert not cpu.is_cpu_profile()


def test_on_a_gpu_no_cpu_module_is_imported() -> None:
    """Where the profile is another, importing verl loads the plug-in without the platform and its patches."""
    code = """
import os, sys
os.environ["VERL_PLATFORM"] = "nvidia"
import verl
from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY
print("gcpo" in TRAINER_REGISTRY, "gcpo.adapters.cpu" in sys.modules, "gcpo.cpu.patches" in sys.modules)
"""
    assert run(code) == "True False False"
