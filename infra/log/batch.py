"""One transaction of the log: everything that was waiting, checked one by one, written at once."""

import sqlite3
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, Final

import msgspec
from msgspec import Struct

from domain.canonical import as_json
from domain.chain import COLUMNS, Head, Row, genesis
from domain.events import Recorded, StateCreated, StateDeleted, decode
from domain.ids import Position, StateId, Version
from domain.intents import GenerationStarted
from domain.origin import parents_of
from domain.ports import Idempotency, Provenance, Remembered
from infra.log import queries
from infra.log.draft import Draft, Scope, answered, place, scope

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


def write_batch(connection: sqlite3.Connection, jobs: Sequence[Job]) -> list[Outcome]:
    """Commit jobs in order, in one transaction; a refused job leaves the others alone.

    Raises:
        sqlite3.Error: the database could not be written; the transaction may still be open.
    """
    connection.execute("BEGIN IMMEDIATE")
    batch = _Batch(connection)
    outcomes = [batch.take(job) for job in jobs]
    batch.write()
    connection.execute("COMMIT")
    return outcomes


def as_row(columns: Sequence[Any]) -> Row:
    """A row from its columns in the order of ``queries.ROWS``, which is that of ``COLUMNS``."""
    return Row(**dict(zip(COLUMNS, columns, strict=True)))


class _Batch:
    """The end of the log as it will be after the jobs taken so far.

    It is read from the database anew for every batch, so that a failed batch leaves nothing to
    repair in memory.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._versions: dict[StateId, Version] = {}
        self._answers: dict[Scope, Remembered] = {}
        self._drafts: list[tuple[Draft, tuple[Recorded, ...]]] = []
        self._intents: list[Intent] = []
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

    def _remembered(self, idempotency: Idempotency) -> Remembered | None:
        key = scope(idempotency)
        if key in self._answers:
            return self._answers[key]
        found = self._connection.execute(queries.IDEMPOTENCY_KEY, key).fetchone()
        if found is None:
            return None
        digest, first, last = found
        rows = self._connection.execute(queries.ROWS, (first - 1, last, -1))
        return Remembered(digest, tuple(decode(as_row(columns)) for columns in rows))

    def take(self, job: Job) -> Outcome:
        """Add a job to the batch, unless it must be refused or was answered before."""
        match job:
            case Intent():
                self._intents.append(job)
                return ()
            case Draft():
                try:
                    return self._take(job)
                except sqlite3.Error:
                    raise
                except Exception as error:  # anything but the database is this job's own fault
                    return error

    def _take(self, job: Draft) -> tuple[Recorded, ...]:
        key = job.idempotency
        if key and (first := self._remembered(key)):
            same = answered(first, key)
            if not job.replaces:
                return same
        events = place(job, self._head, self._last_position, self._version)
        if key:
            self._answers[scope(key)] = Remembered(key.request_digest, events)
        self._drafts.append((job, events))
        self._versions.update((one.state_id, one.version) for one in events)
        self._last_position = events[-1].position
        self._head = Head(self._last_position, events[-1].row.hash)
        return events

    def write(self) -> None:
        """Insert everything taken, table by table."""
        recorded = [event for _, events in self._drafts for event in events]
        self._many(queries.INSERT_EVENT, [one.row.columns() for one in recorded])
        self._project(recorded)
        self._write_beside()
        self._write_keys()
        self._write_intents()

    def _project(self, recorded: list[Recorded]) -> None:
        created, changed, parents = [], [], []
        for one in recorded:
            match one.event:
                case StateCreated(model_id=model_id, origin=origin):
                    created.append((one.state_id, model_id, one.position, one.version))
                    parents += [(parent, one.state_id) for parent, _ in parents_of(origin)]
                case event:
                    deleted = isinstance(event, StateDeleted)
                    changed.append((one.version, deleted, one.state_id))
        self._many(queries.INSERT_STATE, created)
        self._many(queries.UPDATE_STATE, changed)
        self._many(queries.INSERT_PARENT, parents)

    def _write_beside(self) -> None:
        fingerprints, blobs = {}, []
        for draft, events in self._drafts:
            for append, one in zip(draft.appends, events, strict=True):
                if append.fingerprint:
                    columns = msgspec.structs.astuple(append.fingerprint)
                    fingerprints[append.fingerprint.id] = columns
                blobs += [(one.position, step, data) for step, data in enumerate(append.logits)]
        self._many(queries.INSERT_FINGERPRINT, list(fingerprints.values()))
        self._many(queries.INSERT_LOGITS, blobs)

    def _write_keys(self) -> None:
        keys = [
            (
                *scope(draft.idempotency),
                draft.idempotency.request_digest,
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
        rows = [_intent_row(intent) for intent in self._intents]
        self._many(queries.INSERT_GENERATION_STARTED, rows)
        if rows:
            expired = _a_day_before(self._intents[-1].provenance.recorded_at)
            self._connection.execute(queries.DELETE_GENERATIONS_STARTED, (2 * len(rows), expired))

    def _many(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        if rows:
            self._connection.executemany(sql, rows)


def _intent_row(intent: Intent) -> tuple[Any, ...]:
    started, by, key = intent.started, intent.provenance, intent.idempotency
    return (
        started.state_id,
        started.base_version,
        as_json(started),
        started.fingerprint,
        by.recorded_at,
        by.actor,
        by.request_id,
        *(scope(key) if key else (None, None, None, None)),
        key.request_digest if key else None,
    )


def _a_day_before(moment: str) -> str:
    earlier = datetime.fromisoformat(moment) - KEYS_KEPT
    return earlier.isoformat(timespec="microseconds").replace("+00:00", "Z")
