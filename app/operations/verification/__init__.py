"""Verification: a history computed again, and held against what was recorded."""
