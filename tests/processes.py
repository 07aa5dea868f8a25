"""Processes that tests start and whose end they wait for."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest


def is_alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not. In a container without an init process, orphans stay zombies."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def pip_setting(name: str) -> list[str]:
    """The values of a setting of pip, which uv does not read."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", f"global.{name}"], capture_output=True, text=True, check=False
    )
    return os.environ.get(f"PIP_{name.replace('-', '_').upper()}", done.stdout).split()


def uv(*arguments: str) -> None:
    """Run uv; an installation takes the packages from where pip takes them."""
    program = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("uv is not installed; pip takes minutes for the packages")
    options = []
    if arguments[:2] == ("pip", "install"):
        options += [f"--find-links={link}" for link in pip_setting("find-links")]
        options += [f"--default-index={index}" for index in pip_setting("index-url")[:1]]
    command = [program, *arguments, "--quiet", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
