"""One transaction of the log: everything that was waiting, checked one by one, written at once."""

import sqlite3
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, Final

import msgspec
from msgspec import Struct

from domain.chain import COLUMNS, Head, Row, genesis
from domain.errors import StateIsDeleted, StateIsErased
from domain.events import (
    Recorded,
    StateAnalyzed,
    StateCreated,
    StateDeleted,
    StateErased,
    decode,
)
from domain.ids import Position, StateId, Version
from domain.intents import GenerationStarted
from domain.origin import parents_of
from domain.ports import Idempotency, Provenance, Remembered
from infra.log import queries
from infra.log.draft import Draft, Scope, answered, place, scope
from infra.log.retention import KEEP_ALL, Retention, keep
from infra.log.sealing import PLAIN, Plain
from infra.log.tiles import extend

KEYS_KEPT: Final = timedelta(hours=24)
"""How long an ``Idempotency-Key`` is remembered at least."""


class Intent(Struct, frozen=True, kw_only=True):
    """A streamed generation that is about to begin."""

    started: GenerationStarted
    provenance: Provenance
    idempotency: Idempotency | None


Job = Draft | Intent

Outcome = tuple[Recorded, ...] | Exception
"""The events that answer a job, or why it alone was refused."""


def write_batch(
    connection: sqlite3.Connection,
    jobs: Sequence[Job],
    retention: Retention = KEEP_ALL,
    sealer: Plain = PLAIN,
) -> list[Outcome]:
    """Commit jobs in order, in one transaction; a refused job leaves the others alone.

    What ``retention`` does not keep goes bit by bit.

    Raises:
        sqlite3.Error: the database could not be written; the transaction may still be open.
    """
    connection.execute("BEGIN IMMEDIATE")
    batch = Batch(connection, sealer)
    outcomes = [batch.take(job) for job in jobs]
    batch.write(retention)
    connection.execute("COMMIT")
    return outcomes


def as_row(columns: Sequence[Any]) -> Row:
    """A row from its columns in the order of ``queries.ROWS``, which is that of ``COLUMNS``."""
    return Row(**dict(zip(COLUMNS, columns, strict=True)))


def project(connection: sqlite3.Connection, recorded: Sequence[Recorded]) -> None:
    """Bring the list of states to where events lead that were inserted."""
    created, changed, erased, parents = [], [], [], []
    for one in recorded:
        match one.event:
            case StateCreated(model_id=model_id, origin=origin):
                created.append((one.state_id, model_id, one.position, one.version))
                parents += [(parent, one.state_id) for parent, _ in parents_of(origin)]
            case StateErased():
                erased.append((one.version, one.state_id))
            case StateAnalyzed():
                pass
            case event:
                deleted = isinstance(event, StateDeleted)
                changed.append((one.version, deleted, one.state_id))
    connection.executemany(queries.INSERT_STATE, created)
    connection.executemany(queries.UPDATE_STATE, changed)
    connection.executemany(queries.UPDATE_ERASED_STATE, erased)
    connection.executemany(queries.INSERT_PARENT, parents)


