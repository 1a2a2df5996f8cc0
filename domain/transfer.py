"""What leaves a log in a file, and what another log takes in."""

from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

from domain.canonical import as_json
from domain.chain import Row
from domain.fingerprint import Fingerprint
from domain.ids import Position
from domain.log_errors import EventErased, UnknownEvent

Hash = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
"""SHA-256 in hexadecimal."""

Number = Annotated[int, Meta(ge=0, le=2**63 - 1)]
"""A position, or a count, that fits where it is stored."""


class Source(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Where an imported event was recorded first, and what its row said of that.

    With these and its other columns, which are kept, the row it had there can be made again, hash
    and all. Hashes are hexadecimal. Where that row was imported itself, ``source`` is its own.
    """

    log_id: str
    position: Number
    previous_hash: Hash
    hash: Hash
    recorded_at: str
    actor: str
    request_id: str
    source: "Source | None" = None


class Imported(Struct, frozen=True, kw_only=True):
    """An event as another log has it, with what is kept beside it there.

    ``row`` is the original one; its payload is stored as it is. ``source`` says where it is from.
    """

    row: Row
    source: Source
    fingerprint: Fingerprint | None
    logits: tuple[bytes, ...]


Identity = tuple[str, str]
"""The log that recorded an event first, and the hash of its row there: the same wherever it is."""

_sources: Final = msgspec.json.Decoder(Source)


def stored(source: Source) -> str:
    """A source as it is stored and hashed."""
    return as_json(source)


def source_in(row: Row) -> Source | None:
    """The source that a row names.

    Raises:
        UnknownEvent: what it names cannot be read.
    """
    if row.source is None:
        return None
    try:
        return _sources.decode(row.source)
    except (msgspec.DecodeError, RecursionError) as error:
        raise UnknownEvent(row.position, f"its source cannot be read: {error}") from error


def source_of(row: Row, log_id: str) -> Source:
    """The source that a row of a log has when another log takes it in.

    Raises:
        UnknownEvent: the row's own source cannot be read.
    """
    return Source(
        log_id=log_id,
        position=row.position,
        previous_hash=row.previous_hash.hex(),
        hash=row.hash.hex(),
        recorded_at=row.recorded_at,
        actor=row.actor,
        request_id=row.request_id,
        source=source_in(row),
    )


def original_row(row: Row, source: Source) -> Row:
    """The row that an imported one had in the log it comes from; its hash is that of its columns.

    Raises:
        EventErased: the row is sealed, and there is no key to what it held there.
    """
    payload = row.opened if row.sealed else row.payload
    if payload is None:
        raise EventErased(row.position)
    return msgspec.structs.replace(
        row,
        position=Position(source.position),
        payload=payload,
        recorded_at=source.recorded_at,
        actor=source.actor,
        request_id=source.request_id,
        previous_hash=bytes.fromhex(source.previous_hash),
        hash=bytes.fromhex(source.hash),
        source=None if source.source is None else stored(source.source),
        opened=None,
    )


def happened_at(row: Row) -> str:
    """When an event happened: when the log that it comes from recorded it first.

    Raises:
        UnknownEvent: its source cannot be read.
    """
    source = source_in(row)
    return row.recorded_at if source is None else _first(source).recorded_at


def identity(row: Row, log_id: str) -> Identity:
    """Which event a row of a log holds: equal for the same event in two logs.

    Raises:
        UnknownEvent: its source cannot be read.
    """
    source = source_in(row)
    if source is None:
        return log_id, row.hash.hex()
    first = _first(source)
    return first.log_id, first.hash


def _first(source: Source) -> Source:
    while source.source is not None:
        source = source.source
    return source
