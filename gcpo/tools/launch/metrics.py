"""The metrics file of a run: read while it grows, and preserved over several starts."""

from __future__ import annotations

import json
from pathlib import Path

from gcpo.files import write_atomically
from gcpo.tools.metrics import EARLIER_METRICS_FILE, METRICS_FILE, parse_line, read_metrics


class MetricsTail:
    """Reader of the lines that are appended to a metrics file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0

    def read(self) -> list[tuple[int, dict[str, float]]]:
        """Return the steps that were written since the last call."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except OSError:  # the file does not exist yet
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [record for record in map(parse_line, whole.decode(errors="replace").splitlines()) if record]


def keep_earlier_metrics(directory: Path) -> None:
    """Save the content of the metrics file, since verl's logger empties the file when it starts.

    Raises:
        OSError: the disk is full; no line is lost.
    """
    current, earlier = directory / METRICS_FILE, directory / EARLIER_METRICS_FILE
    if current.is_file():
        # A kill between the next two lines leaves duplicates, which `read_metrics` merges. A cut line is terminated.
        texts = [path.read_bytes().rstrip(b"\n") for path in (earlier, current) if path.is_file()]
        write_atomically(earlier, b"".join(text + b"\n" for text in texts))
        current.unlink()


def join_metrics(directory: Path) -> None:
    """Merge the metrics files of all starts: every step once, in order.

    Raises:
        OSError: the disk is full; both files are unchanged, and `read_metrics` reads both.
    """
    earlier = directory / EARLIER_METRICS_FILE
    if earlier.is_file():
        lines = [json.dumps({"step": step, "data": data}) + "\n" for step, data in read_metrics(directory).items()]
        write_atomically(directory / METRICS_FILE, "".join(lines))
        earlier.unlink()
