"""The ports of :mod:`domain` made real: the event log, the engine, the models."""

import os

# OpenMP threads that wait for work spin, and starve whoever else needs their core: three times
# slower on a busy machine. This is a few microseconds; libgomp reads it when torch loads it.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# cuBLAS gives the same bits each time only with workspaces of a fixed size.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
