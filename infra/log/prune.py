"""Letting go of stored logits at once, where no server does it."""

import sqlite3
from contextlib import closing
from pathlib import Path

from domain.log_errors import LogError
from domain.upkeep import Released
from infra.log.migrate import lock
from infra.log.retention import Retention, release
from infra.log.sqlite_reader import read_only


def prune(path: Path, retention: Retention, now: str) -> Released:
    """Let go of all that is beyond the limits; the free space is used again by later events.

    Raises:
        LogIsLocked: a server writes to the log: it does this itself.
        LogError: there is no log of this release's schema, or it cannot be written.
    """
    path = path.resolve()
    with read_only(path):  # nothing is made beside what is no log
        pass
    held, events, gone = lock(path), 0, 0
    try:
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            while True:
                connection.execute("BEGIN IMMEDIATE")
                step = release(connection, retention, now)
                connection.execute("COMMIT")
                if not step.events:
                    return Released(events, gone)
                events, gone = events + step.events, gone + step.bytes
    except sqlite3.Error as error:
        raise LogError(f"{path} could not be pruned to its end: {error}") from error
    finally:
        held.release()
