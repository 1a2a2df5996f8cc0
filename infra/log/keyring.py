"""The keys of an erasable log, in a SQLite file of their own: ``<database>.keys``.

There is one random 256-bit key for each state. Destroying it overwrites it with zeros where it
lies, in the file and in its journal; the row stays. Rows are only ever added at the end, and
overwritten by others of the same size: SQLite never moves a key to another page, so there is no
copy to forget. What a disk keeps of blocks that were overwritten is beyond a program (NIST SP
800-88).
"""

import os
import secrets
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Final, Self
from urllib.parse import quote

from domain.canonical import as_json
from domain.ids import StateId
from domain.log_errors import LogError
from infra.log import queries

KEY_BYTES: Final = 32
"""256 bits: of the key of a state, and of the secret of a log."""

_BUSY_TIMEOUT_S: Final = 0.5
"""Nobody else has business here for longer, and every append waits meanwhile."""

_JOURNAL_KEPT_BYTES: Final = 1 << 16

_CREATE: Final = """
CREATE TABLE IF NOT EXISTS keyring (
    only INTEGER PRIMARY KEY CHECK (only = 1),
    log_id TEXT NOT NULL,
    secret BLOB NOT NULL
) STRICT;

CREATE TABLE IF NOT EXISTS keys (
    number INTEGER PRIMARY KEY,
    state_id TEXT NOT NULL UNIQUE,
    key BLOB NOT NULL CHECK (length(key) = 32)
) STRICT;
"""
_NAME: Final = "INSERT OR IGNORE INTO keyring (only, log_id, secret) VALUES (1, ?, ?)"
_WHOSE: Final = "SELECT log_id, secret FROM keyring WHERE only = 1"
_FIND: Final = """
SELECT state_id, key FROM keys
WHERE state_id IN (SELECT value FROM json_each(?)) AND key <> zeroblob(32)
"""
_ADD: Final = """
INSERT INTO keys (state_id, key) VALUES (?, ?)
ON CONFLICT (state_id) DO UPDATE SET key = excluded.key
"""
_DESTROY: Final = "UPDATE keys SET key = zeroblob(32) WHERE state_id = ?"


def key_file(database: Path) -> Path:
    """Where the keys of a log are."""
    return Path(f"{database}.keys")


def prepare(database: Path, *, erasable: bool) -> str | None:
    """Make a log without events erasable if it is to be, and check that its keys are there.

    Returns the name of an erasable log, null for another. The caller holds the log's lock, and its
    schema is that of this release.

    Raises:
        LogError: the log has events and is not erasable, or it is and its keys are not here.
    """
    with closing(sqlite3.connect(database, isolation_level=None)) as connection:
        (log_id,) = connection.execute(queries.LOG_ID).fetchone()
        (sealed,) = connection.execute(queries.ERASABLE).fetchone()
        begun = connection.execute(queries.LAST_POSITION).fetchone() is not None
        if not (erasable or sealed):
            return None
        if begun and not sealed:
            raise LogError(
                f"CACHER_ERASABLE is set, but {database} was not created erasable: what its"
                " states hold is there unsealed. Unset it, or begin a log of its own"
            )
        if not begun:
            _make(key_file(database), log_id)
            connection.execute(queries.MAKE_ERASABLE)
    Keyring.open(database, log_id, writable=True).close()  # finishes what a crash cut off
    return str(log_id)


def _make(file: Path, log_id: str) -> None:
    """Make an empty key file that only its owner can read, or finish making it."""
    os.close(os.open(file, os.O_CREAT | os.O_RDWR, 0o600))
    directory = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    with closing(_connect(file, writable=True)) as connection:
        connection.executescript(f"BEGIN IMMEDIATE; {_CREATE} COMMIT;")
        connection.execute(_NAME, (log_id, secrets.token_bytes(KEY_BYTES)))


class Keyring:
    """The key file of one log; may be used from several threads. Open it with :meth:`open`.

    ``secret`` is the log's own, for what must be recognised but not guessed.
    """

    def __init__(self, file: Path, connection: sqlite3.Connection, secret: bytes) -> None:
        self._journal = Path(f"{file}-journal")
        self._connection = connection
        self._lock = threading.Lock()
        self.secret = secret

    @classmethod
    def open(cls, database: Path, log_id: str, *, writable: bool = False) -> Self:
        """Open the key file of a log; only the log's writer may have it ``writable``.

        Raises:
            LogError: it is not there, is not this log's, or cannot be read.
        """
        file = key_file(database)
        if not file.exists():
            raise LogError(
                f"{database} is erasable, and the file of its keys is not at {file}: without it"
                " nothing that its states hold can be read. Put it back"
            )
        with ExitStack() as opened:
            try:
                connection = opened.enter_context(closing(_connect(file, writable=writable)))
                whose, secret = connection.execute(_WHOSE).fetchone() or ("", b"")
            except sqlite3.Error as error:
                raise LogError(f"the keys in {file} cannot be read: {error}") from error
            if whose != log_id:
                raise LogError(
                    f"the keys in {file} are not those of {database}: put back those that are, or"
                    " move it away if the log is a new one"
                )
            keyring = cls(file, connection, secret)
            if writable:
                keyring._scrub()  # of what a crash left
            opened.pop_all()
        return keyring

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def find(self, state_ids: Iterable[StateId]) -> dict[StateId, bytes]:
        """The keys of states; one that was destroyed, or never was, is not among them."""
        wanted = as_json(list(state_ids))
        with self._lock:
            return dict(self._connection.execute(_FIND, (wanted,)).fetchall())

    def add(self, keys: Mapping[StateId, bytes]) -> None:
        """Keep keys of new states; on disk when this returns."""
        with self._transaction():
            self._connection.executemany(_ADD, keys.items())

    def destroy(self, state_ids: Iterable[StateId]) -> None:
        """Overwrite keys; gone from the disk when this returns, as far as a program can tell."""
        with self._transaction():
            self._connection.executemany(_DESTROY, [(state_id,) for state_id in state_ids])

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                self._connection.rollback()
                raise
            self._scrub()

    def _scrub(self) -> None:
        """Overwrite the journal: it holds the pages as they were, with their keys."""
        if not self._journal.exists():
            return
        with self._journal.open("r+b") as journal:
            size = journal.seek(0, os.SEEK_END)
            journal.seek(0)
            journal.write(bytes(size))
            journal.flush()
            os.fsync(journal.fileno())
            journal.truncate(min(size, _JOURNAL_KEPT_BYTES))


def _connect(file: Path, *, writable: bool) -> sqlite3.Connection:
    connection = sqlite3.connect(
        f"file:{quote(str(file))}?mode={'rw' if writable else 'ro'}",
        uri=True,
        timeout=_BUSY_TIMEOUT_S,
        isolation_level=None,
        check_same_thread=False,
    )
    if writable:
        try:
            # The journal stays where it is, so that what it held can be overwritten there.
            connection.execute("PRAGMA journal_mode = PERSIST")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA secure_delete = ON")
        except BaseException:
            connection.close()
            raise
    return connection
