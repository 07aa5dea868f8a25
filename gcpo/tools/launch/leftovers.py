"""What a start of a command leaves behind: its processes, shared-memory segments and Ray session.

Every process of a start has the start's id in its environment, so a process id that was given to another process is
never taken for one of ours. Segments and Ray's session have no such mark: the launcher writes down which ones its
processes use while it runs.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import psutil

LAUNCH_VARIABLE = "GCPO_LAUNCH_ID"
"""Set in the command's environment; every process that it starts inherits it, and nothing else has it."""

SHARED_MEMORY = Path("/dev/shm")
SEGMENTS = ("psm_", "verl_weights_", "vllm_", "torch_", "plasma", "nccl-")
"""How the segments of Python and vLLM, verl's weight transfer, torch, Ray and NCCL begin."""

_SESSION_ARGUMENT = re.compile(r"--session[-_]dir=(/.*/session_\d{4}-\d\d-\d\d_[\d_-]+)$")


class LeftoverError(Exception):
    """A process of an earlier start that cannot be ended; the message is one sentence for the user."""


@dataclass
class LaunchRecord:
    """What a start writes down about itself, in ``run.json``."""

    id: str
    host: str = field(default_factory=socket.gethostname)
    pid: int | None = None
    """Of the command."""
    created: float | None = None
    """When that process began, which tells it from another one that was given the same number."""
    segments: dict[str, int] = field(default_factory=dict)
    """Names in ``/dev/shm``, each with its inode, which tells it from another one that was given the same name."""
    sessions: list[str] = field(default_factory=list)
    """Folders of Ray."""

    @classmethod
    def load(cls, data: Any) -> LaunchRecord | None:
        """A record from JSON, None where there is none or it has another form."""
        names = {one.name for one in fields(cls)}
        if not isinstance(data, dict) or set(data) != names or not isinstance(data["id"], str):
            return None
        return cls(**data)

    def update(self) -> bool:
        """Add what the processes of this start use now; whether anything is new."""
        running = processes(self.id)
        segments, sessions = segments_of(running), sessions_of(running)
        new = {name: inode for name, inode in segments.items() if self.segments.get(name) != inode}
        more = [session for session in sessions if session not in self.sessions]
        self.segments |= new
        self.sessions += more
        return bool(new or more)


# ---- processes ------------------------------------------------------------------------------------------------------


def processes(launch_id: str) -> list[psutil.Process]:
    """The processes that one start of a command started, found by the variable in their environment.

    Descendants belong to them as well: a process that sets its title may overwrite its environment with it.
    """
    found: dict[int, psutil.Process] = {}
    children: dict[int, list[psutil.Process]] = {}
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        # A process may end while it is looked at, and those of other users cannot be read.
        with contextlib.suppress(psutil.Error, OSError):
            children.setdefault(process.ppid(), []).append(process)
            if process.environ().get(LAUNCH_VARIABLE) == launch_id:
                found[process.pid] = process
    rest = list(found)
    while rest:
        for child in children.get(rest.pop(), []):
            if child.pid not in found and _is_there(child):
                found[child.pid] = child
                rest.append(child.pid)
    return list(found.values())


