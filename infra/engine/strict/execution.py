"""Runs a program over the slices of a pass, with the K/V of one store."""

from collections.abc import Sequence as Seq
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from infra.engine.blocks import BLOCK_TOKENS
from infra.engine.forward import Batch
from infra.engine.kv_store import KVStore
from infra.engine.memory import zeros
from infra.engine.scheduler import Slice
from infra.engine.strict import attention, linear, machine
from infra.engine.strict.machine import Team
from infra.engine.strict.program import WORDS, Code, Domain, Operand, Operation, Program

_LINE: Final = 64
"""Bytes of a cache line."""


class Execution:
    """A program bound to a store: where its slots and blocks are."""

    def __init__(self, program: Program, store: KVStore, context: int, threads: int) -> None:
        self._program = program
        self._store = store
        self._context = -(-context // BLOCK_TOKENS) * BLOCK_TOKENS
        self._team = Team(threads)
        self._rows = [0, 0]
        segments = program.segments()
        self._segments = np.array(segments, np.int64)
        self._reals = np.zeros((len(program.operations), 4))
        for place, operation in zip(self._reals, program.operations, strict=True):
            place[: len(operation.real)] = operation.real
        self._attends = any(o.code == Code.ATTEND for o in program.operations)
        geometry = store.geometry
        self._group = geometry.query_heads // geometry.kv_heads
        self._tile_rows = max(1, attention.TILE_ROWS // self._group)
        floats = max(
            program.local,
            linear.scratch_floats(),
            attention.scratch_floats(
                self._tile_rows * self._group,
                geometry.head_dim,
                geometry.value_dim,
                self._context,
            ),
        )
        stride = -(-floats * 4 // _LINE) * _LINE
        self._scratch = zeros((threads * stride,), torch.uint8)
        self._counters = np.zeros(len(program.operations) * machine.COUNTER_BYTES // 8, np.int64)
        words = self._team.words
        words[machine._COUNTERS] = self._counters.ctypes.data
        words[machine._SCRATCH] = self._scratch.data_ptr()
        words[machine._SCRATCH_BYTES] = stride
        words[machine._SEGMENTS] = self._segments.ctypes.data
        words[machine._SEGMENT_COUNT] = len(segments)
        words[machine._REALS] = self._reals.ctypes.data

    def run(self, batch: Batch) -> Tensor:
        """Logits of the wanted rows; see :class:`infra.engine.forward.Forward`."""
        if not batch.tokens:
            return torch.empty(0, 0)
        self._reserve(len(batch.tokens), len(batch.wanted))
        width = self._program.widths[self._program.logits]
        logits = torch.empty(len(batch.wanted), width)
        for row, column, offset in self._results:
            self._words[row, column] = logits.data_ptr() + offset
        tables, starts = _tables(batch.slices)
        tokens = np.array(batch.tokens, np.int64)
        if tokens.min() < 0 or tokens.max() >= self._program.vocabulary:
            raise IndexError("a token is not in the vocabulary")
        arrays = {
            machine._TOKENS: tokens,
            machine._POSITIONS: np.array(batch.positions, np.int64),
            machine._WANTED: np.array(batch.wanted, np.int64),
            machine._BLOCKS: np.array(batch.blocks, np.int64),
            machine._TABLES: tables,
            machine._STARTS: starts,
            machine._TILES: (tiles := np.array(self._tiles(batch.slices), np.int64)),
        }
        words = self._team.words
        for word, array in arrays.items():
            words[word] = array.ctypes.data
        words[machine._ROWS] = len(batch.tokens)
        words[machine._WANTED_ROWS] = len(batch.wanted)
        words[machine._TILE_COUNT] = len(tiles)
        self._counters.fill(0)
        self._team.run()
        return logits[:, : self._program.vocabulary]

    def _reserve(self, rows: int, wanted: int) -> None:
        """Slots for so many rows; those there are stay if they are enough."""
        if rows <= self._rows[Domain.ROWS] and wanted <= self._rows[Domain.WANTED]:
            return
        self._rows = [
            need if need > have else have
            for need, have in zip((rows, wanted), self._rows, strict=True)
        ]
        program = self._program
        sizes = [
            width * self._rows[domain]
            for width, domain in zip(program.widths, program.domains, strict=True)
        ]
        sizes[program.logits] = 1  # each pass has its own
        self._slots = [zeros((max(1, size),), torch.float32) for size in sizes]
        addresses = np.array([slot.data_ptr() for slot in self._slots], np.int64)
        self._words = np.zeros((len(self._program.operations), WORDS), np.int64)
        self._results: list[tuple[int, int, int]] = []
        for row, operation in enumerate(self._program.operations):
            self._bind(row, operation, addresses)
        self._team.words[machine._OPERATIONS] = self._words.ctypes.data

    def _bind(self, row: int, operation: Operation, addresses: NDArray[np.int64]) -> None:
        words = self._words[row]
        words[:4] = operation.code, operation.domain, operation.outer, operation.inner
        operands: tuple[Operand, ...] = (operation.out, *operation.inputs)
        for column, operand in zip((5, 10, 15), operands, strict=False):
            words[column : column + 5] = operand.words(addresses, self._program.widths)
            if operand.slot == self._program.logits:
                self._results.append((row, column + 1, 4 * operand.address))
        extra = operation.extra
        if operation.code in (Code.STORE, Code.ATTEND):
            extra = self._kv(operation)
        words[20 : 20 + len(extra)] = extra

    def _kv(self, operation: Operation) -> tuple[int, ...]:
        """Where a layer's blocks are, and their shape."""
        layer, window = operation.extra
        geometry, store = self._store.geometry, self._store
        size = store.k.element_size()
        place = (
            store.k[layer].data_ptr(),
            store.v[layer].data_ptr(),
            store.k.stride(1) * size,
            store.v.stride(1) * size,
            geometry.kv_heads,
        )
        half = int(store.k.dtype == torch.bfloat16)
        if operation.code == Code.STORE:
            return (*place, geometry.head_dim, geometry.value_dim, half)
        return (
            *place,
            self._group,
            geometry.head_dim,
            geometry.value_dim,
            half,
            window,
            self._context,
        )

    def _tiles(self, slices: Seq[Slice]) -> list[tuple[int, int, int]]:
        """First row, rows and shared blocks of each tile."""
        tiles: list[tuple[int, int, int]] = []
        row = 0
        table: list[int] = []  # of the texts in the last tile, as far as they are equal
        for piece in slices:
            own = piece.sequence.table[: piece.start // BLOCK_TOKENS + 1]
            if piece.count > 1:
                tiles += [
                    (row + at, min(self._tile_rows, piece.count - at), len(piece.sequence.table))
                    for at in range(0, piece.count, self._tile_rows)
                ]
                table = []
            elif (same := _common(table, own)) and tiles[-1][1] < self._tile_rows:
                first, count, _ = tiles[-1]
                tiles[-1] = (first, count + 1, same)
                table = table[:same]
            else:
                tiles.append((row, 1, len(own)))
                table = own
            row += piece.count
        return tiles


def _common(a: list[int], b: list[int]) -> int:
    """How many leading elements are equal."""
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count


def _tables(slices: Seq[Slice]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The tables of all texts, one after the other, and where that of each row begins."""
    sizes = [len(piece.sequence.table) for piece in slices]
    begins = np.cumsum([0, *sizes[:-1]])
    tables = np.array([block for piece in slices for block in piece.sequence.table], np.int64)
    return tables, np.repeat(begins, [piece.count for piece in slices]).astype(np.int64)
