"""Analyses in a log: they are events, and leave their states as they were."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from app.operations.transfer import Export
from domain.analysis.parameters import ClassifyParameters
from domain.chain import follow, row_hash
from domain.errors import (
    IdempotencyKeyReused,
    StateIsDeleted,
    StateIsErased,
    VersionConflict,
    VersionNotFound,
)
from domain.events import StateAnalyzed, StateDeleted, decode
from domain.ids import Position, Version
from domain.packing import unpacked_lines
from domain.reading import Reading
from infra.log import queries
from infra.log.backup import check
from infra.log.keyring import key_file
from infra.log.migrate import migrate
from infra.log.restore import restore
from infra.log.sealing import Places
from infra.log.sqlite_log import SqliteLog
from infra.log.statistics import statistics
from tests.builders import (
    BY,
    analyzed,
    append,
    created,
    forwarded,
    idempotency,
    state_id,
)
from tests.domain.exporting import FINGERPRINT, chained

TABLES = ("events", "states", "fingerprints", "parents", "tiles", "logits_kept")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.db"


@pytest.fixture(params=[False, True], ids=["plain", "erasable"])
async def log(path: Path, request: pytest.FixtureRequest) -> AsyncIterator[SqliteLog]:
    """A log of a state at version 2."""
    async with await SqliteLog.open(path, erasable=request.param) as opened:
        await opened.append([append(created())], provenance=BY)
        await opened.append([append(forwarded(3), 1)], provenance=BY)
        yield opened


async def look(log: SqliteLog, version: int, *, state: int = 0, **fields: Any) -> None:
    await log.append([append(analyzed(), version, state=state, **fields)], provenance=BY)


async def test_an_analysis_has_no_version_and_names_the_one_it_saw(log: SqliteLog) -> None:
    seen = append(analyzed(), 1, fingerprint=FINGERPRINT)
    (recorded,) = await log.append([seen], provenance=BY)
    row = recorded.row
    assert (row.version, row.at_version, row.type) == (None, 1, "state_analyzed")
    assert recorded.version == 1
    assert row.sealed == log.erasable
    (read,) = await log.rows(after=Position(2))
    assert decode(read) == recorded
    head = await log.genesis()
    for one in await log.rows():
        head = follow(head, one)
    assert head == await log.head()


async def test_an_analysis_is_no_conflict_and_makes_none(log: SqliteLog) -> None:
    for version in (2, 1, 2):
        await look(log, version)
    await log.append([append(forwarded(4), 2)], provenance=BY)
    assert [row.version for row in await log.state_rows(state_id())] == [1, 2, 3]
    newest = await log.newest(state_id())
    assert newest is not None
    assert newest.version == 3
    standing = (await log.standings([state_id()], after=Position(0)))[state_id()]
    assert (standing.version, standing.type) == (3, "text_forwarded")
    assert standing.listed is not None
    assert standing.listed.version == 3
    with pytest.raises(VersionConflict):
        await log.append([append(forwarded(4), 2)], provenance=BY)


async def test_analyses_are_listed_by_position(log: SqliteLog) -> None:
    await log.append([append(created(), state=1)], provenance=BY)
    for version in (2, 1, 2):
        await look(log, version)
        await look(log, 1, state=1)
    every = await log.analyses(state_id(), after=Position(0), limit=9)
    assert [(row.position, row.at_version) for row in every] == [(4, 2), (6, 1), (8, 2)]
    assert [decode(row).event for row in every] == [analyzed()] * 3
    assert await log.analyses(state_id(), after=Position(4), limit=1) == every[1:2]
    own = await log.page(after=Position(1), limit=9, max_bytes=1 << 20, state_id=state_id())
    assert [row.position for row in own] == [2, 4, 6, 8]


async def test_what_has_not_come_to_be_cannot_be_looked_at(log: SqliteLog) -> None:
    before = await log.head()
    with pytest.raises(VersionNotFound):
        await look(log, 3)
    with pytest.raises(VersionNotFound):
        await look(log, 1, state=7)
    assert await log.head() == before


async def test_an_ended_state_takes_no_analysis_also_if_it_ends_at_that_moment(
    log: SqliteLog,
) -> None:
    outcomes = await asyncio.gather(
        look(log, 2),
        log.append([append(StateDeleted(), 2)], provenance=BY),
        look(log, 2),
        return_exceptions=True,
    )
    assert [type(one) for one in outcomes] == [type(None), tuple, StateIsDeleted]
    with pytest.raises(StateIsDeleted, match=BY.recorded_at):
        await look(log, 1)
    if log.erasable:
        await log.erase([state_id()], provenance=BY)
        with pytest.raises(StateIsErased):
            await look(log, 1)


async def test_a_key_stands_for_one_analysis(log: SqliteLog) -> None:
    key = idempotency()
    first = await log.append([append(analyzed(), 1)], provenance=BY, idempotency=key)
    await log.append([append(forwarded(4), 2)], provenance=BY)
    other = append(analyzed(result_digest="1" * 64), 3)
    again = await log.append([other], provenance=BY, idempotency=key)
    assert again == first
    remembered = await log.recall(key)
    assert remembered is not None
    assert remembered.events == first
    with pytest.raises(IdempotencyKeyReused):
        await log.append([other], provenance=BY, idempotency=idempotency(body=b"another"))
    assert (await log.head()).position == 4


# what is sealed


async def test_what_was_asked_can_be_read_with_the_key_of_the_state_only(path: Path) -> None:
    secret = ClassifyParameters(text="a purple xylophone", labels=("a", "b"))
    async with await SqliteLog.open(path, erasable=True) as log:
        await log.append([append(created())], provenance=BY)
        seen = append(analyzed(parameters=secret), 1)
        await log.append([seen], provenance=BY)
        (row,) = await log.analyses(state_id(), after=Position(0), limit=1)
        event = decode(row).event
        assert isinstance(event, StateAnalyzed)
        assert event.parameters == secret
        await log.erase([state_id()], provenance=BY)
        (row,) = await log.analyses(state_id(), after=Position(0), limit=1)
        assert (row.sealed, row.opened) == (True, None)
    assert b"xylophone" not in await asyncio.to_thread(path.read_bytes)
    places = Places(log.log_id)
    assert places.event(row) != places.event(msgspec.structs.replace(row, at_version=Version(2)))


# copies


def contents(database: Path) -> dict[str, list[Any]]:
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        return {
            table: connection.execute(f"SELECT * FROM {table} ORDER BY 1, 2").fetchall()
            for table in TABLES
        }


async def test_a_log_with_analyses_is_sound_and_is_restored_as_it_was(
    log: SqliteLog, path: Path, tmp_path: Path
) -> None:
    await look(log, 2, fingerprint=FINGERPRINT)
    await log.append([append(created(), state=1)], provenance=BY)
    await look(log, 1, state=1)
    await look(log, 1)
    if log.erasable:
        await log.erase([state_id(1)], provenance=BY)
    export = await Export.of_log(log)
    parts = [part async for part in export.parts()]
    events = 7 if log.erasable else 6
    assert (check(path).problems, check(path).events) == ((), events)
    assert statistics(path).events_by_type["state_analyzed"] == 3
    copy = tmp_path / "copy.db"
    if log.erasable:
        key_file(copy).write_bytes(key_file(path).read_bytes())
    restore(Reading(unpacked_lines(parts)), copy)
    before, after = contents(path), contents(copy)
    if log.erasable:  # of an erased state nobody knows the model
        erased = [row[:1] + row[2:] for row in before.pop("states")]
        assert [row[:1] + row[2:] for row in after.pop("states")] == erased
    assert after == before


def test_a_copy_that_says_what_cannot_have_been_seen_is_not_sound(path: Path) -> None:
    migrate(path)
    with closing(sqlite3.connect(path)) as connection, connection:
        (log_id,) = connection.execute(queries.LOG_ID).fetchone()
        rows = chained((0, created()), (0, analyzed()), log_id=log_id)
        rows[1] = msgspec.structs.replace(rows[1], at_version=Version(2))
        rows[1] = msgspec.structs.replace(rows[1], hash=row_hash(rows[1]))
        connection.executemany(queries.INSERT_EVENT, [row.columns() for row in rows])
        connection.execute(queries.INSERT_STATE, (state_id(), "cacher-tiny", 1, 1))
    (problem,) = check(path).problems
    assert f"version 2 of {state_id()}, which is at 1" in problem
