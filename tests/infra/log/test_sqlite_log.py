"""What only a log on disk promises: crashes, locks, readers beside it, failures, plans."""

import asyncio
import itertools
import logging
import sqlite3
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from domain.errors import LogUnavailable, QueueFull, VersionConflict
from domain.log_errors import LogError, LogIsLocked
from domain.ports import EventLog, LogReader, Provenance
from infra.log import queries, writer
from infra.log.batch import Job, Outcome, write_batch
from infra.log.migrate import lock, migrate
from infra.log.sqlite_log import SqliteLog
from infra.log.sqlite_reader import SqliteReader
from tests.builders import (
    BY,
    FINGERPRINT,
    append,
    created,
    forwarded,
    idempotency,
    provenance,
    started,
    state_id,
)
from tests.infra.log.following import verified


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.db"


@pytest.fixture
async def log(path: Path) -> AsyncIterator[SqliteLog]:
    async with await SqliteLog.open(path) as opened:
        yield opened


def rows_on_disk(path: Path) -> int:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        count: int = connection.execute("SELECT count(*) FROM events").fetchone()[0]
    return count


async def test_it_is_an_event_log(log: SqliteLog) -> None:
    whole: EventLog = log
    reading: LogReader = log
    assert whole is reading


async def test_everything_is_there_after_closing_and_opening_again(path: Path) -> None:
    async with await SqliteLog.open(path) as log:
        await log.append([append(created())], provenance=BY, idempotency=idempotency())
        await log.append(
            [append(forwarded(3), 1, logits=(b"1", b"2"), fingerprint=FINGERPRINT)], provenance=BY
        )
        await log.begin_generation(started(), provenance=BY, idempotency=idempotency("stream"))
        head, genesis, rows = await log.head(), await log.genesis(), await log.rows()
        remembered = await log.recall(idempotency())
    async with await SqliteLog.open(path) as log:
        assert (await log.head(), await log.genesis()) == (head, genesis)
        assert await log.rows() == rows
        assert await log.recall(idempotency()) == remembered
        assert await log.begun_generation(idempotency("stream")) == started()
        assert await log.logits(head.position) == (b"1", b"2")
        assert (await log.live_states(limit=1)).state_ids == (state_id(),)
        with pytest.raises(VersionConflict):
            await log.append([append(forwarded(3), 1)], provenance=BY)
        await log.append([append(forwarded(4), 2)], provenance=BY)
        assert await verified(log) == 3


async def test_closing_writes_what_waits_and_empties_the_wal(path: Path) -> None:
    log = await SqliteLog.open(path)
    waiting = [
        asyncio.ensure_future(log.append([append(created(), state=n)], provenance=BY))
        for n in range(20)
    ]
    await asyncio.sleep(0)
    await log.close()
    assert len(await asyncio.gather(*waiting)) == 20
    assert rows_on_disk(path) == 20
    with pytest.raises(LogUnavailable, match="closed"):
        await log.append([append(created(), state=99)], provenance=BY)
    await log.close()


async def test_every_commit_reaches_the_disk(log: SqliteLog) -> None:
    connection = log._writer._connection
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL


CHILD = """
import asyncio, sys
from infra.log.sqlite_log import SqliteLog
from tests.builders import BY, append, created, forwarded

async def writer(log, state):
    await log.append([append(created(), state=state)], provenance=BY)
    print(state, 1, flush=True)
    for version in range(1, 10**6):
        await log.append([append(forwarded(2 + version), version, state=state)], provenance=BY)
        print(state, version + 1, flush=True)

async def main():
    log = await SqliteLog.open(sys.argv[1])
    await asyncio.gather(*(writer(log, state) for state in range(4)))

asyncio.run(main())
"""


