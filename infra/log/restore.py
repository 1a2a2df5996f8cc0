"""Restoring an export of a whole log: positions, hashes and all that is kept beside the events.

It is read and checked while it is written into a database of its own, which takes its place only
when all of it has proven itself.
"""

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Final

import msgspec

from domain.chain import Head, Row
from domain.events import DELETED
from domain.log_errors import LogError
from domain.reading import Admitted, Reading
from infra.log import queries
from infra.log.batch import project
from infra.log.files import beside, put
from infra.log.keyring import Keyring, key_file
from infra.log.migrate import apply, carried, lock
from infra.log.sealing import Opener
from infra.log.sqlite_reader import read_only
from infra.log.tiles import extend

_PAGE: Final = 1000
_UNKNOWN_MODEL: Final = ""
"""What is projected of a state that was erased."""


def restore(reading: Reading, path: Path) -> Head:
    """Make the log at ``path`` the one that an export is of; returns its newest event.

    Raises:
        BrokenExport: the file does not prove what it holds; nothing was changed.
        LogIsLocked: another process writes to the log at ``path``.
        LogError: there are events there already, the keys of an erasable log are missing, or it
            cannot be written; nothing was changed.
    """
    path = path.resolve()
    if not path.parent.is_dir():
        raise LogError(f"there is no folder {path.parent}")
    partial = Path(f"{path}.partial")
    held = lock(path)
    try:
        _check_empty(path)
        partial.unlink(missing_ok=True)
        apply(partial, carried())
        with _opener(path, reading) as opened:
            _fill(partial, reading, opened)
        put(partial, path)
    except (OSError, sqlite3.Error) as error:
        raise LogError(f"{path} cannot be written: {error}") from error
    finally:
        for file in (partial, *beside(partial)):
            file.unlink(missing_ok=True)
        held.release()
    return reading.head


def _check_empty(path: Path) -> None:
    if not path.exists() or path.stat().st_size == 0:
        return
    with read_only(path) as connection:
        if connection.execute(queries.LAST_POSITION).fetchone() is not None:
            raise LogError(
                f"{path} holds events: a whole log is restored into a database of its own;"
                " name another one with --database"
            )


@contextmanager
def _opener(path: Path, reading: Reading) -> Iterator[Callable[[Row], Row]]:
    """What opens sealed rows: the keys of an erasable log must be there already."""
    if not reading.header.erasable:
        yield lambda row: row
        return
    log_id = reading.header.checkpoint.log_id
    if not key_file(path).exists():
        raise LogError(
            f"the export is of an erasable log, and its keys are never exported: put its key file"
            f" at {key_file(path)} first"
        )
    with closing(Keyring.open(path, log_id)) as keyring:
        opener = Opener(log_id, keyring)
        yield lambda row: opener.rows([row])[0]


def _fill(partial: Path, reading: Reading, opened: Callable[[Row], Row]) -> None:
    with closing(sqlite3.connect(partial, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = OFF")  # a file that fails is thrown away
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("BEGIN")
        header = reading.header
        connection.execute(queries.NAME_LOG, (header.checkpoint.log_id, header.erasable))
        events = reading.events(opened)
        while page := list(islice(events, _PAGE)):
            _insert(connection, page)
        released_until = 0 if reading.released_until is None else reading.released_until
        connection.execute(queries.COUNT_RELEASED_LOGITS, (0, released_until))
        connection.execute("COMMIT")


def _insert(connection: sqlite3.Connection, page: Sequence[Admitted]) -> None:
    connection.executemany(queries.INSERT_EVENT, [one.row.columns() for one in page])
    _project_unreadable(connection, [one.row for one in page if one.recorded is None])
    project(connection, [one.recorded for one in page if one.recorded is not None])
    fingerprints = {one.fingerprint for one in page if one.fingerprint is not None}
    connection.executemany(
        queries.INSERT_FINGERPRINT, [msgspec.structs.astuple(one) for one in fingerprints]
    )
    blobs = [(one.row.position, step, data) for one in page for step, data in enumerate(one.logits)]
    connection.executemany(queries.INSERT_LOGITS, blobs)
    connection.execute(queries.COUNT_LOGITS, (sum(len(data) for _, _, data in blobs),))
    extend(connection, page[-1].row.position)


def _project_unreadable(connection: sqlite3.Connection, rows: Sequence[Row]) -> None:
    """Project events of states whose keys were destroyed: what they came from is not known."""
    created = [row for row in rows if row.version == 1]
    changed = [row for row in rows if row.version not in (1, None)]
    connection.executemany(
        queries.INSERT_STATE,
        [(row.state_id, _UNKNOWN_MODEL, row.position, row.version) for row in created],
    )
    connection.executemany(
        queries.UPDATE_STATE,
        [(row.version, row.type == DELETED, row.state_id) for row in changed],
    )
