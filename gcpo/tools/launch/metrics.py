"""The metrics file of a run: followed while it grows, kept over several starts, and a line per step."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from gcpo import stability
from gcpo.files import write_atomically
from gcpo.tools import report


class MetricsTail:
    """Reads the lines that are added to a metrics file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0
        self._rest = b""

    def read(self) -> list[tuple[int, dict[str, float]]]:
        """Steps that were written since the last call."""
        try:
            with self.path.open("rb") as file:
                if file.seek(0, os.SEEK_END) < self._offset:
                    self._offset, self._rest = 0, b""
                file.seek(self._offset)
                data = file.read()
        except OSError:
            return []
        self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        parsed = (report.parse_line(line.decode("utf-8", errors="replace")) for line in lines)
        return [record for record in parsed if record]


def keep_earlier_metrics(directory: Path) -> None:
    """Put what the metrics file holds aside, since verl's logger empties the file when it starts.

    Raises:
        OSError: there is no room; no line is lost then.
    """
    current, earlier = directory / report.METRICS_FILE, directory / report.EARLIER_METRICS_FILE
    if current.is_file() and current.stat().st_size:
        data = current.read_bytes()
        before = earlier.read_bytes() if earlier.is_file() else b""
        if before and not before.endswith(b"\n"):
            before += b"\n"
        # A kill before the next line leaves lines twice, which `report.read_metrics` joins.
        write_atomically(earlier, before + data + (b"" if data.endswith(b"\n") else b"\n"))
        current.unlink()


def join_metrics(directory: Path) -> None:
    """Make the metrics file whole again: every step of every start, once, in order.

    Raises:
        OSError: there is no room; both files are then as they were, and `report.read_metrics` reads both.
    """
    current, earlier = directory / report.METRICS_FILE, directory / report.EARLIER_METRICS_FILE
    if not earlier.is_file():
        return
    steps = report.read_metrics(directory)
    write_atomically(current, "".join(json.dumps({"step": step, "data": data}) + "\n" for step, data in steps.items()))
    earlier.unlink()


def step_line(step: int, metrics: Mapping[str, float], total: int | None = None) -> str:
    """One readable line about a step."""
    parts = [f"step {step:>{len(str(total or step))}}" + (f"/{total}" if total else "")]

    def add(text: str, *keys: str, scale: float = 1.0) -> None:
        value = report.first(metrics, *keys)
        if value is not None:
            parts.append(text.format(scale * value))

    held_out = report.held_out_key([metrics])
    add("reward {:.3f}", *report.REWARD_KEYS)
    if held_out:
        add("held-out {:.1f} %", held_out, scale=100)
    upsilon = metrics.get(f"{report.UPSILON}/mean")
    if upsilon is not None:
        spread = metrics.get(f"{report.UPSILON}/spread_in_group")
        parts.append(f"Υ {upsilon:.3f}" + (f"±{spread:.3f}" if spread is not None else ""))
    add("κ-KL {:.4f}", report.CAUSAL_KL)
    missing = report.missing_shares(metrics)
    if missing:
        parts.append(
            "missing "
            + ", ".join(f"{100 * share:.{0 if share >= 0.1 else 1}f} % of {part}" for part, share in missing.items())
        )
    add("length {:.0f}", report.LENGTH)
    seconds = report.stage_seconds(metrics)
    whole = metrics.get("timing_s/step")
    if whole is not None:
        split = ", ".join(
            f"{stage} {seconds[stage]:.1f}" for stage in ("generate", "score", "update") if stage in seconds
        )
        parts.append(f"{whole:.1f} s" + (f" ({split})" if split else ""))
    return "  ".join([*parts, *stability.describe(metrics)])
