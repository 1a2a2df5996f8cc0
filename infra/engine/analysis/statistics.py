"""What the elements of a tensor are like: sums in float64, one element after the other."""

import math
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from domain.analysis.cache import Statistics
from infra.engine.kernels import compiling
from infra.engine.kernels.compiling import compiled
from infra.engine.kernels.elementary import f64


def statistics(vectors: NDArray[np.float32]) -> Statistics:
    """Of vectors ``(vectors, width)``. There is one zero: which of two is the least is not told."""
    rows = np.ascontiguousarray(vectors)
    total, square, deviation, norm_total, norm_min, norm_max = kernel()(rows)
    found = {
        "min": rows.min(),
        "max": rows.max(),
        "mean": total / rows.size,
        "standard_deviation": math.sqrt(deviation / rows.size),
        "norm": math.sqrt(square),
        "min_vector_norm": norm_min,
        "max_vector_norm": norm_max,
        "mean_vector_norm": norm_total / len(rows),
    }
    finite = all(map(math.isfinite, found.values()))
    return Statistics(
        **{name: float(value) + 0.0 if finite else None for name, value in found.items()}
    )


def _sums(rows):  # type: ignore[no-untyped-def]
    """The sum, the sum of squares and of squared deviations; sum and extremes of the rows' norms.

    Row by row, and within a row in order.
    """
    total, square = 0.0, 0.0
    norm_total, norm_min, norm_max = 0.0, np.inf, 0.0
    for row in rows:
        inner = 0.0
        for value in row:
            total += f64(value)
            inner += f64(value) * f64(value)
        norm = np.sqrt(inner)
        square += inner
        norm_total += norm
        norm_min, norm_max = min(norm_min, norm), max(norm_max, norm)
    mean = total / f64(rows.size)
    deviation = 0.0
    for row in rows:
        for value in row:
            deviation += (f64(value) - mean) * (f64(value) - mean)
    return total, square, deviation, norm_total, norm_min, norm_max


@cache
def kernel() -> Any:
    """What adds up, compiled when first wanted."""
    sources = (__file__, compiling.__file__)
    return compiled(_sums, "UniTuple(f8, 6)(Array(f4, 2, 'C', True))", sources, nogil=True)
