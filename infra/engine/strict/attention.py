"""Attention over blocks of keys, for rows of many texts at once.

A *tile* is a few rows that read the same blocks: neighbours in one text, or the newest rows of
texts that begin alike. Blocks that all of a tile's rows share are read once for all of them, the
others row by row. Each row sums over exactly the keys it may see, in their order, so neither the
tile nor what else a block holds changes a bit of it.
"""

from typing import Final, NamedTuple

import numpy as np

from infra.engine.blocks import BLOCK_TOKENS
from infra.engine.kernels.compiling import inlined
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

TILE_ROWS: Final = 12
"""Rows of a tile at most, counted for each of the query heads that share a K/V head."""

_BLOCK: Final = BLOCK_TOKENS
_NOTHING = f32(-np.inf)
_ZERO = f32(0)


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


class Tile(NamedTuple):
    """Rows ``row`` to ``row + rows`` of a pass, for one K/V head and its ``group`` query heads.

    The blocks of row r are ``tables[starts[r]:]``; the first ``shared`` are those of all rows. A
    ``window`` of 0 is none.
    """

    row: int
    rows: int
    shared: int
    positions: int
    tables: int
    starts: int
    head: int
    group: int
    window: int


class Layer(NamedTuple):
    """Where the blocks of a layer are and what is in one; see :class:`KVStore`."""

    keys: int
    values: int
    key_bytes: int
    value_bytes: int
    dim: int
    padded_dim: int
    bfloat16: bool


class Scratch(NamedTuple):
    """A thread's memory for a tile, a line for each row and query head.

    Lines are ``dim``, ``context`` and ``padded_dim`` long; ``zeros`` is read only.
    """

    queries: int
    scores: int
    results: int
    zeros: int
    sums: int
    context: int


@inlined
def attend(q, q_row, q_head, out, out_row, out_head, tile, layer, scaling, softcap, scratch):
    """Attention of one tile; queries and results are at ``q`` and ``out``, by row and head."""
    position = integers(tile.positions)
    last, first = np.int64(0), np.int64(0x7FFFFFFFFFFF)
    for r in range(tile.rows):
        last = max(last, position[tile.row + r])
        first = min(first, _lowest(position[tile.row + r], tile.window))
        for g in range(tile.group):
            at = q + ((tile.row + r) * q_row + (tile.head * tile.group + g) * q_head) * 4
            source = floats(at)
            target = floats(scratch.queries + (r * tile.group + g) * layer.dim * 4)
            for d in range(layer.dim):
                target[d] = source[d] * scaling
    first -= first % _BLOCK
    _score(tile, layer, scratch, first, last)
    for r in range(tile.rows):
        high = position[tile.row + r]
        for line in range(r * tile.group, (r + 1) * tile.group):
            row = scratch.scores + line * scratch.context * 4
            low = _lowest(high, tile.window)
            floats(scratch.sums)[line] = _weigh(row, first, low, high, softcap)
            target = floats(scratch.results + line * layer.padded_dim * 4)
            for d in range(layer.padded_dim):
                target[d] = _ZERO
    _mix(tile, layer, scratch, first, last)
    for r in range(tile.rows):
        for g in range(tile.group):
            line = r * tile.group + g
            at = out + ((tile.row + r) * out_row + (tile.head * tile.group + g) * out_head) * 4
            source, target = floats(scratch.results + line * layer.padded_dim * 4), floats(at)
            scale = floats(scratch.sums)[line]
            for d in range(layer.dim):
                target[d] = source[d] / scale


@inlined
def _lowest(position, window):
    """The first key that the row at ``position`` sees."""
    return max(position - window + 1, np.int64(0)) if window > 0 else np.int64(0)


@inlined
def _score(tile, layer, scratch, first, last):
    """Scores of the blocks from key ``first`` to key ``last``, whole blocks at a time."""
    position, index, begin = integers(tile.positions), integers(tile.tables), integers(tile.starts)
    head = tile.head * layer.dim * _BLOCK * (2 if layer.bfloat16 else 4)
    for block in range(first // _BLOCK, last // _BLOCK + 1):
        column = scratch.scores + (block * _BLOCK - first) * 4
        together = block < tile.shared
        for r in range(1 if together else tile.rows):
            if together or block * _BLOCK <= position[tile.row + r]:
                line = r * tile.group
                product(
                    tile.rows * tile.group if together else tile.group,
                    scratch.queries + line * layer.dim * 4, layer.dim,
                    layer.keys + index[begin[tile.row + r] + block] * layer.key_bytes + head,
                    _BLOCK, layer.dim, scratch.zeros, np.int64(0),
                    column + line * scratch.context * 4, scratch.context,
                    _BLOCK, layer.bfloat16, 0,
                )  # fmt: skip


@inlined
def _mix(tile, layer, scratch, first, last):
    """Add the values of the keys from ``first`` to ``last`` by their weights."""
    position, index, begin = integers(tile.positions), integers(tile.tables), integers(tile.starts)
    size, width = 2 if layer.bfloat16 else 4, layer.padded_dim
    head = tile.head * _BLOCK * width * size
    for block in range(first // _BLOCK, last // _BLOCK + 1):
        base = block * _BLOCK
        together = block < tile.shared
        for r in range(tile.rows):
            high = position[tile.row + r]
            if _lowest(high, tile.window) > base or high < base + _BLOCK - 1:
                together = False
        for r in range(1 if together else tile.rows):
            high = position[tile.row + r]
            start = max(_lowest(high, tile.window) - base, 0)
            stop = min(high + 1 - base, _BLOCK)
            if start < stop:
                line = r * tile.group
                at = layer.values + index[begin[tile.row + r] + block] * layer.value_bytes + head
                sums = scratch.results + line * width * 4
                product(
                    tile.rows * tile.group if together else tile.group,
                    scratch.scores + (line * scratch.context + base - first + start) * 4,
                    scratch.context, at + start * width * size, width, stop - start,
                    sums, width, sums, width, width, layer.bfloat16, 0,
                )  # fmt: skip


@inlined
def divide(scratch, lines, dim, padded_dim, context):
    """The parts of a thread's memory; zeros are written."""
    queries = scratch
    scores = queries + lines * dim * 4
    results = scores + lines * context * 4
    zeros = results + lines * padded_dim * 4
    span = max(padded_dim, _BLOCK)
    blank = floats(zeros)
    for d in range(span):
        blank[d] = _ZERO
    return Scratch(queries, scores, results, zeros, zeros + span * 4, context)


def scratch_floats(rows: int, dim: int, padded_dim: int, context: int) -> int:
    """Floats that a thread needs for a tile of ``rows`` rows, counted for each query head."""
    return rows * (dim + context + padded_dim + 1) + max(padded_dim, BLOCK_TOKENS) + LANES
