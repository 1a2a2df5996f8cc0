"""BLAKE2b (RFC 7693) of several rows at once: a vector holds the same word of each of them.

A hash is one long chain that leaves most of a core idle: with vectors of 512 bits eight rows take
less than two one by one. The digests are those of :func:`hashlib.blake2b`.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from infra.engine.kernels import compiling
from infra.engine.kernels.compiling import compiled

DIGEST_BYTES: Final = 8

LANES: Final = 8
"""So many rows are hashed at once."""
_WORTH_IT: Final = 4
"""With fewer rows one by one is as fast."""
_BLOCK_BYTES: Final = 128
_ROUNDS: Final = 12
_IV: Final = (
    0x6A09E667F3BCC908, 0xBB67AE8584CAA73B, 0x3C6EF372FE94F82B, 0xA54FF53A5F1D36F1,
    0x510E527FADE682D1, 0x9B05688C2B3E6C1F, 0x1F83D9ABFB41BD6B, 0x5BE0CD19137E2179,
)  # fmt: skip
_PARAMETERS: Final = 0x01010000 + DIGEST_BYTES
"""No key, no tree."""
_STATE: Final = np.array([_IV[0] ^ _PARAMETERS, *_IV[1:]], np.uint64)
_SIGMA: Final = (
    (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
    (14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3),
    (11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4),
    (7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8),
    (9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13),
    (2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9),
    (12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11),
    (13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10),
    (6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5),
    (10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0),
)
_ORDERS: Final = np.array([_SIGMA[number % len(_SIGMA)] for number in range(_ROUNDS)], np.int64)
_COLUMNS_AND_DIAGONALS: Final = (
    (0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15),
    (0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14),
)  # fmt: skip

_I64, _POINTER = ir.IntType(64), ir.PointerType()
_VECTOR: Final = ir.VectorType(_I64, LANES)
_WORD_BYTES: Final = 8
_VECTOR_BYTES: Final = LANES * _WORD_BYTES


def _int(value: int) -> ir.Constant:
    return ir.Constant(_I64, value)


def _load(b: ir.IRBuilder, base: ir.Value, index: int, what: ir.Type = _VECTOR) -> ir.Value:
    offset = _int(index * (_VECTOR_BYTES if what is _VECTOR else _WORD_BYTES))
    return b.load(b.inttoptr(b.add(base, offset), _POINTER), typ=what, align=1)


def _store(b: ir.IRBuilder, value: ir.Value, base: ir.Value, index: int) -> None:
    offset = _int(index * _VECTOR_BYTES)
    b.store(value, b.inttoptr(b.add(base, offset), _POINTER), align=1)


def _joined(b: ir.IRBuilder, values: Iterable[ir.Value]) -> ir.Value:
    """The vector of these values, one for each lane."""
    vector: ir.Value = ir.Constant(_VECTOR, ir.Undefined)
    for lane, value in enumerate(values):
        vector = b.insert_element(vector, value, ir.Constant(ir.IntType(32), lane))
    return vector


def _rotated(b: ir.IRBuilder, value: ir.Value, count: int) -> ir.Value:
    right, left = (ir.Constant(_VECTOR, [shift] * LANES) for shift in (count, 64 - count))
    return b.or_(b.lshr(value, right), b.shl(value, left))


def _mixed(b: ir.IRBuilder, v: Sequence[ir.Value], words: ir.Value, order: ir.Value) -> Any:
    """One round: the function G of the RFC on columns and diagonals."""
    v = list(v)
    for number, (i, j, k, m) in enumerate(_COLUMNS_AND_DIAGONALS):
        for half, (first, second) in enumerate(((32, 24), (16, 63))):
            offset = b.mul(_load(b, order, 2 * number + half, _I64), _int(_VECTOR_BYTES))
            v[i] = b.add(b.add(v[i], v[j]), _load(b, b.add(words, offset), 0))
            v[m] = _rotated(b, b.xor(v[m], v[i]), first)
            v[k] = b.add(v[k], v[m])
            v[j] = _rotated(b, b.xor(v[j], v[k]), second)
    return v


def _generate_compress(typing, state, blocks, words, orders, hashed, last):  # type: ignore[no-untyped-def]
    """The function F of the RFC, on one block of each lane.

    All are addresses, but for ``hashed`` and ``last``, which has all bits set for the last block:
    8 vectors of state, the blocks of the lanes, 16 vectors for their words, the order of the words
    in each round.
    """

    def generate(context, b, signature, arguments):  # type: ignore[no-untyped-def]
        state, blocks, words, orders, hashed, last = arguments
        lanes = [_load(b, blocks, lane, _I64) for lane in range(LANES)]
        for index in range(16):
            _store(b, _joined(b, [_load(b, lane, index, _I64) for lane in lanes]), words, index)
        h = [_load(b, state, index) for index in range(8)]
        initial = h + [ir.Constant(_VECTOR, [word] * LANES) for word in _IV]
        initial[12] = b.xor(initial[12], _joined(b, [hashed] * LANES))
        initial[14] = b.xor(initial[14], _joined(b, [last] * LANES))

        before, rounds = b.block, b.append_basic_block("rounds")
        done = b.append_basic_block("done")
        b.branch(rounds)
        b.position_at_end(rounds)
        number, v = b.phi(_I64), [b.phi(_VECTOR) for _ in initial]
        mixed = _mixed(b, v, words, b.add(orders, b.mul(number, _int(16 * _WORD_BYTES))))
        following = b.add(number, _int(1))
        later = [following, *mixed]
        for phi, first, again in zip([number, *v], [_int(0), *initial], later, strict=True):
            phi.add_incoming(first, before)
            phi.add_incoming(again, rounds)
        b.cbranch(b.icmp_signed("<", following, _int(_ROUNDS)), rounds, done)
        b.position_at_end(done)
        for index in range(8):
            _store(b, b.xor(h[index], b.xor(mixed[index], mixed[index + 8])), state, index)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), generate


_compress: Final[Any] = intrinsic(_generate_compress)


def _hash(blocks, ends, state, words, orders, length):  # type: ignore[no-untyped-def]
    """The states after ``length`` bytes of each lane.

    ``blocks`` holds where they lie, ``ends`` where their last blocks do, filled up with zeros.
    """
    last = (length - 1) // _BLOCK_BYTES * _BLOCK_BYTES
    for start in range(0, last + 1, _BLOCK_BYTES):
        for lane in range(LANES):
            blocks[lane] = ends[lane] if start == last else blocks[lane]
        hashed, rest = min(start + _BLOCK_BYTES, length), -1 if start == last else 0
        _compress(state, blocks.ctypes.data, words, orders, hashed, rest)
        for lane in range(LANES):
            blocks[lane] += _BLOCK_BYTES


@cache
def kernel() -> Callable[..., None]:
    """What hashes, compiled when first wanted."""
    sources = (__file__, compiling.__file__)
    signature = "void(i8[::1], i8[::1], i8, i8, i8, i8)"
    hashing: Callable[..., None] = compiled(_hash, signature, sources, nogil=True)
    return hashing


def digests(rows: Sequence[NDArray[np.uint8]]) -> list[str]:
    """The hexadecimal digest of each row; rows that are equally long are hashed together."""
    if len({len(row) for row in rows}) > 1:
        return [_digest(row) for row in rows]
    found: list[str] = []
    for start in range(0, len(rows), LANES):
        part = list(rows[start : start + LANES])
        found += map(_digest, part) if len(part) < _WORTH_IT else _together(part)
    return found


def _digest(row: NDArray[np.uint8]) -> str:
    return hashlib.blake2b(row.data, digest_size=DIGEST_BYTES).hexdigest()


def _together(rows: list[NDArray[np.uint8]]) -> list[str]:
    length = len(rows[0])
    ends = np.zeros((LANES, _BLOCK_BYTES), np.uint8)
    for end, row in zip(ends, rows, strict=False):
        rest = row[(length - 1) // _BLOCK_BYTES * _BLOCK_BYTES :]
        end[: len(rest)] = rest
    lanes = rows + rows[-1:] * (LANES - len(rows))
    blocks = np.array([row.ctypes.data for row in lanes])
    state = np.repeat(_STATE[:, None], LANES, axis=1)
    words = np.empty((16, LANES), np.uint64)
    addresses = (array.ctypes.data for array in (state, words, _ORDERS))
    kernel()(blocks, ends.ctypes.data + _BLOCK_BYTES * np.arange(LANES), *addresses, length)
    return [word.astype("<u8").tobytes().hex() for word in state[0, : len(rows)]]
