"""Attention weights from queries and keys, and what is made of them: compiled, in a fixed order.

Scores are those of the strict attention: products in float32, in the order of the dimensions.
Weights are summed in float64, key after key, so a row of any length sums to 1 but for the rounding
of its weights. Each row of each head stands alone: no bit depends on which others are asked for.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from infra.engine.forward import Weighing
from infra.engine.kernels import compiling, elementary
from infra.engine.kernels.compiling import compiled, inlined
from infra.engine.kernels.elementary import f64, i64, log
from infra.engine.strict import elementwise, linear, vectors
from infra.engine.strict.elementwise import exp, f32, tanh
from infra.engine.strict.linear import product
from infra.engine.strict.vectors import LANES, floats, largest

Floats = NDArray[np.float32]

_TILE: Final = 24
_STRIPE: Final = 64
_ZERO: Final = f32(0)


class HeadSummary(NamedTuple):
    """Sums over rows: entropy in nats, distance of query and key in tokens, the first's weight."""

    entropy: float
    distance: float
    first_token: float


class LayerWeights:
    """How the queries of one layer weigh keys.

    ``queries`` are ``(rows, heads, head_dim)`` for the positions from ``start`` on, ``keys``
    ``(kv_heads, tokens, head_dim)`` from 0 on; both are widened to float32. Rows are asked for by
    position, and come as ``(rows, tokens)`` in float32.
    """

    def __init__(self, queries: Tensor, weighing: Weighing, keys: Tensor, start: int) -> None:
        kv_heads, self._tokens, dim = keys.shape
        width = -(-self._tokens // LANES) * LANES
        self._start, self.heads = start, queries.shape[1]
        self._group = self.heads // kv_heads
        self._weighing = weighing
        turned = queries.float().transpose(0, 1).contiguous().numpy()
        self._queries = turned * f32(weighing.scaling)  # (heads, rows, dim)
        self._keys = np.zeros((kv_heads, dim, width), np.float32)
        self._keys[:, :, : self._tokens] = keys.float().transpose(1, 2).numpy()

    def of_head(self, head: int, rows: range) -> Floats:
        """The weights of one head."""
        found = self._weigh(head, rows)
        return found[:, : self._tokens]

    def mean(self, rows: range) -> Floats:
        """The mean over heads, summed one after the other in float64."""
        total = self.of_head(0, rows).astype(np.float64)
        for head in range(1, self.heads):
            total += self.of_head(head, rows)
        return (total / self.heads).astype(np.float32)

    def summarise(self, head: int, rows: range) -> HeadSummary:
        """What sums up the rows of one head."""
        return HeadSummary(*kernels().summarise(self._weigh(head, rows), rows.start))

    def _weigh(self, head: int, rows: range) -> Floats:
        first = rows.start - self._start
        keys = self._keys[head // self._group]
        found = np.empty((len(rows), keys.shape[1]), np.float32)
        kernels().weigh(
            self._queries[head, first : first + len(rows)],
            keys,
            rows.start,
            self._weighing.window,
            self._weighing.softcap,
            np.zeros(keys.shape[1], np.float32),
            found,
        )
        return found


def roll(weights: Floats, position: int, rolled: NDArray[np.float64]) -> None:
    """Take attention rollout one layer further (Abnar and Zuidema 2020), for some rows.

    ``weights`` are the means over heads of the rows from ``position`` on. Of ``rolled``, a row for
    each token, those rows become ``A rolled`` where A is half weights and half identity, its rows
    normalised. The rows before are needed as they were: go from the last to the first.
    """
    kernels().roll(np.ascontiguousarray(weights), position, rolled)


@inlined
def _softmax(row, low, high, width, softcap):  # type: ignore[no-untyped-def]
    """Turn the scores of the keys ``low`` to ``high`` into weights, all others of a row into 0."""
    scores = floats(row)
    for key in range(low):
        scores[key] = _ZERO
    for key in range(high + 1, width):
        scores[key] = _ZERO
    if softcap > _ZERO:
        for key in range(low, high + 1):
            scores[key] = tanh(scores[key] / softcap) * softcap
    peak = largest(row + low * 4, high + 1 - low)
    for key in range(low, high + 1):
        scores[key] = exp(scores[key] - peak)
    total = f64(0)
    for key in range(low, high + 1):
        total += f64(scores[key])
    for key in range(low, high + 1):
        scores[key] = f32(f64(scores[key]) / total)


@inlined
def _lowest(position, window):  # type: ignore[no-untyped-def]
    """The first key that the row at ``position`` sees."""
    return max(position - window + 1, i64(0)) if window > 0 else i64(0)


def _weigh(queries, keys, position, window, softcap, zeros, out):  # type: ignore[no-untyped-def]
    """Weights of one head: of ``queries`` (rows, dim) from ``position`` on, ``keys`` (dim, width).

    A tile of rows meets all keys that any of them sees, in whole vectors.
    """
    rows, dim = queries.shape
    width = i64(keys.shape[1])
    q, k = i64(queries.ctypes.data), i64(keys.ctypes.data)
    start, target = i64(zeros.ctypes.data), i64(out.ctypes.data)
    for row in range(0, rows, _TILE):
        count = min(_TILE, rows - row)
        begin = _lowest(position + row, window) // LANES * LANES
        end = ((position + row + count - 1) // LANES + 1) * LANES
        product(
            count, q + row * dim * 4, dim, k + begin * 4, width, dim, start, i64(0),
            target + (row * width + begin) * 4, width, end - begin, False, 0,
        )  # fmt: skip
        for line in range(row, row + count):
            high = position + line
            _softmax(target + line * width * 4, _lowest(high, window), high, width, softcap)


def _summarise(weights, position):  # type: ignore[no-untyped-def]
    """Sums over rows; within a row, key after key."""
    entropy, distance, first = f64(0), f64(0), f64(0)
    for row in range(len(weights)):
        row_entropy, row_distance = f64(0), f64(0)
        for key in range(position + row + 1):
            weight = f64(weights[row, key])
            if weight > 0.0:
                row_entropy -= weight * log(weight)
                row_distance += weight * f64(position + row - key)
        entropy += row_entropy
        distance += row_distance
        first += f64(weights[row, 0])
    return entropy, distance, first


def _roll(weights, position, rolled):  # type: ignore[no-untyped-def]
    """See :func:`roll`; columns stand alone, a stripe of them stays in the cache."""
    totals = np.empty(len(weights), np.float64)
    for row in range(len(weights)):
        total = f64(0)
        for key in range(position + row + 1):
            total += f64(0.5) * f64(weights[row, key])
        totals[row] = total + f64(0.5)
    sums = np.empty(_STRIPE, np.float64)
    for start in range(0, position + len(weights), _STRIPE):
        stop = min(start + _STRIPE, rolled.shape[1])
        for row in range(len(weights) - 1, -1, -1):
            own = position + row
            sums[:] = 0.0
            for key in range(start, own + 1):
                share = f64(0.5) * f64(weights[row, key]) + (f64(0.5) if key == own else f64(0))
                share /= totals[row]
                for column in range(start, stop):
                    sums[column - start] += share * rolled[key, column]
            for column in range(start, stop):
                rolled[own, column] = sums[column - start]


class Kernels(NamedTuple):
    """The compiled kernels."""

    weigh: Callable[..., None]
    summarise: Callable[..., tuple[float, float, float]]
    roll: Callable[..., None]


@cache
def kernels() -> Kernels:
    """The kernels, compiled when first wanted: seconds, the first time on a machine."""
    parts: tuple[Any, ...] = (elementwise, linear, vectors, elementary, compiling)
    sources = (__file__, *(part.__file__ for part in parts))
    lines, line = "Array(f4, 2, 'C')", "Array(f4, 1, 'C')"
    weigh = f"void({lines}, {lines}, i8, i8, f4, {line}, {lines})"
    return Kernels(
        weigh=compiled(_weigh, weigh, sources, nogil=True),
        summarise=compiled(_summarise, f"UniTuple(f8, 3)({lines}, i8)", sources, nogil=True),
        roll=compiled(_roll, f"void({lines}, i8, Array(f8, 2, 'C'))", sources, nogil=True),
    )
