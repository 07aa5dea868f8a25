"""The worker program of ``gcpo.rewards.math_verify_pool``, which compares answers with math-verify.

A request is a line of JSON, ``[truth, answer]``; the reply is ``1`` (the same) or ``0``. The first byte, ``r``, signals
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
        seconds: limit of the processor time of a comparison; the system ends this process if one exceeds it.
        memory: bytes of address space.
    """
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # output of a library must not look like a reply
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process even inside a long C function
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))

    from gcpo.rewards.math_verify_rules import same

    logging.disable(logging.CRITICAL)  # suppresses math-verify's warning about a missing time limit

    def verdict(truth: str, answer: str) -> bool:
        try:
            return same(truth, answer)
        except Exception:  # sympy raises many kinds of errors on model output; none of them means "the same"
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
