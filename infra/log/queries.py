"""Every SQL statement of the running log, each with its purpose.

Each one finds its rows through an index, so that none grows slower with the log (a test reads
their plans). ``?`` are bound in the order written.
"""

from typing import Final

# The name of the log, which its genesis is made of.
LOG_ID: Final = "SELECT log_id FROM log WHERE only = 1"

# Whether what its states hold is sealed.
ERASABLE: Final = "SELECT erasable FROM log WHERE only = 1"

# The newest event: what the next one is chained to.
HEAD: Final = """
SELECT position, hash FROM events WHERE position = (SELECT max(position) FROM events)
"""

# The largest position ever handed out, also of a row that was removed since. One row.
LAST_POSITION: Final = "SELECT seq FROM sqlite_sequence WHERE name = 'events'"

# Events of the whole log in order: after a position, up to and with another, at most so many.
ROWS: Final = """
SELECT position, state_id, version, at_version, type, schema, payload, fingerprint,
       recorded_at, actor, request_id, previous_hash, hash, source
FROM events WHERE position > ? AND position <= ? ORDER BY position LIMIT ?
"""

# Events before the first position that a log can have, at most so many.
ROWS_BEFORE_FIRST: Final = """
SELECT position, state_id, version, at_version, type, schema, payload, fingerprint,
       recorded_at, actor, request_id, previous_hash, hash, source
FROM events WHERE position < 1 ORDER BY position LIMIT ?
"""

# Events of one state in order: after a version, up to and with another, at most so many.
STATE_ROWS: Final = """
SELECT position, state_id, version, at_version, type, schema, payload, fingerprint,
       recorded_at, actor, request_id, previous_hash, hash, source
FROM events WHERE state_id = ? AND version > ? AND version <= ? ORDER BY version LIMIT ?
"""

# The newest event of one state.
STATE_NEWEST: Final = """
SELECT position, state_id, version, at_version, type, schema, payload, fingerprint,
       recorded_at, actor, request_id, previous_hash, hash, source
FROM events WHERE state_id = ? ORDER BY version DESC LIMIT 1
"""

# Events of one state in the order of the log: after a position, at most so many.
STATE_PAGE: Final = """
SELECT position, state_id, version, at_version, type, schema, payload, fingerprint,
       recorded_at, actor, request_id, previous_hash, hash, source
FROM events WHERE state_id = ? AND position > ? ORDER BY position LIMIT ?
"""

# Analyses of one state in the order of the log: after a position, at most so many.
ANALYSES: Final = """
SELECT position, state_id, version, at_version, type, schema, payload, fingerprint,
       recorded_at, actor, request_id, previous_hash, hash, source
FROM events WHERE state_id = ? AND version IS NULL AND position > ? ORDER BY position LIMIT ?
"""

# The blobs kept beside one event, in order.
LOGITS: Final = "SELECT data FROM logits WHERE position = ? ORDER BY step"

# A fingerprint by its id.
FINGERPRINT: Final = "SELECT id, document, deterministic FROM fingerprints WHERE id = ?"

# A page of the states that are not deleted, newest first, from below a position.
LIVE_STATES: Final = """
SELECT state_id, created_position FROM states
WHERE deleted = 0 AND created_position < ? ORDER BY created_position DESC LIMIT ?
"""

# The same, of one model.
LIVE_STATES_OF_MODEL: Final = """
SELECT state_id, created_position FROM states
WHERE deleted = 0 AND model_id = ? AND created_position < ?
ORDER BY created_position DESC LIMIT ?
"""

# Every state that ever was, oldest first.
STATE_IDS: Final = """
SELECT state_id FROM events GROUP BY state_id ORDER BY min(position)
"""

# States that are listed and have no events, at most so many.
PHANTOMS: Final = """
SELECT state_id, created_position FROM states
WHERE state_id >= '' AND NOT EXISTS (SELECT 1 FROM events WHERE state_id = states.state_id)
LIMIT ?
"""

# Which state began with what another held: those that began after a position and up to another.
KINSHIPS: Final = """
SELECT coalesce(created_position, 0) AS began, child_id, parent_id
FROM parents LEFT JOIN states ON state_id = child_id
WHERE parent_id >= '' AND (created_position IS NULL OR began > ? AND began <= ?)
"""

