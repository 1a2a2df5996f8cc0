"""Reading a log from SQLite: beside a live writer, without a lock, without changing anything."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, ParamSpec, Self, TypeVar
from urllib.parse import quote

import aiosqlite

from domain.canonical import as_json
from domain.chain import Head, Row, genesis, legible
from domain.errors import LogUnavailable
from domain.fingerprint import Fingerprint
from domain.ids import ModelId, Position, StateId, Version
from domain.log_errors import LogError
from domain.merkle import TILE, Tile
from domain.ports import StatePage
from domain.report import Kinship, Listed, Standing
from infra.log import queries
from infra.log.batch import as_row
from infra.log.keyring import Keyring, key_file
from infra.log.migrate import check_current
from infra.log.sealing import Opener
from infra.log.wal import check_wal

P = ParamSpec("P")
T = TypeVar("T")

_ALL: Final = -1
"""SQLite's LIMIT for "no limit"."""

_LAST: Final = 2**63 - 1
"""Above every position and every version."""

_AT_ONCE: Final = 4
"""Rows of a page that are fetched together: more would be faster, and hold more beyond its size."""

_PHANTOMS: Final = 1000
"""States without events that are named."""

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
        opener: Opener | None,
        path: Path,
        connections: Sequence[aiosqlite.Connection],
        opened: AsyncExitStack,
    ) -> None:
        self.path = path
        self.log_id = log_id
        self.erasable = erasable
        self.has_keys = opener is not None
        self._opener = opener
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
            opener = None
            if erasable and key_file(path).exists():  # a copy of the log comes without it
                keyring = await asyncio.to_thread(Keyring.open, path, log_id)
                opened.callback(keyring.close)
                opener = Opener(log_id, keyring)
            return cls(log_id, erasable, opener, path, pool, opened.pop_all())

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
        return await self._rows(queries.ROWS, after, _LAST, _ALL if limit is None else limit)

    async def state_rows(
        self,
        state_id: StateId,
        *,
        after: Version = Version(0),
        until: Version | None = None,
        limit: int | None = None,
    ) -> list[Row]:
        """Rows of one state in order: versions above ``after``, up to and with ``until``."""
        return await self._rows(
            queries.STATE_ROWS,
            state_id,
            after,
            _LAST if until is None else until,
            _ALL if limit is None else limit,
        )

    async def rows_before_first(self, *, limit: int) -> list[Row]:
        """Rows at positions before 1, where no log has any."""
        return await self._rows(queries.ROWS_BEFORE_FIRST, limit)

    async def newest(self, state_id: StateId) -> Row | None:
        """The row of a state's latest version; null if there is no such state."""
        found = await self._rows(queries.STATE_NEWEST, state_id)
        return found[0] if found else None

    async def analyses(self, state_id: StateId, *, after: Position, limit: int) -> list[Row]:
        """Analyses of a state in the order of the log, from the one after a position."""
        return await self._rows(queries.ANALYSES, state_id, after, limit)

    async def page(
        self,
        *,
        after: Position,
        limit: int,
        max_bytes: int,
        state_id: StateId | None = None,
    ) -> list[Row]:
        """Rows in the order of the log, of one state or of all, from the one after a position.

        At most ``limit``, and hardly more of them than have ``max_bytes`` of payload together;
        none only if there are none.
        """
        bound: tuple[object, ...]
        if state_id is None:
            sql, bound = queries.ROWS, (after, _LAST, limit)
        else:
            sql, bound = queries.STATE_PAGE, (state_id, after, limit)
        rows: list[Row] = []
        size = 0
        async with self._connection() as connection, connection.execute(sql, bound) as cursor:
            while size < max_bytes and (found := await cursor.fetchmany(_AT_ONCE)):
                more = [as_row(columns) for columns in found]
                size += sum(len(row.payload) for row in more)
                rows += more
        return await self._opened_rows(rows)

    async def stored_logits(self, position: Position) -> tuple[bytes, ...]:
        """The blobs kept beside an event as they are stored: sealed in an erasable log."""
        return tuple(data for (data,) in await self._fetch(queries.LOGITS, position))

    async def logits(self, position: Position) -> tuple[bytes, ...]:
        """The blobs kept beside an event, in order."""
        stored = await self.stored_logits(position)
        if self._opener is None or not stored:
            return stored
        ((state_id, version),) = await self._fetch(queries.EVENT_PLACE, position)
        return await self._unseal(self._opener.blobs, state_id, version, stored)

    async def fingerprint(self, fingerprint_id: str) -> Fingerprint | None:
        """A fingerprint that some event refers to."""
        for name, document, deterministic in await self._fetch(queries.FINGERPRINT, fingerprint_id):
            return Fingerprint(
                id=name, document=legible(document), deterministic=bool(deterministic)
            )
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
        """Every state that has events, oldest first."""
        return [StateId(state_id) for (state_id,) in await self._fetch(queries.STATE_IDS)]

    async def standings(
        self, state_ids: Sequence[StateId], *, after: Position
    ) -> dict[StateId, Standing]:
        """Where states stand that have events after position ``after``."""
        asked = as_json(list(state_ids))
        return {
            StateId(state_id): Standing(
                first=first, version=newest, type=type_, listed=_listed(projected)
            )
            for state_id, first, newest, type_, *projected in await self._fetch(
                queries.STANDINGS, after, asked
            )
        }

    async def phantoms(self) -> list[tuple[StateId, Position]]:
        """Some of the states that are listed and have no events, and where they are said to begin.

        None only if there are none.
        """
        found = await self._fetch(queries.PHANTOMS, _PHANTOMS)
        return [(StateId(state_id), Position(position)) for state_id, position in found]

    async def kinships(self, *, after: Position, until: Position) -> list[Kinship]:
        """What is listed of which state began with what another held, by where it began."""
        return [
            Kinship(position=position, child=child, parent=parent)
            for position, child, parent in await self._fetch(queries.KINSHIPS, after, until)
        ]

    async def size(self) -> int:
        """Number of events."""
        ((tiles, beyond),) = await self._fetch(queries.SIZE)
        return int(tiles) * TILE + int(beyond)

    async def tiles(self, *, every: bool = False) -> list[Tile]:
        """The roots over full tiles of events that are kept, in order and without a gap.

        With ``every`` also those that come after a gap, or whose number none can have.
        """
        found = [Tile(*columns) for columns in await self._fetch(queries.TILES)]
        kept = (tile for tile in found if tile.number >= 0)
        return found if every else [one for index, one in enumerate(kept) if one.number == index]

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

    async def _rows(self, sql: str, *parameters: object) -> list[Row]:
        """Rows with what their payloads hold, where there is a key to those that are sealed."""
        found = await self._fetch(sql, *parameters)
        return await self._opened_rows([as_row(columns) for columns in found])

    async def _opened_rows(self, rows: list[Row]) -> list[Row]:
        if self._opener is None or not rows:
            return rows
        return await self._unseal(self._opener.rows, rows)

    async def _unseal(self, unseal: Callable[P, T], *given: P.args, **named: P.kwargs) -> T:
        try:
            return await asyncio.to_thread(unseal, *given, **named)
        except sqlite3.Error as error:
            raise LogUnavailable(f"the keys of {self.path.name} cannot be read: {error}") from error

    async def _fetch(self, sql: str, *parameters: object) -> list[Any]:
        async with self._connection() as connection:
            return list(await connection.execute_fetchall(sql, parameters))

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[aiosqlite.Connection]:
        connection = await self._idle.get()
        try:
            yield connection
        except sqlite3.Error as error:
            raise LogUnavailable(f"the log {self.path.name} cannot be read: {error}") from error
        finally:
            self._idle.put_nowait(connection)


