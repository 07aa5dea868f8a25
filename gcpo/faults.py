"""Errors that end a run on purpose; each message is one sentence for the user."""

from __future__ import annotations


class RunStoppedError(RuntimeError):
    """An error that ends the run; the message is one sentence with the cause. The trainer appends the saved state."""


class ServerLostError(RuntimeError):
    """The server of a request was lost, not only the request, so the run cannot continue."""


def one_line(error: BaseException) -> str:
    """Return the class and the message of an error in one line of at most 200 characters."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 200 else f"{text[:197]}..."