# Where some of the states (a JSON array) stand by their events after a position, and as projected.
STANDINGS: Final = """
WITH asked AS (
    SELECT value AS state_id,
           (SELECT min(position) FROM events WHERE state_id = value AND position > ?) AS first,
           (SELECT max(version) FROM events WHERE state_id = value) AS newest
    FROM json_each(?)
)
SELECT asked.state_id, first, newest,
       (SELECT type FROM events WHERE state_id = asked.state_id AND version = newest),
       model_id, created_position, states.version, deleted, erased
FROM asked LEFT JOIN states ON states.state_id = asked.state_id
WHERE first IS NOT NULL
"""

# Number of full tiles, and of events beyond the last of them.
SIZE: Final = """
SELECT coalesce((SELECT max(number) FROM tiles) + 1, 0), count(*) FROM events
WHERE position > coalesce(
    (SELECT last_position FROM tiles WHERE number = (SELECT max(number) FROM tiles)), 0
)
"""

# The roots over full tiles of events, in order.
TILES: Final = """
SELECT number, last_position, hash FROM tiles WHERE number >= -9223372036854775808 ORDER BY number
"""

# The newest tile that is kept.
NEWEST_TILE: Final = """
SELECT number, last_position FROM tiles WHERE number = (SELECT max(number) FROM tiles)
"""

# Keep the root over a full tile.
INSERT_TILE: Final = "INSERT INTO tiles (number, last_position, hash) VALUES (?, ?, ?)"

# Hashes of events in order: after a position, at most so many.
HASHES: Final = "SELECT position, hash FROM events WHERE position > ? ORDER BY position LIMIT ?"

# States that began with what another held, and what these held, in the order they began.
DESCENDANTS: Final = """
WITH RECURSIVE found (state_id) AS (
    SELECT child_id FROM parents WHERE parent_id = ?
    UNION
    SELECT child_id FROM parents JOIN found ON parent_id = found.state_id
)
SELECT state_id FROM found CROSS JOIN states USING (state_id) ORDER BY created_position
"""

# The position up to which stored logits may have been let go of.
RELEASED_UNTIL: Final = "SELECT released_until FROM logits_kept WHERE only = 1"

# Bytes of the stored logits, and the position up to which they may have been let go of.
LOGITS_KEPT: Final = "SELECT bytes, released_until FROM logits_kept WHERE only = 1"

# Events with stored logits from after a position, oldest first, at most so many: bytes, and time.
OLDEST_LOGITS: Final = """
SELECT position, sum(length(data)),
       coalesce((SELECT recorded_at FROM events WHERE events.position = logits.position), '')
FROM logits WHERE position > ? GROUP BY position ORDER BY position LIMIT ?
"""

# When a state was erased, if it was.
ERASED_AT: Final = """
SELECT recorded_at FROM events JOIN states USING (state_id, version)
WHERE state_id = ? AND erased = 1
"""

# When a state ended, if it did, and whether it was erased.
ENDED_AT: Final = """
SELECT recorded_at, erased FROM events JOIN states USING (state_id, version)
WHERE state_id = ? AND deleted = 1
"""

# A page of the states that were erased, in the order of their ids.
ERASED_STATES: Final = """
SELECT state_id FROM states WHERE erased = 1 AND state_id > ? ORDER BY state_id LIMIT ?
"""

# Which event it is that some logits are kept beside.
EVENT_PLACE: Final = "SELECT state_id, version FROM events WHERE position = ?"

# Where a state stands now.
STATE_VERSION: Final = "SELECT version FROM states WHERE state_id = ?"

# What a request with this Idempotency-Key did.
IDEMPOTENCY_KEY: Final = """
SELECT request_digest, first_position, last_position FROM idempotency_keys
WHERE actor = ? AND method = ? AND path = ? AND key = ?
"""

# The newest intent that a streamed request with this Idempotency-Key left.
GENERATION_STARTED: Final = """
SELECT state_id, base_version, payload, request_digest FROM generations_started
WHERE key_actor = ? AND key_method = ? AND key_path = ? AND key = ?
ORDER BY id DESC LIMIT 1
"""

