"""What a program is: operations on rows of floats, as numbers the machine reads.

A program works on *slots*: one array of rows for each value that lives at the same time. An operand
says where its floats are, for row r of a pass: ``address + 4 * (index(r) * row + i * outer + j *
inner)``, where ``index`` depends on its :class:`Mode`.
"""

from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from infra.engine.forward import Site, Weighing

WORDS: Final = 32
"""64-bit integers of one operation."""

LANES: Final = 16
"""Floats of one vector."""


class Code(IntEnum):
    """What an operation does."""

    COPY = 0
    NEGATIVE = 1
    RELU = 2
    TANH = 3
    SIGMOID = 4
    SILU = 5
    GELU = 6
    GELU_TANH = 7
    RSQRT = 8
    SQUARE = 9
    CUBE = 10
    EXP = 11
    MEAN = 12
    ADD = 20
    SUBTRACT = 21
    MULTIPLY = 22
    DIVIDE = 23
    LAYER_NORM = 30
    EMBED = 31
    STORE = 32
    LINEAR = 40
    ATTEND = 41


class Mode(IntEnum):
    """How an operand is indexed by the row."""

    FIXED = 0
    ROW = 1
    POSITION = 2
    WANTED = 3
    LOCAL = 4


class Domain(IntEnum):
    """Over which rows an operation runs: all of the pass, or those whose logits are wanted."""

    ROWS = 0
    WANTED = 1


@dataclass(frozen=True)
class Operand:
    """Where an operation reads or writes.

    ``address`` is one in memory, or counts floats from the start of ``slot``, or, if the mode is
    local, from the start of a thread's own memory.
    """

    mode: Mode
    address: int
    row: int
    outer: int
    inner: int
    slot: int | None = None

    def words(self, addresses: NDArray[np.int64], widths: list[int]) -> list[int]:
        """The operand as the machine reads it, with the slots at these addresses."""
        if self.mode == Mode.LOCAL:
            return [self.mode, 4 * self.address, 0, self.outer, self.inner]
        if self.slot is None:
            return [self.mode, self.address, self.row, self.outer, self.inner]
        base = int(addresses[self.slot]) + 4 * self.address
        return [self.mode, base, widths[self.slot], self.outer, self.inner]


NOWHERE: Final = Operand(Mode.FIXED, 0, 0, 0, 0)


@dataclass(frozen=True)
class Operation:
    """One step of a program.

    ``outer`` times ``inner`` floats of each row are computed. ``extra`` and ``real`` are what the
    code's kernel needs besides; :mod:`.machine` says what they mean.
    """

    code: Code
    domain: Domain
    outer: int
    inner: int
    out: Operand
    inputs: tuple[Operand, ...]
    extra: tuple[int, ...] = ()
    real: tuple[float, ...] = ()

    @property
    def by_rows(self) -> bool:
        """Whether a thread may compute its own rows without asking what others do."""
        return self.code < Code.LINEAR


@dataclass(frozen=True)
class Place:
    """Where the rows of a site are, each of ``shape``, when a pass comes to ``before``.

    ``before`` is the index of the operation that is next.
    """

    before: int
    operand: Operand
    shape: tuple[int, ...]
    weighing: Weighing | None = None


@dataclass
class Program:
    """Operations in order, and the width of each slot in floats.

    ``logits`` is the slot of the result, ``local`` the floats of a thread's own memory, ``alive``
    what the addresses in the program point to.

    ``sites`` are met in their order; at each of them all threads wait and the rows are in a slot.
    A program without any spares that, and computes the same bits; ``watched`` is the one with.
    """

    operations: list[Operation] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    domains: list[Domain] = field(default_factory=list)
    logits: int = -1
    vocabulary: int = 0
    local: int = 0
    alive: list[object] = field(default_factory=list)
    sites: dict[Site, Place] = field(default_factory=dict)
    watched: "Program | None" = None

    def slot(self, width: int, domain: Domain) -> int:
        """A new slot."""
        self.widths.append(width)
        self.domains.append(domain)
        return len(self.widths) - 1

    def follows_from(self, site: Site) -> bool:
        """Whether what comes after a site depends on its rows alone."""
        place = self.sites[site]
        known = {None, place.operand.slot}
        for operation in self.operations[place.before :]:
            if operation.code in (Code.EMBED, Code.STORE, Code.ATTEND) or any(
                operand.mode == Mode.POSITION or operand.slot not in known
                for operand in operation.inputs
            ):
                return False
            known.add(operation.out.slot)
        return True

    def segments(self) -> list[tuple[int, int]]:
        """Ranges of operations between which all threads wait for each other.

        Operations by rows of one domain follow each other without waiting: a thread keeps its
        rows. Products that do not need each other run together. None goes on past a site.
        """
        found: list[tuple[int, int]] = []
        start = 0
        cuts = {len(self.operations), *(place.before for place in self.sites.values())}
        for index in range(1, len(self.operations) + 1):
            if index in cuts or not self._together(start, index):
                found.append((start, index))
                start = index
        return found

    def _together(self, start: int, index: int) -> bool:
        first, this = self.operations[start], self.operations[index]
        if first.by_rows != this.by_rows or first.domain != this.domain:
            return False
        if this.by_rows:
            return True
        if Code.ATTEND in (first.code, this.code):
            return False
        written = {operation.out.slot for operation in self.operations[start:index]}
        return not written & {operand.slot for operand in this.inputs}


