"""How much of the stored logits is kept: the newest, by age, by bytes, or both.

They are no part of the chain: an event holds their digest, and verification computes them again.
What is beyond a limit goes in the order of the log, oldest first, a bounded part of it with each
transaction of the writer, and more than what comes in, so that it always catches up.
"""

import sqlite3
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final

from msgspec import Struct

from domain.upkeep import Released
from infra.log import queries

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


def _earlier(moment: str, days: int) -> str:
    earlier = datetime.fromisoformat(moment) - timedelta(days=days)
    return earlier.isoformat(timespec="microseconds").replace("+00:00", "Z")
