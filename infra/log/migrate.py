"""Bring a database to this release's schema: numbered SQL files, forward only.

Each file runs in a transaction of its own, which also records its number and checksum. Before the
first change to a database that holds something, a copy is put beside it.
"""

import hashlib
import sqlite3
from contextlib import closing
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Final

from filelock import BaseFileLock, FileLock, Timeout
from msgspec import Struct

from domain.log_errors import LogError, LogIsLocked, MigrationChanged, SchemaTooNew

_CREATE_TABLE: Final = """
CREATE TABLE IF NOT EXISTS schema_migrations (
    number INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    checksum TEXT NOT NULL,
    applied_at TEXT NOT NULL
) STRICT
"""


class SchemaTooOld(LogError):
    """The database needs migrations before this release can read it."""


class Migration(Struct, frozen=True, kw_only=True):
    """One numbered step; ``checksum`` is the SHA-256 (hexadecimal) of its SQL."""

    number: int
    name: str
    sql: str

    @property
    def checksum(self) -> str:
        """SHA-256 of the SQL, in hexadecimal."""
        return hashlib.sha256(self.sql.encode()).hexdigest()


def carried() -> tuple[Migration, ...]:
    """The migrations of this release, in order."""
    files = (file for file in resources.files("migrations").iterdir() if file.name[:4].isdigit())
    return tuple(
        Migration(
            number=int(file.name[:4]),
            name=file.name[5:].removesuffix(".sql"),
            sql=file.read_text("utf-8"),
        )
        for file in sorted(files, key=lambda file: file.name)
    )


def lock(path: Path) -> BaseFileLock:
    """Become the only one who writes to the database at ``path``, until the lock is released.

    Raises:
        LogIsLocked: someone else is.
    """
    held = FileLock(f"{path}.lock", timeout=0, thread_local=False)
    try:
        held.acquire()
    except Timeout as error:
        raise LogIsLocked(
            f"another process writes to {path} (it holds {path}.lock): a log has one writer."
            " Stop the server or command that uses this log, run one worker only, or give this"
            " process a log of its own"
        ) from error
    return held


def migrate(path: Path) -> tuple[Migration, ...]:
    """Lock the database and apply what is missing; returns what was applied.

    Raises:
        LogIsLocked, SchemaTooNew, MigrationChanged: nothing was changed.
        LogError: it is no database, or a migration failed; those before it were applied.
    """
    path = path.resolve()
    held = lock(path)
    try:
        return apply(path, carried())
    finally:
        held.release()


def apply(path: Path, migrations: tuple[Migration, ...]) -> tuple[Migration, ...]:
    """Apply those of ``migrations`` that are missing. The caller holds the :func:`lock`.

    Raises:
        SchemaTooNew, MigrationChanged: nothing was changed.
        LogError: it is no database, or a migration failed; those before it were applied.
    """
    try:
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            missing = pending(connection, path, migrations)
            if missing:
                _back_up(connection, path, from_number=missing[0].number - 1)
            for migration in missing:
                _apply_one(connection, migration)
    except sqlite3.Error as error:
        raise LogError(f"{path} cannot be opened or migrated: {error}") from error
    return missing


def pending(
    connection: sqlite3.Connection, path: Path, migrations: tuple[Migration, ...]
) -> tuple[Migration, ...]:
    """Those of ``migrations`` that the database has not had yet; reads only.

    Raises:
        SchemaTooNew: the database has had a migration that is not among them.
        MigrationChanged: it has had one with another text.
    """
    exists = connection.execute(
        "SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = 'schema_migrations'"
    ).fetchone()
    found = "SELECT number, checksum FROM schema_migrations ORDER BY number"
    applied: dict[int, str] = dict(connection.execute(found) if exists else ())
    newest = max((m.number for m in migrations), default=0)
    if max(applied, default=0) > newest:
        raise SchemaTooNew(
            f"{path} is at migration {max(applied)}, this release knows migrations up to {newest}:"
            " a newer release has written to it; use that release, or its backup"
            f" {path}.backup-{newest}"
        )
    for migration in migrations:
        if applied.get(migration.number, migration.checksum) != migration.checksum:
            raise MigrationChanged(
                f"migration {migration.number} ({migration.name}) of {path} is not the one this"
                " release carries: an applied migration must never be edited"
            )
    return tuple(m for m in migrations if m.number not in applied)


def check_current(connection: sqlite3.Connection, path: Path) -> None:
    """Refuse a database whose schema is not exactly this release's; reads only.

    Raises:
        SchemaTooOld, SchemaTooNew, MigrationChanged: what is wrong and what to do.
    """
    missing = pending(connection, path, carried())
    if missing:
        raise SchemaTooOld(
            f"{path} is not at the schema of this release (it lacks migration"
            f" {missing[0].number}, {missing[0].name}): run `cacher migrate`, or start the server,"
            " which does the same"
        )


def _back_up(connection: sqlite3.Connection, path: Path, *, from_number: int) -> None:
    if connection.execute("SELECT 1 FROM sqlite_schema LIMIT 1").fetchone() is None:
        return
    backup = Path(f"{path}.backup-{from_number}")
    partial = Path(f"{backup}.partial")
    partial.unlink(missing_ok=True)
    with closing(sqlite3.connect(partial)) as copy:
        connection.backup(copy)
    # Only now: a copy that was cut off never takes the place of a whole one.
    partial.replace(backup)


def _apply_one(connection: sqlite3.Connection, migration: Migration) -> None:
    try:
        # executescript would commit a transaction begun before it, so BEGIN is in the script.
        connection.executescript(f"BEGIN IMMEDIATE;\n{_CREATE_TABLE};\n{migration.sql}")
        connection.execute(
            "INSERT INTO schema_migrations (number, name, checksum, applied_at)"
            " VALUES (?, ?, ?, ?)",
            (
                migration.number,
                migration.name,
                migration.checksum,
                datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z"),
            ),
        )
        connection.execute("COMMIT")
    except BaseException:
        connection.rollback()
        raise
