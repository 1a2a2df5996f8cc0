"""Exports made in memory, by hand: sound ones, and any that somebody might forge."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from domain.chain import Head, Row, blobs_digest, genesis
from domain.content import StoredLogits
from domain.events import Event, StateAnalyzed, StateCreated
from domain.export import (
    FORMAT,
    EventLine,
    FingerprintLine,
    Header,
    Line,
    LogitsLine,
    ReleasedLine,
    StateAt,
    Tally,
    write_line,
)
from domain.fingerprint import Fingerprint
from domain.ids import Position, Version
from domain.merkle import TILE, Checkpoint, Inclusion, Tree, tile_hash, to_note
from domain.origin import Fork
from domain.reading import Admitted, Reading
from tests.builders import created, forwarded, generated, row, state_id

LOG_ID = "0123456789abcdef0123456789abcdef"
BLOBS = (b"first", b"second")
FINGERPRINT = Fingerprint.of({"cpu": "any", "deterministic": True})


def chained(*happened: tuple[int, Event], log_id: str = LOG_ID, **columns: Any) -> list[Row]:
    """Rows of a log in which these events happened to states of these numbers, in order.

    Analyses see the newest version.
    """
    head, versions, rows = genesis(log_id), dict[int, int](), list[Row]()
    for number, event in happened:
        versions[number] = versions.get(number, 0) + (not isinstance(event, StateAnalyzed))
        rows.append(
            row(event, version=versions[number], head=head, state_id=state_id(number), **columns)
        )
        head = Head(rows[-1].position, rows[-1].hash)
    return rows


def forked(parent: int, version: int) -> StateCreated:
    """A state that begins with what another held at a version."""
    origin = Fork(state_id=state_id(parent), version=Version(version), head_position=3)
    return msgspec.structs.replace(created(), origin=origin)


def a_log() -> list[Row]:
    """State 1 is forked from state 0, and has logits beside it; state 2 has nothing to do with it.

    Positions: 1 and 2 of state 0, 3 of state 2, 4 of state 1, 5 of state 0, 6 of state 1.
    """
    stored = StoredLogits(kind="top_k", k=1, digest=blobs_digest(BLOBS))
    return chained(
        (0, created()),
        (0, forwarded(3)),
        (2, created("other")),
        (1, forked(0, 2)),
        (0, forwarded(4)),
        (1, generated(3, "de", stored_logits=stored)),
        fingerprint=FINGERPRINT.id,
    )


LOGITS: Mapping[int, tuple[bytes, ...]] = {6: BLOBS}


def checkpoint(rows: Sequence[Row], log_id: str = LOG_ID) -> Checkpoint:
    """A log as it stands."""
    head = Head(rows[-1].position, rows[-1].hash) if rows else genesis(log_id)
    hashes = [one.hash for one in rows]
    full = len(hashes) // TILE * TILE
    tiles = [tile_hash(hashes[start : start + TILE]) for start in range(0, full, TILE)]
    root = Tree(tiles, hashes[full:]).root.hex()
    return Checkpoint(
        log_id=log_id, size=len(rows), position=head.position, hash=head.hash.hex(), root=root
    )


def inclusion(rows: Sequence[Row], position: int) -> Inclusion:
    """The proof that a log of fewer than 256 events holds the one at a position."""
    hashes = [one.hash for one in rows]
    (index,) = (index for index, one in enumerate(rows) if one.position == position)
    (proof,) = Tree([], hashes).inclusions([(index, Position(position))], hashes)
    return proof


def lines_of_log(
    rows: Sequence[Row], logits: Mapping[int, tuple[bytes, ...]] = LOGITS, **header: Any
) -> list[Line]:
    """The lines of an export of a whole log but for its end."""
    return [_header(rows, kind="log", **header), *_body(rows, logits, {})]


def lines_of_states(
    rows: Sequence[Row],
    asked: Mapping[int, int],
    held: Sequence[int],
    logits: Mapping[int, tuple[bytes, ...]] = LOGITS,
    **header: Any,
) -> list[Line]:
    """The lines of an export of states at versions but for its end; it holds rows by position."""
    states = tuple(
        StateAt(state_id=state_id(number), version=Version(version))
        for number, version in asked.items()
    )
    body = _body(
        [one for one in rows if one.position in held],
        logits,
        {position: inclusion(rows, position) for position in held},
    )
    return [_header(rows, kind="state", states=states, **header), *body]


def _header(rows: Sequence[Row], **fields: Any) -> Header:
    at = checkpoint(rows)
    given = {"checkpoint": at, "note": to_note(at), "created_by": "a test", "version": FORMAT}
    return Header(format="cacher-export", **(given | fields))


def _body(
    rows: Sequence[Row],
    logits: Mapping[int, tuple[bytes, ...]],
    inclusions: Mapping[int, Inclusion],
) -> list[Line]:
    lines: list[Line] = []
    if any(one.fingerprint for one in rows):
        lines.append(FingerprintLine(**msgspec.structs.asdict(FINGERPRINT)))
    for one in rows:
        lines.append(EventLine.of(one, inclusions.get(one.position)))
        lines += [LogitsLine(data=data) for data in logits.get(one.position, ())]
    return lines


def ended(lines: Sequence[Line], released_until: int = 0) -> list[bytes]:
    """The bytes of lines, and of the end that belongs to them."""
    tally = Tally()
    written = [tally.write([line]) for line in (*lines, ReleasedLine(until=released_until))]
    return [*written, write_line(tally.end())]


def read(lines: Sequence[bytes]) -> list[Admitted]:
    """Everything that an export holds, once all of it is proven."""
    return list(Reading(lines).events())
