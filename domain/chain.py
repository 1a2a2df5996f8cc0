"""The hash chain: each row's hash covers the row before it and every other column.

``hash = SHA-256(previous_hash || column || column ...)``. A column is a type tag, then for text
and blobs a length, then the value, so that no two different rows have the same encoding. The
payload is hashed as the exact bytes stored. Whoever keeps the newest position and hash can prove
later that nothing before it was altered, removed or reordered.
"""

import hashlib
import struct
from typing import Any, Final

from msgspec import Struct, structs

from domain.ids import Position, StateId, Version
from domain.log_errors import ChainBroken

SEALED: Final = '{"sealed":'
"""What a sealed payload begins with: it is JSON as well, with the ciphertext in base64."""


class Row(Struct, frozen=True, kw_only=True):
    """One stored event, as it lies in the log.

    ``version`` is null for an event that leaves its state as it was; ``at_version`` then says
    which version it looked at. ``recorded_at`` is RFC 3339, UTC, with microseconds. ``source``
    is JSON of where an imported event comes from (:class:`domain.transfer.Source`).

    A sealed payload is ciphertext; ``opened`` is what it holds, for whoever has the key. It is no
    column.
    """

    position: Position
    state_id: StateId
    version: Version | None
    at_version: Version | None
    type: str
    schema: int
    payload: str
    fingerprint: str | None
    recorded_at: str
    actor: str
    request_id: str
    previous_hash: bytes
    hash: bytes
    source: str | None = None
    opened: str | None = None

    @property
    def sealed(self) -> bool:
        """Whether the payload is ciphertext."""
        return self.payload.startswith(SEALED)

    def columns(self) -> tuple[Any, ...]:
        """What is stored of it, in order."""
        return tuple(getattr(self, name) for name in COLUMNS)


COLUMNS: Final = tuple(name for name in Row.__struct_fields__ if name != "opened")
"""The columns of a stored row, in order."""


class Head(Struct, frozen=True):
    """The newest row of a log: its position and hash."""

    position: Position
    hash: bytes


_GENESIS: Final = b"cacher-api3 log 1\0"


def genesis(log_id: str) -> Head:
    """The head of a log that has no events yet; it names the log."""
    return Head(Position(0), hashlib.sha256(_GENESIS + log_id.encode()).digest())


_integer: Final = struct.Struct(">cq").pack


def _column(value: int | str | None) -> bytes:
    if value is None:
        return b"N"
    if isinstance(value, int):
        return _integer(b"I", value)
    data = value.encode(errors="surrogateescape")  # as stored, also where that is no UTF-8
    return _integer(b"T", len(data)) + data


def row_hash(row: Row) -> bytes:
    """SHA-256 over the previous hash and every column of ``row`` but the hash itself.

    The source is a column where there is one: a row of an event that was not imported has none.
    """
    columns = (
        row.position,
        row.state_id,
        row.version,
        row.at_version,
        row.type,
        row.schema,
        row.payload,
        row.fingerprint,
        row.recorded_at,
        row.actor,
        row.request_id,
        *(() if row.source is None else (row.source,)),
    )
    return hashlib.sha256(row.previous_hash + b"".join(map(_column, columns))).digest()


def legible(text: str) -> str:
    """A text with bytes that are not UTF-8 written out, for reports."""
    return text if text.isascii() else text.encode(errors="backslashreplace").decode()


def legible_row(row: Row) -> Row:
    """The row with every text of it legible; it need not match its hash any more."""
    columns = {name: getattr(row, name) for name in COLUMNS}
    texts = {name: legible(text) for name, text in columns.items() if isinstance(text, str)}
    return structs.replace(row, **texts)


def blobs_digest(blobs: tuple[bytes, ...]) -> str:
    """SHA-256 (hexadecimal) over blobs in order, each with its length before it."""
    return hashlib.sha256(b"".join(struct.pack(">q", len(b)) + b for b in blobs)).hexdigest()


def follow(head: Head, row: Row) -> Head:
    """The head after ``row``, which must come next.

    Raises:
        ChainBroken: the row does not follow ``head``, or its hash is not that of its columns.
    """
    if row.position <= head.position:
        raise ChainBroken(row.position, f"comes after position {head.position}")
    if row.previous_hash != head.hash:
        raise ChainBroken(
            row.position,
            f"does not follow position {head.position}: a row between was changed or removed",
        )
    if row_hash(row) != row.hash:
        raise ChainBroken(row.position, "a column was changed: the row does not match its hash")
    return Head(row.position, row.hash)