def _is_there(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def processes_of(launch_id: str) -> list[int]:
    """The process ids of `processes`."""
    return [process.pid for process in processes(launch_id)]


def end(launch_id: str, patience: float = 10.0) -> int:
    """End the processes of a start, first with SIGTERM, after ``patience`` seconds with SIGKILL.

    Returns:
        How many there were.

    Raises:
        LeftoverError: one is still there, for example since it belongs to another user.
    """
    remaining = processes(launch_id)
    count = len(remaining)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in remaining:
            with contextlib.suppress(psutil.Error):  # gone, or another user's: what remains is looked at below
                process.send_signal(number)  # psutil compares the time of birth first
        deadline = time.monotonic() + patience
        while remaining and time.monotonic() < deadline:
            time.sleep(0.1)
            remaining = processes(launch_id)
    if remaining:
        raise LeftoverError(_still_there(remaining[0]))
    return count


def _still_there(process: psutil.Process) -> str:
    owner = "?"
    with contextlib.suppress(psutil.Error):
        owner = process.username()
    return (
        f"process {process.pid} (user {owner}) of the last start is still running and cannot be ended from here; "
        "end it, then start the same command again"
    )


# ---- shared memory and Ray's session ---------------------------------------------------------------------------------


def segments_of(running: Iterable[psutil.Process]) -> dict[str, int]:
    """The shared-memory segments that these processes have mapped, by name, each with its inode."""
    found = {}
    for process in running:
        for name in _mapped(process.pid):
            with contextlib.suppress(OSError):
                found[name] = (SHARED_MEMORY / name).stat().st_ino
    return found


def _mapped(pid: int) -> set[str]:
    """Names of the segments of the known kinds that a process has mapped and that still have a name."""
    names = set()
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines():
            _, found, name = line.partition(f" {SHARED_MEMORY}/")
            if found and name.startswith(SEGMENTS) and not name.endswith(" (deleted)") and "/" not in name:
                names.add(name)
    return names


def sessions_of(running: Iterable[psutil.Process]) -> list[str]:
    """Folders of Ray's sessions that these processes were started with."""
    found = []
    for process in running:
        with contextlib.suppress(psutil.Error):
            for argument in process.cmdline():
                match = _SESSION_ARGUMENT.match(argument)
                if match and match[1] not in found:
                    found.append(match[1])
    return found


def remove_segments(segments: dict[str, int]) -> int:
    """Remove these shared-memory segments, but none that another process uses, or that is another one by now."""
    theirs = {name: inode for name, inode in segments.items() if _is_ours(SHARED_MEMORY / name, inode)}
    if not theirs:
        return 0
    used = set().union(*(_mapped(pid) for pid in psutil.pids()))
    removed = 0
    for name in set(theirs) - used:
        with contextlib.suppress(OSError):
            (SHARED_MEMORY / name).unlink()
            removed += 1
    return removed


def _is_ours(path: Path, inode: int) -> bool:
    try:
        status = path.lstat()
    except OSError:
        return False
    return status.st_ino == inode and status.st_uid == os.geteuid()


def remove_sessions(sessions: Iterable[str]) -> int:
    """Remove the folders of Ray's sessions that nobody uses any more."""
    removed = 0
    for session in sessions:
        folder = Path(session)
        if not _SESSION_ARGUMENT.match(f"--session-dir={session}") or folder.is_symlink() or not folder.is_dir():
            continue
        if folder.stat().st_uid == os.geteuid() and not _is_named_by_a_process(session):
            shutil.rmtree(folder, ignore_errors=True)
            removed += 1
    return removed


def _is_named_by_a_process(session: str) -> bool:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(session in argument for argument in process.cmdline()):
                return True
    return False


# ---- the next start --------------------------------------------------------------------------------------------------


def clear(record: LaunchRecord, was_running: bool) -> str | None:
    """End and remove what an earlier start left behind.

    Args:
        record: of that start.
        was_running: by ``run.json``; its launcher was then killed.

    Returns:
        A sentence for the user, None where nothing was left.

    Raises:
        LeftoverError: a process cannot be ended.
    """
    if record.host != socket.gethostname():
        if not was_running:
            return None
        return (
            f"the last start ran on the machine {record.host} and was not ended in order; its processes cannot be seen "
            "from here: make sure that none of them still runs"
        )
    running = processes(record.id)
    segments, sessions = record.segments | segments_of(running), [*record.sessions, *sessions_of(running)]
    count = end(record.id)
    _check_command(record)
    parts = [f"ended {_count(count, 'process', 'processes')}"] if count else []
    removed = remove_segments(segments)
    if removed:
        parts.append(f"removed {_count(removed, 'shared-memory segment', 'shared-memory segments')}")
    if was_running and remove_sessions(sessions):
        parts.append("removed the folder of its Ray session")
    if not parts:
        return None
    return f"the last start was not ended in order: {', '.join(parts)}"


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _check_command(record: LaunchRecord) -> None:
    """Refuse to start beside the command of an earlier start; its environment cannot be read by other users."""
    if record.pid is None or record.created is None:
        return
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(record.pid)
        if abs(process.create_time() - record.created) < 1.0 and _is_there(process):
            raise LeftoverError(_still_there(process))
