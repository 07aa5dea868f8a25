"""Groups take turns where a server's prefix cache can't hold the prompts of all of them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Admission:
    """Lets groups in, in the order in which they ask, as long as their tokens fit together.

    Args:
        limit: tokens that may be in at once; a group with more waits until it is alone. ``None``: no limit.
    """

    def __init__(self, limit: float | None) -> None:
        self.limit = limit
        self._inside: list[int] = []
        self._queue: deque[object] = deque()
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def __call__(self, tokens: int) -> AsyncIterator[None]:
        """Wait until ``tokens`` more fit, and hold them inside the ``async with`` block."""
        await self._enter(tokens)
        try:
            yield
        finally:
            async with self._changed:
                self._inside.remove(tokens)
                self._changed.notify_all()

    async def _enter(self, tokens: int) -> None:
        ticket = object()
        async with self._changed:
            self._queue.append(ticket)
            try:
                await self._changed.wait_for(lambda: self._queue[0] is ticket and self._fits(tokens))
                self._inside.append(tokens)
            finally:
                self._queue.remove(ticket)
                self._changed.notify_all()

    def _fits(self, tokens: int) -> bool:
        return self.limit is None or not self._inside or sum(self._inside) + tokens <= self.limit
