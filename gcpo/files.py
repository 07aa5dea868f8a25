"""Atomic writing of files and folders, and locks for folders that several processes may create."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

LOCK_FILE = ".lock"
"""The lock file of a folder with one user."""

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_TEXT = re.compile(r"No space left on device|Disk quota exceeded|Errno (?:28|122)\]")
# torch's own writer reports a full disk without an errno.
_WRITER_TEXT = re.compile(r"PytorchStreamWriter failed|inline_container\.cc|unexpected pos \d+ vs \d+|iostream error")
_ALMOST_NOTHING = 2**20


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write ``content`` to ``path`` such that a reader finds the old file or the new file, never a part of one.

    The content reaches the disk before the name does (``fsync``), so the file is also whole after a power failure.

    Raises:
        OSError: the file cannot be written; the old file is then unchanged and no temporary file is left.
    """
    data = content.encode() if isinstance(content, str) else content
    with tempfile.NamedTemporaryFile(prefix=f".{path.name}.", suffix=".part", dir=path.parent, delete=False) as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o644)  # tempfile gives 0600; these files have no secrets
            os.replace(file.name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(file.name)
            raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Sync the content of a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_in_place(made: Path, target: Path) -> None:
    """Rename the folder ``made`` to ``target``, and replace ``target`` if it exists.

    A folder cannot be renamed onto one that has files, so the old one is first renamed to a hidden name beside it, and
    removed last. Call it while holding `lock` for ``target``.

    Raises:
        OSError: the rename fails; the old folder is then restored.
    """
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    shutil.rmtree(old, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        os.replace(target, old)
    try:
        os.replace(made, target)
    except OSError:
        with contextlib.suppress(FileNotFoundError):
            os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def lock(target: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the lock of ``target``, a file or folder that will be created; other processes wait.

    The lock file is ``.NAME.lock`` beside ``target`` while the lock is held. The operating system releases the lock
    when the process ends, however it ends.

    Args:
        target: the file or folder to be created.
        waiting: called once if another process holds the lock.

    Raises:
        OSError: the lock file cannot be made.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(target.with_name(f".{target.name}.lock"))
    try:
        held.acquire(timeout=0)
    except Timeout:
        if waiting is not None:
            waiting()
        held.acquire()
    with _removing(held):
        yield


@contextlib.contextmanager
def sole_user(folder: Path) -> Iterator[None]:
    """Hold ``folder``, which must exist, until the end of the block.

    Raises:
        BlockingIOError: another process holds it.
        OSError: the lock file cannot be made in it.
    """
    held = FileLock(folder / LOCK_FILE)
    try:
        held.acquire(timeout=0)
    except Timeout as error:
        raise BlockingIOError(errno.EAGAIN, "another process holds it", str(folder)) from error
    with _removing(held):
        yield


@contextlib.contextmanager
def _removing(held: FileLock) -> Iterator[None]:
    try:
        yield
    finally:
        # Removed while it is held: filelock does not lock a file without a name, so that no two processes can
        # hold two files of one name.
        with contextlib.suppress(OSError):
            os.unlink(held.lock_file)
        held.release()


# ---- full disks -----------------------------------------------------------------------------------------------------


def is_disk_full(error: BaseException, folder: Path | None = None) -> bool:
    """Return whether ``error``, or an error that caused it, says that no space is left.

    Args:
        error: the error, or the text of an error from another process.
        folder: the folder of the write; torch's writer gives no reason, so its errors count only if this disk is full.
    """
    chain: list[BaseException] = [error]
    for one in chain:
        if (isinstance(one, OSError) and one.errno in _FULL) or _FULL_TEXT.search(str(one)):
            return True
        if folder is not None and _WRITER_TEXT.search(str(one)) and free_bytes(folder) < _ALMOST_NOTHING:
            return True
        causes = (one.__cause__, one.__context__, getattr(one, "cause", None))
        chain += [cause for cause in causes if isinstance(cause, BaseException) and cause not in chain]
    return False


def free_bytes(folder: Path) -> int:
    """Return the bytes that this user can still write into ``folder``, or into its nearest parent that exists."""
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def why(error: OSError) -> str:
    """Return the reason of a failed write as the operating system states it."""
    return error.strerror or str(error) or type(error).__name__


def megabytes(count: int) -> str:
    """Format ``count`` bytes for people."""
    return f"{count / 2**20:,.1f} MB" if count < 2**30 else f"{count / 2**30:,.1f} GB"
