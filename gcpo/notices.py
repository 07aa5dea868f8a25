"""Sentences of a run that a person must see: the launcher shows them between the lines of the steps."""

from __future__ import annotations

import logging

MARK = "gcpo notice: "
"""The launcher shows what follows it in a line of the log, each sentence once."""


def notice(logger: logging.Logger, sentence: str) -> None:
    """Log ``sentence`` as a warning with the mark that the launcher looks for."""
    logger.warning("%s%s", MARK, sentence)
