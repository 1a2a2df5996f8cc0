"""The event log as the application needs it, as protocols; ``infra`` makes them real."""

from collections.abc import Sequence
from typing import Protocol

from msgspec import Struct

from domain.chain import Head, Row
from domain.events import (
    Event,
    Recorded,
)
from domain.fingerprint import Fingerprint
from domain.ids import ModelId, Position, StateId, Version
from domain.intents import GenerationStarted
from domain.merkle import Tile
from domain.report import Kinship, Standing
from domain.transfer import Imported


class Provenance(Struct, frozen=True, kw_only=True):
    """Who caused an event, by which request, and when (RFC 3339, UTC, microseconds)."""

    actor: str
    request_id: str
    recorded_at: str


class Idempotency(Struct, frozen=True, kw_only=True):
    """A client's ``Idempotency-Key`` in its scope, and the SHA-256 of the request's body."""

    actor: str
    method: str
    path: str
    key: str
    request_digest: bytes


class Append(Struct, frozen=True, kw_only=True):
    """One event to add to one state.

    ``expected_version`` is the version the state has now (0 for a new state); the event gets the
    next one. For ``state_analyzed``, which gets none, it is the version that was looked at.
    ``logits`` are blobs kept beside the event, one per token.
    """

    state_id: StateId
    expected_version: Version
    event: Event
    fingerprint: Fingerprint | None = None
    logits: tuple[bytes, ...] = ()


class Remembered(Struct, frozen=True):
    """What a request with this ``Idempotency-Key`` did: the digest of its body, its events."""

    request_digest: bytes
    events: tuple[Recorded, ...]


class StatePage(Struct, frozen=True):
    """A page of live states, newest first; ``next_cursor`` is null on the last page."""

    state_ids: tuple[StateId, ...]
    next_cursor: Position | None


class LogReader(Protocol):
    """Reads of the log. Nothing here waits for a writer.

    ``log_id`` names the log; what states of an ``erasable`` one hold is sealed, and can be read
    where it ``has_keys``.
    """

    log_id: str
    erasable: bool
    has_keys: bool

    async def head(self) -> Head:
        """The newest position and hash (the genesis head of an empty log)."""

    async def genesis(self) -> Head:
        """The head before the first event."""

    async def rows(self, *, after: Position = Position(0), limit: int | None = None) -> list[Row]:
        """Rows of the whole log in order, from the one after position ``after``."""

    async def state_rows(
        self,
        state_id: StateId,
        *,
        after: Version = Version(0),
        until: Version | None = None,
        limit: int | None = None,
    ) -> list[Row]:
        """Rows of one state in order: versions above ``after``, up to and with ``until``.

        Its analyses, which have no version, are not among them.
        """

    async def rows_before_first(self, *, limit: int) -> list[Row]:
        """Rows at positions before 1, where no log has any."""

    async def newest(self, state_id: StateId) -> Row | None:
        """The row of a state's latest version; null if there is no such state."""

    async def analyses(self, state_id: StateId, *, after: Position, limit: int) -> list[Row]:
        """Analyses of a state in the order of the log, from the one after a position."""

    async def page(
        self,
        *,
        after: Position,
        limit: int,
        max_bytes: int,
        state_id: StateId | None = None,
    ) -> list[Row]:
        """Rows in the order of the log, of one state or of all, from the one after a position.

        At most ``limit``, and hardly more of them than have ``max_bytes`` of payload together;
        none only if there are none.
        """

    async def logits(self, position: Position) -> tuple[bytes, ...]:
        """The blobs kept beside an event, in order; one that cannot be opened is empty."""

    async def stored_logits(self, position: Position) -> tuple[bytes, ...]:
        """The same as they are stored: sealed in an erasable log."""

    async def fingerprint(self, fingerprint_id: str) -> Fingerprint | None:
        """A fingerprint that some event refers to."""

    async def live_states(
        self, *, limit: int, cursor: Position | None = None, model_id: ModelId | None = None
    ) -> StatePage:
        """States that are not deleted, newest first, from below ``cursor``."""

    async def state_ids(self) -> list[StateId]:
        """Every state that has events, oldest first."""

    async def standings(
        self, state_ids: Sequence[StateId], *, after: Position
    ) -> dict[StateId, Standing]:
        """Where states stand that have events after position ``after``."""

    async def phantoms(self) -> list[tuple[StateId, Position]]:
        """Some of the states that are listed and have no events, and where they are said to begin.

        None only if there are none.
        """

    async def kinships(self, *, after: Position, until: Position) -> list[Kinship]:
        """What is listed of which state began with what another held, by where it began."""

    async def size(self) -> int:
        """Number of events."""

    async def tiles(self, *, every: bool = False) -> list[Tile]:
        """The roots over full tiles of events that are kept, in order and without a gap.

        With ``every`` also those that come after a gap, or whose number none can have.
        """

    async def hashes(self, *, after: Position, limit: int) -> list[tuple[Position, bytes]]:
        """Hashes of events in order, from the one after position ``after``."""

    async def descendants(self, state_id: StateId) -> list[StateId]:
        """States that began with what this one held, and theirs, in the order they began."""

    async def released_until(self) -> Position:
        """The position up to which stored logits may have been let go of."""


