"""Time and memory of a comparison are bounded, in any thread, and what exceeds them is wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

import gcpo.rewards.math
from gcpo.rewards import GraderError, compute_score, grade_many, same_answer
from gcpo.rewards import math_verify_pool as pool
from gcpo.rewards.math_verify_pool import Pool

HANG = 240
"""Seconds that tell a bounded answer from one that hangs, on however busy a machine."""

HOSTILE = [
    "9^{9^{9^{9}}}",
    "99999999!",
    r"\Gamma(99999999)",
    r"\binom{99999999}{5000000}",
    "(x+y+z)^{5000}",
    r"\frac{1}{" * 80 + "1" + "}" * 80,
    "(" * 990,
    "x^" * 400 + "x",
]


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pool]:
    """A grader with half a second for a comparison."""
    hurried = Pool(pool.size(), seconds=0.5)
    monkeypatch.setattr(pool, "_shared", hurried)
    gcpo.rewards.math._same_mathematics.cache_clear()
    yield hurried
    hurried.close()
    gcpo.rewards.math._same_mathematics.cache_clear()


def processes() -> set[int]:
    """The worker processes of this one."""
    found = set()
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as stat, open(f"/proc/{name}/cmdline") as command:
                if (
                    int(stat.read().rpartition(")")[2].split()[1]) == os.getpid()
                    and "math_verify_worker.py" in command.read()
                ):
                    found.add(int(name))
        except OSError:  # it has just ended
            continue
    return found


def wait_for_the_end_of(process: int) -> None:
    """Fails where it goes on."""
    deadline = time.monotonic() + HANG
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/{process}/stat") as stat:
                if stat.read().rpartition(")")[2].split()[0] == "Z":  # ended, and its parent has not asked yet
                    return
        except FileNotFoundError:
            return
        time.sleep(0.02)
    pytest.fail(f"process {process} goes on")


def test_hostile_answers_are_wrong_in_bounded_time(hurried):
    started = time.monotonic()
    results = grade_many([f"\\boxed{{{answer}}}" for answer in HOSTILE], ["7"] * len(HOSTILE))
    assert all(result == {"score": 0.0, "acc": 0.0, "format": 1.0} for result in results)
    assert same_answer("x+1", "1+x")
    assert time.monotonic() - started < HANG


def test_a_hanging_worker_is_replaced_and_said_once(hurried, caplog):
    assert not hurried.same("7", "9^{999999999}")
    assert not hurried.same("7", "9^{999999998}")  # each ends a worker
    assert len(caplog.records) == 1 and "0.5 s" in caplog.text
    assert hurried.same("x+1", "1+x")


def test_memory_is_bounded():
    before = processes()
    small = Pool(1, memory=2**28)
    try:
        assert small.same("x+1", "1+x")
        (worker,) = processes() - before
        with open(f"/proc/{worker}/limits") as limits:
            (address_space,) = [line for line in limits if line.startswith("Max address space")]
        assert address_space.split()[3:5] == [str(2**28)] * 2
    finally:
        small.close()
    with pytest.raises(GraderError, match="memory"):
        Pool(1, memory=2**25).same("x+1", "1+x")


def test_a_worker_that_is_gone_is_replaced():
    before = processes()
    one = Pool(1)
    try:
        assert one.same("x+1", "1+x")
        (worker,) = processes() - before
        os.kill(worker, signal.SIGKILL)
        wait_for_the_end_of(worker)
        assert one.same("x+1", "1+x")
        assert worker not in processes()
    finally:
        one.close()
    assert processes() == before


def test_a_worker_that_sleeps_is_replaced(monkeypatch):
    before = processes()
    one = Pool(1)
    try:
        assert one.same("x+1", "1+x")
        (worker,) = processes() - before
        os.kill(worker, signal.SIGSTOP)
        monkeypatch.setattr(pool, "MAX_WALL_SECONDS", 0.2)
        assert not one.same("x+1", "1+x")
        monkeypatch.undo()
        assert one.same("x+1", "1+x")
        assert worker not in processes()
    finally:
        one.close()


def test_many_threads_at_once():
    pairs = [(f"{n}+x", f"x+{n if n % 2 else n + 1}") for n in range(40)]
    with ThreadPoolExecutor(16) as threads:
        results = list(threads.map(lambda pair: same_answer(*pair), pairs))
    assert results == [n % 2 == 1 for n in range(40)]
    assert len(processes()) <= pool.size()


def test_off_the_main_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append(same_answer("3+y", "y+3")))
    thread.start()
    thread.join()
    assert results == [True]


def test_a_forked_process_has_its_own_workers():
    assert same_answer("x+1", "1+x")
    before = pool._shared
    child = os.fork()
    if child == 0:
        os._exit(0 if pool._shared is not before and same_answer("x+y", "y+x") else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert same_answer("x+2", "2+x")


SCRIPT = """
import os, sys
import gcpo.rewards.math_verify_pool as pool
from gcpo.rewards import same_answer
assert same_answer("x+1", "1+x")
(worker,) = [w for w in list(pool.shared()._places.queue) if w]
print(worker._process.pid, flush=True)
{end}
"""


@pytest.mark.parametrize("end", ["", "sys.exit(3)", "os.kill(os.getpid(), 9)", "raise ValueError"])
def test_no_worker_outlives_its_process(end):
    """The script has no guard around its main part, which processes of multiprocessing would need."""
    ended = subprocess.run([sys.executable, "-c", SCRIPT.format(end=end)], capture_output=True, text=True)
    worker = int(ended.stdout)
    wait_for_the_end_of(worker)


def test_a_grader_that_does_not_start_is_no_wrong_answer(monkeypatch, tmp_path):
    monkeypatch.setattr(pool, "_shared", Pool(1))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(GraderError, match="cannot start .*python"):
        compute_score("", r"\boxed{3+z}", "z+3")
    monkeypatch.undo()
    assert same_answer("3+z", "z+3")


def test_a_grader_without_its_library(monkeypatch, tmp_path, capfd):
    (tmp_path / "worker.py").write_text("raise ImportError('no math_verify')")
    monkeypatch.setattr(pool, "_PROGRAM", tmp_path / "worker.py")
    with pytest.raises(GraderError, match="does not start"):
        Pool(1).same("1", "2")
    assert "no math_verify" in capfd.readouterr().err
