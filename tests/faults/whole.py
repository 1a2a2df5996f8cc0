"""A log that is whole: nothing half there, in any of its tables."""

import hashlib
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Final

from domain.chain import Head
from domain.merkle import TILE
from tests.end_to_end.calls import walk_chain

PARENTS: Final = """
SELECT json_extract(payload, '$.origin.state_id') AS parent_id, state_id AS child_id FROM events
WHERE json_extract(payload, '$.origin.kind') = 'fork'
UNION SELECT json_extract(parent.value, '$.state_id'), events.state_id
FROM events, json_each(payload, '$.origin.parents') AS parent
"""

# Each finds what must not be there.
HALF_THERE: Final = {
    "versions with a gap": """
        SELECT state_id FROM events GROUP BY state_id
        HAVING count(version) != max(version) OR min(version) != 1""",
    "a state that does not begin with its creation": """
        SELECT position FROM events WHERE (version = 1) != (type = 'state_created')""",
    "an event after the deletion": """
        SELECT e.position FROM events e JOIN events d USING (state_id)
        WHERE d.type = 'state_deleted' AND e.position > d.position""",
    "an analysis with a version, or another event without": """
        SELECT position FROM events WHERE (version IS NULL) != (type = 'state_analyzed')
        OR (at_version IS NULL) = (type = 'state_analyzed')""",
    "an analysis of what was not there": """
        SELECT a.position FROM events a LEFT JOIN events e
        ON e.state_id = a.state_id AND e.version = a.at_version AND e.position < a.position
        WHERE a.type = 'state_analyzed' AND e.position IS NULL""",
    "a projection that is not that of the events": """
        SELECT state_id, min(position), max(version), max(type = 'state_deleted') FROM events
        GROUP BY state_id
        EXCEPT SELECT state_id, created_position, version, deleted FROM states""",
    "a projection of no events": """
        SELECT state_id FROM states EXCEPT SELECT state_id FROM events""",
    "a key whose events are not there": """
        SELECT k.key FROM idempotency_keys k WHERE last_position - first_position + 1 !=
        (SELECT count(*) FROM events e WHERE e.request_id = k.key
         AND e.position BETWEEN k.first_position AND k.last_position)""",
    "an event whose key is not there": """
        SELECT request_id FROM events EXCEPT SELECT key FROM idempotency_keys""",
    "a fingerprint that is not there": """
        SELECT fingerprint FROM events WHERE fingerprint IS NOT NULL
        EXCEPT SELECT id FROM fingerprints""",
    "logits of no event": """
        SELECT position FROM logits EXCEPT SELECT position FROM events""",
    "bytes of logits that are not theirs": """
        SELECT bytes FROM logits_kept EXCEPT SELECT coalesce(sum(length(data)), 0) FROM logits""",
    "a parent that no event names": f"""
        SELECT parent_id, child_id FROM parents
        EXCEPT SELECT parent_id, child_id FROM ({PARENTS})""",
    "a parent that is not there": f"""
        SELECT parent_id, child_id FROM ({PARENTS}) EXCEPT SELECT parent_id, child_id FROM parents
        """,
}


def check_whole(database: Path, known: Head | None = None) -> Head:
    """Make sure that a log is whole; the chain from the head that is ``known`` on. Its head."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        for fault, sql in HALF_THERE.items():
            found = connection.execute(sql).fetchall()
            assert found == [], f"{fault}: {found}"
        hashes = connection.execute("SELECT position, hash FROM events ORDER BY position")
        kept = connection.execute("SELECT number, last_position, hash FROM tiles ORDER BY number")
        assert kept.fetchall() == tiles(hashes.fetchall())
    return walk_chain(database, known)


def tiles(events: Sequence[tuple[int, bytes]]) -> list[tuple[int, int, bytes]]:
    """The roots over full tiles of events (RFC 9162, 2.1.1), each with its last position."""
    return [
        (
            start // TILE,
            events[start + TILE - 1][0],
            root([digest for _, digest in events[start : start + TILE]]),
        )
        for start in range(0, len(events) - TILE + 1, TILE)
    ]


def root(hashes: Sequence[bytes]) -> bytes:
    """The root over a full tile, level by level."""
    level = [hashlib.sha256(b"\0" + one).digest() for one in hashes]
    while len(level) > 1:
        pairs = zip(level[::2], level[1::2], strict=True)
        level = [hashlib.sha256(b"\1" + left + right).digest() for left, right in pairs]
    return level[0]
