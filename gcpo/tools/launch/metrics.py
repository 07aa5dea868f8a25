"""The metrics file of a run: followed while it grows, and kept over several starts."""

from __future__ import annotations

import json
from pathlib import Path

from gcpo.files import write_atomically
from gcpo.tools.metrics import EARLIER_METRICS_FILE, METRICS_FILE, parse_line, read_metrics


class MetricsTail:
    """Reads the lines that are added to a metrics file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0

    def read(self) -> list[tuple[int, dict[str, float]]]:
        """Steps that were written since the last call."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except OSError:  # it is not there yet
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [record for record in map(parse_line, whole.decode(errors="replace").splitlines()) if record]


def keep_earlier_metrics(directory: Path) -> None:
    """Put what the metrics file holds aside, since verl's logger empties the file when it starts.

    Raises:
        OSError: there is no room; no line is lost then.
    """
    current, earlier = directory / METRICS_FILE, directory / EARLIER_METRICS_FILE
    if current.is_file():
        # A kill between the two lines below leaves lines twice, which `read_metrics` joins. A cut line ends here.
        texts = [path.read_bytes().rstrip(b"\n") for path in (earlier, current) if path.is_file()]
        write_atomically(earlier, b"".join(text + b"\n" for text in texts))
        current.unlink()


def join_metrics(directory: Path) -> None:
    """Make the metrics file whole again: every step of every start, once, in order.

    Raises:
        OSError: there is no room; both files are then as they were, and `read_metrics` reads both.
    """
    earlier = directory / EARLIER_METRICS_FILE
    if earlier.is_file():
        lines = [json.dumps({"step": step, "data": data}) + "\n" for step, data in read_metrics(directory).items()]
        write_atomically(directory / METRICS_FILE, "".join(lines))
        earlier.unlink()
