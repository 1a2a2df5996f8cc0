"""What tending a log finds: whether a copy is sound, what was let go of, figures."""

from typing import Any

from msgspec import Struct

from domain.chain import Head


class Checked(Struct, frozen=True, kw_only=True):
    """What a database holds, and each reason why it is no sound log.

    ``head`` is the last one that the chain reaches from its genesis.
    """

    head: Head
    events: int
    states: int
    erasable: bool
    problems: tuple[str, ...]


class Released(Struct, frozen=True):
    """Events whose logits were let go of, and the bytes of these."""

    events: int
    bytes: int


class States(Struct, frozen=True, kw_only=True):
    """How many states can be used, were deleted, were erased."""

    live: int
    deleted: int
    erased: int


class Bytes(Struct, frozen=True, kw_only=True):
    """What the log takes on disk.

    ``free`` is the part of ``file`` that later events will use; ``by_table`` its parts with their
    indexes, null where the file is too long to count its pages. ``payloads`` is that of all
    events, ``logits`` that of the stored logits.
    """

    file: int
    wal: int
    free: int
    payloads: int
    logits: int
    by_table: dict[str, int] | None


class AppliedMigration(Struct, frozen=True, kw_only=True):
    """A step that brought the database to its schema, and when."""

    number: int
    name: str
    applied_at: str


class Statistics(Struct, frozen=True, kw_only=True):
    """A log in figures.

    What is counted by type and by fingerprint, and the bytes of the payloads, are ``exact`` in a
    short log, and estimated from a sample of a long one. All else is exact.
    ``fingerprints`` are those that events were computed under. ``released_until`` is the position
    up to which stored logits may have been let go of. ``verified`` is the mark that verification
    leaves beside the log.
    """

    log_id: str
    erasable: bool
    head: str
    events: int
    first_recorded_at: str | None
    last_recorded_at: str | None
    states: States
    exact: bool
    events_by_type: dict[str, int]
    fingerprints: dict[str, int]
    bytes: Bytes
    released_until: int
    migrations: tuple[AppliedMigration, ...]
    verified: Any
