"""Errors that end a run on purpose; a user reads each as one sentence."""

from __future__ import annotations


class RunStoppedError(RuntimeError):
    """Ends the run; the message is one sentence that names the cause. The trainer adds the saved state to it."""


class ServerLostError(RuntimeError):
    """The server that a request went to is gone; the request did not fail by itself, and the run cannot go on."""


def one_line(error: BaseException) -> str:
    """The class and the message of an error in one line of at most 200 characters."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 200 else f"{text[:197]}..."
