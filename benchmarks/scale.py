"""What a log of a million events costs, against the same of a small log."""

import asyncio
import gzip
import json
import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path

from app.bootstrap import import_file
from app.operations.proofs import Proofs
from app.operations.transfer import Export
from benchmarks.bench import Bench
from benchmarks.measured import Measured, Ratio, seconds
from domain.events import HeadRewound, decode
from domain.ids import Position
from domain.ports import Append
from domain.state import fold
from infra.log.batch import write_batch
from infra.log.draft import draft
from infra.log.migrate import migrate
from infra.log.sqlite_log import SqliteLog
from tests.builders import BY, append, created, generated, state_id
from tests.support import Server

EVENTS_OF_A_STATE = 10
BATCH = 500
SMALL = 1000

Work = Callable[[SqliteLog], Awaitable[object]]


def build(path: Path, events: int, longest: int) -> None:
    """A log of so many events: state 0 has the ``longest`` history, all others a short one."""
    migrate(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        appends = _appends(events, longest)
        while batch := [*islice(appends, BATCH)]:
            write_batch(connection, [draft([one], BY, None) for one in batch])
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _appends(events: int, longest: int) -> Iterator[Append]:
    yield from _history(0, longest)
    for state in range(1, 1 + (events - longest) // EVENTS_OF_A_STATE):
        yield from _history(state, EVENTS_OF_A_STATE)


def _history(state: int, events: int) -> Iterator[Append]:
    """A state that generates 16 tokens and takes them back, again and again."""
    yield append(created(), state=state)
    for version in range(1, events):
        event = generated(3, "sixteen letters.") if version % 2 else HeadRewound(to_position=3)
        yield append(event, version, state=state)


async def timed(path: Path, work: Work) -> float:
    """Milliseconds of some work on an open log."""
    async with await SqliteLog.open(path) as log:
        await log.head()
        begun = time.perf_counter()
        await work(log)
        return 1e3 * (time.perf_counter() - begun)


def opened(path: Path) -> float:
    """Milliseconds until a log is open for reading and writing."""
    begun = time.perf_counter()

    async def open_and_close() -> float:
        async with await SqliteLog.open(path) as log:
            await log.head()
            return time.perf_counter()

    return 1e3 * (asyncio.run(open_and_close()) - begun)


def started(path: Path) -> float:
    """Milliseconds from starting the server to its answer that it is ready."""
    server = Server(path)
    begun = time.perf_counter()
    with server:
        return 1e3 * (time.perf_counter() - begun)


async def list_states(log: SqliteLog) -> None:
    """A page of 100 states, each folded: what ``GET /v1/states`` does."""
    page = await log.live_states(limit=100)
    for one in page.state_ids:
        fold(map(decode, await log.state_rows(one)))


async def list_events(log: SqliteLog) -> None:
    """A page of 100 events from the middle."""
    middle = (await log.head()).position // 2
    await log.rows(after=Position(middle), limit=100)


async def fold_the_longest(log: SqliteLog) -> None:
    """Fold the state that has the longest history."""
    fold(map(decode, await log.state_rows(state_id(0))))


async def prove_inclusion(log: SqliteLog) -> None:
    """That the event in the middle is in the log."""
    size = await log.size()
    await Proofs(log).inclusions([Position(size // 2)], size)


async def prove_consistency(log: SqliteLog) -> None:
    """That the log continues its first half."""
    size = await log.size()
    await Proofs(log).consistency(size // 2, size)


def rows(bench: Bench) -> Iterator[Measured]:
    """Its size, its start, pages, proofs and folds; a part of it in a file."""
    sizes, folder = bench.sizes, bench.folder / "scale"
    folder.mkdir()
    big, small = folder / "big.db", folder / "small.db"
    build(big, sizes.events, sizes.longest)
    build(small, SMALL, EVENTS_OF_A_STATE)
    yield _size(big)
    events = f"a log of {sizes.events:,} events"

    def pair(what: str, measure: Callable[[Path], float]) -> Measured:
        return bench.pair(
            f"{what} of {events}",
            f"of one of {SMALL:,}",
            "ms",
            Ratio.COST,
            ours=lambda: measure(big),
            theirs=lambda: measure(small),
        )

    yield pair("start until ready", started)
    yield pair("opening", opened)
    for what, work in (
        ("page of 100 states", list_states),
        ("page of 100 events", list_events),
        ("proof that an event is part", prove_inclusion),
        ("proof that it continues the half", prove_consistency),
    ):
        yield pair(what, lambda path, work=work: asyncio.run(timed(path, work)))  # type: ignore[misc]
    yield _fold(bench, big)
    moved = folder / "moved.db"
    build(moved, sizes.moved, EVENTS_OF_A_STATE)
    yield from _moved(bench, moved)


def _size(path: Path) -> Measured:
    with closing(sqlite3.connect(path)) as connection:
        ((events, payload),) = connection.execute(
            "SELECT count(*), sum(length(payload)) FROM events"
        )
    return Measured(
        what=f"file of {events:,} events",
        against="their payloads",
        unit="MB",
        ratio=Ratio.COST,
        ours=[path.stat().st_size / 1e6],
        theirs=[payload / 1e6],
    )


def _fold(bench: Bench, path: Path) -> Measured:
    """Folding a long history against reading its rows with plain sqlite3."""

    def plainly() -> float:
        with closing(sqlite3.connect(path)) as connection:
            begun = time.perf_counter()
            sql = "SELECT * FROM events WHERE state_id = ? ORDER BY version"
            connection.execute(sql, (state_id(0),)).fetchall()
            return 1e3 * (time.perf_counter() - begun)

    return bench.pair(
        f"fold of a state of {bench.sizes.longest:,} events, from the disk",
        "plain sqlite3 reading its rows",
        "ms",
        Ratio.COST,
        ours=lambda: asyncio.run(timed(path, fold_the_longest)),
        theirs=plainly,
    )


def _moved(bench: Bench, path: Path) -> Iterator[Measured]:
    """Exporting and restoring a log, against writing and reading its rows as gzip of JSON lines."""
    events, file = bench.sizes.moved, path.with_suffix(".gz")
    plain = path.with_suffix(".plain.gz")

    def rate(work: Callable[[], object]) -> float:
        return events / seconds(work)

    async def export() -> None:
        async with await SqliteLog.open(path) as log:
            with file.open("wb") as target:
                async for part in (await Export.of_log(log)).parts():
                    target.write(part)

    async def restore() -> None:
        database = path.with_suffix(".restored.db")
        database.unlink(missing_ok=True)
        await import_file(file, database)

    yield bench.pair(
        f"export of {events:,} events to a file",
        "plain sqlite3, json and gzip",
        "events/s",
        Ratio.SPEED,
        ours=lambda: rate(lambda: asyncio.run(export())),
        theirs=lambda: rate(lambda: _write_plainly(path, plain)),
    )
    yield bench.pair(
        f"restore of {events:,} events from it, everything checked",
        "plain gzip, json and sqlite3, nothing checked",
        "events/s",
        Ratio.SPEED,
        ours=lambda: rate(lambda: asyncio.run(restore())),
        theirs=lambda: rate(lambda: _read_plainly(plain, path.with_suffix(".rows.db"))),
    )


def _write_plainly(path: Path, target: Path) -> None:
    with closing(sqlite3.connect(path)) as connection, gzip.open(target, "wt") as lines:
        for row in connection.execute("SELECT * FROM events ORDER BY position"):
            columns = [one.hex() if isinstance(one, bytes) else one for one in row]
            lines.write(json.dumps(columns) + "\n")


def _read_plainly(file: Path, database: Path) -> None:
    database.unlink(missing_ok=True)
    migrate(database)
    with closing(sqlite3.connect(database)) as connection, gzip.open(file, "rt") as lines:
        marks = ", ".join("?" * 14)
        connection.executemany(
            f"INSERT INTO events VALUES ({marks})",
            (
                [*columns[:11], *map(bytes.fromhex, columns[11:13]), columns[13]]
                for columns in map(json.loads, lines)
            ),
        )
        connection.commit()
