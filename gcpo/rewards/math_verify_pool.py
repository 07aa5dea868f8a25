"""Processes that compare answers with math-verify, so that no answer can block, overload or end the caller.

sympy may compute without end inside one C function, where neither a signal handler nor an exception can interrupt it.
The system therefore ends a worker once a comparison has used its processor time,
and a new worker replaces it. The limits hold in any thread; verl does not grade in the main thread.

The workers are plain programs with pipes, because processes of ``multiprocessing`` import the caller's main module
again: in a Ray worker all of Ray, and in a script without a main guard the script itself.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import queue
import select
import subprocess
import sys
import threading
from pathlib import Path

__all__ = ["GraderError", "Pool", "shared", "size"]

logger = logging.getLogger(__name__)

MAX_SECONDS = 5.0
"""Processor time of a comparison."""
MAX_MEMORY = 2**30
"""Address space of a worker in bytes; with sympy it starts at about 60 MiB."""
MAX_WALL_SECONDS = 60.0
"""Seconds after which a worker that has not replied is ended."""
START_SECONDS = 120.0
"""A worker starts in half a second; on a busy machine it may take longer."""
MAX_WORKERS = 8
"""Largest number of workers of a process; verl has several processes that grade."""

_PROGRAM = Path(__file__).with_name("math_verify_worker.py")
_PACKAGE_ROOT = Path(__file__).parents[2]


class GraderError(RuntimeError):
    """The workers do not start, so nothing can be graded."""


def size() -> int:
    """Return the largest number of workers of a process: its cores, up to `MAX_WORKERS`."""
    return min(MAX_WORKERS, len(os.sched_getaffinity(0)))


class _Worker:
    """One worker process with its pipes."""

    def __init__(self, seconds: float, memory: int) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([*filter(None, sys.path), str(_PACKAGE_ROOT)]),
            "PYTHONHASHSEED": "0",  # sympy's order of terms and its simplifications depend on it
        }
        try:
            # -P: the folder of the program, with its math.py, must not be on the path.
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_PROGRAM), str(seconds), str(memory)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                bufsize=0,
            )
        except OSError as error:
            raise GraderError(f"the math grader cannot start {sys.executable}: {error}") from error
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests, self._replies = self._process.stdin, self._process.stdout
        self._poll = select.poll()
        self._poll.register(self._replies, select.POLLIN)
        if self._reply(START_SECONDS) != b"r":
            self.end()
            raise GraderError(
                f"the math grader does not start (its error is above): check that `{sys.executable} -c 'import "
                "math_verify'` works and that there is memory for it"
            )

    def _reply(self, seconds: float) -> bytes:
        """Return one byte, or no byte if the process ended or did not reply in time."""
        return self._replies.read(1) if self._poll.poll(1000 * seconds) else b""

    def same(self, truth: str, answer: str) -> bool | None:
        """Return the verdict, or ``None`` if the process ended or did not reply in time and must be replaced."""
        self._requests.write(json.dumps([truth, answer]).encode() + b"\n")
        reply = self._reply(MAX_WALL_SECONDS)
        return reply == b"1" if reply else None

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def end(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._requests.close()
        self._replies.close()


class Pool:
    """Up to ``workers`` processes, started at their first use. Any thread may call it and waits for a free worker."""

    def __init__(self, workers: int, seconds: float = MAX_SECONDS, memory: int = MAX_MEMORY) -> None:
        self._limits = seconds, memory
        self._warned = threading.Event()
        # The worker used last comes first, so that sequential comparisons need only one worker.
        self._places: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(workers):
            self._places.put(None)

    def same(self, truth: str, answer: str) -> bool:
        """Return whether math-verify finds ``answer`` equal to ``truth``; False if it exceeds a limit or fails.

        Raises:
            GraderError: the worker cannot be started.
        """
        worker = self._places.get()
        verdict = None
        try:
            if worker is not None and not worker.alive:  # ended from outside while it was idle
                worker.end()
                worker = None
            worker = worker or _Worker(*self._limits)
            verdict = worker.same(truth, answer)
        finally:  # also after an interrupt, when a reply may still arrive
            if worker is not None and verdict is None:
                worker.end()
                worker = None
            self._places.put(worker)
        if verdict is None and not self._warned.is_set():
            self._warned.set()
            limits = f"{self._limits[0]:g} s and {self._limits[1] >> 20} MiB"
            logger.warning(
                "math-verify could not compare %.80r with %.80r within %s: it counts as wrong, and so will others "
                "without a word",
                answer,
                truth,
                limits,
            )
        return bool(verdict)

    def close(self) -> None:
        """End the workers that are idle; busy workers end after their comparison."""
        taken = [self._places.get() for _ in range(self._places.qsize())]
        for worker in taken:
            if worker is not None:
                worker.end()
            self._places.put(None)


_shared = Pool(size())


def shared() -> Pool:
    """Return the pool of this process."""
    return _shared


def _forget() -> None:
    """Drop the workers after a fork: they belong to the parent process."""
    global _shared
    _shared = Pool(size())


atexit.register(lambda: _shared.close())
os.register_at_fork(after_in_child=_forget)
