"""Runs a program over the rows of a pass, on several threads, in one call without Python.

Threads share a block of 64-bit words. A pass begins when the first thread raises its number; the
others, asleep or spinning, then read what is to be done from the block. Between two segments of a
program all wait for each other: they spin for a moment, then offer their core to whoever needs it.
"""

import ctypes
import threading
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np
from numba import types
from numpy.typing import NDArray

from infra.engine import blocks
from infra.engine.blocks import BLOCK_TOKENS
from infra.engine.kernels import compiling
from infra.engine.kernels.compiling import compiled, inlined
from infra.engine.strict.attention import Layer, Tile, attend, divide, store
from infra.engine.strict.elementwise import binary, f32, layer_norm, unary
from infra.engine.strict.linear import linear
from infra.engine.strict.program import WORDS, Code, Domain, Mode
from infra.engine.strict.vectors import (
    doubles,
    fetch_add,
    float_of,
    floats,
    halves,
    integers,
    load_shared,
    pause,
    store_shared,
)

_SPINS: Final = 2000

_SOURCES: Final = [
    *sorted(map(str, Path(__file__).parent.glob("*.py"))),
    blocks.__file__,
    compiling.__file__,
]

# Words of the shared block, by cache line: what one thread writes and another polls stands alone.
_EPOCH, _ARRIVED, _PASSED, _STOP = 0, 8, 16, 24
_MUTEX, _CONDITION = 32, 48
_PASS = 64
_THREADS, _OPERATIONS, _REALS, _SEGMENTS, _SEGMENT_COUNT = range(_PASS, _PASS + 5)
_ROWS, _WANTED_ROWS, _TOKENS, _POSITIONS, _WANTED, _BLOCKS = range(_PASS + 5, _PASS + 11)
_TABLES, _STARTS, _TILES, _TILE_COUNT = range(_PASS + 11, _PASS + 15)
_SCRATCH, _SCRATCH_BYTES, _COUNTERS = range(_PASS + 15, _PASS + 18)
_SIZE: Final = _PASS + 32

_lock = types.ExternalFunction("pthread_mutex_lock", types.int32(types.int64))
_unlock = types.ExternalFunction("pthread_mutex_unlock", types.int32(types.int64))
_sleep = types.ExternalFunction("pthread_cond_wait", types.int32(types.int64, types.int64))
_wake = types.ExternalFunction("pthread_cond_broadcast", types.int32(types.int64))
_yield = types.ExternalFunction("sched_yield", types.int32())

COUNTER_BYTES: Final = 64
"""An operation's counter, on a cache line of its own, says what part of it nobody has taken."""

_LINEAR, _ATTEND, _LAYER_NORM = int(Code.LINEAR), int(Code.ATTEND), int(Code.LAYER_NORM)
_EMBED, _STORE, _ADD = int(Code.EMBED), int(Code.STORE), int(Code.ADD)
_ROW, _POSITION, _WANTED_MODE = int(Mode.ROW), int(Mode.POSITION), int(Mode.WANTED)
_LOCAL = int(Mode.LOCAL)
_WANTED_DOMAIN = int(Domain.WANTED)
_BLOCK: Final = BLOCK_TOKENS


@inlined
def _address(op, at, row, words, scratch):
    """Address of the operand that begins at word ``at``, for one row."""
    mode = op[at]
    index = np.int64(0)
    if mode == _ROW:
        index = row
    elif mode == _POSITION:
        index = integers(words[_POSITIONS])[row]
    elif mode == _WANTED_MODE:
        index = integers(words[_WANTED])[row]
    elif mode == _LOCAL:
        return scratch + op[at + 1]
    return op[at + 1] + index * op[at + 2] * 4


@inlined
def _embed(op, row, words, scratch):
    token = integers(words[_TOKENS])[row]
    width = op[3]
    target = floats(_address(op, 5, row, words, scratch))
    if op[21]:
        bits = halves(op[20] + token * width * 2)
        for i in range(width):
            target[i] = float_of(np.int32(np.int32(bits[i]) << np.int32(16)))
    else:
        source = floats(op[20] + token * width * 4)
        for i in range(width):
            target[i] = source[i]


@inlined
def _store(op, row, words, scratch):
    block = integers(words[_BLOCKS])[row]
    position = integers(words[_POSITIONS])[row]
    store(
        _address(op, 10, row, words, scratch), _address(op, 15, row, words, scratch),
        op[13], op[18], op[20] + block * op[22], op[21] + block * op[23], op[24], op[25], op[26],
        position % _BLOCK, op[27] != 0,
    )  # fmt: skip


@inlined
def _by_row(op, real, row, words, scratch):
    """One operation on one row."""
    code = op[np.int64(0)]
    if code == _EMBED:
        _embed(op, row, words, scratch)
    elif code == _STORE:
        _store(op, row, words, scratch)
    elif code == _LAYER_NORM:
        layer_norm(
            _address(op, 5, row, words, scratch), _address(op, 10, row, words, scratch),
            op[3], op[20], op[21], f32(real[np.int64(0)]),
        )  # fmt: skip
    else:
        out, x = _address(op, 5, row, words, scratch), _address(op, 10, row, words, scratch)
        for i in range(op[2]):
            if code >= _ADD:
                y = _address(op, 15, row, words, scratch)
                binary(
                    code, out + i * op[8] * 4, x + i * op[13] * 4, op[14], y + i * op[18] * 4,
                    op[19], op[3],
                )  # fmt: skip
            else:
                unary(code, out + i * op[8] * 4, x + i * op[13] * 4, op[14], op[3])


@inlined
def _linear(op, rows, counter, scratch):
    panel = fetch_add(counter, 1)
    while panel < op[23]:
        linear(
            op[11], op[12], rows, op[22], op[20], op[21], op[6], op[7], panel, op[24] != 0, scratch
        )
        panel = fetch_add(counter, 1)


