"""Roots over full tiles are kept in the transaction that fills them, and cost nothing else."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from domain.errors import LogUnavailable
from domain.ids import Position
from domain.merkle import TILE, Tile, tile
from infra.log import queries
from infra.log.batch import write_batch
from infra.log.draft import draft
from infra.log.migrate import migrate
from infra.log.sqlite_log import SqliteLog
from infra.log.sqlite_reader import SqliteReader
from tests.builders import BY, append, created


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.db"


async def add(log: SqliteLog, count: int) -> None:
    """Append so many events, in one batch."""
    begun = len(await log.state_ids()) + len(await log.phantoms())
    appends = [append(created(), state=begun + number) for number in range(count)]
    await log.append(appends, provenance=BY)


async def from_rows(log: SqliteReader) -> list[Tile]:
    """The tiles that there should be."""
    rows = await log.hashes(after=Position(0), limit=-1)
    return [tile(number, rows[number * TILE :][:TILE]) for number in range(len(rows) // TILE)]


def execute(path: Path, *statements: str) -> None:
    """Change the log behind its back."""
    with closing(sqlite3.connect(path)) as connection, connection:
        for sql in statements:
            connection.execute(sql)


async def test_a_tile_is_kept_once_it_is_full(path: Path) -> None:
    async with await SqliteLog.open(path) as log:
        for count, kept in ((TILE - 1, 0), (1, 1), (1, 1), (2 * TILE, 3), (TILE - 2, 3), (1, 4)):
            await add(log, count)
            found = await log.tiles()
            assert len(found) == kept
            assert found == await from_rows(log)
            assert await log.size() == len(await log.rows())
    async with await SqliteReader.open(path) as reader:
        assert await reader.tiles() == found


@pytest.mark.parametrize("left", [0, 2, 5])
async def test_a_log_whose_tiles_are_missing_has_them_once_it_is_opened(
    path: Path, left: int
) -> None:
    async with await SqliteLog.open(path) as log:
        await add(log, 5 * TILE + 3)
    execute(path, f"DELETE FROM tiles WHERE number >= {left}")
    async with await SqliteReader.open(path) as reader:
        assert len(await reader.tiles()) == left
        assert await reader.size() == 5 * TILE + 3
    async with await SqliteLog.open(path) as log:
        assert await log.tiles() == await from_rows(log)
        assert len(await log.tiles()) == 5


async def test_a_batch_whose_tile_cannot_be_kept_is_not_written(path: Path) -> None:
    async with await SqliteLog.open(path) as log:
        await add(log, TILE - 2)
        refuse = "BEFORE INSERT ON tiles BEGIN SELECT raise(ABORT, 'not now'); END"
        execute(path, f"CREATE TRIGGER refuse {refuse}")
        await add(log, 1)
        with pytest.raises(LogUnavailable, match="not now"):
            await add(log, 1)
        assert await log.size() == TILE - 1
        execute(path, "DROP TRIGGER refuse")
        await add(log, 1)
        assert await log.tiles() == await from_rows(log)
        assert len(await log.tiles()) == 1


async def test_rows_removed_behind_its_back_leave_tiles_of_those_that_are_there(
    path: Path,
) -> None:
    async with await SqliteLog.open(path) as log:
        await add(log, TILE - 1)
    execute(path, "DELETE FROM events WHERE position IN (7, 100)")
    async with await SqliteLog.open(path) as log:
        await add(log, 1)
        assert await log.tiles() == []
        await add(log, 2)
        assert await log.tiles() == await from_rows(log)
        assert (await log.tiles())[0].last_position == TILE + 2


@pytest.fixture
def connection(path: Path) -> Iterator[sqlite3.Connection]:
    """A migrated log to write batches into."""
    migrate(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as opened:
        yield opened


def statements(connection: sqlite3.Connection, first: int, count: int) -> list[str]:
    """What SQLite is asked to do by a batch of so many events."""
    asked: list[str] = []
    connection.set_trace_callback(asked.append)
    write_batch(
        connection, [draft([append(created(), state=first + n) for n in range(count)], BY, None)]
    )
    connection.set_trace_callback(None)
    return asked


def test_events_are_read_back_only_when_they_may_fill_a_tile(
    connection: sqlite3.Connection,
) -> None:
    reading = queries.HASHES.partition("?")[0]
    for first, count, reads in ((0, TILE - 1, 0), (TILE - 1, 1, 1), (TILE, 1, 0)):
        asked = statements(connection, first, count)
        assert sum(sql.startswith(reading) for sql in asked) == reads
        assert sum(sql == queries.NEWEST_TILE for sql in asked) == 1
