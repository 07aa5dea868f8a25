"""Removal of a start's leftovers: its processes, shared-memory segments and Ray session.

Every process of a start has the start's id in its environment, so a reused process id is
never taken for one of ours. Segments and Ray's session have no such mark, so the launcher records those that its
processes use while it runs.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import psutil

LAUNCH_VARIABLE = "GCPO_LAUNCH_ID"
"""Set in the command's environment; only the processes that it starts inherit it."""

SHARED_MEMORY = Path("/dev/shm")
# Segments of Python and vLLM, verl's weight transfer, torch, Ray and NCCL.
_SEGMENT = re.compile(
    rf" {SHARED_MEMORY}/((?:psm_|verl_weights_|vllm_|torch_|plasma|nccl-)[^/\n]*)(?<! \(deleted\))$", re.MULTILINE
)
_SESSION_ARGUMENT = re.compile(r"--session[-_]dir=(/.*/session_\d{4}-\d\d-\d\d_[\d_-]+)$")


class LaunchError(Exception):
    """A command that cannot be started; the message is one sentence for the user."""


class LeftoverError(LaunchError):
    """A process of an earlier start that cannot be ended."""

    def __init__(self, process: psutil.Process) -> None:
        owner = "?"
        with contextlib.suppress(psutil.Error):
            owner = process.username()
        super().__init__(
            f"process {process.pid} (user {owner}) of the last start is still running and cannot be ended from here; "
            "end it, then start the same command again"
        )


@dataclass
class LaunchRecord:
    """The record of a start in ``run.json``.

    Attributes:
        id: marks the processes of this start.
        host: name of the machine.
        pid: process id of the command.
        created: start time of that process, which distinguishes it from a later one with the same id.
        segments: names in ``/dev/shm``, each with its inode, which distinguishes it from a later one of the same name.
        sessions: folders of Ray's sessions.
    """

    id: str
    host: str = field(default_factory=socket.gethostname)
    pid: int | None = None
    created: float | None = None
    segments: dict[str, int] = field(default_factory=dict)
    sessions: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, data: Any) -> LaunchRecord | None:
        """Return a record from JSON, or None if it is missing or has another form."""
        whole = isinstance(data, dict) and set(data) == {one.name for one in fields(cls)}
        return cls(**data) if whole and isinstance(data["id"], str) else None

    def update(self) -> bool:
        """Add the resources that the processes of this start use now; return whether any is new."""
        before = (dict(self.segments), list(self.sessions))
        for process in processes(self.id):
            for name in _mapped(process.pid):
                with contextlib.suppress(OSError):
                    self.segments[name] = (SHARED_MEMORY / name).stat().st_ino
            with contextlib.suppress(psutil.Error):
                found = filter(None, map(_SESSION_ARGUMENT.match, process.cmdline()))
                self.sessions += [match[1] for match in found if match[1] not in self.sessions]
        return before != (self.segments, self.sessions)


# ---- processes ------------------------------------------------------------------------------------------------------


def processes(launch_id: str) -> list[psutil.Process]:
    """Return the processes that one start of a command started, identified by the variable in their environment.

    Descendants are included, because a process that sets its title may overwrite its environment.
    """
    # The environment of other users' processes and of ended ones cannot be read and is None.
    every = {one.pid: one for one in psutil.process_iter(["ppid", "environ", "status"]) if one.pid != os.getpid()}
    found = {pid for pid, one in every.items() if (one.info["environ"] or {}).get(LAUNCH_VARIABLE) == launch_id}
    alive = {pid: one for pid, one in every.items() if one.info["status"] != psutil.STATUS_ZOMBIE}
    while more := {pid for pid, one in alive.items() if one.info["ppid"] in found} - found:
        found |= more
    return [every[pid] for pid in sorted(found)]


def end(launch_id: str, patience: float = 10.0) -> int:
    """End the processes of a start, first with SIGTERM, after ``patience`` seconds with SIGKILL.

    Returns:
        The number of processes.

    Raises:
        LeftoverError: a process still runs, for example because it belongs to another user.
    """
    remaining = processes(launch_id)
    count = len(remaining)
    for stop in (psutil.Process.terminate, psutil.Process.kill):
        for process in remaining:
            with contextlib.suppress(psutil.Error):  # ended, or another user's; the check below finds those that remain
                stop(process)  # psutil compares the start time first
        deadline = time.monotonic() + patience
        while remaining and time.monotonic() < deadline:
            time.sleep(0.1)
            remaining = processes(launch_id)
    if remaining:
        raise LeftoverError(remaining[0])
    return count


# ---- shared memory and Ray's session ---------------------------------------------------------------------------------


def _mapped(pid: int) -> set[str]:
    """Return names of the segments of the known kinds that a process has mapped and that still have a name."""
    with contextlib.suppress(OSError):
        # psutil's memory_maps() reads smaps, which is slow for processes with many mappings.
        return set(_SEGMENT.findall(Path(f"/proc/{pid}/maps").read_text(errors="replace")))
    return set()


def remove_segments(segments: dict[str, int]) -> int:
    """Remove these shared-memory segments, except those that another process uses or that were replaced."""
    theirs = {name for name, inode in segments.items() if _is_ours(SHARED_MEMORY / name, inode)}
    removed = 0
    for name in theirs.difference(*map(_mapped, psutil.pids() if theirs else [])):
        with contextlib.suppress(OSError):
            (SHARED_MEMORY / name).unlink()
            removed += 1
    return removed


def _is_ours(path: Path, inode: int | None = None) -> bool:
    """Return whether the path exists, belongs to this user, is not a link, and has this inode."""
    with contextlib.suppress(OSError):
        status = path.lstat()
        return status.st_uid == os.geteuid() and inode in (None, status.st_ino) and not path.is_symlink()
    return False


def remove_sessions(sessions: Iterable[str]) -> int:
    """Remove the folders of Ray's sessions that are no longer in use."""
    named = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    removed = 0
    for session in sessions:
        ours = _SESSION_ARGUMENT.match(f"--session-dir={session}") and _is_ours(Path(session))
        if ours and not any(session in command for command in named):
            shutil.rmtree(session, ignore_errors=True)
            removed += 1
    return removed


# ---- the next start --------------------------------------------------------------------------------------------------


def clear(record: LaunchRecord, was_running: bool) -> str | None:
    """End the processes and remove the resources that an earlier start left behind.

    Args:
        record: the record of that start.
        was_running: whether ``run.json`` says so, in which case its launcher was killed.

    Returns:
        A sentence for the user, or None if nothing was left.

    Raises:
        LeftoverError: a process cannot be ended.
    """
    if record.host != socket.gethostname():
        sentence = (
            f"the last start ran on the machine {record.host} and was not ended in order; its processes cannot be seen "
            "from here: make sure that none of them still runs"
        )
        return sentence if was_running else None
    record.update()
    count = end(record.id)
    if record.pid is not None and record.created is not None:
        _refuse_beside(record.pid, record.created)
    parts = [f"ended {count} process{'es' if count > 1 else ''}"] if count else []
    if removed := remove_segments(record.segments):
        parts.append(f"removed {removed} shared-memory segment{'s' if removed > 1 else ''}")
    if was_running and remove_sessions(record.sessions):
        parts.append("removed the folder of its Ray session")
    return f"the last start was not ended in order: {', '.join(parts)}" if parts else None


def _refuse_beside(pid: int, created: float) -> None:
    """Refuse to start beside the command of an earlier start, whose environment other users cannot read."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        if abs(process.create_time() - created) < 1.0 and process.status() != psutil.STATUS_ZOMBIE:
            raise LeftoverError(process)
