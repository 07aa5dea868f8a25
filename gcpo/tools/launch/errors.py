"""Why a command failed, from what it printed."""

from __future__ import annotations

import re
from collections.abc import Sequence

_RAY_PREFIX = re.compile(r"^\((?P<actor>[\w.:-]+) pid=(?P<pid>\d+)(?:, ip=[^)]*)?\) ?")
_EXCEPTION = re.compile(
    r"^(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Exit|Timeout|Died)\w*(?:\([\w.]+\))?(?::|$)"
)
_RAY_WRAPPER = re.compile(r"^ray\.exceptions\.RayTaskError")
_WORKER_DIED = re.compile(r"^ray\.exceptions\.\w*(?:Died|Crashed|Actor|OutOfMemory)")
_OWN_ERROR = re.compile(r"^gcpo\.[\w.]+: (.+)")
_DISK_FULL = re.compile(r"No space left on device|Disk quota exceeded")
_FRAME = re.compile(r'^\s*File "([^"]+)", line \d+')


def error_summary(lines: Sequence[str], limit: int = 12) -> list[str]:
    """The lines of a failed run's output that say why.

    That is a refusal or an error of our own, which is one sentence, or that the disk is full; else the last exception
    of the main process and where it was raised; with it the last one of a worker where the main process only says that
    a worker died; else the last lines.
    """
    own = [line for line in lines if line.strip() and not _RAY_PREFIX.match(line)]
    if own and own[-1].startswith(("gcpo: ", "error: ")):
        return [own[-1]]
    found = _last_exception(own, limit)
    sentence = next((match[1] for line in found or [] if (match := _OWN_ERROR.match(line))), None)
    if sentence:
        return [sentence]
    if found and any(_DISK_FULL.search(line) for line in found):
        return [f"no space is left on the disk ({found[-1].strip()}); make room and start the same command again"]
    if found and not any(_WORKER_DIED.match(line) for line in found):
        return found
    workers = _last_exception([_RAY_PREFIX.sub("", line) for line in lines if _RAY_PREFIX.match(line)], limit)
    return (found or []) + (workers or []) or own[-6:]


def _last_exception(lines: Sequence[str], limit: int) -> list[str] | None:
    indexes = [i for i, line in enumerate(lines) if _EXCEPTION.match(line) and not _RAY_WRAPPER.match(line)]
    if not indexes:
        return None
    index = indexes[-1]
    message = [lines[index]]
    for line in lines[index + 1 : index + limit]:
        if not line.strip() or line.startswith(("Traceback", "(", "[", "The above", "During handling", "Set the env")):
            break
        message.append(line)
    frame = next((line.strip() for line in reversed(lines[:index]) if _FRAME.match(line)), None)
    return ([f"in {frame}"] if frame else []) + message
