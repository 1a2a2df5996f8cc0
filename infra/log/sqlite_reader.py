"""Reading a log from SQLite: beside a live writer, without a lock, without changing anything."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import quote

import aiosqlite

from domain.chain import Head, Row, genesis
from domain.errors import LogError, LogUnavailable
from domain.fingerprint import Fingerprint
from domain.ids import ModelId, Position, StateId, Version
from domain.merkle import TILE, Tile
from domain.ports import StatePage
from infra.log import queries
from infra.log.batch import as_row
from infra.log.migrate import check_current

_ALL: Final = -1
"""SQLite's LIMIT for "no limit"."""

_LAST: Final = 2**63 - 1
"""Above every position and every version."""

_BUSY_TIMEOUT_S: Final = 5.0


class SqliteReader:
    """A log that is only read (``LogReader``). Open it with :meth:`open`, and close it.

    Each read is one statement, so it sees one moment of the log. Several can run at once, as many
    as there are connections.
    """

    def __init__(
        self,
        log_id: str,
        erasable: bool,
        path: Path,
        connections: Sequence[aiosqlite.Connection],
        opened: AsyncExitStack,
    ) -> None:
        self.path = path
        self.log_id = log_id
        self.erasable = erasable
        self._genesis = genesis(log_id)
        self._connections = tuple(connections)
        self._opened = opened
        self._idle: asyncio.Queue[aiosqlite.Connection] = asyncio.Queue()
        for connection in connections:
            self._idle.put_nowait(connection)

    @classmethod
    async def open(cls, path: Path | str, *, connections: int = 2) -> Self:
        """Open an existing log of this release's schema.

        Raises:
            LogError: there is no log, or its schema is another one; says what to do.
        """
        path = await asyncio.to_thread(Path(path).resolve)
        log_id, erasable = await asyncio.to_thread(_identify, path)
        async with AsyncExitStack() as opened:
            pool = [await opened.enter_async_context(_connect(path)) for _ in range(connections)]
            return cls(log_id, erasable, path, pool, opened.pop_all())

    async def close(self) -> None:
        """Close the connections once their reads have ended."""
        await self._opened.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def head(self) -> Head:
        """The newest position and hash (the genesis head of an empty log)."""
        found = await self._fetch(queries.HEAD)
        return Head(*found[0]) if found else self._genesis

    async def genesis(self) -> Head:
        """The head before the first event."""
        return self._genesis

    async def rows(self, *, after: Position = Position(0), limit: int | None = None) -> list[Row]:
        """Rows of the whole log in order, from the one after position ``after``."""
        found = await self._fetch(queries.ROWS, after, _LAST, _ALL if limit is None else limit)
        return [as_row(columns) for columns in found]

    async def state_rows(
        self,
        state_id: StateId,
        *,
        after: Version = Version(0),
        until: Version | None = None,
        limit: int | None = None,
    ) -> list[Row]:
        """Rows of one state in order: versions above ``after``, up to and with ``until``."""
        found = await self._fetch(
            queries.STATE_ROWS,
            state_id,
            after,
            _LAST if until is None else until,
            _ALL if limit is None else limit,
        )
        return [as_row(columns) for columns in found]

    async def logits(self, position: Position) -> tuple[bytes, ...]:
        """The blobs kept beside an event, in order."""
        return tuple(data for (data,) in await self._fetch(queries.LOGITS, position))

    async def fingerprint(self, fingerprint_id: str) -> Fingerprint | None:
        """A fingerprint that some event refers to."""
        for name, document, deterministic in await self._fetch(queries.FINGERPRINT, fingerprint_id):
            return Fingerprint(id=name, document=document, deterministic=bool(deterministic))
        return None

    async def live_states(
        self, *, limit: int, cursor: Position | None = None, model_id: ModelId | None = None
    ) -> StatePage:
        """States that are not deleted, newest first, from below ``cursor``."""
        below = _LAST if cursor is None else cursor
        # One more than asked for tells whether there is another page.
        if model_id is None:
            found = await self._fetch(queries.LIVE_STATES, below, limit + 1)
        else:
            found = await self._fetch(queries.LIVE_STATES_OF_MODEL, model_id, below, limit + 1)
        page = found[:limit]
        more = len(found) > limit
        return StatePage(
            tuple(StateId(state_id) for state_id, _ in page),
            Position(page[-1][1]) if page and more else None,
        )

    async def state_ids(self) -> list[StateId]:
        """Every state that ever was, oldest first."""
        return [StateId(state_id) for (state_id,) in await self._fetch(queries.STATE_IDS)]

    async def size(self) -> int:
        """Number of events."""
        ((tiles, beyond),) = await self._fetch(queries.SIZE)
        return int(tiles) * TILE + int(beyond)

    async def tiles(self) -> list[Tile]:
        """The roots over full tiles of events that are kept, in order and without a gap."""
        found = [Tile(*columns) for columns in await self._fetch(queries.TILES)]
        return [tile for index, tile in enumerate(found) if tile.number == index]

    async def hashes(self, *, after: Position, limit: int) -> list[tuple[Position, bytes]]:
        """Hashes of events in order, from the one after position ``after``."""
        return [
            (position, digest)
            for position, digest in await self._fetch(queries.HASHES, after, limit)
        ]

    async def descendants(self, state_id: StateId) -> list[StateId]:
        """States that began with what this one held, and theirs, in the order they began."""
        return [StateId(one) for (one,) in await self._fetch(queries.DESCENDANTS, state_id)]

    async def released_until(self) -> Position:
        """The position up to which stored logits may have been let go of."""
        ((position,),) = await self._fetch(queries.RELEASED_UNTIL)
        return Position(position)

    async def _fetch(self, sql: str, *parameters: object) -> list[Any]:
        connection = await self._idle.get()
        try:
            return list(await connection.execute_fetchall(sql, parameters))
        except sqlite3.Error as error:
            raise LogUnavailable(f"the log {self.path.name} cannot be read: {error}") from error
        finally:
            self._idle.put_nowait(connection)


def _uri(path: Path) -> str:
    return f"file:{quote(str(path))}?mode=ro"


def _identify(path: Path) -> tuple[str, bool]:
    """The log's name and whether it is erasable, once its schema has been checked."""
    if not path.exists():
        raise LogError(f"there is no log at {path}; the server makes one when it starts")
    try:
        with closing(sqlite3.connect(_uri(path), uri=True)) as connection:
            check_current(connection, path)
            (log_id,) = connection.execute(queries.LOG_ID).fetchone()
            (erasable,) = connection.execute(queries.ERASABLE).fetchone()
    except sqlite3.Error as error:
        raise LogError(f"{path} cannot be read as a log: {error}") from error
    return log_id, bool(erasable)


@asynccontextmanager
async def _connect(path: Path) -> AsyncIterator[aiosqlite.Connection]:
    async with aiosqlite.connect(
        _uri(path), uri=True, timeout=_BUSY_TIMEOUT_S, isolation_level=None
    ) as connection:
        await connection.execute("PRAGMA query_only = ON")
        # Only the writer moves pages from the WAL into the database.
        await connection.execute("PRAGMA wal_autocheckpoint = 0")
        yield connection
