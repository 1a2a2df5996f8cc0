"""Migrations: forward only, each whole or not at all, never on an unsaved database."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from domain.log_errors import LogError, MigrationChanged, SchemaTooNew
from infra.log.migrate import Migration, SchemaTooOld, apply, carried, migrate
from infra.log.sqlite_log import SqliteLog
from infra.log.sqlite_reader import SqliteReader
from tests.builders import BY, append, created

FIRST = Migration(number=1, name="first", sql="CREATE TABLE one (a INTEGER) STRICT;")
SECOND = Migration(
    number=2,
    name="second",
    sql="CREATE TABLE two (b TEXT) STRICT;\nINSERT INTO two VALUES ('; not the end');",
)
BROKEN = Migration(
    number=3, name="broken", sql="CREATE TABLE three (c TEXT); INSERT INTO nowhere VALUES (1);"
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.db"


def query(path: Path, sql: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(path)) as connection, connection:
        return connection.execute(sql).fetchall()


def test_the_migrations_carried_are_numbered_without_a_gap() -> None:
    assert [m.number for m in carried()] == list(range(1, len(carried()) + 1))
    assert carried()[0].name == "events"


def test_what_is_missing_is_applied_in_order_and_returned(path: Path) -> None:
    assert apply(path, (FIRST,)) == (FIRST,)
    assert apply(path, (FIRST, SECOND)) == (SECOND,)
    assert apply(path, (FIRST, SECOND)) == ()
    found = query(path, "SELECT number, name, checksum FROM schema_migrations ORDER BY number")
    assert found == [(m.number, m.name, m.checksum) for m in (FIRST, SECOND)]
    assert query(path, "SELECT b FROM two") == [("; not the end",)]


def test_a_new_database_needs_no_backup(path: Path) -> None:
    assert migrate(path) == carried()
    assert migrate(path) == ()
    assert {file.name for file in path.parent.iterdir()} <= {"log.db", "log.db.lock"}


def test_a_backup_is_taken_before_the_first_change(path: Path) -> None:
    apply(path, (FIRST,))
    query(path, "INSERT INTO one VALUES (42)")
    apply(path, (FIRST, SECOND))
    backup = path.with_name("log.db.backup-1")
    assert query(backup, "SELECT a FROM one") == [(42,)]
    assert query(backup, "SELECT max(number) FROM schema_migrations") == [(1,)]
    assert [file.name for file in path.parent.glob("*.partial")] == []


def test_a_foreign_database_is_backed_up_too(path: Path) -> None:
    query(path, "CREATE TABLE theirs (x)")
    apply(path, (FIRST,))
    assert query(path.with_name("log.db.backup-0"), "SELECT * FROM theirs") == []


def test_a_migration_that_fails_changes_nothing(path: Path) -> None:
    with pytest.raises(LogError, match="nowhere"):
        apply(path, (FIRST, SECOND, BROKEN))
    assert query(path, "SELECT max(number) FROM schema_migrations") == [(2,)]
    assert query(path, "SELECT 1 FROM sqlite_schema WHERE name = 'three'") == []
    fixed = Migration(number=3, name="fixed", sql="CREATE TABLE three (c TEXT) STRICT;")
    assert apply(path, (FIRST, SECOND, fixed)) == (fixed,)


def test_an_edited_migration_is_refused(path: Path) -> None:
    apply(path, (FIRST,))
    edited = Migration(number=1, name="first", sql=FIRST.sql + " -- better")
    with pytest.raises(MigrationChanged, match=r"migration 1 \(first\).*never be edited"):
        apply(path, (edited, SECOND))
    assert query(path, "SELECT count(*) FROM schema_migrations") == [(1,)]


async def test_a_newer_schema_is_refused(path: Path) -> None:
    migrate(path)
    newer = Migration(number=99, name="later", sql="CREATE TABLE later (x TEXT) STRICT;")
    apply(path, (*carried(), newer))
    wanted = rf"at migration 99, this release knows migrations up to {carried()[-1].number}"
    with pytest.raises(SchemaTooNew, match=wanted):
        await SqliteLog.open(path)
    with pytest.raises(SchemaTooNew, match=wanted):
        await SqliteReader.open(path)
    with pytest.raises(SchemaTooNew, match=wanted):
        migrate(path)


async def test_a_reader_does_not_migrate(path: Path) -> None:
    query(path, "CREATE TABLE theirs (x)")
    with pytest.raises(SchemaTooOld, match="cacher migrate"):
        await SqliteReader.open(path)
    assert query(path, "SELECT name FROM sqlite_schema") == [("theirs",)]


async def test_migrating_first_is_the_same_as_starting_the_server(path: Path) -> None:
    migrate(path)
    async with await SqliteReader.open(path) as reader:
        genesis = await reader.genesis()
    async with await SqliteLog.open(path) as log:
        assert await log.genesis() == genesis
        await log.append([append(created())], provenance=BY)
