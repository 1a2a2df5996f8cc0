"""How much of the stored logits is kept: the newest, by age, by bytes, or both.

They are no part of the chain: an event holds their digest, and verification computes them again.
What is beyond a limit goes in the order of the log, oldest first, a bounded part of it with each
transaction of the writer, and more than what comes in, so that it always catches up.
"""

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from msgspec import Struct

from domain.log_errors import LogError
from domain.upkeep import Released
from infra.log import queries
from infra.log.migrate import check_current, lock

STEP_EVENTS: Final = 64
STEP_BYTES: Final = 8 << 20
"""What one transaction lets go of at most, or twice what it adds where that is more; it may go
beyond the bytes by one event."""


class Retention(Struct, frozen=True, kw_only=True):
    """Keep logits of the last ``max_days`` days, and at most ``max_bytes`` of them; 0: no limit.

    An event's age is the time from when it was recorded to when the events now written are (the
    time in their provenance). Nothing goes before what comes before it in the log: what is
    recorded while the clock is set back goes no sooner than the event before it.
    """

    max_days: int = 0
    max_bytes: int = 0

    def __bool__(self) -> bool:
        return self.max_days > 0 or self.max_bytes > 0


KEEP_ALL: Final = Retention()


def keep(
    connection: sqlite3.Connection, retention: Retention, now: str, added: Sequence[int]
) -> None:
    """Count blobs of these sizes, which the open transaction adds; let go of what is too much."""
    if added:
        connection.execute(queries.COUNT_LOGITS, (sum(added),))
    if retention:
        release(connection, retention, now, added)


def release(
    connection: sqlite3.Connection, retention: Retention, now: str, added: Sequence[int] = ()
) -> Released:
    """Let go of some of what is beyond the limits, in the open transaction.

    ``now`` is RFC 3339, as in the log; ``added`` are the sizes of the blobs that it adds.
    """
    kept, until = connection.execute(queries.LOGITS_KEPT).fetchone()
    before = _earlier(now, retention.max_days) if retention.max_days else ""
    most_bytes = max(STEP_BYTES, 2 * sum(added))
    events, gone, last = 0, 0, until
    oldest = (until, max(STEP_EVENTS, 2 * len(added)))
    for position, size, recorded_at in connection.execute(queries.OLDEST_LOGITS, oldest):
        too_many = 0 < retention.max_bytes < kept - gone
        if gone >= most_bytes or not (too_many or recorded_at < before):
            break
        events, gone, last = events + 1, gone + size, position
    if events:
        connection.execute(queries.DELETE_LOGITS, (until, last))
        connection.execute(queries.COUNT_RELEASED_LOGITS, (gone, last))
    return Released(events, gone)


def prune(path: Path, retention: Retention, now: str) -> Released:
    """Let go of all that is beyond the limits; the free space is used again by later events.

    Raises:
        LogIsLocked: a server writes to the log: it does this itself.
        LogError: there is no log of this release's schema, or it cannot be written.
    """
    path = path.resolve()
    if not path.exists():
        raise LogError(f"there is no log at {path}")
    held, events, gone = lock(path), 0, 0
    try:
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            check_current(connection, path)
            while True:
                connection.execute("BEGIN IMMEDIATE")
                step = release(connection, retention, now)
                connection.execute("COMMIT")
                if not step.events:
                    return Released(events, gone)
                events, gone = events + step.events, gone + step.bytes
    except sqlite3.Error as error:
        raise LogError(f"{path} could not be pruned to its end: {error}") from error
    finally:
        held.release()


def _earlier(moment: str, days: int) -> str:
    earlier = datetime.fromisoformat(moment) - timedelta(days=days)
    return earlier.isoformat(timespec="microseconds").replace("+00:00", "Z")
