"""Analyses in a log: they are events, and leave their states as they were."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from domain.chain import follow
from domain.errors import (
    IdempotencyKeyReused,
    StateIsDeleted,
    StateIsErased,
    VersionNotFound,
)
from domain.events import StateDeleted, decode
from domain.ids import Position, Version
from infra.log.sqlite_log import SqliteLog
from tests.builders import (
    BY,
    FINGERPRINT,
    analyzed,
    append,
    created,
    forwarded,
    idempotency,
    state_id,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.db"


@pytest.fixture(params=[False, True], ids=["plain", "erasable"])
async def log(path: Path, request: pytest.FixtureRequest) -> AsyncIterator[SqliteLog]:
    async with await SqliteLog.open(path, erasable=request.param) as opened:
        await opened.append([append(created())], provenance=BY)
        await opened.append([append(forwarded(3), 1)], provenance=BY)
        yield opened


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
        await log.append([append(analyzed(), version)], provenance=BY)
    await log.append([append(forwarded(4), 2)], provenance=BY)
    assert [row.version for row in await log.state_rows(state_id())] == [1, 2, 3]
    newest = await log.newest(state_id())
    assert newest is not None
    assert newest.version == 3
    standing = (await log.standings([state_id()], after=Position(0)))[state_id()]
    assert (standing.version, standing.type) == (3, "text_forwarded")
    assert standing.listed is not None
    assert standing.listed.version == 3


async def test_what_has_not_come_to_be_cannot_be_looked_at(log: SqliteLog) -> None:
    before = await log.head()
    with pytest.raises(VersionNotFound):
        await log.append([append(analyzed(), 3)], provenance=BY)
    with pytest.raises(VersionNotFound):
        await log.append([append(analyzed(), 1, state=7)], provenance=BY)
    assert await log.head() == before


async def test_a_deleted_state_is_not_looked_at(log: SqliteLog) -> None:
    log_deletion = log.append([append(StateDeleted(), 2)], provenance=BY)
    await log_deletion
    with pytest.raises(StateIsDeleted):
        await log.append([append(analyzed(), 1)], provenance=BY)