def _listed(columns: Sequence[Any]) -> Listed | None:
    model_id, position, version, deleted, erased = columns
    if position is None:
        return None
    return Listed(
        model_id=model_id,
        created_position=position,
        version=version,
        deleted=bool(deleted),
        erased=bool(erased),
    )


def _uri(path: Path) -> str:
    return f"file:{quote(str(path))}?mode=ro"


@contextmanager
def read_only(path: Path) -> Iterator[sqlite3.Connection]:
    """A plain connection to an existing log, for reading alone; its schema has been checked.

    Raises:
        LogError: there is no log, its schema is another one, or it cannot be read.
    """
    if not path.exists():
        raise LogError(f"there is no log at {path}; the server makes one when it starts")
    check_wal(path)
    try:
        with closing(sqlite3.connect(_uri(path), uri=True, isolation_level=None)) as connection:
            check_current(connection, path)
            yield connection
    except sqlite3.Error as error:
        raise LogError(f"{path} cannot be read as a log: {error}") from error


def identity(connection: sqlite3.Connection) -> tuple[str, bool]:
    """The log's name, and whether it is erasable."""
    (log_id,) = connection.execute(queries.LOG_ID).fetchone()
    (erasable,) = connection.execute(queries.ERASABLE).fetchone()
    return log_id, bool(erasable)


def _identify(path: Path) -> tuple[str, bool]:
    with read_only(path) as connection:
        return identity(connection)


@asynccontextmanager
async def _connect(path: Path) -> AsyncIterator[aiosqlite.Connection]:
    async with aiosqlite.connect(
        _uri(path), uri=True, timeout=_BUSY_TIMEOUT_S, isolation_level=None
    ) as connection:
        await connection.execute("PRAGMA query_only = ON")
        # Only the writer moves pages from the WAL into the database.
        await connection.execute("PRAGMA wal_autocheckpoint = 0")
        connection.text_factory = _text
        yield connection


def _text(data: bytes) -> str:
    """Text as it is stored: a damaged one too can be read, and does not match its hash."""
    return data.decode(errors="surrogateescape")
