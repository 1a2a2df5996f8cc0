"""The log as it grows, for any number of readers: first what there is, then what comes.

A reader asks for the page after the last position it has, waits until the log has grown beyond
that, and asks again. Positions only grow, so nothing is missed and nothing comes twice. Nothing is
kept for a reader but the page it is reading: one that is slow is only further behind. Readers at
the same place share one read.
"""

import asyncio
from collections.abc import AsyncGenerator
from typing import Final

from msgspec import Struct

from app import sse
from app.schemas import EventView
from domain.chain import Row
from domain.events import DELETED, ERASED
from domain.ids import Position, StateId
from domain.ports import EventLog

PAGE_EVENTS: Final = 256
PAGE_BYTES: Final = 256 << 10
HEARTBEAT_S: Final = 15.0
RETRY_MS: Final = 2000

Chunks = AsyncGenerator[bytes, None]
"""Pieces of a stream of server-sent events."""


class _Written(Struct, frozen=True):
    """An event as it is sent; ``ends`` its state or not."""

    position: Position
    state_id: StateId
    ends: bool
    data: bytes

    @classmethod
    def of(cls, row: Row) -> "_Written":
        data = sse.event("recorded", EventView.of(row), row.position)
        return cls(row.position, row.state_id, row.type in (DELETED, ERASED), data)


_Page = tuple[_Written, ...]


class Feeds:
    """Feeds of one log."""

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self._stopped: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._coming: dict[Position, asyncio.Future[_Page]] = {}

    def stop(self) -> None:
        """End every feed with the page that it is sending: clients come back by themselves."""
        if not self._stopped.done():
            self._stopped.set_result(None)

    async def is_over(self, state_id: StateId, after: Position) -> bool:
        """Whether a state has ended and nothing happened to it after a position."""
        return await self._has_ended(state_id) and not await self._past(after, state_id)

    async def follow(self, after: Position, state_id: StateId | None = None) -> Chunks:
        """Events after a position, of one state or of all; then each one as it comes.

        That of a state ends when the state does. One that nothing happens to says so.
        """
        yield sse.retry(RETRY_MS)
        ended = False
        if state_id is not None:  # its past by its own index, its future from the log of all
            ended = await self._has_ended(state_id)
            newest = (await self._log.head()).position
            while page := await self._past(after, state_id):
                after = page[-1].position
                ended = ended or any(one.ends for one in page)
                yield b"".join(one.data for one in page)
            after = max(after, newest)
        clock = asyncio.get_running_loop().time
        due = clock() + HEARTBEAT_S
        while not ended and not self._stopped.done():
            page = await self._next(after, due - clock())
            own = [one for one in page if state_id in (None, one.state_id)]
            if own or not page:
                yield b"".join(one.data for one in own) or sse.HEARTBEAT
                due = clock() + HEARTBEAT_S
            after = page[-1].position if page else after
            ended = state_id is not None and any(one.ends for one in own)
        if ended and not self._stopped.done():  # else there may be more of its past
            yield sse.event("end", {})

    async def _has_ended(self, state_id: StateId) -> bool:
        newest = await self._log.newest(state_id)
        return newest is not None and newest.type in (DELETED, ERASED)

    async def _past(self, after: Position, state_id: StateId) -> _Page:
        """What there is of a state after a position; nothing if the server stops.

        Read anew for each reader: it must hold all that the head, read before, stands for.
        """
        return () if self._stopped.done() else await self._read(after, state_id)

    async def _next(self, after: Position, patience_s: float) -> _Page:
        """What comes after a position; nothing if it takes too long, or the server stops.

        Whoever waits at the same place gets the same page, and cannot cancel it.
        """
        if after not in self._coming:
            self._coming[after] = asyncio.ensure_future(self._come(after))
            self._coming[after].add_done_callback(lambda _: self._coming.pop(after))
        coming = self._coming[after]
        await asyncio.wait(
            (coming, self._stopped), timeout=patience_s, return_when=asyncio.FIRST_COMPLETED
        )
        return coming.result() if coming.done() else ()

    async def _come(self, after: Position) -> _Page:
        await self._log.grown(after)
        return await self._read(after)

    async def _read(self, after: Position, state_id: StateId | None = None) -> _Page:
        rows = await self._log.page(
            after=after, limit=PAGE_EVENTS, max_bytes=PAGE_BYTES, state_id=state_id
        )
        return tuple(map(_Written.of, rows))
