"""Erasing states: the fact is recorded first, then what it says is made true.

The transaction that records it also lets go of all that is kept beside the states' events. Then
their keys are destroyed, and the WAL, which may hold what was overwritten, is emptied. A crash, or
a disk that fails, leaves states that are erased and whose keys are still there: nobody is given
what they open, and the writer tries again and again to destroy them, the next one too.
"""

import logging
import sqlite3
import time
from collections.abc import Iterator
from typing import Final

from msgspec import Struct

from domain.errors import HasDescendants, LogUnavailable, Refusal, StateIsErased, StateNotFound
from domain.events import Recorded, StateErased
from domain.ids import StateId, Version
from domain.ports import Append, Idempotency, Provenance
from infra.log import queries
from infra.log.batch import Batch, Outcome
from infra.log.draft import answered, draft
from infra.log.retention import KEEP_ALL
from infra.log.sealing import Sealer

_AT_ONCE: Final = 1000

RETRY_S: Final = 5.0
"""How long after a failure the destruction of keys is tried again."""

_log = logging.getLogger(__name__)


class Erasure(Struct, frozen=True, kw_only=True):
    """States whose texts are to be destroyed, with those that hold parts of them."""

    state_ids: tuple[StateId, ...]
    provenance: Provenance
    idempotency: Idempotency | None


class Eraser:
    """Erases states, in the writer's thread and on its connection."""

    def __init__(self, connection: sqlite3.Connection, sealer: Sealer) -> None:
        self._connection = connection
        self._sealer = sealer
        self._due = 0.0
        for page in self._erased():
            sealer.doom(sealer.find(page))
        self.finish()

    def erase(self, erasure: Erasure) -> Outcome:
        """Erase states, or say why not; also of states that are erased if their keys are left.

        Raises:
            sqlite3.Error: nothing was recorded; the transaction may still be open.
        """
        outcome = self._recorded(erasure)
        if self._sealer.doomed.isdisjoint(erasure.state_ids) or not (error := self.finish()):
            return outcome
        return LogUnavailable(
            "the states are recorded as erased, but their keys could not be destroyed yet:"
            f" {error}. That is tried again until it is done"
        )

    def retry(self) -> float | None:
        """Finish what is left, if it is time to; returns how long it is until then, if ever."""
        if self._sealer.doomed and time.monotonic() >= self._due:
            self.finish()
        return max(0.0, self._due - time.monotonic()) if self._sealer.doomed else None

    def finish(self) -> Exception | None:
        """Destroy the keys of all states that were erased; returns what stood in the way."""
        if not self._sealer.doomed:
            return None
        try:
            self._sealer.destroy()
            empty_wal(self._connection)
        except (sqlite3.Error, OSError) as error:
            self._due = time.monotonic() + RETRY_S
            _log.error("keys of erased states are still there: %s", error)
            return error
        self._sealer.doomed.clear()
        return None

    def _erased(self) -> Iterator[list[StateId]]:
        last = ""
        while page := self._connection.execute(queries.ERASED_STATES, (last, _AT_ONCE)).fetchall():
            yield [state_id for (state_id,) in page]
            ((last,),) = page[-1:]

    def _recorded(self, erasure: Erasure) -> Outcome:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            recorded = self._record(erasure)
        except Refusal as refused:
            self._connection.execute("ROLLBACK")
            return refused
        self._connection.execute("COMMIT")
        self._sealer.doom(erasure.state_ids)
        return recorded

    def _record(self, erasure: Erasure) -> tuple[Recorded, ...]:
        batch = Batch(self._connection, self._sealer)
        if (key := erasure.idempotency) and (first := batch.remembered(key)):
            return answered(first, key)
        self._check_descendants(erasure.state_ids)
        appends = [self._append(state_id) for state_id in erasure.state_ids]
        recorded = batch.take(draft(appends, erasure.provenance, key))
        if isinstance(recorded, Exception):
            raise recorded
        for state_id in erasure.state_ids:
            self._let_go_of_what_is_beside(state_id)
        batch.write(KEEP_ALL)
        return recorded

    def _append(self, state_id: StateId) -> Append:
        if erased := self._connection.execute(queries.ERASED_AT, (state_id,)).fetchone():
            raise StateIsErased(state_id, *erased)
        found = self._connection.execute(queries.STATE_VERSION, (state_id,)).fetchone()
        if found is None:
            raise StateNotFound(state_id)
        return Append(state_id=state_id, expected_version=Version(*found), event=StateErased())

    def _check_descendants(self, state_ids: tuple[StateId, ...]) -> None:
        found = (
            descendant
            for state_id in state_ids
            for (descendant,) in self._connection.execute(queries.DESCENDANTS, (state_id,))
        )
        left = [one for one in dict.fromkeys(found) if one not in state_ids]
        kept = [one for one in left if not self._is_erased(one)]
        if kept:
            raise HasDescendants(state_ids[0], tuple(kept))

    def _is_erased(self, state_id: StateId) -> bool:
        return self._connection.execute(queries.ERASED_AT, (state_id,)).fetchone() is not None

    def _let_go_of_what_is_beside(self, state_id: StateId) -> None:
        execute = self._connection.execute
        execute(queries.OVERWRITE_DIGESTS, (state_id,))
        execute(queries.DELETE_INTENTS, (state_id,))
        (size,) = execute(queries.LOGITS_OF_STATE, (state_id,)).fetchone()
        execute(queries.DELETE_LOGITS_OF_STATE, (state_id,))
        execute(queries.COUNT_LOGITS, (-size,))


def empty_wal(connection: sqlite3.Connection) -> None:
    """Move the WAL into the database and cut it off; what it holds is ciphertext at most."""
    busy, _, _ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    if busy:
        _log.warning("the WAL could not be emptied: a reader still needs it; a later start will")
