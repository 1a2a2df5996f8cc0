"""Passes through transformers' own modules."""
