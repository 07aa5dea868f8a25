"""What a run tells the launcher besides its metrics: sentences that a person must see, and its number of steps."""

from __future__ import annotations

import logging

MARK = "gcpo notice: "
"""The launcher shows what follows it in a line of the log, each sentence once."""
TOTAL_STEPS = "training/total_steps"
"""Metric of every step: the number of the last one."""


def notice(logger: logging.Logger, sentence: str) -> None:
    """Log ``sentence`` as a warning with the mark that the launcher looks for."""
    logger.warning("%s%s", MARK, sentence)
