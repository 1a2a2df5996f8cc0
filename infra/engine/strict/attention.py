"""Attention over blocks of keys, for rows of many texts at once.

A *tile* is a few rows that read the same blocks: neighbours in one text, or the newest rows of
texts that begin alike. Blocks that all of a tile's rows share are read once for all of them, the
others row by row. Each row sums over exactly the keys it may see, in their order, so neither the
tile nor what else a block holds changes a bit of it.
"""

from typing import Final

import numpy as np

from infra.engine.blocks import BLOCK_TOKENS
from infra.engine.compiling import inlined
from infra.engine.strict.elementwise import exp, f32, tanh
from infra.engine.strict.linear import product
from infra.engine.strict.vectors import (
    LANES,
    bits_of,
    floats,
    halves,
    integers,
    largest,
    total,
)

TILE_ROWS: Final = 6
"""Rows of a tile at most, counted for each of the query heads that share a K/V head."""

_BLOCK: Final = BLOCK_TOKENS
_NOTHING = f32(-np.inf)
_ONE, _ZERO = f32(1), f32(0)


@inlined
def _rounded(x):
    """The bits of the bfloat16 next to a float, ties to even."""
    bits = np.uint32(bits_of(x))
    odd = np.uint32((bits >> np.uint32(16)) & np.uint32(1))
    return np.uint16(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))


@inlined
def store(k, v, k_step, v_step, keys, values, heads, dim, padded_dim, offset, bfloat16):
    """Write K and V of one token at ``offset`` of a block.

    ``k`` and ``v`` have ``heads`` vectors, ``k_step`` and ``v_step`` floats apart. A block's keys
    are ``(heads, dim, tokens)``, its values ``(heads, tokens, padded_dim)``.
    """
    for head in range(heads):
        source, other = floats(k + head * k_step * 4), floats(v + head * v_step * 4)
        key, value = head * dim * _BLOCK + offset, (head * _BLOCK + offset) * padded_dim
        if bfloat16:
            target, target_v = halves(keys), halves(values)
            for d in range(dim):
                target[key + d * _BLOCK] = _rounded(source[d])
                target_v[value + d] = _rounded(other[d])
        else:
            target_f, target_vf = floats(keys), floats(values)
            for d in range(dim):
                target_f[key + d * _BLOCK] = source[d]
                target_vf[value + d] = other[d]


@inlined
def _weigh(row, first, low, high, softcap):
    """Turn scores of the keys ``low`` to ``high`` into weights; returns their sum.

    ``row`` begins at key ``first``, the start of a block, and goes on to the end of one.
    """
    scores = floats(row)
    stop = high - high % _BLOCK + _BLOCK - first
    for i in range(low - first):
        scores[i] = _NOTHING
    for i in range(high + 1 - first, stop):
        scores[i] = _NOTHING
    if softcap > _ZERO:
        for i in range(low - first, high + 1 - first):
            scores[i] = tanh(scores[i] / softcap) * softcap
    peak = largest(row, stop)
    for i in range(stop):
        scores[i] = exp(scores[i] - peak)
    return total(row, stop)


