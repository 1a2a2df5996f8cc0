"""Taking in what was exported: states among others, and whole logs as they were."""

import sqlite3
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from app.operations.transfer import Export
from domain.chain import Row, blobs_digest, follow, row_hash
from domain.content import StoredLogits
from domain.errors import BrokenExport, IdempotencyKeyReused, VersionConflict
from domain.events import StateDeleted, decode
from domain.ids import Position, Version
from domain.log_errors import LogError, LogIsLocked
from domain.packing import unpacked_lines
from domain.ports import EventLog
from domain.reading import Reading
from domain.state import Deleted, Live, fold
from domain.transfer import Imported, identity, original_row, source_in, source_of
from infra.log.migrate import migrate
from infra.log.restore import restore
from infra.log.sqlite_log import SqliteLog
from infra.log.sqlite_reader import SqliteReader
from tests.builders import (
    BY,
    append,
    created,
    forwarded,
    generated,
    idempotency,
    provenance,
    state_id,
)
from tests.domain.exporting import (
    BLOBS,
    FINGERPRINT,
    LOG_ID,
    LOGITS,
    a_log,
    ended,
    forked,
    lines_of_log,
)

TABLES = ("events", "states", "fingerprints", "logits", "parents", "tiles", "logits_kept")
IMPORTER = provenance(
    actor="importer", request_id="import", recorded_at="2030-01-01T00:00:00.000000Z"
)


@pytest.fixture
async def log(tmp_path: Path) -> AsyncIterator[EventLog]:
    async with await SqliteLog.open(tmp_path / "log.db") as opened:
        yield opened


def imported(rows: list[Row], log_id: str = LOG_ID) -> list[Imported]:
    """Rows of another log as an export brings them."""
    return [
        Imported(
            row=row,
            source=source_of(row, log_id),
            fingerprint=FINGERPRINT if row.fingerprint else None,
            logits=LOGITS.get(row.position, ()),
        )
        for row in rows
    ]