def kill_after(path: Path, acknowledgements: int) -> dict[int, int]:
    """Kill a process that appends; the newest version of each state that it acknowledged."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    lines = [child.stdout.readline() for _ in range(acknowledgements)]
    child.kill()
    lines += child.stdout.readlines()
    child.wait()
    whole = (line for line in lines if line.endswith("\n"))
    return {int(state): int(version) for state, version in map(str.split, whole)}


@pytest.mark.parametrize("acknowledgements", [1, 150])
async def test_what_was_acknowledged_survives_a_kill(path: Path, acknowledgements: int) -> None:
    reached = await asyncio.to_thread(kill_after, path, acknowledgements)
    assert reached
    async with await SqliteReader.open(path) as reader:
        beside = await verified(reader)
    async with await SqliteLog.open(path) as log:
        assert await verified(log) == beside
        for state, version in reached.items():
            rows = await log.state_rows(state_id(state))
            assert [row.version for row in rows] == list(range(1, len(rows) + 1))
            assert len(rows) >= version
        await log.append([append(created(), state=9)], provenance=BY)
        assert await verified(log) == beside + 1


async def test_a_second_writer_is_refused(log: SqliteLog, path: Path) -> None:
    with pytest.raises(LogIsLocked, match=r"log\.db\.lock.*one worker only"):
        await SqliteLog.open(path)
    with pytest.raises(LogIsLocked):
        migrate(path)
    link = path.with_name("link.db")
    link.symlink_to(path)
    with pytest.raises(LogIsLocked):
        await SqliteLog.open(link)
    await log.append([append(created())], provenance=BY)


@pytest.fixture
def not_a_log(path: Path) -> Path:
    path.write_bytes(b"this is no database, whatever its name may say" * 100)
    return path


async def test_a_log_that_could_not_be_opened_is_not_left_locked(not_a_log: Path) -> None:
    for _ in range(2):
        with pytest.raises(LogError, match="not a database"):
            await SqliteLog.open(not_a_log)
    lock(not_a_log).release()


async def test_a_reader_works_beside_a_live_writer(log: SqliteLog, path: Path) -> None:
    async with await SqliteReader.open(path) as reader:
        assert await reader.genesis() == await log.genesis()
        for n in range(3):
            await log.append([append(created(), state=n)], provenance=BY)
            assert await reader.head() == await log.head()
        assert await verified(reader) == 3


async def test_a_reader_cannot_write(log: SqliteLog, path: Path) -> None:
    await log.append([append(created())], provenance=BY)
    async with await SqliteReader.open(path) as reader:
        for connection in reader._connections:
            with pytest.raises(sqlite3.OperationalError, match="readonly"):
                await connection.execute("DELETE FROM events")
            (checkpoints,) = await connection.execute_fetchall("PRAGMA wal_autocheckpoint")
            assert checkpoints == (0,)


async def test_a_reader_needs_no_writer_and_takes_no_lock(path: Path) -> None:
    async with await SqliteLog.open(path) as log:
        await log.append([append(created())], provenance=BY)
    async with await SqliteReader.open(path) as reader:
        async with await SqliteLog.open(path) as log:
            await log.append([append(forwarded(3), 1)], provenance=BY)
        assert await verified(reader) == 2


async def test_a_reader_says_that_there_is_no_log(path: Path) -> None:
    with pytest.raises(LogError, match="there is no log at"):
        await SqliteReader.open(path)
    with pytest.raises(LogError, match="there is no log at"):
        await SqliteReader.open(path)  # the first try did not make one


async def test_a_reader_refuses_what_is_no_log(not_a_log: Path) -> None:
    with pytest.raises(LogError, match="cannot be read as a log"):
        await SqliteReader.open(not_a_log)


async def test_reads_run_beside_each_other(log: SqliteLog) -> None:
    await log.append([append(created(), state=n) for n in range(50)], provenance=BY)
    results = await asyncio.gather(*(log.rows(after=n, limit=5) for n in range(40)))
    assert [rows[0].position for rows in results] == list(range(1, 41))


async def test_the_queue_is_bounded(path: Path) -> None:
    async with await SqliteLog.open(path, max_queue=3) as log:
        results = await asyncio.gather(
            *(log.append([append(created(), state=n)], provenance=BY) for n in range(5)),
            return_exceptions=True,
        )
        assert [isinstance(result, QueueFull) for result in results] == [False] * 3 + [True] * 2
        await log.append([append(created(), state=9)], provenance=BY)
        assert await verified(log) == 4


async def test_what_waits_together_is_committed_together(
    log: SqliteLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    taken, gate = threading.Event(), threading.Event()

    def gated(connection: sqlite3.Connection, jobs: list[Job], *_: object) -> list[Outcome]:
        taken.set()
        assert gate.wait(60)
        sizes.append(len(jobs))
        return write_batch(connection, jobs)

    monkeypatch.setattr(writer, "write_batch", gated)
    first = asyncio.ensure_future(log.append([append(created())], provenance=BY))
    assert await asyncio.to_thread(taken.wait, 60)
    rest = [
        asyncio.ensure_future(log.append([append(created(), state=n)], provenance=BY))
        for n in range(1, 30)
    ]
    await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(first, *rest)
    assert sizes == [1, 29]


numbers = itertools.count()


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(delays=st.lists(st.integers(0, 6), min_size=1, max_size=25))
def test_a_cancelled_caller_leaves_no_transaction_open(tmp_path: Path, delays: list[int]) -> None:
    """Callers are cancelled after 0 to 6 turns of the loop: before, while and after the commit."""

    async def scenario() -> None:
        async with await SqliteLog.open(tmp_path / f"{next(numbers)}.db") as log:

            async def cancelled(state: int, turns: int) -> bool:
                task = asyncio.ensure_future(
                    log.append(
                        [append(created(), state=state), append(forwarded(3), 1, state=state)],
                        provenance=BY,
                    )
                )
                for turn in range(turns):
                    await asyncio.sleep(0.0002 * turn)
                task.cancel()
                try:
                    await task
                except asyncio.CancelledError:
                    return False
                return True

            done = await asyncio.gather(*(cancelled(n, turns) for n, turns in enumerate(delays)))
            await log.append([append(created(), state=99)], provenance=BY)
            assert not log._writer._connection.in_transaction
            assert log._writer._unanswered == 0
            await verified(log)
            for state, acknowledged in enumerate(done):
                written = len(await log.state_rows(state_id(state)))
                assert written in ({2} if acknowledged else {0, 2})

    asyncio.run(scenario())


async def test_a_full_disk_records_nothing_and_is_recovered_from(
    log: SqliteLog, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await log.append([append(created())], provenance=BY)
    before = await log.head()
    connection = log._writer._connection
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {pages}")
    big = append(created(), state=1, logits=(b"x" * 100_000,))
    results = await asyncio.gather(
        log.append([big], provenance=BY, idempotency=idempotency()),
        log.append([append(created(), state=2)], provenance=BY),
        log.begin_generation(started(), provenance=BY, idempotency=idempotency("stream")),
        return_exceptions=True,
    )
    assert all(isinstance(result, LogUnavailable) for result in results)
    assert "full" in str(results[0])
    assert "could not be written" in caplog.text
    assert not connection.in_transaction
    assert await log.head() == before
    assert await log.recall(idempotency()) is None
    assert await log.begun_generation(idempotency("stream")) is None

    connection.execute("PRAGMA max_page_count = 1000000")
    (again,) = await log.append([big], provenance=BY, idempotency=idempotency())
    assert again.position == before.position + 1
    assert await verified(log) == 2


async def test_a_failure_while_committing_records_nothing(
    log: SqliteLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    await log.append([append(created())], provenance=BY)

    def fails(connection: sqlite3.Connection, jobs: list[Job], *_: object) -> list[Outcome]:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("DELETE FROM events")
        raise sqlite3.OperationalError("disk I/O error")

    with monkeypatch.context() as patched:
        patched.setattr(writer, "write_batch", fails)
        with pytest.raises(LogUnavailable, match="disk I/O error"):
            await log.append([append(forwarded(3), 1)], provenance=BY)
    assert not log._writer._connection.in_transaction
    await log.append([append(forwarded(3), 1)], provenance=BY)
    assert await verified(log) == 2


async def test_an_append_that_cannot_be_encoded_fails_alone(log: SqliteLog) -> None:
    unpaired = provenance(actor="\ud800")
    results = await asyncio.gather(
        log.append([append(created(), state=1)], provenance=BY),
        log.append([append(created(), state=2)], provenance=unpaired),
        log.append([append(created(), state=3)], provenance=BY, idempotency=idempotency("\udfff")),
        log.append([append(created(), state=4)], provenance=BY),
        return_exceptions=True,
    )
    assert [isinstance(result, UnicodeEncodeError) for result in results] == [
        False,
        True,
        True,
        False,
    ]
    assert await log.state_ids() == [state_id(1), state_id(4)]
    assert await verified(log) == 2


async def test_a_failed_read_is_a_refusal(log: SqliteLog) -> None:
    log._writer._connection.execute("DROP TABLE fingerprints")
    with pytest.raises(LogUnavailable, match="cannot be read"):
        await log.fingerprint("any")
    assert await log.rows() == []


async def test_a_position_is_never_used_again(path: Path) -> None:
    async with await SqliteLog.open(path) as log:
        await log.append([append(created(), state=n) for n in range(3)], provenance=BY)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DELETE FROM events WHERE position = 3")
        connection.execute("DELETE FROM states WHERE created_position = 3")
    async with await SqliteLog.open(path) as log:
        (recorded,) = await log.append([append(created(), state=2)], provenance=BY)
        assert recorded.position == 4
        assert await verified(log) == 3


async def test_keys_are_kept_for_a_day_and_old_ones_go_bit_by_bit(log: SqliteLog) -> None:
    async def use(number: int, by: Provenance) -> None:
        key = idempotency(f"key-{number}")
        await log.append([append(created(), state=number)], provenance=by, idempotency=key)

    for number in range(6):
        await use(number, provenance(recorded_at=f"2026-01-02T00:00:00.{number:06d}Z"))
    await use(6, provenance(recorded_at="2026-01-03T00:00:00.000003Z"))
    left = [n for n in range(7) if await log.recall(idempotency(f"key-{n}"))]
    assert left == [2, 3, 4, 5, 6]  # two old ones went, the third may stay a while
    await use(7, provenance(recorded_at="2026-01-03T00:00:00.000003Z"))
    left = [n for n in range(8) if await log.recall(idempotency(f"key-{n}"))]
    assert left == [3, 4, 5, 6, 7]


STATEMENTS = {name: sql for name, sql in vars(queries).items() if name.isupper()}


@pytest.fixture(scope="module")
def big_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20,000 events of 2,000 states, half of them deleted."""
    path = tmp_path_factory.mktemp("big") / "log.db"

    async def fill() -> None:
        async with await SqliteLog.open(path) as log:
            connection = log._writer._connection
            await log.append([append(created())], provenance=BY)
            with connection:
                connection.execute("BEGIN")
                connection.execute(
                    "WITH RECURSIVE n(i) AS (SELECT 2 UNION ALL SELECT i + 1 FROM n LIMIT 19999)"
                    " INSERT INTO events SELECT i, printf('state-%032x', i / 10), i % 10 + 1,"
                    " at_version, type, schema, payload, fingerprint, recorded_at, actor,"
                    " request_id, hash, hash, source FROM n, (SELECT * FROM events LIMIT 1)"
                )
                connection.execute(
                    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 1999)"
                    " INSERT INTO states SELECT printf('state-%032x', i), 'cacher-tiny',"
                    " 10 * i, 10, i % 2, 0 FROM n"
                )
                connection.execute("ANALYZE")

    asyncio.run(fill())
    return path


