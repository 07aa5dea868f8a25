"""The output of a command: its lines, its log file, and the summary of a failure."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from gcpo.files import why

LOG_FILE = "train.log"

_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07")
_RAY_PREFIX = re.compile(r"^\([\w.:-]+ pid=\d+(?:, ip=[^)]*)?\) ?")
_EXCEPTION = re.compile(
    r"^(?!ray\.exceptions\.RayTaskError)"
    r"(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Exit|Timeout|Died)\w*(?:\([\w.]+\))?(?::|$)"
)
_WORKER_DIED = re.compile(r"^ray\.exceptions\.\w*(?:Died|Crashed|Actor|OutOfMemory)")
_OWN_ERROR = re.compile(r"^gcpo\.[\w.]+: (.+)")
_DISK_FULL = re.compile(r"No space left on device|Disk quota exceeded")
_FRAME = re.compile(r'^\s*File "([^"]+)", line \d+')
_AFTER_MESSAGE = ("Traceback", "(", "[", "The above", "During handling", "Set the env")


def lines_of(stream: IO[bytes]) -> Iterator[str]:
    """Yield lines without terminal control codes; a carriage return, as in progress bars, also ends a line."""
    for line in io.TextIOWrapper(stream, encoding="utf-8", errors="replace"):
        yield _ANSI.sub("", line).rstrip("\n")


def without_prefix(line: str) -> str:
    """Return the line without Ray's prefix, and with single spaces."""
    return " ".join(_RAY_PREFIX.sub("", line).split())


class Log:
    """A file to which lines are appended. A line that cannot be written is counted, and the next one is tried.

    The reader of a command's output must not stop, because the command would block once the pipe is full.

    Attributes:
        problem: a sentence after a line was lost, before that None.
        lost: number of lines lost since the last written one.
    """

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises:
            OSError: it cannot be opened.
        """
        self.path = path
        self.problem: str | None = None
        self.lost = 0
        self._file = path.open("ab", buffering=0)

    def write(self, line: str) -> None:
        """Append a line."""
        missing = f"### {self.lost} lines are missing here: {self.problem}\n" if self.lost else ""
        data = f"{missing}{line}\n".encode(errors="replace")
        try:
            while data:
                data = data[self._file.write(data) or 0 :]
            self.lost = 0
        except OSError as error:
            self.lost += 1
            self.problem = f"{self.path} cannot be written ({why(error)}); the run goes on, and these lines are lost"
        except ValueError:
            # The command has ended and its log is closed; a surviving worker still prints.
            self.lost += 1

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def error_summary(lines: Sequence[str], limit: int = 12) -> list[str]:
    """Return the lines of a failed run's output that give the reason.

    These are gcpo's own one-sentence refusal or error, or the message of a full disk; else the last exception
    of the main process and its place, with the last exception of a worker if the main process only reports that
    a worker died; else the last lines of the output.
    """
    own = [line for line in lines if line.strip() and not _RAY_PREFIX.match(line)]
    if own and own[-1].startswith(("gcpo: ", "error: ")):
        return [own[-1]]
    found = _last_exception(own, limit)
    for match in filter(None, map(_OWN_ERROR.match, found)):
        return [match[1]]
    if any(map(_DISK_FULL.search, found)):
        return [f"no space is left on the disk ({found[-1].strip()}); make room and start the same command again"]
    if found and not any(map(_WORKER_DIED.match, found)):
        return found
    workers = [_RAY_PREFIX.sub("", line) for line in lines if _RAY_PREFIX.match(line)]
    return [*found, *_last_exception(workers, limit)] or own[-6:]


def _last_exception(lines: Sequence[str], limit: int) -> list[str]:
    """Return the last exception with at most ``limit`` lines of its message, after the place where it was raised."""
    index = next((i for i in reversed(range(len(lines))) if _EXCEPTION.match(lines[i])), None)
    if index is None:
        return []
    message = [lines[index]]
    for line in lines[index + 1 : index + limit]:
        if not line.strip() or line.startswith(_AFTER_MESSAGE):
            break
        message.append(line)
    frame = next((line.strip() for line in reversed(lines[:index]) if _FRAME.match(line)), None)
    return ([f"in {frame}"] if frame else []) + message
