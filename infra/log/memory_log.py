"""An event log in memory: for tests and trials. It keeps every promise but the disk."""

import uuid
from collections.abc import Sequence

from msgspec import Struct

from domain.chain import Head, Row, genesis
from domain.errors import IdempotencyKeyReused
from domain.events import GenerationStarted, Recorded, StateCreated, StateDeleted
from domain.fingerprint import Fingerprint
from domain.ids import ModelId, Position, StateId, Version
from domain.ports import Append, Idempotency, Provenance, Remembered, StatePage
from infra.log.draft import Scope, answered, draft, place, scope


class _State(Struct):
    model_id: ModelId
    created_position: Position
    rows: list[Row]
    deleted: bool = False


class MemoryLog:
    """A log (``EventLog``) that is gone with its process.

    No method waits inside, so each one is atomic on the event loop.
    """

    def __init__(self, log_id: str | None = None) -> None:
        self._genesis = genesis(log_id or uuid.uuid4().hex)
        self._head = self._genesis
        self._rows: list[Row] = []
        self._states: dict[StateId, _State] = {}
        self._logits: dict[Position, tuple[bytes, ...]] = {}
        self._fingerprints: dict[str, Fingerprint] = {}
        self._answers: dict[Scope, Remembered] = {}
        self._intents: dict[Scope, tuple[bytes, GenerationStarted]] = {}

    async def head(self) -> Head:
        """The newest position and hash (the genesis head of an empty log)."""
        return self._head

    async def genesis(self) -> Head:
        """The head before the first event."""
        return self._genesis

    async def rows(self, *, after: Position = Position(0), limit: int | None = None) -> list[Row]:
        """Rows of the whole log in order, from the one after position ``after``."""
        return self._rows[after:][:limit]

    async def state_rows(
        self,
        state_id: StateId,
        *,
        after: Version = Version(0),
        until: Version | None = None,
        limit: int | None = None,
    ) -> list[Row]:
        """Rows of one state in order: versions above ``after``, up to and with ``until``."""
        state = self._states.get(state_id)
        return state.rows[after:until][:limit] if state else []

    async def logits(self, position: Position) -> tuple[bytes, ...]:
        """The blobs kept beside an event, in order."""
        return self._logits.get(position, ())

    async def fingerprint(self, fingerprint_id: str) -> Fingerprint | None:
        """A fingerprint that some event refers to."""
        return self._fingerprints.get(fingerprint_id)

    async def live_states(
        self, *, limit: int, cursor: Position | None = None, model_id: ModelId | None = None
    ) -> StatePage:
        """States that are not deleted, newest first, from below ``cursor``."""
        found = [
            (state_id, state.created_position)
            for state_id, state in reversed(self._states.items())
            if not state.deleted
            and (cursor is None or state.created_position < cursor)
            and (model_id is None or state.model_id == model_id)
        ]
        page = found[:limit]
        more = len(found) > limit
        return StatePage(
            tuple(state_id for state_id, _ in page), page[-1][1] if page and more else None
        )

    async def state_ids(self) -> list[StateId]:
        """Every state that ever was, oldest first."""
        return list(self._states)

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
            IdempotencyKeyReused: the key belongs to a request with another body.
        """
        drafted = draft(appends, provenance, idempotency, replaces=replaces)
        if idempotency and (first := self._answers.get(scope(idempotency))):
            same = answered(first, idempotency)
            if not replaces:
                return same
        events = place(drafted, self._head, self._head.position, self._version)
        for append, recorded in zip(appends, events, strict=True):
            self._add(append, recorded)
        if idempotency:
            self._answers[scope(idempotency)] = Remembered(idempotency.request_digest, events)
        return events

    async def recall(self, idempotency: Idempotency) -> Remembered | None:
        """What an earlier request with this key in this scope did."""
        return self._answers.get(scope(idempotency))

    async def begin_generation(
        self,
        started: GenerationStarted,
        *,
        provenance: Provenance,
        idempotency: Idempotency | None = None,
    ) -> None:
        """Keep the intent of a streamed generation."""
        if idempotency:
            self._intents[scope(idempotency)] = (idempotency.request_digest, started)

    async def begun_generation(self, idempotency: Idempotency) -> GenerationStarted | None:
        """The intent that a streamed request with this key left last, if any.

        Raises:
            IdempotencyKeyReused: the key belongs to a request with another body.
        """
        digest, started = self._intents.get(scope(idempotency), (None, None))
        if started and digest != idempotency.request_digest:
            raise IdempotencyKeyReused(idempotency.key)
        return started

    def _version(self, state_id: StateId) -> Version:
        state = self._states.get(state_id)
        return Version(len(state.rows) if state else 0)

    def _add(self, append: Append, recorded: Recorded) -> None:
        row, event = recorded.row, recorded.event
        if isinstance(event, StateCreated):
            self._states[row.state_id] = _State(event.model_id, row.position, [])
        state = self._states[row.state_id]
        state.rows.append(row)
        state.deleted = isinstance(event, StateDeleted)
        self._rows.append(row)
        self._head = Head(row.position, row.hash)
        if append.logits:
            self._logits[row.position] = append.logits
        if append.fingerprint:
            self._fingerprints.setdefault(append.fingerprint.id, append.fingerprint)
