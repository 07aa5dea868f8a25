"""The program that a worker of ``gcpo.rewards.pool`` runs: it compares answers with math-verify.

A request is a line of JSON, ``[truth, answer, boxed]``; the reply is ``1`` (the same) or ``0``. Where ``boxed`` is true
``answer`` is an answer, else a text that math-verify looks for one in. After its first byte, ``r``, it is ready.

It is run by its path and imports nothing of gcpo.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import re
import resource
import signal
import sys
from typing import Any

LAST_LETTERS = re.compile(r"[\d\s})] *[A-Za-z]+ *$", re.MULTILINE)
COMMAND_OR_LETTER = re.compile(r"\\[A-Za-z]+|[A-Za-z]")
SPARE_SYMBOLS = ("\\Psi", "\\Xi", "\\Upsilon", "\\Omega", "\\Phi")


def tell_apart(truth: str, answer: str) -> tuple[str, str]:
    """Both with other symbols for the capitals that one of them also has as a small letter.

    math-verify takes all letters for small ones, and so R - r for 0.
    """
    found = [set(COMMAND_OR_LETTER.findall(text)) for text in (truth, answer)]
    clashing = sorted({one for symbols in found for one in symbols if one.isupper() and one.lower() in symbols})
    spare = [symbol for symbol in SPARE_SYMBOLS if symbol not in found[0] | found[1]]
    names = {capital: symbol + " " for capital, symbol in zip(clashing, spare, strict=False)}
    if not names:
        return truth, answer
    renamed = [COMMAND_OR_LETTER.sub(lambda m: names.get(m[0], m[0]), text) for text in (truth, answer)]
    return renamed[0], renamed[1]


def main(seconds: float, memory: int) -> None:
    """Answer requests until the input ends.

    Args:
        seconds: processor time of a comparison; the system ends this process where one needs more.
        memory: bytes of address space.
    """
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no reply
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, also in the middle of a long C function
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))

    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    logging.disable(logging.CRITICAL)  # that no time limit is set
    usual = LatexExtractionConfig(boxed_match_priority=0)
    without_units = dataclasses.replace(
        usual, normalization_config=dataclasses.replace(usual.normalization_config, units=False)
    )
    anchored = [LatexExtractionConfig(try_extract_without_anchor=False), ExprExtractionConfig(False)]

    @functools.lru_cache(maxsize=256)
    def parsed(text: str, config: LatexExtractionConfig) -> list[Any]:
        return parse(f"\\boxed{{{text}}}", [config], parsing_timeout=None)

    def equal(truth: list[Any], answer: list[Any]) -> bool:
        return bool(truth and answer) and verify(truth, answer, allow_set_relation_comp=True, timeout_seconds=None)

    def same(truth: str, answer: str, boxed: bool) -> bool:
        try:
            if not boxed:
                return equal(parsed(truth, usual), parse(answer, anchored, parsing_timeout=None))
            truth, answer = tell_apart(truth, answer)
            # math-verify drops a last letter that could be a unit; in \frac{1}{m}t it is none.
            configs = [usual, without_units] if LAST_LETTERS.search(truth + "\n" + answer) else [usual]
            return any(equal(parsed(truth, config), parsed(answer, config)) for config in configs)
        except Exception:  # sympy raises all sorts of things on what models write: it is not the same
            return False

    same("x+1", "1+x", True)  # the first one loads parsers
    replies.write(b"r")
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        result = same(*json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(b"1" if result else b"0")


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
