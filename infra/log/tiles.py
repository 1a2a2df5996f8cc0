"""The roots over full tiles of events, kept as the log grows; see ``domain/merkle.py``."""

import sqlite3
from contextlib import closing
from pathlib import Path

import msgspec

from domain.ids import Position
from domain.log_errors import LogError
from domain.merkle import TILE, tile
from infra.log import queries


def extend(connection: sqlite3.Connection, newest: Position) -> None:
    """Keep the roots of tiles that are full by now; ``newest`` is the last position written.

    Within the transaction that wrote it. Almost free where no tile is full.
    """
    found = connection.execute(queries.NEWEST_TILE).fetchone()
    number, last = (found[0] + 1, found[1]) if found else (0, 0)
    while newest - last >= TILE:  # else there are fewer rows than that: no need to read them
        rows = connection.execute(queries.HASHES, (last, TILE)).fetchall()
        if len(rows) < TILE:
            return
        full = tile(number, rows)
        connection.execute(queries.INSERT_TILE, msgspec.structs.astuple(full))
        number, last = number + 1, full.last_position


def catch_up(path: Path) -> None:
    """Keep the roots of what was written without them: by an earlier release, or as a copy.

    Raises:
        LogError: the database could not be read or written.
    """
    try:
        with closing(sqlite3.connect(path)) as connection, connection:
            head = connection.execute(queries.HEAD).fetchone()
            extend(connection, Position(head[0] if head else 0))
    except sqlite3.Error as error:
        raise LogError(f"{path}: the roots over its events cannot be kept: {error}") from error
