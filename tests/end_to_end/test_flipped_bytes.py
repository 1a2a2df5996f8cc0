"""One byte changed anywhere in what a log holds: verification names the place."""

import shutil
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import pytest
import pytest_asyncio
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from app.bootstrap import open_models
from app.operations.verification.verify import Request, Verifier
from app.settings import Settings
from domain.chain import COLUMNS
from domain.ids import StateId
from domain.merkle import TILE
from domain.models import Models
from domain.report import Report
from infra.log.sqlite_log import SqliteLog
from infra.log.sqlite_reader import SqliteReader
from tests.builders import BY, append, created
from tests.end_to_end.calls import query
from tests.end_to_end.written import Log

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.usefixtures("models_kept"),
]

SETTINGS: Final = Settings(model_name="cacher-tiny", threads=1, hot_cache_bytes=32 << 20)
PLACES: Final = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
FEW: Final = settings(PLACES, max_examples=5)


class Flip(NamedTuple):
    """A byte of a value of a row, by numbers that stand for what there is, and how it changes."""

    row: int
    byte: int
    change: int


flips = st.builds(Flip, st.integers(0), st.integers(0), st.integers(1, 255))


def flipped(value: Any, flip: Flip) -> Any:
    """The value with the byte changed; of a number, not the lowest, which may be in use."""
    if isinstance(value, int):
        return value ^ flip.change << 8 * (1 + flip.byte % 6)
    data = bytearray(value)
    data[flip.byte % len(data)] ^= flip.change
    return bytes(data)


KEYS: Final = {"events": "position", "logits": "rowid", "fingerprints": "id", "tiles": "number"}


def flip_in(database: Path, table: str, column: str, flip: Flip) -> Any:
    """Change a byte of a column of a row that has something in it; the row's key."""
    key = KEYS[table]
    stored = f"CASE typeof({column}) WHEN 'integer' THEN {column} ELSE CAST({column} AS BLOB) END"
    with closing(sqlite3.connect(database)) as connection, connection:
        rows = connection.execute(
            f"SELECT {key}, typeof({column}), {stored} FROM {table} WHERE {column} IS NOT NULL"
        ).fetchall()
        found, kind, value = rows[flip.row % len(rows)]
        new = "CAST(? AS TEXT)" if kind == "text" else "?"
        sql = f"UPDATE {table} SET {column} = {new} WHERE {key} = ?"
        connection.execute(sql, (flipped(value, flip), found))
    return found


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def models(models_kept: None) -> AsyncIterator[Models]:
    async with open_models(SETTINGS) as store:
        yield store


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def tiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log of two full tiles and some more."""
    path = tmp_path_factory.mktemp("tiled") / "log.db"
    async with await SqliteLog.open(path) as log:
        every = [append(created(), state=number) for number in range(2 * TILE + 7)]
        await log.append(every, provenance=BY)
    return path


async def verified(database: Path, models: Models, *state_ids: StateId) -> Report:
    """The report on the chain, and on some states."""
    async with await SqliteReader.open(database) as reader:
        return await Verifier(reader, models).run(Request(state_ids=state_ids))


def places(report: Report) -> set[tuple[int, str]]:
    return {(one.position, one.field) for one in report.divergences}


TEXTS: Final = ("state_id", "type", "payload", "fingerprint", "recorded_at", "actor", "request_id")
BYTES: Final = ("previous_hash", "hash")
NUMBERS: Final = ("version", "at_version", "schema")


async def test_every_column_of_an_event_is_tried_but_those_that_are_empty_and_its_place() -> None:
    assert {*TEXTS, *BYTES, *NUMBERS} == set(COLUMNS) - {"source", "position"}


@PLACES
@given(column=st.sampled_from([*TEXTS, *BYTES, *NUMBERS]), flip=flips)
@example(column="payload", flip=Flip(3, 40, 0x80))
@example(column="actor", flip=Flip(0, 0, 0xFF))
async def test_a_byte_of_an_event_is_found_by_the_chain(
    column: str, flip: Flip, log: Log, models: Models, tmp_path: Path
) -> None:
    shutil.copy(log.database, tmp_path / "copy.db")
    position = flip_in(tmp_path / "copy.db", "events", column, flip)
    report = await verified(tmp_path / "copy.db", models)
    assert report.result == "divergent"
    assert (position, "hash") in places(report)
    assert {found for found, field in places(report) if field == "hash"} <= {position, position + 1}


@FEW
@given(column=st.sampled_from(TEXTS), flip=flips)
async def test_a_byte_of_an_event_leaves_a_report_that_can_be_sent(
    column: str, flip: Flip, log: Log, models: Models, tmp_path: Path
) -> None:
    shutil.copy(log.database, tmp_path / "copy.db")
    position = flip_in(tmp_path / "copy.db", "events", column, flip)
    async with await SqliteReader.open(tmp_path / "copy.db") as reader:
        report = await Verifier(reader, models).run(Request())
    assert f'"position":{position},'.encode() in msgspec.json.encode(report)
    assert (position, "hash") in places(report)


@FEW
@given(flip=flips)
async def test_a_byte_of_stored_logits_is_found_by_the_event_that_names_their_digest(
    flip: Flip, log: Log, models: Models, tmp_path: Path
) -> None:
    shutil.copy(log.database, tmp_path / "copy.db")
    rowid = flip_in(tmp_path / "copy.db", "logits", "data", flip)
    sql = (
        "SELECT position, state_id FROM logits JOIN events USING (position) WHERE logits.rowid = ?"
    )
    ((position, state_id),) = query(tmp_path / "copy.db", sql, rowid)
    assert places(await verified(tmp_path / "copy.db", models, state_id)) == {(position, "logits")}


@FEW
@given(flip=flips)
async def test_a_byte_of_a_fingerprint_is_found_by_every_event_that_names_it(
    flip: Flip, log: Log, models: Models, tmp_path: Path
) -> None:
    shutil.copy(log.database, tmp_path / "copy.db")
    flip_in(tmp_path / "copy.db", "fingerprints", "document", flip)
    state_id = StateId(log.place("created")[1])
    named = "SELECT position FROM events WHERE fingerprint IS NOT NULL AND state_id = ?"
    expected = {(position, "fingerprint") for (position,) in query(log.database, named, state_id)}
    assert places(await verified(tmp_path / "copy.db", models, state_id)) == expected


@FEW
@given(column=st.sampled_from(["hash", "last_position"]), flip=flips)
async def test_a_byte_of_a_tile_is_found_by_the_events_under_it(
    column: str, flip: Flip, tiled: Path, models: Models, tmp_path: Path
) -> None:
    shutil.copy(tiled, tmp_path / "copy.db")
    tile = flip_in(tmp_path / "copy.db", "tiles", column, flip)
    fields = {field for _, field in places(await verified(tmp_path / "copy.db", models))}
    assert f"tiles[{tile}]" in fields


async def test_copies_that_nobody_touched_are_equal(log: Log, tiled: Path, models: Models) -> None:
    state_id = StateId(log.place("created")[1])
    assert (await verified(log.database, models, state_id)).result == "equal"
    assert (await verified(tiled, models)).result == "equal"
