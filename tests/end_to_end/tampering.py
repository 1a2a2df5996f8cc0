"""Changing a log behind its back: as a clumsy hand does it, and as one that re-hashes the chain."""

import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from domain.chain import genesis, row_hash
from infra.log.batch import as_row
from infra.log.queries import LOG_ID, ROWS

Payload = dict[str, Any]
Change = Callable[[Payload], None]
_encoder = msgspec.json.Encoder(order="sorted")


@contextmanager
def tampering(original: Path, copy: Path, *, rehash: bool) -> Iterator[sqlite3.Connection]:
    """A copy of a database to change; afterwards its chain is made whole again, or not."""
    shutil.copyfile(original, copy)
    connection = sqlite3.connect(copy)
    try:
        yield connection
        if rehash:
            rehash_chain(connection)
        connection.commit()
    finally:
        connection.close()


def rehash_chain(connection: sqlite3.Connection) -> None:
    """Give every row the hashes that its columns ask for."""
    head = genesis(*connection.execute(LOG_ID).fetchone()).hash
    for columns in connection.execute(ROWS, (0, 2**63 - 1, -1)).fetchall():
        row = msgspec.structs.replace(as_row(columns), previous_hash=head)
        head = row_hash(row)
        connection.execute(
            "UPDATE events SET previous_hash = ?, hash = ? WHERE position = ?",
            (row.previous_hash, head, row.position),
        )


def read(connection: sqlite3.Connection, position: int) -> Payload:
    sql = "SELECT payload FROM events WHERE position = ?"
    payload: Payload = json.loads(connection.execute(sql, (position,)).fetchone()[0])
    return payload


def edit(connection: sqlite3.Connection, position: int, change: Change) -> None:
    """Change a payload."""
    payload = read(connection, position)
    change(payload)
    set_column(connection, position, "payload", _encoder.encode(payload).decode())


def set_column(connection: sqlite3.Connection, position: int, column: str, value: Any) -> None:
    done = connection.execute(
        f"UPDATE events SET {column} = ? WHERE position = ?", (value, position)
    )
    assert done.rowcount == 1


def remove(connection: sqlite3.Connection, position: int) -> None:
    """Remove an event with its blobs and close the gap in its state's versions."""
    sql = "SELECT state_id, version FROM events WHERE position = ?"
    state_id, version = connection.execute(sql, (position,)).fetchone()
    connection.execute("DELETE FROM events WHERE position = ?", (position,))
    connection.execute("DELETE FROM logits WHERE position = ?", (position,))
    later = "SELECT position FROM events WHERE state_id = ? AND version > ? ORDER BY version"
    for (other,) in connection.execute(later, (state_id, version)).fetchall():
        connection.execute("UPDATE events SET version = version - 1 WHERE position = ?", (other,))
    deleted = "EXISTS (SELECT 1 FROM events WHERE state_id = ?1 AND type = 'state_deleted')"
    project = f"UPDATE states SET version = version - 1, deleted = {deleted} WHERE state_id = ?1"
    connection.execute(project, (state_id,))


def swap(connection: sqlite3.Connection, first: int, second: int) -> None:
    """Exchange two events of one state: what is in their rows, and their blobs."""
    columns = "type, schema, payload, fingerprint, recorded_at, actor, request_id"
    sql = f"SELECT {columns} FROM events WHERE position = ?"
    contents = [connection.execute(sql, (position,)).fetchone() for position in (first, second)]
    marks = ", ".join(f"{column} = ?" for column in columns.split(", "))
    for position, content in zip((second, first), contents, strict=True):
        connection.execute(f"UPDATE events SET {marks} WHERE position = ?", (*content, position))
    move = "UPDATE logits SET position = ? WHERE position = ?"
    connection.executemany(move, [(-first, first), (first, second), (second, -first)])


def edit_blob(connection: sqlite3.Connection, position: int, step: int) -> None:
    """Change the last byte of one stored blob."""
    where = "position = ? AND step = ?"
    sql = f"SELECT data FROM logits WHERE {where}"
    (data,) = connection.execute(sql, (position, step)).fetchone()
    changed = data[:-1] + bytes([data[-1] ^ 1])
    connection.execute(f"UPDATE logits SET data = ? WHERE {where}", (changed, position, step))


def blobs(connection: sqlite3.Connection, position: int) -> tuple[bytes, ...]:
    sql = "SELECT data FROM logits WHERE position = ? ORDER BY step"
    return tuple(data for (data,) in connection.execute(sql, (position,)))
