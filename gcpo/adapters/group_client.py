"""One server for all requests of a group."""

from __future__ import annotations

import asyncio
from typing import Any

from verl.workers.rollout.llm_server import LLMServerClient

from gcpo.adapters.processes import is_death
from gcpo.faults import ServerLostError


class GroupClient(LLMServerClient):
    """verl's client for the requests of one group, which acquires a server once and releases it at the end.

    All requests of a group go to one server. Without this class, two of the three calls of a
    request would acquire and release it.

    Args:
        client: the worker's client.
        request_id: id of all requests, which therefore share a server's prefix cache.
    """

    def __init__(self, client: LLMServerClient, request_id: str) -> None:
        super().__init__(client.config, client._load_balancer)
        self.request_id = request_id
        self._server: asyncio.Future | None = None

    async def _acquire_server(self, request_id: str, **fields: Any) -> tuple[str, Any]:
        if self._server is None:
            self._server = asyncio.ensure_future(super()._acquire_server(request_id, **fields))
        return await self._server

    def _release_server(self, server_id: str, request_id: str | None = None) -> None:
        """Do nothing, since `close` releases the server at the end of the group."""

    async def ask(self, prompt_ids: list[int], params: dict[str, Any]) -> Any:
        """Return one request.

        Raises:
            ServerLostError: the server or its engine is dead.
        """
        try:
            return await self.generate(self.request_id, prompt_ids=prompt_ids, sampling_params=dict(params))
        except Exception as error:
            if is_death(error):
                raise ServerLostError(f"the generation server is dead: {type(error).__name__}") from error
            raise

    async def close(self) -> None:
        """Release the server, if one was acquired."""
        if self._server is None:
            return
        await asyncio.wait([self._server])
        if self._server.exception() is None:
            super()._release_server(self._server.result()[0], self.request_id)
