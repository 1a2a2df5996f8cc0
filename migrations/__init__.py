"""The schema of the log: numbered SQL files, applied in order and never edited."""
