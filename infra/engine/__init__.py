"""The engine: transformers models on one thread, with the same bits however work is cut up."""

import os

# OpenMP threads that wait spin. For long, that starves whoever else needs the core; this is a few
# microseconds, longer than the gap between two products. Read when torch loads the library.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