@inlined
def _attend(op, real, words, counter, scratch):
    heads = op[24]
    layer = Layer(op[20], op[21], op[22], op[23], op[26], op[27], op[28] != 0)
    item = fetch_add(counter, 1)
    while item < words[_TILE_COUNT] * heads:
        rows = integers(words[_TILES] + (item // heads) * 24)
        tile = Tile(
            rows[np.int64(0)], rows[np.int64(1)], rows[np.int64(2)],
            words[_POSITIONS], words[_TABLES], words[_STARTS], item % heads, op[25], op[29],
        )  # fmt: skip
        attend(
            op[11], op[12], op[13], op[6], op[7], op[8], tile, layer,
            f32(real[np.int64(0)]), f32(real[np.int64(1)]),
            divide(scratch, tile.rows * tile.group, layer.dim, layer.padded_dim, op[30]),
        )  # fmt: skip
        item = fetch_add(counter, 1)


@inlined
def _segment(start, stop, words, thread, threads):
    """A thread's part of the operations ``start`` to ``stop``."""
    base, reals = words[_OPERATIONS], words[_REALS]
    first = integers(base + start * WORDS * 8)
    rows = words[_WANTED_ROWS] if first[1] == _WANTED_DOMAIN else words[_ROWS]
    scratch = words[_SCRATCH] + thread * words[_SCRATCH_BYTES]
    if first[np.int64(0)] < _LINEAR:
        for row in range(rows * thread // threads, rows * (thread + 1) // threads):
            for index in range(start, stop):
                op = integers(base + index * WORDS * 8)
                _by_row(op, doubles(reals + index * 32), row, words, scratch)
    elif rows > 0:
        for index in range(start, stop):
            op = integers(base + index * WORDS * 8)
            counter = words[_COUNTERS] + index * COUNTER_BYTES
            if op[np.int64(0)] == _LINEAR:
                _linear(op, rows, counter, scratch)
            else:
                _attend(op, doubles(reals + index * 32), words, counter, scratch)


@inlined
def _wait_until_changed(address, seen):
    spins = 0
    while load_shared(address) == seen:
        if spins < _SPINS:
            spins += 1
            pause()
        else:
            _yield()


@inlined
def _meet(block, threads):
    """Wait until every thread is here."""
    passed = load_shared(block + _PASSED * 8)
    if fetch_add(block + _ARRIVED * 8, 1) == threads - 1:
        store_shared(block + _ARRIVED * 8, 0)
        store_shared(block + _PASSED * 8, passed + 1)
    else:
        _wait_until_changed(block + _PASSED * 8, passed)


@inlined
def _run(block, thread):
    words = integers(block)
    threads = words[_THREADS]
    segments = integers(words[_SEGMENTS])
    for index in range(words[_SEGMENT_COUNT]):
        _segment(segments[2 * index], segments[2 * index + 1], words, thread, threads)
        if threads > 1:
            _meet(block, threads)


@inlined
def _lead(block):
    if integers(block)[_THREADS] > 1:
        _lock(block + _MUTEX * 8)
        store_shared(block + _EPOCH * 8, load_shared(block + _EPOCH * 8) + 1)
        _wake(block + _CONDITION * 8)
        _unlock(block + _MUTEX * 8)
    _run(block, np.int64(0))


@inlined
def _follow(block, thread):
    seen = np.int64(0)
    while True:
        spins = 0
        while load_shared(block + _EPOCH * 8) == seen and spins < _SPINS:
            spins += 1
            pause()
        _lock(block + _MUTEX * 8)
        while load_shared(block + _EPOCH * 8) == seen:
            _sleep(block + _CONDITION * 8, block + _MUTEX * 8)
        _unlock(block + _MUTEX * 8)
        seen += 1
        if load_shared(block + _STOP * 8) != 0:
            return
        _run(block, thread)


@cache
def _compiled() -> Callable[[int, int], None]:
    """What a thread calls: the first one for each pass, the others once, until they are stopped."""

    def enter(block, thread):
        if thread == 0:
            _lead(block)
        else:
            _follow(block, thread)

    return compiled(enter, "void(int64, int64)", _SOURCES, nogil=True)


class Team:
    """The threads of one machine and the words they share.

    The caller of :meth:`run` is the first of them; the others sleep between passes.
    """

    def __init__(self, threads: int) -> None:
        self._enter = _compiled()
        self.words = np.zeros(_SIZE, np.int64)
        self.words[_THREADS] = threads
        block = self.words.ctypes.data
        process = ctypes.CDLL(None)
        process.pthread_mutex_init(ctypes.c_void_p(block + _MUTEX * 8), None)
        process.pthread_cond_init(ctypes.c_void_p(block + _CONDITION * 8), None)
        followers = [
            threading.Thread(target=_keep, args=(self._enter, self.words, n), daemon=True)
            for n in range(1, threads)
        ]
        for follower in followers:
            follower.start()
        weakref.finalize(self, _stop, self._enter, self.words)

    def run(self) -> None:
        """One pass, as the words say. Not from two threads at a time."""
        self._enter(self.words.ctypes.data, 0)


def _keep(enter: Callable[[int, int], None], words: NDArray[np.int64], thread: int) -> None:
    """Holds on to the words for as long as a thread uses them."""
    enter(words.ctypes.data, thread)


def _stop(enter: Callable[[int, int], None], words: NDArray[np.int64]) -> None:
    """Let the followers leave: a pass without work, with the word that says so."""
    words[_STOP] = 1
    words[_SEGMENT_COUNT] = 0
    if words[_THREADS] > 1:
        enter(words.ctypes.data, 0)