# Record an event.
INSERT_EVENT: Final = """
INSERT INTO events (position, state_id, version, at_version, type, schema, payload, fingerprint,
                    recorded_at, actor, request_id, previous_hash, hash, source)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""

# Project the creation of a state.
INSERT_STATE: Final = """
INSERT INTO states (state_id, model_id, created_position, version, deleted)
VALUES (?, ?, ?, ?, 0)
"""

# Project that a state began with what another held.
INSERT_PARENT: Final = """
INSERT INTO parents (parent_id, child_id) VALUES (?, ?) ON CONFLICT DO NOTHING
"""

# Project any later event of a state.
UPDATE_STATE: Final = """
UPDATE states SET version = ?, deleted = max(deleted, ?) WHERE state_id = ?
"""

# Project that a state was erased; the list of states leaves it out.
UPDATE_ERASED_STATE: Final = """
UPDATE states SET version = ?, deleted = 1, erased = 1 WHERE state_id = ?
"""

# Give a log without events the name of the one that is restored into it.
NAME_LOG: Final = "UPDATE log SET log_id = ?, erasable = ? WHERE only = 1"

# Keep what states hold sealed from now on.
MAKE_ERASABLE: Final = "UPDATE log SET erasable = 1 WHERE only = 1"

# Overwrite the digests of requests whose answers hold something of a state. A key is as old as
# the events it stands for.
OVERWRITE_DIGESTS: Final = """
UPDATE idempotency_keys SET request_digest = zeroblob(32)
WHERE (actor, method, path, key) IN (
    SELECT keys.actor, method, path, key FROM events JOIN idempotency_keys AS keys
    ON keys.recorded_at = events.recorded_at AND position BETWEEN first_position AND last_position
    WHERE state_id = ?
)
"""

# Forget the generations that a state began.
DELETE_INTENTS: Final = "DELETE FROM generations_started WHERE state_id = ?"

# Bytes of the logits that are kept of a state.
LOGITS_OF_STATE: Final = """
SELECT coalesce(sum(length(data)), 0) FROM events JOIN logits USING (position) WHERE state_id = ?
"""

# Let go of the logits of a state.
DELETE_LOGITS_OF_STATE: Final = """
DELETE FROM logits WHERE position IN (SELECT position FROM events WHERE state_id = ?)
"""

# Keep a fingerprint that an event refers to; most are there already.
INSERT_FINGERPRINT: Final = """
INSERT INTO fingerprints (id, document, deterministic) VALUES (?, ?, ?) ON CONFLICT DO NOTHING
"""

# Keep one blob of logits beside an event.
INSERT_LOGITS: Final = "INSERT INTO logits (position, step, data) VALUES (?, ?, ?)"

# Count bytes of logits that are kept from now on.
COUNT_LOGITS: Final = "UPDATE logits_kept SET bytes = bytes + ? WHERE only = 1"

# Let go of the logits of events after a position, up to and with another.
DELETE_LOGITS: Final = "DELETE FROM logits WHERE position > ? AND position <= ?"

# Count bytes of logits that were let go of, up to a position.
COUNT_RELEASED_LOGITS: Final = """
UPDATE logits_kept SET bytes = max(0, bytes - ?), released_until = ? WHERE only = 1
"""

# Remember which events answered a request, in place of those remembered before.
INSERT_IDEMPOTENCY_KEY: Final = """
INSERT OR REPLACE INTO idempotency_keys (actor, method, path, key, request_digest,
                              first_position, last_position, recorded_at)
VALUES (?, ?, ?, ?, ?, ?, ?, ?)
"""

# Forget the oldest keys from before a moment, at most so many.
DELETE_IDEMPOTENCY_KEYS: Final = """
DELETE FROM idempotency_keys WHERE (actor, method, path, key) IN (
    SELECT actor, method, path, key FROM idempotency_keys
    WHERE recorded_at < ? ORDER BY recorded_at LIMIT ?
)
"""

# Record the intent of a streamed generation.
INSERT_GENERATION_STARTED: Final = """
INSERT INTO generations_started (state_id, base_version, payload, fingerprint, recorded_at,
                                 actor, request_id, key_actor, key_method, key_path, key,
                                 request_digest)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""

# Forget intents from before a moment, among so many of the oldest.
DELETE_GENERATIONS_STARTED: Final = """
DELETE FROM generations_started
WHERE id < (SELECT min(id) FROM generations_started) + ? AND recorded_at < ?
"""