def contents(database: Path) -> dict[str, list[Any]]:
    """Everything that restoring brings back."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        tables = {
            table: connection.execute(f"SELECT * FROM {table} ORDER BY 1, 2").fetchall()
            for table in TABLES
        }
        tables["log"] = connection.execute("SELECT log_id, erasable FROM log").fetchall()
        return tables


def names(folder: Path, beginning: str = "") -> set[str]:
    """The files of a folder."""
    return {file.name for file in folder.glob(f"{beginning}*")}


# adopting


async def test_adopted_events_keep_what_they_are_and_name_where_they_come_from(
    log: EventLog,
) -> None:
    (own,) = await log.append([append(created(), state=7)], provenance=BY)
    adopted = await log.adopt(imported(a_log()), provenance=IMPORTER)
    rows = await log.rows(after=own.position)
    assert [decode(row) for row in rows] == list(adopted)
    head = await log.genesis()
    for row in await log.rows():
        head = follow(head, row)
    assert head == await log.head()
    for row, original in zip(rows, a_log(), strict=True):
        assert (row.actor, row.request_id, row.recorded_at) == msgspec.structs.astuple(IMPORTER)
        source = source_in(row)
        assert source is not None
        assert (source.log_id, source.position) == (LOG_ID, original.position)
        assert original_row(row, source) == original
        assert identity(row, log.log_id) == (LOG_ID, original.hash.hex())
    assert await log.logits(rows[5].position) == BLOBS
    assert await log.fingerprint(FINGERPRINT.id) == FINGERPRINT


async def test_adopted_states_are_there_like_any_other_and_go_on(log: EventLog) -> None:
    await log.adopt(imported(a_log()), provenance=IMPORTER)
    assert await log.state_ids() == [state_id(0), state_id(2), state_id(1)]
    assert await log.descendants(state_id(0)) == [state_id(1)]
    state = fold(map(decode, await log.state_rows(state_id(1))))
    assert isinstance(state, Live)
    assert (state.version, state.content.text) == (2, "abcde")
    assert state.modified_at == BY.recorded_at
    await log.append([append(forwarded(5), 2, state=1)], provenance=IMPORTER)
    state = fold(map(decode, await log.state_rows(state_id(1))))
    assert isinstance(state, Live)
    assert (state.created_at, state.modified_at) == (BY.recorded_at, IMPORTER.recorded_at)


async def test_of_events_of_which_one_cannot_be_adopted_none_is(log: EventLog) -> None:
    await log.append([append(created(), state=2)], provenance=BY)
    before = await log.head()
    with pytest.raises(VersionConflict) as conflict:
        await log.adopt(imported(a_log()), provenance=IMPORTER)
    assert conflict.value.facts["state_id"] == state_id(2)
    assert await log.head() == before
    assert await log.state_rows(state_id(0)) == []


async def test_an_adoption_with_a_key_that_was_used_adopts_nothing_again(log: EventLog) -> None:
    key = idempotency()
    first = await log.adopt(imported(a_log()), provenance=IMPORTER, idempotency=key)
    assert await log.adopt(imported(a_log()), provenance=IMPORTER, idempotency=key) == first
    with pytest.raises(IdempotencyKeyReused):
        await log.adopt(
            imported(a_log()), provenance=IMPORTER, idempotency=idempotency(body=b"other")
        )
    assert await log.size() == len(a_log())


async def test_an_erasable_log_seals_what_it_adopts(tmp_path: Path) -> None:
    async with await SqliteLog.open(tmp_path / "log.db", erasable=True) as log:
        await log.adopt(imported(a_log()), provenance=IMPORTER)
        for row, original in zip(await log.rows(), a_log(), strict=True):
            assert row.sealed
            source = source_in(row)
            assert source is not None
            assert original_row(row, source) == original
        assert await log.logits(Position(6)) == BLOBS


# restoring


async def written(path: Path, *, erasable: bool = False) -> list[bytes]:
    """The lines of an export of a log with more than a tile of events; the log is at ``path``."""
    stored = StoredLogits(kind="top_k", k=1, digest=blobs_digest(BLOBS))
    event = generated(3, "de", stored_logits=stored)
    async with await SqliteLog.open(path, erasable=erasable) as log:
        await log.append([append(created())], provenance=BY)
        made = append(event, 1, fingerprint=FINGERPRINT, logits=BLOBS)
        await log.append([made], provenance=BY)
        await log.append([append(forked(0, 2), state=1)], provenance=BY)
        await log.append([append(created(), state=2)], provenance=BY)
        await log.append([append(StateDeleted(), 1, state=2)], provenance=BY)
        await log.adopt(imported(renamed(a_log())), provenance=IMPORTER)
        await log.append(
            [append(forwarded(3 + n), 1 + n, state=1) for n in range(300)], provenance=BY
        )
        export = await Export.of_log(log)
        return list(unpacked_lines([part async for part in export.parts()]))


def renamed(rows: list[Row]) -> list[Row]:
    """The only row of a log that nobody else knows."""
    row = msgspec.structs.replace(rows[0], state_id=state_id(9))
    return [msgspec.structs.replace(row, hash=row_hash(row))]


async def test_a_restored_log_is_the_one_that_was_exported(tmp_path: Path) -> None:
    lines = await written(tmp_path / "log.db")
    head = restore(Reading(lines), tmp_path / "restored.db")
    assert names(tmp_path, "restored") == {"restored.db", "restored.db.lock"}
    original, restored = contents(tmp_path / "log.db"), contents(tmp_path / "restored.db")
    assert restored == original
    assert len(original["tiles"]) == 1
    assert len(original["logits"]) == 2
    assert len(original["parents"]) == 1
    async with await SqliteLog.open(tmp_path / "restored.db") as log:
        assert await log.head() == head
        state = fold(map(decode, await log.state_rows(state_id(2))))
        assert isinstance(state, Deleted)
        (added,) = await log.append([append(created(), state=3)], provenance=BY)
        assert added.position == head.position + 1
        assert added.row.previous_hash == head.hash


async def test_an_export_of_what_was_restored_is_the_same_file(tmp_path: Path) -> None:
    lines = await written(tmp_path / "log.db")
    restore(Reading(lines), tmp_path / "restored.db")
    async with await SqliteReader.open(tmp_path / "restored.db") as log:
        export = await Export.of_log(log)
        assert list(unpacked_lines([part async for part in export.parts()])) == lines


async def test_a_log_is_restored_over_one_that_has_no_events(tmp_path: Path) -> None:
    migrate(tmp_path / "empty.db")
    (tmp_path / "new.db").touch()
    for name in ("empty.db", "new.db"):
        restore(Reading(ended(lines_of_log(a_log()))), tmp_path / name)
        async with await SqliteReader.open(tmp_path / name) as log:
            assert log.log_id == LOG_ID
            assert await log.rows() == a_log()


async def test_how_far_logits_were_let_go_of_is_restored(tmp_path: Path) -> None:
    restore(Reading(ended(lines_of_log(a_log(), {}), released_until=6)), tmp_path / "log.db")
    async with await SqliteReader.open(tmp_path / "log.db") as log:
        assert await log.released_until() == 6
        assert await log.logits(Position(6)) == ()


@pytest.mark.parametrize("there", ["nothing", "no events"])
def test_a_file_that_is_refused_anywhere_leaves_what_was_there(tmp_path: Path, there: str) -> None:
    database = tmp_path / "log.db"
    if there == "no events":
        migrate(database)
    before = database.read_bytes() if database.exists() else None
    sound = ended(lines_of_log(a_log()))
    for index in range(len(sound)):
        for lines in (sound[:index], [*sound[:index], *sound[index + 1 :]]):
            with pytest.raises(BrokenExport):
                restore(Reading(lines), database)
    assert (database.read_bytes() if database.exists() else None) == before
    assert names(tmp_path) <= {"log.db", "log.db.lock"}


async def test_a_log_is_not_restored_over_events(tmp_path: Path) -> None:
    lines = await written(tmp_path / "log.db")
    before = contents(tmp_path / "log.db")
    with pytest.raises(LogError, match="holds events"):
        restore(Reading(lines), tmp_path / "log.db")
    assert contents(tmp_path / "log.db") == before


async def test_a_log_is_not_restored_where_somebody_writes_or_there_is_no_folder(
    tmp_path: Path,
) -> None:
    lines = ended(lines_of_log(a_log()))
    async with await SqliteLog.open(tmp_path / "log.db"):
        with pytest.raises(LogIsLocked):
            restore(Reading(lines), tmp_path / "log.db")
    with pytest.raises(LogError, match="no folder"):
        restore(Reading(lines), tmp_path / "nowhere" / "log.db")


def test_what_is_no_log_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("Dear reader")
    with pytest.raises(LogError, match="cannot be read"):
        restore(Reading(ended(lines_of_log(a_log()))), tmp_path / "letter.txt")
    assert (tmp_path / "letter.txt").read_text() == "Dear reader"


# erasable logs


async def test_an_export_of_an_erasable_log_holds_no_text_and_is_restored_beside_its_keys(
    tmp_path: Path,
) -> None:
    lines = await written(tmp_path / "log.db", erasable=True)
    plain = await written(tmp_path / "plain.db")
    for held in (b'"text\\"', b"cacher-tiny", b64encode(BLOBS[0])):
        assert not any(held in line for line in lines)
        assert any(held in line for line in plain)
    with pytest.raises(LogError, match="key file"):
        restore(Reading(lines), tmp_path / "restored.db")
    assert not (tmp_path / "restored.db").exists()
    keys = (tmp_path / "log.db.keys").read_bytes()
    (tmp_path / "restored.db.keys").write_bytes(keys)
    restore(Reading(lines), tmp_path / "restored.db")
    assert contents(tmp_path / "restored.db") == contents(tmp_path / "log.db")
    async with await SqliteLog.open(tmp_path / "restored.db") as log:
        state = fold(map(decode, await log.state_rows(state_id(1))))
        assert isinstance(state, Live)
        assert state.version == Version(301)
        assert await log.logits(Position(2)) == BLOBS
