"""Runs a program over the slices of a pass, with the K/V of one store."""

from collections.abc import Collection
from collections.abc import Sequence as Seq
from functools import cached_property
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from infra.engine.blocks import BLOCK_TOKENS
from infra.engine.forward import Batch, Site, Watch, not_shown
from infra.engine.kv_store import KVStore
from infra.engine.memory import zeros
from infra.engine.scheduler import Slice
from infra.engine.strict import attention, linear, machine
from infra.engine.strict.binding import Binding
from infra.engine.strict.machine import Team
from infra.engine.strict.program import Program

_LINE: Final = 64
"""Bytes of a cache line."""


class Execution:
    """A program bound to a store, and the threads that run it."""

    def __init__(self, program: Program, store: KVStore, context: int, threads: int) -> None:
        self._program = program
        self._store = store
        self._context = -(-context // BLOCK_TOKENS) * BLOCK_TOKENS
        self._team = Team(threads)
        self._plain = Binding(program, store, self._context)
        self._reals = np.zeros((len(program.operations), 4))
        for place, operation in zip(self._reals, program.operations, strict=True):
            place[: len(operation.real)] = operation.real
        geometry = store.geometry
        group = geometry.query_heads // geometry.kv_heads
        self._tile_rows = max(1, attention.TILE_ROWS // group)
        floats = max(
            program.local,
            linear.scratch_floats(),
            attention.scratch_floats(
                self._tile_rows * group, geometry.head_dim, geometry.value_dim, self._context
            ),
        )
        stride = -(-floats * 4 // _LINE) * _LINE
        self._scratch = zeros((threads * stride,), torch.uint8)
        self._counters = np.zeros(len(program.operations) * machine.COUNTER_BYTES // 8, np.int64)
        words = self._team.words
        words[machine._COUNTERS] = self._counters.ctypes.data
        words[machine._SCRATCH] = self._scratch.data_ptr()
        words[machine._SCRATCH_BYTES] = stride
        words[machine._REALS] = self._reals.ctypes.data

    @property
    def sites(self) -> Collection[Site]:
        """What can be seen of a pass."""
        return self._program.watched.sites if self._program.watched is not None else ()

    def run(self, batch: Batch, watch: Watch | None = None) -> Tensor:
        """Logits of the wanted rows; see :class:`infra.engine.forward.Forward`.

        Raises:
            InvalidInput: the watch is to see what the model does not show.
        """
        if not batch.tokens:
            return torch.empty(0, 0)
        looked_at = watch and (watch.sites or watch.until)
        bound = self._showing(watch.sites) if watch and looked_at else self._plain
        wanted = np.array(batch.wanted, np.int64)
        logits = self._begin(bound, len(batch.tokens), wanted)
        tables, starts = _tables(batch.slices)
        tokens = np.array(batch.tokens, np.int64)
        if tokens.min() < 0 or tokens.max() >= self._program.vocabulary:
            raise IndexError("a token is not in the vocabulary")
        arrays = {
            machine._TOKENS: tokens,
            machine._POSITIONS: np.array(batch.positions, np.int64),
            machine._BLOCKS: np.array(batch.blocks, np.int64),
            machine._TABLES: tables,
            machine._STARTS: starts,
            machine._TILES: (tiles := np.array(self._tiles(batch.slices), np.int64)),
        }
        words = self._team.words
        for word, array in arrays.items():
            words[word] = array.ctypes.data
        words[machine._TILE_COUNT] = len(tiles)
        self._go_through(bound, len(tokens), watch)
        return logits[:, : self._program.vocabulary]

    def project(self, hidden: Tensor) -> Tensor:
        """Logits of rows of the last layer; see :class:`infra.engine.forward.Forward`.

        Raises:
            InvalidInput: in this model they do not depend on those alone.
        """
        if not len(hidden):
            return torch.empty(0, self._program.vocabulary)
        site = Site("residual", self._store.geometry.layers)
        bound = self._showing([site])
        if not bound.program.follows_from(site):
            raise not_shown(site)
        wanted = np.arange(len(hidden))
        logits = self._begin(bound, len(hidden), wanted)
        bound.rows(site, len(hidden)).copy_(hidden)
        self._compute(bound, bound.stop(site), bound.end)
        return logits[:, : self._program.vocabulary]

    @cached_property
    def _watched(self) -> Binding:
        """What is run in place of the program while somebody looks on."""
        return Binding(self._program.watched or self._program, self._store, self._context)

    def _showing(self, sites: Collection[Site]) -> Binding:
        for site in sites:
            if site not in self.sites:
                raise not_shown(site)
        return self._watched

    def _begin(self, bound: Binding, rows: int, wanted: NDArray[np.int64]) -> Tensor:
        """Make room for so many rows; where the logits of those wanted will be."""
        bound.reserve(rows, len(wanted))
        logits = torch.empty(len(wanted), bound.program.widths[bound.program.logits])
        bound.write_to(logits)
        words = self._team.words
        words[machine._OPERATIONS] = bound.operations
        words[machine._ROWS] = rows
        words[machine._WANTED_ROWS] = len(wanted)
        words[machine._WANTED] = wanted.ctypes.data
        self._counters.fill(0)
        return logits

    def _go_through(self, bound: Binding, rows: int, watch: Watch | None) -> None:
        """Run the program, for so many rows, as far as it is needed."""
        done, end = 0, bound.end
        if watch:
            end = bound.stop(watch.until) if watch.until in bound.program.sites else end
            for site, place in bound.program.sites.items():
                if site in watch.sites and (stop := bound.stop(site)) <= end:
                    self._compute(bound, done, stop)
                    watch.see(site, bound.rows(site, rows), place.weighing)
                    done = stop
        self._compute(bound, done, end)

    def _compute(self, bound: Binding, start: int, stop: int) -> None:
        """Run the segments from ``start`` to ``stop``."""
        if start == stop:
            return
        words = self._team.words
        words[machine._SEGMENTS] = bound.segment(start)
        words[machine._SEGMENT_COUNT] = stop - start
        self._team.run()

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
