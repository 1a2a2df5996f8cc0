"""Durable appends: the log against plain sqlite3 doing the same commits.

All write with ``synchronous=FULL``. Plain sqlite3 commits in batches of the sizes that the log's
group commit came to in the same round; once with finished rows, and once with the same work
(encoding, version checks, hashes) but without callers that wait for their answers. The time that an
append waits is held against that of as many callers in line, for each of whom sqlite3 commits a
finished row of its own.
"""

import asyncio
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Final, NamedTuple
from unittest.mock import patch

import infra.log.writer
from benchmarks.bench import Bench
from benchmarks.measured import Measured, Ratio, percentile
from domain.chain import Row
from domain.events import decode
from domain.ids import Version
from domain.ports import Append
from infra.log import queries
from infra.log.batch import Job, Outcome, as_row, write_batch
from infra.log.draft import draft
from infra.log.migrate import migrate
from infra.log.sqlite_log import SqliteLog
from tests.builders import BY, append, created, generated


class Appended(NamedTuple):
    """Seconds for all appends, the batches they were committed in, seconds that each waited."""

    seconds: float
    sizes: list[int]
    waits: list[float]


async def through_the_log(path: Path, writers: int, each: int) -> Appended:
    """``writers`` at once append ``each`` events."""
    sizes: list[int] = []
    waits: list[float] = []

    def counting(connection: sqlite3.Connection, jobs: Sequence[Job], *how: Any) -> list[Outcome]:
        sizes.append(len(jobs))
        return write_batch(connection, jobs, *how)

    async def write(appends: list[Append]) -> None:
        for one in appends:
            begun = time.perf_counter()
            await log.append([one], provenance=BY)
            waits.append(time.perf_counter() - begun)

    counted = patch.object(infra.log.writer, "write_batch", counting)
    async with await SqliteLog.open(path) as log:
        for state in range(writers):
            await log.append([append(created(), state=state)], provenance=BY)
        work = [
            [append(generated(3 + n), n + 1, state=state) for n in range(each)]
            for state in range(writers)
        ]
        with counted:
            begun = time.perf_counter()
            await asyncio.gather(*map(write, work))
            return Appended(time.perf_counter() - begun, sizes, waits)


def open_plainly(path: Path, writers: int) -> sqlite3.Connection:
    """A log in which each writer's state was just created."""
    migrate(path)
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    for state in range(writers):
        write_batch(connection, [draft([append(created(), state=state)], BY, None)])
    return connection


def with_finished_rows(path: Path, writers: int, rows: list[Row], sizes: list[int]) -> list[float]:
    """Seconds for sqlite3 to commit the same rows in batches of these sizes, for each of them."""
    columns = [row.columns() for row in rows]
    waits = []
    versions = [(row.version, 0, row.state_id) for row in rows]
    with closing(open_plainly(path, writers)) as connection:
        start = 0
        for size in sizes:
            begun, batch = time.perf_counter(), slice(start, start + size)
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany(queries.INSERT_EVENT, columns[batch])
            connection.executemany(queries.UPDATE_STATE, versions[batch])
            connection.execute("COMMIT")
            waits.append(time.perf_counter() - begun)
            start += size
    return waits


def with_the_same_work(path: Path, writers: int, rows: list[Row], sizes: list[int]) -> float:
    """Seconds to encode, check, chain and commit the same events in the same batches."""
    appends = [
        Append(
            state_id=row.state_id,
            expected_version=Version((row.version or 0) - 1),
            event=decode(row).event,
        )
        for row in rows
    ]
    with closing(open_plainly(path, writers)) as connection:
        begun, start = time.perf_counter(), 0
        for size in sizes:
            batch = appends[start : start + size]
            write_batch(connection, [draft([one], BY, None) for one in batch])
            start += size
        return time.perf_counter() - begun


def rows(bench: Bench) -> Iterator[Measured]:
    """Against plain sqlite3 doing the same work, and storing finished rows."""
    for writers in bench.sizes.writers:
        rounds = [
            measure(bench.folder / f"log-{writers}-{number}", writers, bench.sizes.appends)
            for number in range(bench.rounds)
        ]
        log, same, finished = ([getattr(one, name) for one in rounds] for name in RATES)
        for against, theirs in (("the same work", same), ("storing finished rows", finished)):
            yield Measured(
                what=f"durable appends to the log, {writers} at once",
                against=f"plain sqlite3, {against}",
                unit="appends/s",
                ratio=Ratio.SPEED,
                ours=log,
                theirs=theirs,
            )
        for name, percent in (("median", 50), ("p99", 99)):
            yield Measured(
                what=f"{name} wait for a durable append, {writers} at once",
                against="plain sqlite3, a commit for each, in line",
                unit="ms",
                ratio=Ratio.COST,
                ours=[1e3 * percentile(one.waits, percent) for one in rounds],
                theirs=[1e3 * percentile(one.in_line, percent) for one in rounds],
            )


RATES: Final = ("log", "same", "finished")


class Round(NamedTuple):
    """Appends per second: of the log, of the same work, of finished rows; seconds of each wait."""

    log: float
    same: float
    finished: float
    waits: list[float]
    in_line: list[float]


def measure(folder: Path, writers: int, events: int) -> Round:
    """One round of everything."""
    folder.mkdir()
    path = folder / "log.db"
    seconds, sizes, waits = asyncio.run(through_the_log(path, writers, events // writers))
    with closing(sqlite3.connect(path)) as connection:
        rows = [*map(as_row, connection.execute(queries.ROWS, (writers, 2**63 - 1, -1)))]
    same = with_the_same_work(folder / "same.db", writers, rows, sizes)
    finished = with_finished_rows(folder / "rows.db", writers, rows, sizes)
    commits = with_finished_rows(folder / "single.db", writers, rows, [1] * len(rows))
    in_line = [sum(commits[last - writers : last]) for last in range(writers, 1 + len(commits))]
    return Round(len(rows) / seconds, len(rows) / same, len(rows) / sum(finished), waits, in_line)