@inlined
def attend(
    q, q_row, q_head, out, out_row, out_head,
    row, rows, shared, positions, tables, starts, head, group, dim, padded_dim,
    keys, values, key_bytes, value_bytes, bfloat16, scaling, window, softcap,
    scratch, context,
):  # fmt: skip
    """Rows ``row`` to ``row + rows`` of a pass, for the ``group`` query heads of K/V head ``head``.

    The blocks of row r are ``tables[starts[r]:]``; the first ``shared`` are those of all rows.
    ``keys`` and ``values`` are a layer's; a block takes ``key_bytes`` and ``value_bytes``.
    ``scratch`` has room for ``rows * group`` queries, scores of ``context`` keys, and results.
    """
    count = rows * group
    size = 2 if bfloat16 else 4
    key_head, value_head = head * dim * _BLOCK * size, head * _BLOCK * padded_dim * size
    queries = scratch
    scores = queries + count * dim * 4
    results = scores + count * context * 4
    zeros = results + count * padded_dim * 4
    place, index, begin = integers(positions), integers(tables), integers(starts)
    blank, sums = floats(zeros), floats(zeros + padded_dim * 4)
    span = max(padded_dim, _BLOCK)
    for d in range(span):
        blank[d] = _ZERO
    sums = floats(zeros + span * 4)

    last = np.int64(0)
    first = np.int64(0x7FFFFFFFFFFF)
    for r in range(rows):
        position = place[row + r]
        last = max(last, position)
        first = min(first, max(position - window + 1, 0) if window > 0 else 0)
        for g in range(group):
            source = floats(q + ((row + r) * q_row + (head * group + g) * q_head) * 4)
            target = floats(queries + (r * group + g) * dim * 4)
            for d in range(dim):
                target[d] = source[d] * scaling
    first -= first % _BLOCK

    for block in range(first // _BLOCK, last // _BLOCK + 1):
        column = (block * _BLOCK - first) * 4
        if block < shared:
            at = keys + index[begin[row] + block] * key_bytes + key_head
            product(
                count, queries, dim, at, _BLOCK, dim, zeros, np.int64(0), scores + column, context,
                _BLOCK, bfloat16, 0,
            )  # fmt: skip
        else:
            for r in range(rows):
                if block * _BLOCK <= place[row + r]:
                    at = keys + index[begin[row + r] + block] * key_bytes + key_head
                    line = r * group
                    product(
                        group, queries + line * dim * 4, dim, at, _BLOCK, dim, zeros, np.int64(0),
                        scores + line * context * 4 + column, context, _BLOCK, bfloat16, 0,
                    )  # fmt: skip

    for r in range(rows):
        position = place[row + r]
        low = max(position - window + 1, 0) if window > 0 else np.int64(0)
        for g in range(group):
            line = r * group + g
            sums[line] = _weigh(scores + line * context * 4, first, low, position, softcap)
            target = floats(results + line * padded_dim * 4)
            for d in range(padded_dim):
                target[d] = _ZERO

    for block in range(first // _BLOCK, last // _BLOCK + 1):
        column = block * _BLOCK - first
        together = block < shared
        for r in range(rows):
            position = place[row + r]
            low = max(position - window + 1, 0) if window > 0 else np.int64(0)
            if low > block * _BLOCK or position < block * _BLOCK + _BLOCK - 1:
                together = False
        if together:
            at = values + index[begin[row] + block] * value_bytes + value_head
            product(
                count, scores + column * 4, context, at, padded_dim, _BLOCK, results, padded_dim,
                results, padded_dim, padded_dim, bfloat16, 0,
            )  # fmt: skip
        else:
            for r in range(rows):
                position = place[row + r]
                low = max(position - window + 1, 0) if window > 0 else np.int64(0)
                start = max(low - block * _BLOCK, 0)
                stop = min(position + 1 - block * _BLOCK, _BLOCK)
                if start < stop:
                    at = values + index[begin[row + r] + block] * value_bytes + value_head
                    line = r * group
                    target_row = results + line * padded_dim * 4
                    product(
                        group, scores + (line * context + column + start) * 4, context,
                        at + start * padded_dim * size, padded_dim, stop - start,
                        target_row, padded_dim, target_row, padded_dim, padded_dim, bfloat16, 0,
                    )  # fmt: skip

    for r in range(rows):
        for g in range(group):
            line = r * group + g
            source = floats(results + line * padded_dim * 4)
            target = floats(out + ((row + r) * out_row + (head * group + g) * out_head) * 4)
            scale = sums[line]
            for d in range(dim):
                target[d] = source[d] / scale


def scratch_floats(rows: int, dim: int, padded_dim: int, context: int) -> int:
    """Floats that a thread needs for a tile of ``rows`` rows, counted for each query head."""
    return rows * (dim + context + padded_dim + 1) + max(padded_dim, BLOCK_TOKENS) + LANES
