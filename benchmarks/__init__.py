"""Measurements, as ratios against the plain libraries in the same run."""
