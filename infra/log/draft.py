"""From the events of one call to rows of the chain: the rules that every kind of log shares."""

from collections.abc import Callable, Sequence

import msgspec
from msgspec import Struct

from domain.chain import Head, Row, row_hash
from domain.errors import IdempotencyKeyReused, VersionConflict, VersionNotFound
from domain.events import (
    SCHEMA,
    Recorded,
    StateAnalyzed,
    StateCreated,
    decode,
    encode,
    event_type,
)
from domain.ids import Position, StateId, Version
from domain.ports import Append, Idempotency, Provenance, Remembered
from domain.transfer import Imported, stored

Scope = tuple[str, str, str, str]
"""Actor, method, path and key: two requests with the same four are the same request."""


def scope(idempotency: Idempotency) -> Scope:
    """What a key is looked up by."""
    return (idempotency.actor, idempotency.method, idempotency.path, idempotency.key)


class Draft(Struct, frozen=True, kw_only=True):
    """The events of one call, complete but for their places in the log.

    ``events[i]`` comes from ``appends[i]``; its row has position 0 and no hashes yet. They take
    the place of what its key stood for if it ``replaces`` it.
    """

    appends: tuple[Append, ...]
    events: tuple[Recorded, ...]
    provenance: Provenance
    idempotency: Idempotency | None
    replaces: bool


def draft(
    appends: Sequence[Append],
    provenance: Provenance,
    idempotency: Idempotency | None,
    *,
    replaces: bool = False,
) -> Draft:
    """Encode the events of one call.

    The events are read back from what will be stored, so that an answer made now and one made
    from the log later are the same.

    Raises:
        ValueError: no event at all, or a first event that is not (or a later one that is)
            ``state_created``.
        UnknownEvent: the event could not be read back (a number that JSON does not have).
    """
    if not appends:
        raise ValueError("nothing to append")
    for append in appends:
        if (append.expected_version == 0) != isinstance(append.event, StateCreated):
            raise ValueError("a state begins with state_created, and only begins with it")
    return Draft(
        appends=tuple(appends),
        events=tuple(_encoded(append, provenance) for append in appends),
        provenance=provenance,
        idempotency=idempotency,
        replaces=replaces,
    )


def _encoded(append: Append, provenance: Provenance) -> Recorded:
    looked = isinstance(append.event, StateAnalyzed)
    return decode(
        Row(
            position=Position(0),
            state_id=append.state_id,
            version=None if looked else Version(append.expected_version + 1),
            at_version=append.expected_version if looked else None,
            type=event_type(append.event),
            schema=SCHEMA,
            payload=encode(append.event),
            fingerprint=append.fingerprint.id if append.fingerprint else None,
            recorded_at=provenance.recorded_at,
            actor=provenance.actor,
            request_id=provenance.request_id,
            previous_hash=b"",
            hash=b"",
        )
    )


def adoption(
    imported: Sequence[Imported], provenance: Provenance, idempotency: Idempotency | None
) -> Draft:
    """The events of another log as those of one call, each with its source.

    Raises:
        ValueError: no event at all.
        UnknownEvent, EventErased: an event that cannot be read.
    """
    if not imported:
        raise ValueError("nothing to adopt")
    events = tuple(_adopted(one, provenance) for one in imported)
    return Draft(
        appends=tuple(
            Append(
                state_id=event.state_id,
                expected_version=_expected(event),
                event=event.event,
                fingerprint=one.fingerprint,
                logits=one.logits,
            )
            for event, one in zip(events, imported, strict=True)
        ),
        events=events,
        provenance=provenance,
        idempotency=idempotency,
        replaces=False,
    )


def _expected(event: Recorded) -> Version:
    return event.version if event.row.version is None else Version(event.row.version - 1)


def _adopted(imported: Imported, provenance: Provenance) -> Recorded:
    return decode(
        msgspec.structs.replace(
            imported.row,
            position=Position(0),
            recorded_at=provenance.recorded_at,
            actor=provenance.actor,
            request_id=provenance.request_id,
            previous_hash=b"",
            hash=b"",
            source=stored(imported.source),
        )
    )


def answered(first: Remembered, idempotency: Idempotency) -> tuple[Recorded, ...]:
    """The events that answer a request whose key is remembered: those recorded ``first``.

    Raises:
        IdempotencyKeyReused: the key belongs to a request with another body.
    """
    if first.request_digest != idempotency.request_digest:
        raise IdempotencyKeyReused(idempotency.key)
    return first.events


def place(
    drafted: Draft,
    head: Head,
    last_position: Position,
    version: Callable[[StateId], Version],
    seal: Callable[[Row], Row],
) -> tuple[Recorded, ...]:
    """Chain every event of a draft to ``head``, or none of them.

    ``last_position`` is the largest one ever used; ``version`` tells where a state stands;
    ``seal`` makes a row what is stored, which the hash covers.

    Raises:
        VersionConflict: a state is not where the draft expects it.
        VersionNotFound: a state has not come to where it is said to have been looked at.
    """
    reached: dict[StateId, Version] = {}
    placed = []
    for append, event in zip(drafted.appends, drafted.events, strict=True):
        state_id = append.state_id
        current = reached[state_id] if state_id in reached else version(state_id)
        if event.row.version is None:
            if current < append.expected_version:
                raise VersionNotFound(state_id, append.expected_version, current)
        elif current != append.expected_version:
            raise VersionConflict(state_id, append.expected_version, current)
        else:
            reached[state_id] = event.version
        last_position = Position(last_position + 1)
        row = seal(event.row)
        row = msgspec.structs.replace(row, position=last_position, previous_hash=head.hash)
        row = msgspec.structs.replace(row, hash=row_hash(row))
        head = Head(row.position, row.hash)
        placed.append(Recorded(row, event.event))
    return tuple(placed)