class Batch:
    """The end of the log as it will be after the jobs taken so far.

    It is read from the database anew for every batch, so that a failed batch leaves nothing to
    repair in memory.
    """

    def __init__(self, connection: sqlite3.Connection, sealer: Plain) -> None:
        sealer.begin()
        self._connection = connection
        self._sealer = sealer
        self._versions: dict[StateId, Version] = {}
        self._deleted: dict[StateId, str] = {}
        self._answers: dict[Scope, Remembered] = {}
        self._drafts: list[tuple[Draft, tuple[Recorded, ...]]] = []
        self._intents: list[tuple[Intent, str]] = []
        head = connection.execute(queries.HEAD).fetchone()
        self._head = (
            Head(*head) if head else genesis(*connection.execute(queries.LOG_ID).fetchone())
        )
        last = connection.execute(queries.LAST_POSITION).fetchone()
        self._last_position = Position(max(self._head.position, last[0] if last else 0))

    def _version(self, state_id: StateId) -> Version:
        if state_id not in self._versions:
            found = self._connection.execute(queries.STATE_VERSION, (state_id,)).fetchone()
            self._versions[state_id] = Version(found[0] if found else 0)
        return self._versions[state_id]

    def remembered(self, idempotency: Idempotency) -> Remembered | None:
        """What a request with this key did, also one of this batch."""
        key = scope(idempotency)
        if key in self._answers:
            return self._answers[key]
        found = self._connection.execute(queries.IDEMPOTENCY_KEY, key).fetchone()
        if found is None:
            return None
        digest, first, last = found
        rows = map(as_row, self._connection.execute(queries.ROWS, (first - 1, last, -1)))
        events = tuple(map(decode, self._sealer.opened(list(rows))))
        return Remembered(self._sealer.recognised(digest, idempotency), events)

    def take(self, job: Job) -> Outcome:
        """Add a job to the batch, unless it must be refused or was answered before."""
        try:
            match job:
                case Intent():
                    self._intents.append((job, self._sealer.intent(job.started)))
                    return ()
                case Draft():
                    return self._take(job)
        except sqlite3.Error:
            raise
        except Exception as error:  # anything but the database is this job's own fault
            return error

    def _take(self, job: Draft) -> tuple[Recorded, ...]:
        key = job.idempotency
        if key and (first := self.remembered(key)):
            same = answered(first, key)
            if not job.replaces:
                return same
        self._check_parents(job)
        self._check_looked_at(job)
        seal = self._sealer.row
        events = place(job, self._head, self._last_position, self._version, seal)
        if key:
            self._answers[scope(key)] = Remembered(key.request_digest, events)
        self._drafts.append((job, events))
        for one in events:
            if one.row.version is not None:
                self._versions[one.state_id] = one.row.version
            if isinstance(one.event, StateDeleted):
                self._deleted[one.state_id] = one.row.recorded_at
        self._last_position = events[-1].position
        self._head = Head(self._last_position, events[-1].row.hash)
        return events

    def _check_parents(self, job: Draft) -> None:
        """Refuse states that begin with what was erased."""
        for one in job.events:
            if isinstance(one.event, StateCreated):
                for parent, _ in parents_of(one.event.origin):
                    found = self._connection.execute(queries.ERASED_AT, (parent,)).fetchone()
                    if found:
                        raise StateIsErased(parent, *found)

    def _check_looked_at(self, job: Draft) -> None:
        """Refuse to say that somebody looked inside states that have ended."""
        for one in job.events:
            if isinstance(one.event, StateAnalyzed):
                if deleted_at := self._deleted.get(one.state_id):
                    raise StateIsDeleted(one.state_id, deleted_at)
                ended = self._connection.execute(queries.ENDED_AT, (one.state_id,)).fetchone()
                if ended:
                    at, erased = ended
                    raise (StateIsErased if erased else StateIsDeleted)(one.state_id, at)

    def write(self, retention: Retention) -> None:
        """Insert everything taken, table by table."""
        self._sealer.commit()
        recorded = [event for _, events in self._drafts for event in events]
        self._many(queries.INSERT_EVENT, [one.row.columns() for one in recorded])
        if recorded:
            extend(self._connection, self._last_position)
        project(self._connection, recorded)
        self._write_beside(retention)
        self._write_keys()
        self._write_intents()

    def _write_beside(self, retention: Retention) -> None:
        fingerprints, blobs = {}, []
        for draft, events in self._drafts:
            for append, one in zip(draft.appends, events, strict=True):
                if append.fingerprint:
                    columns = msgspec.structs.astuple(append.fingerprint)
                    fingerprints[append.fingerprint.id] = columns
                blobs += [
                    (one.position, step, self._sealer.blob(one.row, step, data))
                    for step, data in enumerate(append.logits)
                ]
        self._many(queries.INSERT_FINGERPRINT, list(fingerprints.values()))
        self._many(queries.INSERT_LOGITS, blobs)
        if self._drafts:
            now = self._drafts[-1][0].provenance.recorded_at
            keep(self._connection, retention, now, [len(data) for _, _, data in blobs])

    def _write_keys(self) -> None:
        keys = [
            (
                *scope(draft.idempotency),
                self._sealer.digest(draft.idempotency.request_digest),
                events[0].position,
                events[-1].position,
                draft.provenance.recorded_at,
            )
            for draft, events in self._drafts
            if draft.idempotency
        ]
        self._many(queries.INSERT_IDEMPOTENCY_KEY, keys)
        if keys:
            # Two old ones go for each one that comes: bounded work that always catches up.
            expired = _a_day_before(keys[-1][-1])
            self._connection.execute(queries.DELETE_IDEMPOTENCY_KEYS, (expired, 2 * len(keys)))

    def _write_intents(self) -> None:
        rows = [self._intent_row(intent, payload) for intent, payload in self._intents]
        self._many(queries.INSERT_GENERATION_STARTED, rows)
        if rows:
            expired = _a_day_before(self._intents[-1][0].provenance.recorded_at)
            self._connection.execute(queries.DELETE_GENERATIONS_STARTED, (2 * len(rows), expired))

    def _intent_row(self, intent: Intent, payload: str) -> tuple[Any, ...]:
        started, by, key = intent.started, intent.provenance, intent.idempotency
        return (
            started.state_id,
            started.base_version,
            payload,
            started.fingerprint,
            by.recorded_at,
            by.actor,
            by.request_id,
            *(scope(key) if key else (None, None, None, None)),
            self._sealer.digest(key.request_digest) if key else None,
        )

    def _many(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        if rows:
            self._connection.executemany(sql, rows)


def _a_day_before(moment: str) -> str:
    earlier = datetime.fromisoformat(moment) - KEYS_KEPT
    return earlier.isoformat(timespec="microseconds").replace("+00:00", "Z")