class EventLog(LogReader, Protocol):
    """The one truth. What :meth:`append` has returned is on disk."""

    async def append(
        self,
        appends: Sequence[Append],
        *,
        provenance: Provenance,
        idempotency: Idempotency | None = None,
        replaces: bool = False,
    ) -> tuple[Recorded, ...]:
        """Record events, all or none, and the ``Idempotency-Key`` they answer.

        A key that was used before gets the events recorded then, and records nothing; unless this
        ``replaces`` them as its answer.

        Raises:
            VersionConflict: a state is not at its ``expected_version``; names the current one.
            StateIsDeleted, StateIsErased, VersionNotFound: a state cannot have been looked at.
            IdempotencyKeyReused: the key belongs to a request with another body.
            QueueFull: too many appends are waiting.
            LogUnavailable: the database could not be written; nothing was recorded.
        """

    async def adopt(
        self,
        imported: Sequence[Imported],
        *,
        provenance: Provenance,
        idempotency: Idempotency | None = None,
    ) -> tuple[Recorded, ...]:
        """Record events of another log with their source, all or none.

        They keep their state, version, type, schema, payload and fingerprint, and get a position
        and hashes of this log.

        Raises:
            VersionConflict: a state is here already; names its version.
            IdempotencyKeyReused, QueueFull, LogUnavailable: as for :meth:`append`.
        """

    async def erase(
        self,
        state_ids: Sequence[StateId],
        *,
        provenance: Provenance,
        idempotency: Idempotency | None = None,
    ) -> tuple[Recorded, ...]:
        """Record that states are erased and destroy their keys; on disk before this returns.

        No state can begin with what an erased one held.

        Raises:
            NotErasable: the log was not created erasable.
            StateNotFound, StateIsErased: there is no such state, or nothing left to erase.
            HasDescendants: states that are not among these hold what they held; names them.
            IdempotencyKeyReused, QueueFull: as for :meth:`append`.
            LogUnavailable: nothing was recorded; or it was, and nothing of the states can be read
                any more, but their keys are not destroyed yet: that is tried until it is done.
        """

    async def grown(self, after: Position) -> None:
        """Return once there is an event after position ``after``."""

    async def recall(self, idempotency: Idempotency) -> Remembered | None:
        """What an earlier request with this key in this scope did."""

    async def begin_generation(
        self,
        started: GenerationStarted,
        *,
        provenance: Provenance,
        idempotency: Idempotency | None = None,
    ) -> None:
        """Record the intent of a streamed generation, on disk before this returns."""

    async def begun_generation(self, idempotency: Idempotency) -> GenerationStarted | None:
        """The intent that a streamed request with this key left last, if any.

        Raises:
            IdempotencyKeyReused: the key belongs to a request with another body.
        """


class Signer(Protocol):
    """An Ed25519 key that signs checkpoints.

    ``name`` is what signature lines call it, ``key_id`` are the four bytes that tell keys of one
    name apart, ``public_key`` is PEM.
    """

    name: str
    key_id: bytes
    public_key: str

    def sign(self, text: bytes) -> bytes:
        """The signature over a text, 64 bytes."""
