"""Messages of a run to the launcher besides its metrics: sentences for the user and the number of steps."""

from __future__ import annotations

import logging

MARK = "gcpo notice: "
"""Prefix of the sentences that the launcher shows, each once."""
TOTAL_STEPS = "training/total_steps"
"""Metric of every step: the number of the run's last step."""


def notice(logger: logging.Logger, sentence: str) -> None:
    """Log ``sentence`` as a warning with the prefix that the launcher shows."""
    logger.warning("%s%s", MARK, sentence)