def share_memory(program: Program) -> None:
    """Give values that do not live at the same time one place.

    A value that is only used between two meetings of the threads becomes local: a thread needs it
    for one row at a time, and it never leaves the nearest cache.
    """
    spans = _spans(program)
    segment_of = {
        index: number
        for number, (start, stop) in enumerate(program.segments())
        for index in range(start, stop)
    }
    homes: dict[int, Operand] = {}
    offsets: dict[int, int] = {}
    slots = _Slots()
    for slot, (first, last) in sorted(spans.items(), key=lambda item: item[1]):
        segment = segment_of[first]
        by_rows = program.operations[first].by_rows
        if slot != program.logits and segment == segment_of[last] and by_rows:
            homes[slot] = Operand(Mode.LOCAL, offsets.get(segment, 0), 0, 0, 0)
            size = -(-program.widths[slot] // LANES) * LANES
            offsets[segment] = offsets.get(segment, 0) + size
        else:
            until = len(segment_of) if slot == program.logits else segment_of[last]
            kind = (program.widths[slot], program.domains[slot], slot == program.logits)
            homes[slot] = Operand(Mode.ROW, 0, 0, 0, 0, slots.take(kind, segment, until))
    program.operations = [_moved(operation, homes) for operation in program.operations]
    program.sites = {
        site: replace(place, operand=_at_home(place.operand, homes))
        for site, place in program.sites.items()
    }
    program.logits = homes[program.logits].slot or 0
    program.widths = [width for width, _, _ in slots.kinds]
    program.domains = [domain for _, domain, _ in slots.kinds]
    program.local = max(offsets.values(), default=0)


def _spans(program: Program) -> dict[int, tuple[int, int]]:
    """The first and the last operation that touches each slot, or looks at it before it runs."""
    spans: dict[int, tuple[int, int]] = {}
    for index, operation in enumerate(program.operations):
        for operand in (operation.out, *operation.inputs):
            if operand.slot is not None:
                first, _ = spans.get(operand.slot, (index, index))
                spans[operand.slot] = (first, index)
    for place in program.sites.values():
        if place.operand.slot is not None:
            first, last = spans[place.operand.slot]
            spans[place.operand.slot] = (first, max(last, place.before))
    return spans


class _Slots:
    """Slots of a kind, each taken from one segment to another."""

    def __init__(self) -> None:
        self.kinds: list[tuple[int, Domain, bool]] = []
        self._until: list[int] = []

    def take(self, kind: tuple[int, Domain, bool], start: int, stop: int) -> int:
        for slot, until in enumerate(self._until):
            if self.kinds[slot] == kind and until < start:
                self._until[slot] = stop
                return slot
        self.kinds.append(kind)
        self._until.append(stop)
        return len(self.kinds) - 1


def _moved(operation: Operation, homes: dict[int, Operand]) -> Operation:
    return replace(
        operation,
        out=_at_home(operation.out, homes),
        inputs=tuple(_at_home(operand, homes) for operand in operation.inputs),
    )


def _at_home(operand: Operand, homes: dict[int, Operand]) -> Operand:
    if operand.slot is None:
        return operand
    home = homes[operand.slot]
    return replace(
        operand,
        mode=Mode.LOCAL if home.mode == Mode.LOCAL else operand.mode,
        address=operand.address + home.address,
        slot=home.slot,
    )
