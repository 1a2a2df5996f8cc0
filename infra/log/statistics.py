"""What a log holds, in figures; takes seconds, however long the log is."""

import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import Struct

from domain.chain import Head, genesis
from domain.merkle import TILE
from domain.upkeep import AppliedMigration, Bytes, States, Statistics
from infra.log import queries
from infra.log.marks import SUFFIX
from infra.log.sqlite_reader import identity, read_only

SAMPLE: Final = 20_000
"""Events that are looked at one by one: all of them up to this many, else evenly spread ones."""

MOST_BYTES_BY_TABLE: Final = 256 << 20
"""Up to this size of the file its pages are counted; that reads every one of them."""

_SAMPLED: Final = """
WITH RECURSIVE chosen (position) AS (
    SELECT 1 UNION ALL SELECT position + :step FROM chosen WHERE position + :step <= :last
)
SELECT type, fingerprint, count(*), sum(length(payload))
FROM chosen JOIN events USING (position) GROUP BY type, fingerprint
"""

_STATES: Final = "SELECT deleted, erased, count(*) FROM states GROUP BY deleted, erased"

_TIMES: Final = """
SELECT recorded_at FROM events
WHERE position IN ((SELECT min(position) FROM events), (SELECT max(position) FROM events))
ORDER BY position
"""

_BY_TABLE: Final = """
SELECT coalesce(tbl_name, name) AS part, sum(pgsize)
FROM dbstat LEFT JOIN sqlite_schema USING (name) GROUP BY part ORDER BY sum(pgsize) DESC, part
"""

_MIGRATIONS: Final = "SELECT number, name, applied_at FROM schema_migrations ORDER BY number"


def statistics(path: Path) -> Statistics:
    """Look at the log at ``path``, also beside its writer; all figures are of one moment.

    Raises:
        LogError: there is no log of this release's schema.
    """
    with read_only(path) as connection:
        connection.execute("BEGIN")
        log_id, erasable = identity(connection)
        found = connection.execute(queries.HEAD).fetchone()
        head = Head(*found) if found else genesis(log_id)
        tiles, beyond = connection.execute(queries.SIZE).fetchone()
        events = tiles * TILE + beyond
        times = [time for (time,) in connection.execute(_TIMES)]
        sample = _sample(connection, events, head.position)
        logits, released_until = connection.execute(queries.LOGITS_KEPT).fetchone()
        return Statistics(
            log_id=log_id,
            erasable=erasable,
            head=f"{head.position}:{head.hash.hex()}",
            events=events,
            first_recorded_at=times[0] if times else None,
            last_recorded_at=times[-1] if times else None,
            states=_states(connection),
            exact=events <= SAMPLE,
            events_by_type=sample.by_type,
            fingerprints=sample.by_fingerprint,
            bytes=_bytes(connection, path, payloads=sample.payload_bytes, logits=logits),
            released_until=released_until,
            migrations=tuple(
                AppliedMigration(number=number, name=name, applied_at=applied_at)
                for number, name, applied_at in connection.execute(_MIGRATIONS)
            ),
            verified=_verified(path),
        )


class _Sample(Struct, frozen=True):
    by_type: dict[str, int]
    by_fingerprint: dict[str, int]
    payload_bytes: int


def _sample(connection: sqlite3.Connection, events: int, last: int) -> _Sample:
    step = -(-events // SAMPLE) or 1
    rows = connection.execute(_SAMPLED, {"step": step, "last": last}).fetchall()
    seen = sum(count for _, _, count, _ in rows)
    share = events / seen if seen else 0.0
    by_type: dict[str, int] = {}
    by_fingerprint: dict[str, int] = {}
    for kind, fingerprint, count, _ in rows:
        by_type[kind] = by_type.get(kind, 0) + count
        if fingerprint is not None:
            by_fingerprint[fingerprint] = by_fingerprint.get(fingerprint, 0) + count
    payload_bytes = sum(size for _, _, _, size in rows)
    return _Sample(
        _scaled(by_type, share), _scaled(by_fingerprint, share), round(payload_bytes * share)
    )


def _scaled(counts: Mapping[str, int], share: float) -> dict[str, int]:
    """Most frequent first."""
    order = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return {name: round(count * share) for name, count in order}


def _states(connection: sqlite3.Connection) -> States:
    counts = {"live": 0, "deleted": 0, "erased": 0}
    for deleted, erased, count in connection.execute(_STATES):
        counts["erased" if erased else "deleted" if deleted else "live"] += count
    return States(**counts)


def _bytes(connection: sqlite3.Connection, path: Path, *, payloads: int, logits: int) -> Bytes:
    (page_size,) = connection.execute("PRAGMA page_size").fetchone()
    (free,) = connection.execute("PRAGMA freelist_count").fetchone()
    file, wal = path.stat().st_size, Path(f"{path}-wal")
    return Bytes(
        file=file,
        wal=wal.stat().st_size if wal.exists() else 0,
        free=free * page_size,
        payloads=payloads,
        logits=logits,
        by_table=_by_table(connection) if file <= MOST_BYTES_BY_TABLE else None,
    )


def _by_table(connection: sqlite3.Connection) -> dict[str, int] | None:
    try:
        return dict(connection.execute(_BY_TABLE).fetchall())
    except sqlite3.OperationalError:  # an SQLite that was built without dbstat
        return None


def _verified(path: Path) -> Any:
    try:
        return msgspec.json.decode(Path(f"{path}{SUFFIX}").read_bytes())
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None
