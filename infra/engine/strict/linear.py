"""Products with weights: every output is a sum over the inputs in their order, from the bias on.

Weights are packed in panels of ``PANEL`` outputs, ``(panels, inputs, PANEL)``, so that they are
read once, straight through, and a vector of outputs shares each input. How rows and inputs are cut
to fit registers and caches does not change a bit: partial sums wait in memory unrounded.
"""

from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from infra.engine.kernels.compiling import inlined
from infra.engine.memory import zeros
from infra.engine.strict.vectors import LANES, WIDE, float_of, floats, halves, tile

PANEL: Final = 4 * LANES if WIDE else LANES
"""Outputs of a panel: as many as keep a tile of six rows in registers."""

TILE_ROWS: Final = 6
"""Rows of a tile at most: with a panel's width they fill the registers."""

_SHORT_CHUNK: Final = 64
"""Inputs of a panel that are used for some rows before the next: they stay in the first cache."""

_LONG_CHUNK: Final = 1024
"""The same for many rows: they stay in the second cache."""

_FEW_ROWS: Final = 12
"""Up to so many rows bfloat16 weights are widened in registers, above once per chunk in memory."""

_SOME_ROWS: Final = 36
"""Up to so many rows reading the weights takes as long as using them."""

_AHEAD: Final = 16384
"""Bytes by which weights are fetched before they are used: further than the processor looks."""

_VECTORS: Final = 4 if WIDE else 1


def _tiles(vectors: int, *, bfloat16: bool) -> Any:
    """A function for tiles of 1 to 6 rows."""
    one, two, three, four, five, six = (
        tile(rows, vectors, bfloat16=bfloat16) for rows in range(1, 7)
    )

    @inlined
    def run(m, a, lda, b, ldb, k, start, ldstart, out, ldout, ahead):
        if m == 1:
            one(a, lda, b, ldb, k, start, ldstart, out, ldout, ahead)
        elif m == 2:
            two(a, lda, b, ldb, k, start, ldstart, out, ldout, ahead)
        elif m == 3:
            three(a, lda, b, ldb, k, start, ldstart, out, ldout, ahead)
        elif m == 4:
            four(a, lda, b, ldb, k, start, ldstart, out, ldout, ahead)
        elif m == 5:
            five(a, lda, b, ldb, k, start, ldstart, out, ldout, ahead)
        else:
            six(a, lda, b, ldb, k, start, ldstart, out, ldout, ahead)

    return run


def _rows(vectors: int, *, bfloat16: bool) -> Any:
    """A function for any number of rows, in tiles of nearly equal size."""
    run = _tiles(vectors, bfloat16=bfloat16)

    @inlined
    def product(m, a, lda, b, ldb, k, start, ldstart, out, ldout, ahead):
        tiles = (m + TILE_ROWS - 1) // TILE_ROWS
        row = 0
        for index in range(tiles):
            stop = m * (index + 1) // tiles
            run(
                stop - row,
                a + row * lda * 4,
                lda,
                b,
                ldb,
                k,
                start + row * ldstart * 4,
                ldstart,
                out + row * ldout * 4,
                ldout,
                ahead if index == 0 else 0,
            )
            row = stop

    return product


_widest = _rows(_VECTORS, bfloat16=False)
_widest_bfloat16 = _rows(_VECTORS, bfloat16=True)
_single = _rows(1, bfloat16=False)
_single_bfloat16 = _rows(1, bfloat16=True)
_width = _VECTORS * LANES


@inlined
def product(m, a, lda, b, ldb, k, start, ldstart, out, ldout, n, bfloat16, ahead):
    """``out[r] = start[r] + a[r] @ b`` for ``m`` rows and ``n`` columns, ``n`` a multiple of 16.

    Addresses, and distances from row to row in elements; ``b`` holds floats or bfloat16. Where
    ``b`` is read for the first time, what lies ``ahead`` bytes after it is fetched meanwhile.
    """
    size = 2 if bfloat16 else 4
    column = 0
    while n - column >= _width:
        at, place, first = b + column * size, out + column * 4, start + column * 4
        if bfloat16:
            _widest_bfloat16(m, a, lda, at, ldb, k, first, ldstart, place, ldout, ahead)
        else:
            _widest(m, a, lda, at, ldb, k, first, ldstart, place, ldout, ahead)
        column += _width
    while column < n:
        at, place, first = b + column * size, out + column * 4, start + column * 4
        if bfloat16:
            _single_bfloat16(m, a, lda, at, ldb, k, first, ldstart, place, ldout, ahead)
        else:
            _single(m, a, lda, at, ldb, k, first, ldstart, place, ldout, ahead)
        column += LANES


@inlined
def _widen(source, target, n):
    bits, values = halves(source), floats(target)
    for i in range(n):
        values[i] = float_of(np.int32(np.int32(bits[i]) << np.int32(16)))


@inlined
def linear(x, ldx, m, k, weights, bias, out, ldout, panel, bfloat16, scratch):
    """``m`` rows of ``k`` inputs through one panel of packed weights.

    Its weights are used for all rows while they are in the cache. ``bias`` is padded to whole
    panels; ``scratch`` has room for ``_LONG_CHUNK`` lines of a panel.
    """
    size = 2 if bfloat16 else 4
    widened = bfloat16 and m > _FEW_ROWS
    chunk = k if m <= TILE_ROWS else (_SHORT_CHUNK if m <= _SOME_ROWS else _LONG_CHUNK)
    place = out + panel * PANEL * 4
    start, ldstart = bias + panel * PANEL * 4, np.int64(0)
    done = 0
    while done < k:
        count = min(chunk, k - done)
        lines = weights + (panel * k + done) * PANEL * size
        if widened:
            _widen(lines, scratch, count * PANEL)
            lines = scratch
        product(
            m, x + done * 4, ldx, lines, PANEL, count, start, ldstart, place, ldout, PANEL,
            bfloat16 and not widened, 0 if widened else _AHEAD,
        )  # fmt: skip
        start, ldstart = place, ldout
        done += count


def scratch_floats() -> int:
    """Floats that a thread needs while it widens weights."""
    return _LONG_CHUNK * PANEL


def padded(outputs: int) -> int:
    """Outputs with those that fill the last panel."""
    return -(-outputs // PANEL) * PANEL


def pack(weight: Tensor) -> Tensor:
    """Weights ``(out, in)`` in panels, ``(panels, in, PANEL)``; missing outputs are zero."""
    outputs, inputs = weight.shape
    full = torch.nn.functional.pad(weight, (0, 0, 0, padded(outputs) - outputs))
    panels = full.view(-1, PANEL, inputs).transpose(1, 2)
    return zeros(panels.shape, weight.dtype).copy_(panels)
