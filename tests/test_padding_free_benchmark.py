"""The benchmark of packed rows, on groups that take seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

from benchmarks.padding_free import make_rows

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"questions": 2, "n": 3, "question": 12, "spread": 0.5, "vocabulary": 64, "seed": 0}


def test_what_it_measures(tmp_path: Path) -> None:
    """Padded rows are as long as the longest; packed ones read the two questions once."""
    options = [text for name, value in SIZES.items() for text in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.padding_free", "--output", str(tmp_path), *options]
        + ["--rounds", "1", "--lengths", "9", "--hidden", "32", "--layers", "1", "--heads", "2"],
        cwd=ROOT,
        env={**os.environ, "VERL_PLATFORM": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "padding_free.json").read_text())["results"]["T = 9"]
    lengths = [len(row) for row in make_rows(Namespace(**SIZES), 9)]
    assert found["tokens"] == {"padded": 6 * max(lengths), "packed": sum(lengths) - 2 * 2 * 12}
    assert all(found[name]["ratio"] > 0 for name in ("forward", "with gradient"))
    assert f"| tokens | {found['tokens']['padded']:,} / {found['tokens']['packed']:,} |" in done.stdout
