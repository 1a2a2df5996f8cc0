"""The event log in SQLite."""

import asyncio
import logging
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Self

import msgspec

from domain.errors import IdempotencyKeyReused, NotErasable
from domain.events import Recorded, decode
from domain.ids import Position, StateId
from domain.intents import GenerationStarted
from domain.log_errors import LogError
from domain.ports import Append, Idempotency, Provenance, Remembered
from domain.transfer import Imported
from infra.log import queries
from infra.log.batch import Intent
from infra.log.draft import adoption, draft, scope
from infra.log.erasing import Erasure
from infra.log.migrate import apply, carried, lock
from infra.log.retention import KEEP_ALL, Retention
from infra.log.sealing import Plain, Sealer, open_sealer
from infra.log.sqlite_reader import SqliteReader
from infra.log.tiles import catch_up
from infra.log.wal import check_wal
from infra.log.writer import Writer

_WAL_RESET_BUG: Final = ((3, 7, 0), (3, 51, 2))
"""SQLite versions, first and last, that can corrupt a database whose WAL two connections write
and checkpoint at the same moment."""

_intents: Final = msgspec.json.Decoder(GenerationStarted)
_log = logging.getLogger(__name__)


class SqliteLog(SqliteReader):
    """A log in one SQLite file (``EventLog``), of which this process is the only writer.

    Open it with :meth:`open`, use it in the event loop it was opened in, and close it: that
    writes what is waiting and gives up the lock. After a crash the next start finds everything
    that was acknowledged.
    """

    _writer: Writer
    _sealer: Plain

    @classmethod
    async def open(
        cls,
        path: Path | str,
        *,
        connections: int = 2,
        max_queue: int = 1000,
        retention: Retention = KEEP_ALL,
        erasable: bool = False,
    ) -> Self:
        """Lock the log at ``path``, make or migrate it, and start its writer.

        One that is made now seals what its states hold if it is to be ``erasable``.

        ``connections`` is how many reads may run at once, ``max_queue`` how many appends may wait
        or be under way, ``retention`` how much of the stored logits is kept.

        Raises:
            LogIsLocked: another process writes to it.
            SchemaTooNew, MigrationChanged: its schema is not of this release or one before.
            LogError: it is no database, or a migration failed; or it has events and is not
                erasable though it should be, or is and the file of its keys is not there.
        """
        path = await asyncio.to_thread(Path(path).resolve)
        _warn_of_wal_reset_bug()
        held = lock(path)
        try:
            await asyncio.to_thread(check_wal, path)
            await asyncio.to_thread(apply, path, carried())
            await asyncio.to_thread(catch_up, path)
            sealer = await asyncio.to_thread(open_sealer, path, erasable=erasable)
            writer = Writer(path, max_queue, held, retention, sealer)
        except sqlite3.Error as error:
            held.release()
            raise LogError(f"{path} cannot be opened for writing: {error}") from error
        except BaseException:
            held.release()
            raise
        try:
            log = await super().open(path, connections=connections)
        except BaseException:
            await writer.close()
            raise
        log._writer, log._sealer = writer, sealer
        if log._opener is not None and isinstance(sealer, Sealer):
            log._opener.doomed = sealer.doomed
        return log

    async def close(self) -> None:
        """End the reads, write what is waiting, and give up the lock."""
        try:
            await super().close()
        finally:
            await self._writer.close()

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
            QueueFull: too many appends are waiting.
            LogUnavailable: the database could not be written; nothing was recorded.
        """
        return await self._writer.write(draft(appends, provenance, idempotency, replaces=replaces))

    async def adopt(
        self,
        imported: Sequence[Imported],
        *,
        provenance: Provenance,
        idempotency: Idempotency | None = None,
    ) -> tuple[Recorded, ...]:
        """Record events of another log with their source, all or none; see the port."""
        drafted = await asyncio.to_thread(adoption, imported, provenance, idempotency)
        return await self._writer.write(drafted)

    async def erase(
        self,
        state_ids: Sequence[StateId],
        *,
        provenance: Provenance,
        idempotency: Idempotency | None = None,
    ) -> tuple[Recorded, ...]:
        """Record that states are erased and destroy their keys; see the port."""
        if not self.erasable:
            raise NotErasable
        unique = tuple(dict.fromkeys(state_ids))
        return await self._writer.write(
            Erasure(state_ids=unique, provenance=provenance, idempotency=idempotency)
        )

    async def grown(self, after: Position) -> None:
        """Return once there is an event after position ``after``."""
        await self._writer.grown(after)

    async def recall(self, idempotency: Idempotency) -> Remembered | None:
        """What an earlier request with this key in this scope did."""
        for digest, first, last in await self._fetch(queries.IDEMPOTENCY_KEY, *scope(idempotency)):
            rows = await self._rows(queries.ROWS, first - 1, last, -1)
            known = self._sealer.recognised(digest, idempotency)
            return Remembered(known, tuple(map(decode, rows)))
        return None

    async def begin_generation(
        self,
        started: GenerationStarted,
        *,
        provenance: Provenance,
        idempotency: Idempotency | None = None,
    ) -> None:
        """Record the intent of a streamed generation, on disk before this returns.

        Raises:
            QueueFull, LogUnavailable: it was not recorded.
        """
        await self._writer.write(
            Intent(started=started, provenance=provenance, idempotency=idempotency)
        )

    async def begun_generation(self, idempotency: Idempotency) -> GenerationStarted | None:
        """The intent that a streamed request with this key left last, if any.

        Raises:
            IdempotencyKeyReused: the key belongs to a request with another body.
        """
        found = await self._fetch(queries.GENERATION_STARTED, *scope(idempotency))
        for state_id, base_version, payload, digest in found:
            if self._sealer.recognised(digest, idempotency) != idempotency.request_digest:
                raise IdempotencyKeyReused(idempotency.key)
            if self._opener is not None:
                payload = await self._unseal(self._opener.intent, state_id, base_version, payload)
            return None if payload is None else _intents.decode(payload)
        return None


def _warn_of_wal_reset_bug() -> None:
    first, last = _WAL_RESET_BUG
    if first <= sqlite3.sqlite_version_info <= last:
        _log.warning(
            "SQLite %s can corrupt a database in WAL mode if two connections write and checkpoint"
            " at once (fixed in 3.51.3). Cacher itself has one connection that does both: let no"
            " other program write to the log",
            sqlite3.sqlite_version,
        )