@pytest.mark.parametrize("name", STATEMENTS)
def test_no_statement_scans_a_table(big_log: Path, name: str) -> None:
    sql = STATEMENTS[name]
    with closing(sqlite3.connect(big_log)) as connection:
        steps = connection.execute("EXPLAIN QUERY PLAN " + sql, (None,) * sql.count("?"))
        plan = [detail for _, _, _, detail in steps]
    scans = [step for step in plan if step.startswith("SCAN") or "TEMP B-TREE" in step]
    allowed = {
        "LAST_POSITION": ["SCAN sqlite_sequence"],  # a table of one row
        # What was found so far, and what is found in the order of its beginning.
        "DESCENDANTS": ["SCAN found", "SCAN found", "USE TEMP B-TREE FOR ORDER BY"],
        # All of them are asked for, and no row is read.
        "STATE_IDS": [
            "SCAN events USING COVERING INDEX events_by_state",
            "USE TEMP B-TREE FOR ORDER BY",
        ],
        "STANDINGS": ["SCAN json_each VIRTUAL TABLE INDEX 1:"],  # what is asked about
    }
    assert scans == allowed.get(name, [])


async def test_starting_and_listing_do_not_read_the_whole_log(big_log: Path) -> None:
    """Counted in steps of SQLite's virtual machine, which grow with the rows touched."""
    async with await SqliteLog.open(big_log) as log:
        steps = 0

        def count() -> int:
            nonlocal steps
            steps += 1
            return 0

        for connection in log._connections:
            await connection.set_progress_handler(count, 100)
        log._writer._connection.set_progress_handler(count, 100)
        assert (await log.head()).position == 20_000
        page = await log.live_states(limit=20)
        assert len(page.state_ids) == 20
        assert page.next_cursor is not None
        await log.append([append(created(), state=10**6)], provenance=BY)
        assert len(await log.state_rows(state_id(500))) == 10
        assert steps < 100


@pytest.mark.parametrize(
    ("version", "warns"),
    [((3, 6, 23), False), ((3, 40, 1), True), ((3, 51, 2), True), ((3, 51, 3), False)],
)
async def test_versions_of_sqlite_with_the_wal_reset_bug_are_warned_of(
    path: Path,
    version: tuple[int, int, int],
    warns: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", version)
    with caplog.at_level(logging.WARNING):
        await (await SqliteLog.open(path)).close()
    assert ("corrupt a database" in caplog.text) == warns


async def test_the_log_is_readable_with_the_sqlite_shell(log: SqliteLog, path: Path) -> None:
    await log.append([append(created("añb"))], provenance=BY)
    with closing(sqlite3.connect(path)) as connection:
        text = "SELECT json_extract(payload, '$.content.text') FROM events"
        assert connection.execute(text).fetchall() == [("añb",)]
