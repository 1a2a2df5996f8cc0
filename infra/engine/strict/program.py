"""What a program is: operations on rows of floats, as numbers the machine reads.

A program works on *slots*: one array of rows for each value that lives at the same time. An operand
says where its floats are, for row r of a pass: ``address + 4 * (index(r) * row + i * outer + j *
inner)``, where ``index`` depends on its :class:`Mode`.
"""

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

WORDS: Final = 32
"""64-bit integers of one operation."""


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


class Domain(IntEnum):
    """Over which rows an operation runs: all of the pass, or those whose logits are wanted."""

    ROWS = 0
    WANTED = 1


@dataclass(frozen=True)
class Operand:
    """Where an operation reads or writes. ``slot`` is null for constants and tables."""

    mode: Mode
    address: int
    row: int
    outer: int
    inner: int
    slot: int | None = None

    def words(self, addresses: NDArray[np.int64], widths: list[int]) -> list[int]:
        """The operand as the machine reads it, with the slots at these addresses."""
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


@dataclass
class Program:
    """Operations in order, and the width of each slot in floats.

    ``logits`` is the operand of the result, ``alive`` what the addresses in the program point to.
    """

    operations: list[Operation] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    domains: list[Domain] = field(default_factory=list)
    logits: int = -1
    vocabulary: int = 0
    alive: list[object] = field(default_factory=list)

    def slot(self, width: int, domain: Domain) -> int:
        """A new slot."""
        self.widths.append(width)
        self.domains.append(domain)
        return len(self.widths) - 1

    def segments(self) -> list[tuple[int, int]]:
        """Ranges of operations between which all threads wait for each other.

        Operations by rows of one domain follow each other without waiting: a thread keeps its
        rows. Products that do not need each other run together.
        """
        found: list[tuple[int, int]] = []
        start = 0
        for index in range(1, len(self.operations) + 1):
            if index == len(self.operations) or not self._together(start, index):
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


def share_slots(program: Program) -> None:
    """Let values that do not live at the same time use one slot, in place where that is safe.

    An operation may write where it reads only if it reads each float at the place it writes it,
    and only within a thread's own rows.
    """
    last: dict[int, int] = {}
    for index, operation in enumerate(program.operations):
        for operand in (*operation.inputs, operation.out):
            if operand.slot is not None:
                last[operand.slot] = index
    last[program.logits] = len(program.operations)
    segment_of = [
        number
        for number, (start, stop) in enumerate(program.segments())
        for _ in range(start, stop)
    ]
    home: dict[int, int] = {}
    widths: list[int] = []
    domains: list[Domain] = []
    free: list[tuple[int, int]] = []  # (slot, the segment from which it may be written)
    for index, operation in enumerate(program.operations):
        virtual = operation.out.slot
        if virtual is not None and virtual not in home:
            home[virtual] = _place(
                program, operation, index, last, home, free, segment_of[index], widths, domains
            )
        ended = {
            operand.slot
            for operand in (*operation.inputs, operation.out)
            if operand.slot is not None and last[operand.slot] == index
        }
        taken = {home[slot] for slot in home if last[slot] > index}
        for place in {home[slot] for slot in ended} - taken:
            free.append((place, segment_of[index] + 1))
    program.operations = [_moved(operation, home) for operation in program.operations]
    program.widths, program.domains = widths, domains
    program.logits = home[program.logits]


def _place(
    program: Program,
    operation: Operation,
    index: int,
    last: dict[int, int],
    home: dict[int, int],
    free: list[tuple[int, int]],
    segment: int,
    widths: list[int],
    domains: list[Domain],
) -> int:
    virtual = operation.out.slot
    assert virtual is not None
    width, domain = program.widths[virtual], program.domains[virtual]
    for operand in operation.inputs:
        if (
            operation.by_rows
            and operand.slot is not None
            and last[operand.slot] == index
            and _same_place(operand, operation.out)
            and program.widths[operand.slot] == width
            and program.domains[operand.slot] == domain
            and not any(
                home[slot] == home[operand.slot] and last[slot] >= index
                for slot in home
                if slot != operand.slot
            )
        ):
            return home[operand.slot]
    for entry in free:
        place, since = entry
        if since <= segment and widths[place] == width and domains[place] == domain:
            free.remove(entry)
            return place
    widths.append(width)
    domains.append(domain)
    return len(widths) - 1


def _same_place(read: Operand, written: Operand) -> bool:
    return (
        read.mode == Mode.ROW
        and read.address == written.address
        and read.outer == written.outer
        and read.inner == written.inner
    )


def _moved(operation: Operation, home: dict[int, int]) -> Operation:
    def moved(operand: Operand) -> Operand:
        if operand.slot is None:
            return operand
        return Operand(
            operand.mode, operand.address, 0, operand.outer, operand.inner, home[operand.slot]
        )

    return Operation(
        operation.code,
        operation.domain,
        operation.outer,
        operation.inner,
        moved(operation.out),
        tuple(moved(operand) for operand in operation.inputs),
        operation.extra,
        operation.real,
    )
