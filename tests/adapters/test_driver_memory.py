"""The driver's memory for a batch of the paper's size, in a process of its own."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
MIB = 2**20


def test_the_driver_takes_groups_one_after_another() -> None:
    """256 groups of 8 with up to 16,384 tokens: the causal stage takes less than 96 MiB beside the fields in the queue.

    A table of responses x contexts x longest response takes 2 GiB in float64; one of the responses, without contexts,
    takes 256 MiB. The meter sees allocations of that size.
    """
    command = [sys.executable, "-m", "tests.adapters.driver_memory"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print({name: round(value / MIB) for name, value in found.items()})
    assert found["written"] == 256 * 8 and math.isfinite(found["kl_mean"])
    assert found["table"] == 2048 * MIB and found["seen"] > 200 * MIB
    assert 0 < found["taken"] < 96 * MIB
