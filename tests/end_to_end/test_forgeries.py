"""Verification finds what a forger plants who hashes the chain anew, and lists what fits."""

import base64
import json
import shutil
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import pytest_asyncio

from app.bootstrap import open_models, open_service
from app.operations import states
from app.operations.verification.verify import Request, Verifier
from domain.config import ConfigChanges
from domain.ids import StateId
from domain.models import Models
from domain.report import Report
from infra.log.sqlite_reader import SqliteReader
from tests.end_to_end.faults import put
from tests.end_to_end.tampering import read, rehash_chain, set_column
from tests.end_to_end.test_verify import SETTINGS, begin, call, draw

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.usefixtures("models_kept"),
]

NOISE = json.dumps({"sealed": base64.b64encode(bytes(64)).decode()}, separators=(",", ":"))
ERASURE = '{"type":"state_erased"}'


class Small(NamedTuple):
    """A log of a parent (events 1 and 2), its fork (event 3), and another state (event 4)."""

    database: Path
    parent: StateId
    child: StateId
    other: StateId


Plant = Callable[[sqlite3.Connection, Small], Any]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def models(models_kept: None) -> AsyncIterator[Models]:
    async with open_models(SETTINGS) as store:
        yield store


async def write(database: Path, *, erasable: bool) -> Small:
    settings = msgspec.structs.replace(SETTINGS, database=str(database), erasable=erasable)
    async with open_service(settings) as service:
        parent = await begin(service, "Once upon a time")
        await draw(service, parent)
        (forked,) = await states.fork(
            service,
            call(),
            parent,
            position=None,
            version=None,
            continuation=None,
            count=1,
            changes=ConfigChanges(),
            metadata=None,
        )
        other = await begin(service, "The end.")
    return Small(database, parent, forked.state_id, other)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def plain(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return await write(tmp_path_factory.mktemp("plain") / "cacher.db", erasable=False)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sealed(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return await write(tmp_path_factory.mktemp("sealed") / "cacher.db", erasable=True)


def forge(small: Small, folder: Path, *plants: Plant) -> Path:
    """A copy of a log, and of its keys if it has any, with something planted behind its chain."""
    copy = folder / "copy.db"
    shutil.copyfile(small.database, copy)
    if Path(f"{small.database}.keys").exists():
        shutil.copyfile(f"{small.database}.keys", f"{copy}.keys")
    with closing(sqlite3.connect(copy)) as connection:
        for plant in plants:
            plant(connection, small)
        rehash_chain(connection)
        connection.commit()
    return copy


async def verify(database: Path, models: Models, **request: Any) -> Report:
    async with await SqliteReader.open(database) as reader:
        return await Verifier(reader, models).run(Request(**request))


def execute(sql: str) -> Plant:
    return lambda connection, small: connection.execute(sql, small._asdict() | {"database": ""})


def insert(
    connection: sqlite3.Connection, position: int, state_id: str, kind: str, payload: str
) -> None:
    """Add an event to a state, and list that it was added."""
    sql = "SELECT coalesce(max(version), 0) + 1 FROM events WHERE state_id = ?"
    (version,) = connection.execute(sql, (state_id,)).fetchone()
    connection.execute(
        "INSERT INTO events SELECT ?, ?, ?, NULL, ?, schema, ?, NULL, recorded_at, actor,"
        " request_id, previous_hash, hash, NULL FROM events WHERE position = 1",
        (position, state_id, version, kind, payload),
    )
    connection.execute("UPDATE states SET version = ? WHERE state_id = ?", (version, state_id))


def rewind(position: int) -> Plant:
    payload = '{"to_position":2,"type":"head_rewound"}'
    return lambda connection, small: insert(
        connection, position, small.other, "head_rewound", payload
    )


def invented(connection: sqlite3.Connection, small: Small) -> None:
    """A whole state where nobody looks, in the list of states."""
    connection.execute("INSERT INTO states VALUES ('state-x', 'cacher-tiny', 100, 1, 0, 0)")
    payload = json.dumps(read(connection, 4))
    insert(connection, -3, "state-x", "state_created", payload)


def erased(*names: str, noise: bool = True) -> Plant:
    """States that are said to be erased; what they held is noise."""

    def plant(connection: sqlite3.Connection, small: Small) -> None:
        for name in names:
            state_id = getattr(small, name)
            if noise:
                sql = "UPDATE events SET payload = ? WHERE state_id = ?"
                connection.execute(sql, (NOISE, state_id))
            (last,) = connection.execute("SELECT max(position) FROM events").fetchone()
            insert(connection, last + 1, state_id, "state_erased", ERASURE)
            sql = "UPDATE states SET deleted = 1, erased = 1 WHERE state_id = ?"
            connection.execute(sql, (state_id,))

    return plant


def without_key(*names: str) -> Plant:
    def plant(connection: sqlite3.Connection, small: Small) -> None:
        (_, _, file) = connection.execute("PRAGMA database_list").fetchone()
        with closing(sqlite3.connect(f"{file}.keys")) as keys:
            for name in names:
                sql = "UPDATE keys SET key = zeroblob(32) WHERE state_id = ?"
                keys.execute(sql, (getattr(small, name),))
            keys.commit()

    return plant


# rows that are not where rows are, and what is not sealed as the log's rows are


PLAIN: dict[str, tuple[str, Plant]] = {
    "a row before the first": ("position", rewind(-5)),
    "a row at position 0": ("position", rewind(0)),
    "a row before all numbers": ("position", rewind(-(2**63))),
    "a state before the first": ("position", invented),
    "an erasure": ("event", erased("other")),
    "an erasure of nothing": ("event", erased("other", noise=False)),
    "a sealed event": ("event", lambda c, small: set_column(c, 2, "payload", NOISE)),
    "that it is erasable": ("event", execute("UPDATE log SET erasable = 1")),
    "an extra tile": ("tiles[0]", execute("INSERT INTO tiles VALUES (0, 3, zeroblob(32))")),
    "a tile after a gap": ("tiles[7]", execute("INSERT INTO tiles VALUES (7, 4, zeroblob(32))")),
    "a tile below 0": ("tiles[-1]", execute("INSERT INTO tiles VALUES (-1, 4, zeroblob(32))")),
    "a tile beyond": ("tiles[0]", execute("INSERT INTO tiles VALUES (0, 999, zeroblob(32))")),
    "another place": (
        "states.created_position",
        execute("UPDATE states SET created_position = -7 WHERE state_id = :other"),
    ),
    "another model": (
        "states.model_id",
        execute("UPDATE states SET model_id = 'x' WHERE state_id = :other"),
    ),
    "a state without events": (
        "states",
        execute("INSERT INTO states VALUES ('state-x', 'cacher-tiny', 999, 3, 0, 0)"),
    ),
    "no parents": ("parents", execute("DELETE FROM parents")),
    "another parent": ("parents", execute("INSERT INTO parents VALUES (:other, :child)")),
    "parents of a state that began anew": (
        "parents",
        execute("INSERT INTO parents VALUES (:parent, :other)"),
    ),
    "parents of nobody": ("parents", execute("INSERT INTO parents VALUES (:parent, 'state-x')")),
}


@pytest.mark.parametrize("name", PLAIN)
async def test_what_is_planted_in_a_log_is_found(
    name: str, plain: Small, models: Models, tmp_path: Path
) -> None:
    field, plant = PLAIN[name]
    report = await verify(forge(plain, tmp_path, plant), models)
    assert report.result == "divergent"
    assert {one.field for one in report.divergences} == {field}
    assert report.erased == 0


async def test_a_log_in_which_nothing_was_planted_is_equal(
    plain: Small, sealed: Small, models: Models, tmp_path: Path
) -> None:
    for small in (plain, sealed):
        report = await verify(forge(small, tmp_path), models)
        assert (report.result, report.events_checked, report.notes) == ("equal", 4, ())


async def test_a_row_before_the_first_is_found_wherever_is_looked(
    plain: Small, models: Models, tmp_path: Path
) -> None:
    copy = forge(plain, tmp_path, rewind(-5))
    requests: list[dict[str, Any]] = [{"state_ids": (plain.parent,)}, {"after": 3}, {"until": 1}]
    for request in requests:
        found = (await verify(copy, models, **request)).divergences
        assert [(one.position, one.state_id, one.field) for one in found] == [
            (-5, plain.other, "position")
        ]


async def test_a_state_whose_parent_cannot_be_read_is_not_held_to_it(
    plain: Small, models: Models, tmp_path: Path
) -> None:
    copy = forge(plain, tmp_path, lambda c, small: set_column(c, 2, "payload", "{}"))
    alone = await verify(copy, models, state_ids=(plain.child,))
    assert (alone.result, alone.notes) == (
        "unverified",
        ("what some states began with cannot be read",),
    )
    both = await verify(copy, models, state_ids=(plain.child, plain.parent))
    assert (both.result, both.divergences[0].state_id) == ("divergent", plain.parent)


# what an erasure hides


def version_gone(connection: sqlite3.Connection, small: Small) -> None:
    connection.execute("DELETE FROM events WHERE position = 2")


def versions_exchanged(connection: sqlite3.Connection, small: Small) -> None:
    for position, version in ((2, None), (1, 2), (2, 1)):
        set_column(connection, position, "version", version)


def written_on(connection: sqlite3.Connection, small: Small) -> None:
    insert(connection, 9, small.parent, "head_rewound", NOISE)


GONE = [erased("parent", "child"), without_key("parent", "child")]

SEALED: dict[str, tuple[str, list[Plant]]] = {
    "a fork that outlives its parent": (
        "origin",
        [erased("parent"), without_key("parent")],
    ),
    "what is not sealed": ("event", [lambda c, small: set_column(c, 4, "payload", "{}")]),
    "what is not sealed and erased": (
        "event",
        [*GONE, lambda c, small: set_column(c, 2, "payload", "{}")],
    ),
    "an erasure that is sealed": (
        "event",
        [*GONE, lambda c, small: set_column(c, 5, "payload", NOISE)],
    ),
    "an erasure that says more": (
        "event",
        [*GONE, lambda c, small: put("type", value="x")(c, 5)],
    ),
    "an event that an erased state lost": ("event", [*GONE, version_gone]),
    "events of an erased state in another order": ("event", [*GONE, versions_exchanged]),
    "a key that was lost": ("event", [without_key("other")]),
    "an event that the key does not open": (
        "event",
        [lambda c, small: set_column(c, 2, "payload", NOISE)],
    ),
}


@pytest.mark.parametrize("name", SEALED)
async def test_what_is_planted_in_an_erasable_log_is_found(
    name: str, sealed: Small, models: Models, tmp_path: Path
) -> None:
    field, plants = SEALED[name]
    report = await verify(forge(sealed, tmp_path, *plants), models)
    assert report.result == "divergent"
    assert {one.field for one in report.divergences} == {field}


async def test_an_erased_state_is_named_and_one_that_goes_on_after_it_is_found(
    sealed: Small, models: Models, tmp_path: Path
) -> None:
    report = await verify(forge(sealed, tmp_path, *GONE), models)
    assert (report.result, report.erased) == ("equal", 2)
    assert report.erased_states == (sealed.parent, sealed.child)
    report = await verify(forge(sealed, tmp_path, *GONE, written_on), models)
    assert report.result == "divergent"
    assert {one.state_id for one in report.divergences} == {sealed.parent}


async def test_a_copy_without_its_keys_is_still_followed(
    sealed: Small, models: Models, tmp_path: Path
) -> None:
    (copy := forge(sealed, tmp_path)).with_name("copy.db.keys").unlink()
    report = await verify(copy, models)
    assert (report.result, report.divergences) == ("unverified", ())
    with closing(sqlite3.connect(copy)) as connection:
        version_gone(connection, sealed)
        set_column(connection, 4, "version", 2)
        rehash_chain(connection)
        connection.commit()
    report = await verify(copy, models)
    assert report.result == "divergent"
    found = [(one.position, one.field) for one in report.divergences]
    assert (4, "event") in found
