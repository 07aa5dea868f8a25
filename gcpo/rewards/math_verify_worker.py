"""The program that a worker of ``gcpo.rewards.math_verify_pool`` runs: it compares answers with math-verify.

A request is a line of JSON, ``[truth, answer]``; the reply is ``1`` (the same) or ``0``. The first byte, ``r``, says
that the worker is ready.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys


def main(seconds: float, memory: int) -> None:
    """Answer requests until the input ends.

    Args:
        seconds: processor time of a comparison; the system ends this process where one needs more.
        memory: bytes of address space.
    """
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # output of a library must not look like a reply
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, also in the middle of a long C function
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))

    from gcpo.rewards.math_verify_rules import same

    logging.disable(logging.CRITICAL)  # math-verify warns that no time limit is set

    def verdict(truth: str, answer: str) -> bool:
        try:
            return same(truth, answer)
        except Exception:  # sympy raises many kinds of errors on what models write: it is not the same
            return False

    verdict("x+1", "1+x")  # the first comparison loads parsers
    replies.write(b"r")
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        result = verdict(*json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(b"1" if result else b"0")


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
