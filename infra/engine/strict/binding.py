"""A program as the machine reads it: with the addresses of its slots and of one store's blocks."""

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from infra.engine.forward import Site
from infra.engine.kv_store import KVStore
from infra.engine.memory import zeros
from infra.engine.strict.program import WORDS, Code, Domain, Operand, Operation, Program

_SEGMENT_BYTES: Final = 16


class Binding:
    """The slots of a program, for as many rows as there ever were, and where everything is.

    ``operations`` is the address of what the machine reads; attention over at most ``context``
    keys.
    """

    def __init__(self, program: Program, store: KVStore, context: int) -> None:
        self.program = program
        self._store = store
        self._context = context
        self._rows = [0, 0]
        self._segments = np.array(segments := program.segments(), np.int64)
        starts = [start for start, _ in segments]
        self._stops = {site: starts.index(place.before) for site, place in program.sites.items()}
        self.end = len(segments)

    def segment(self, number: int) -> int:
        """Address of a segment."""
        return int(self._segments.ctypes.data) + _SEGMENT_BYTES * number

    def stop(self, site: Site) -> int:
        """The segment that comes next at a site."""
        return self._stops[site]

    def rows(self, site: Site, count: int) -> Tensor:
        """So many rows of a site, where they are."""
        place = self.program.sites[site]
        operand = place.operand
        assert operand.slot is not None
        row = self.program.widths[operand.slot]
        strides = (row, operand.outer, operand.inner)[:: 1 if len(place.shape) == 2 else 2]
        return self._slots[operand.slot].as_strided((count, *place.shape), strides, operand.address)

    def reserve(self, rows: int, wanted: int) -> None:
        """Slots for so many rows; those there are stay if they are enough."""
        if rows <= self._rows[Domain.ROWS] and wanted <= self._rows[Domain.WANTED]:
            return
        self._rows = [
            need if need > have else have
            for need, have in zip((rows, wanted), self._rows, strict=True)
        ]
        program = self.program
        sizes = [
            width * self._rows[domain]
            for width, domain in zip(program.widths, program.domains, strict=True)
        ]
        sizes[program.logits] = 1  # each pass has its own
        self._slots = [zeros((max(1, size),), torch.float32) for size in sizes]
        addresses = np.array([slot.data_ptr() for slot in self._slots], np.int64)
        self._words = np.zeros((len(program.operations), WORDS), np.int64)
        self._results: list[tuple[int, int, int]] = []
        for row, operation in enumerate(program.operations):
            self._bind(row, operation, addresses)
        self.operations = int(self._words.ctypes.data)

    def write_to(self, logits: Tensor) -> None:
        """Where the next pass leaves its result."""
        for row, column, offset in self._results:
            self._words[row, column] = logits.data_ptr() + offset

    def _bind(self, row: int, operation: Operation, addresses: NDArray[np.int64]) -> None:
        words = self._words[row]
        words[:4] = operation.code, operation.domain, operation.outer, operation.inner
        operands: tuple[Operand, ...] = (operation.out, *operation.inputs)
        for column, operand in zip((5, 10, 15), operands, strict=False):
            words[column : column + 5] = operand.words(addresses, self.program.widths)
            if operand.slot == self.program.logits:
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
            geometry.query_heads // geometry.kv_heads,
            geometry.head_dim,
            geometry.value_dim,
            half,
            window,
            self._context,
        )
