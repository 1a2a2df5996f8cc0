-- The analyses of one state in the order of the log: events that leave their state as it was.
CREATE INDEX analyses_by_state ON events (state_id, position) WHERE version IS NULL;
