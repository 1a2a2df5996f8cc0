"""Answers that are sent as they are made: feeds of events, and files."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Final

import anyio
from anyio.abc import TaskGroup
from litestar import Litestar, Request
from litestar.response import Stream
from litestar.response.base import ASGIResponse
from litestar.response.streaming import ASGIStreamingResponse
from litestar.types import Receive, Send

from app import sse

PATIENCE_S: Final = 60.0
"""How long a reader may take nothing."""


class CutOff(Exception):
    """There are no more chunks though these are not all, for a reason that was logged."""


class EventStream(Stream):
    """A response of server-sent events, or of other bytes, that waits for no reader for ever.

    However it ends, ``chunks`` are closed then; a reader that takes nothing for ``PATIENCE_S`` is
    let go of. The connection is cut where they raise :class:`CutOff`.
    """

    def __init__(
        self,
        chunks: AsyncGenerator[bytes, None],
        *,
        media_type: str = sse.MEDIA_TYPE,
        headers: dict[str, str] = sse.HEADERS,
    ) -> None:
        super().__init__(chunks, media_type=media_type, headers=headers)
        self._chunks = chunks

    def to_asgi_response(
        self, app: Litestar | None, request: Request[Any, Any, Any], **_: Any
    ) -> ASGIResponse:
        """What sends it."""
        return _Sending(self._chunks, headers=self.headers, media_type=self.media_type)


class _Sending(ASGIStreamingResponse):
    def __init__(self, chunks: AsyncGenerator[bytes, None], **options: Any) -> None:
        super().__init__(iterator=chunks, **options)
        self._chunks = chunks

    async def send_body(self, send: Send, receive: Receive) -> None:
        """Send the chunks until they end, the client leaves, or it takes nothing any more."""
        async with aclosing(self._chunks), anyio.create_task_group() as group:
            group.start_soon(_until_left, receive, group)
            if await self._send_all(send):
                await _taken(send, b"", more=False)
            group.cancel_scope.cancel()

    async def _send_all(self, send: Send) -> bool:
        try:
            async for chunk in self._chunks:
                if not await _taken(send, chunk, more=True):
                    return False
        except CutOff:
            return False
        return True


async def _taken(send: Send, chunk: bytes, *, more: bool) -> bool:
    """Whether the reader had room for this chunk in time."""
    with anyio.move_on_after(PATIENCE_S) as patience:
        await send({"type": "http.response.body", "body": chunk, "more_body": more})
    return not patience.cancelled_caught


async def _until_left(receive: Receive, group: TaskGroup) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    group.cancel_scope.cancel()
