-- The event log and what is kept beside it. Times are RFC 3339, UTC, with microseconds.

-- The log's identity: one row, which the genesis of the hash chain is made of.
CREATE TABLE log (
    only INTEGER PRIMARY KEY CHECK (only = 1),
    log_id TEXT NOT NULL,
    created_at TEXT NOT NULL
) STRICT;

INSERT INTO log (only, log_id, created_at)
VALUES (1, lower(hex(randomblob(16))), strftime('%Y-%m-%dT%H:%M:%f000Z', 'now'));

-- The facts. AUTOINCREMENT: the number of a removed last row is never handed out again.
-- version counts 1, 2, 3 ... within a state; it is null for an event that leaves its state as it
-- was, and at_version then says which version it looked at.
CREATE TABLE events (
    position INTEGER PRIMARY KEY AUTOINCREMENT,
    state_id TEXT NOT NULL,
    version INTEGER,
    at_version INTEGER,
    type TEXT NOT NULL,
    schema INTEGER NOT NULL,
    payload TEXT NOT NULL,
    fingerprint TEXT,
    recorded_at TEXT NOT NULL,
    actor TEXT NOT NULL,
    request_id TEXT NOT NULL,
    previous_hash BLOB NOT NULL,
    hash BLOB NOT NULL,
    UNIQUE (state_id, version)
) STRICT;

-- The numerics that events were computed under, by the SHA-256 of their description.
CREATE TABLE fingerprints (
    id TEXT PRIMARY KEY,
    document TEXT NOT NULL,
    deterministic INTEGER NOT NULL CHECK (deterministic IN (0, 1))
) STRICT, WITHOUT ROWID;

-- Which events answered which request. A row goes when it is more than a day old.
CREATE TABLE idempotency_keys (
    actor TEXT NOT NULL,
    method TEXT NOT NULL,
    path TEXT NOT NULL,
    key TEXT NOT NULL,
    request_digest BLOB NOT NULL,
    first_position INTEGER NOT NULL,
    last_position INTEGER NOT NULL,
    recorded_at TEXT NOT NULL,
    PRIMARY KEY (actor, method, path, key)
) STRICT, WITHOUT ROWID;

CREATE INDEX idempotency_keys_by_age ON idempotency_keys (recorded_at);

-- Logits kept beside an event, one blob per token; the event holds their digest.
CREATE TABLE logits (
    position INTEGER NOT NULL,
    step INTEGER NOT NULL,
    data BLOB NOT NULL,
    PRIMARY KEY (position, step)
) STRICT;

-- Streamed generations that were begun: a trace of those that a crash cut off. Not in the chain.
CREATE TABLE generations_started (
    id INTEGER PRIMARY KEY,
    state_id TEXT NOT NULL,
    base_version INTEGER NOT NULL,
    payload TEXT NOT NULL,
    fingerprint TEXT NOT NULL,
    recorded_at TEXT NOT NULL,
    actor TEXT NOT NULL,
    request_id TEXT NOT NULL,
    key_actor TEXT,
    key_method TEXT,
    key_path TEXT,
    key TEXT,
    request_digest BLOB
) STRICT;

CREATE INDEX generations_started_by_key
ON generations_started (key, key_path, key_method, key_actor) WHERE key IS NOT NULL;

-- A projection of the events, written in their transaction: where each state stands.
CREATE TABLE states (
    state_id TEXT PRIMARY KEY,
    model_id TEXT NOT NULL,
    created_position INTEGER NOT NULL UNIQUE,
    version INTEGER NOT NULL,
    deleted INTEGER NOT NULL CHECK (deleted IN (0, 1))
) STRICT, WITHOUT ROWID;

CREATE INDEX live_states ON states (created_position) WHERE deleted = 0;

CREATE INDEX live_states_by_model ON states (model_id, created_position) WHERE deleted = 0;
