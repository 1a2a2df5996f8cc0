"""The one writer of a log: a thread that owns the one writing connection.

Whatever waits when the thread comes round goes into one transaction (group commit), and costs one
trip from the event loop to the thread and back. An ``aiosqlite`` connection is such a thread too,
but every statement is a trip of its own there, and a caller that is cancelled between two of them
leaves a transaction open. Here nothing a caller does can come between ``BEGIN`` and ``COMMIT``.
"""

import asyncio
import logging
import sqlite3
import threading
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Final

from filelock import BaseFileLock

from domain.errors import LogUnavailable, QueueFull
from domain.events import Recorded
from domain.ids import Position
from infra.log import queries
from infra.log.batch import Job, Outcome, write_batch
from infra.log.erasing import Eraser, Erasure
from infra.log.retention import Retention
from infra.log.sealing import Plain, Sealer

_BUSY_TIMEOUT_S: Final = 5.0

_log = logging.getLogger(__name__)

_Answer = asyncio.Future[tuple[Recorded, ...]]


class Writer:
    """Writes jobs in the order they come, at most ``max_queue`` waiting or being written.

    All methods are for the event loop it was made on. ``reached`` is the newest position on disk.
    ``held`` is the log's lock: released when the thread ends, not before, whatever becomes of the
    caller of :meth:`close`.
    """

    def __init__(
        self,
        path: Path,
        max_queue: int,
        held: BaseFileLock,
        retention: Retention,
        sealer: Plain,
    ) -> None:
        self._path = path
        self._held = held
        self._retention = retention
        self._sealer = sealer
        self._max_queue = max_queue
        self._unanswered = 0
        self._closing = False
        self._jobs: SimpleQueue[tuple[Job | Erasure, _Answer] | None] = SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._connection = _connect(path)
        self._eraser: Eraser | None = None
        if isinstance(sealer, Sealer):
            # What is overwritten or deleted leaves nothing behind in the pages of the database.
            self._connection.execute("PRAGMA secure_delete = ON")
            self._eraser = Eraser(self._connection, sealer)
        self.reached = _last_position(self._connection)
        self._news = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
        self._thread.start()

    async def write(self, job: Job | Erasure) -> tuple[Recorded, ...]:
        """Return once ``job`` is on disk.

        A caller that is cancelled only stops waiting: its job is written wholly all the same.

        Raises:
            VersionConflict, IdempotencyKeyReused: the job was refused.
            QueueFull, LogUnavailable: it was not written.
        """
        if self._closing:
            raise LogUnavailable("the log is closed")
        if self._unanswered >= self._max_queue:
            raise QueueFull(self._max_queue)
        self._unanswered += 1
        answer: _Answer = self._loop.create_future()
        self._jobs.put((job, answer))
        return await answer

    async def grown(self, after: Position) -> None:
        """Return once an event after position ``after`` is on disk."""
        while self.reached <= after:
            await self._news.wait()

    async def close(self) -> None:
        """Write what is waiting, move the WAL into the database, release the lock."""
        if not self._closing:
            self._closing = True
            self._jobs.put(None)
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        closing = False
        while not closing:
            taken = self._taken()
            batch = [entry for entry in taken if entry is not None]
            closing = len(batch) < len(taken)
            if batch:
                outcomes = self._outcomes([job for job, _ in batch])
                answers = [answer for _, answer in batch]
                self._loop.call_soon_threadsafe(self._answer, answers, outcomes)
        self._finish()

    def _taken(self) -> list[tuple[Job | Erasure, _Answer] | None]:
        """All that waits, once anything does; what is left of erasures is done meanwhile."""
        taken: list[tuple[Job | Erasure, _Answer] | None] = []
        while not taken:
            patience_s = None if self._eraser is None else self._eraser.retry()
            with suppress(Empty):
                taken.append(self._jobs.get(timeout=patience_s))
        while not self._jobs.empty():
            taken.append(self._jobs.get())
        return taken

    def _outcomes(self, jobs: list[Job | Erasure]) -> list[Outcome]:
        """Carry out jobs in order: an erasure is a transaction of its own."""
        groups = groupby(jobs, key=lambda job: id(job) if isinstance(job, Erasure) else None)
        return [outcome for _, group in groups for outcome in self._commit(list(group))]

    def _commit(self, jobs: list[Job | Erasure]) -> list[Outcome]:
        try:
            if self._connection.in_transaction:  # the rollback of an earlier batch failed too
                self._connection.rollback()
            return self._carry_out(jobs)
        except Exception as error:
            _log.exception("a batch of %d appends could not be written", len(jobs))
            self._roll_back()
            return [_unavailable(self._path, error) for _ in jobs]

    def _carry_out(self, jobs: list[Job | Erasure]) -> list[Outcome]:
        if self._eraser is not None and isinstance(jobs[0], Erasure):
            return [self._eraser.erase(jobs[0])]
        together = [job for job in jobs if not isinstance(job, Erasure)]
        return write_batch(self._connection, together, self._retention, self._sealer)

    def _roll_back(self) -> None:
        try:
            self._connection.rollback()
        except sqlite3.Error:
            _log.exception("the transaction could not be rolled back; trying again before the next")

    def _answer(self, answers: list[_Answer], outcomes: list[Outcome]) -> None:
        self._unanswered -= len(answers)
        for answer, outcome in zip(answers, outcomes, strict=True):
            if answer.cancelled():
                continue
            if isinstance(outcome, Exception):
                answer.set_exception(outcome)
            else:
                answer.set_result(outcome)
        self._tell(outcomes)

    def _tell(self, outcomes: list[Outcome]) -> None:
        """Wake whoever waits for events."""
        written = [one.position for out in outcomes if isinstance(out, tuple) for one in out]
        self.reached = max([self.reached, *written])
        self._news.set()
        self._news = asyncio.Event()

    def _finish(self) -> None:
        if self._eraser is not None:
            self._eraser.finish()
        try:
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except sqlite3.Error:
            _log.exception("the WAL stays as it is; the next start reads it")
        self._connection.close()
        self._sealer.close()
        self._held.release()


def _connect(path: Path) -> sqlite3.Connection:
    # Made here so that an error reaches the caller; used by the thread alone from then on.
    connection = sqlite3.connect(
        path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
    )
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    return connection


def _last_position(connection: sqlite3.Connection) -> Position:
    found = connection.execute(queries.HEAD).fetchone()
    return Position(found[0] if found else 0)


def _unavailable(path: Path, error: Exception) -> LogUnavailable:
    return LogUnavailable(
        f"the log {path.name} could not be written, nothing was recorded: {error}"
    )
