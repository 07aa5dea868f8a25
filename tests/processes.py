"""Processes that tests start and whose end they wait for."""

import psutil


def is_alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not. In a container without an init process, orphans stay zombies."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
