-- What proofs, the feed, import, erasure and retention need beside the events.

-- Where an imported event comes from (JSON): it is part of the hash where there is one.
ALTER TABLE events ADD COLUMN source TEXT;

-- The events of one state in the order of the log.
CREATE INDEX events_by_state ON events (state_id, position);

-- The Merkle tree over the events' hashes, 256 of them at a time: the root over each full tile, and
-- the position of its last event. Derived: a tile that is missing is computed from its events.
CREATE TABLE tiles (
    number INTEGER PRIMARY KEY,
    last_position INTEGER NOT NULL,
    hash BLOB NOT NULL
) STRICT;

-- Which state began with what another held.
CREATE TABLE parents (
    parent_id TEXT NOT NULL,
    child_id TEXT NOT NULL,
    PRIMARY KEY (parent_id, child_id)
) STRICT, WITHOUT ROWID;

INSERT OR IGNORE INTO parents (parent_id, child_id)
SELECT json_extract(payload, '$.origin.state_id'), state_id FROM events
WHERE type = 'state_created' AND json_extract(payload, '$.origin.kind') = 'fork';

INSERT OR IGNORE INTO parents (parent_id, child_id)
SELECT json_extract(parent.value, '$.state_id'), events.state_id
FROM events, json_each(events.payload, '$.origin.parents') AS parent
WHERE events.type = 'state_created' AND json_extract(events.payload, '$.origin.kind') = 'merge';

-- Whether what states hold is sealed with a key of each state's own, which can be destroyed.
ALTER TABLE log ADD COLUMN erasable INTEGER NOT NULL DEFAULT 0 CHECK (erasable IN (0, 1));

-- 1 where the key of a state was destroyed, or is about to be.
ALTER TABLE states ADD COLUMN erased INTEGER NOT NULL DEFAULT 0 CHECK (erased IN (0, 1));

CREATE INDEX erased_states ON states (state_id) WHERE erased = 1;

-- So that what a state was about to do can be forgotten with it.
CREATE INDEX generations_started_by_state ON generations_started (state_id);

-- What is kept in logits: its bytes, and the position up to which it may have been let go of.
CREATE TABLE logits_kept (
    only INTEGER PRIMARY KEY CHECK (only = 1),
    bytes INTEGER NOT NULL,
    released_until INTEGER NOT NULL
) STRICT;

INSERT INTO logits_kept (only, bytes, released_until)
SELECT 1, coalesce(sum(length(data)), 0), 0 FROM logits;
