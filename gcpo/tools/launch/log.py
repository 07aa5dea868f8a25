"""The log of a run: lines of a byte stream, and a file that outlasts a full disk."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from gcpo.files import why

LOG_FILE = "train.log"

_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07")


def clean(line: str) -> str:
    """The line without terminal control codes."""
    return _ANSI.sub("", line).rstrip("\r\n")


def split_lines(chunks: Iterable[bytes]) -> Iterator[str]:
    """Lines of a byte stream; a carriage return ends a line too, since progress bars use nothing else."""
    rest = b""
    for chunk in chunks:
        *lines, rest = re.split(rb"\r\n|\n|\r(?!\n)", rest + chunk)
        for line in lines:
            yield clean(line.decode("utf-8", errors="replace"))
    if rest:
        yield clean(rest.decode("utf-8", errors="replace"))


class Log:
    """A file to which lines are appended. A line that cannot be written is counted, and the next one is tried.

    The reader of a command's output must not stop: the command would wait for it once the pipe is full.
    """

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises:
            OSError: it cannot be opened.
        """
        self.path = path
        self.problem: str | None = None
        """A sentence once a line was lost."""
        self.lost = 0
        self._file = path.open("ab", buffering=0)

    def write(self, line: str) -> None:
        """Append a line."""
        data = (line + "\n").encode("utf-8", errors="replace")
        if self.lost:
            data = f"### {self.lost} lines are missing here: {self.problem}\n".encode() + data
        try:
            while data:
                data = data[self._file.write(data) or 0 :]
            self.lost = 0
        except OSError as error:
            self.lost += 1
            self.problem = f"{self.path} cannot be written ({why(error)}); the run goes on, and these lines are lost"
        except ValueError:
            # The command has ended and its log is closed; a worker that outlived it still prints.
            self.lost += 1

    def close(self) -> None:
        """Close the file."""
        self._file.close()
