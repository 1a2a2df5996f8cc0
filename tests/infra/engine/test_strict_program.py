"""Values share memory in a program, and none is overwritten while it is still needed.

Random programs are interpreted with names in place of floats: once as they were written, every
value in a place of its own, and once with the memory they were given, in orders that threads may
happen upon.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Final

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.engine.forward import Site
from infra.engine.strict.program import (
    Code,
    Domain,
    Mode,
    Operand,
    Operation,
    Place,
    Program,
    share_memory,
)
from tests.infra.engine import programs
from tests.infra.engine.programs import Writer

ROWS: Final = 3
WANTED: Final = (2, 0)
Memory = dict[tuple[object, ...], object]


@st.composite
def written(draw: st.DrawFn) -> Program:
    """A program of functions by row and of whole rows, some of them put together from pieces."""
    program, values = Program(), [0]
    widths = st.integers(1, 40)

    def emit(code: Code, inner: int, sources: Sequence[tuple[int, int]], domain: Domain) -> int:
        out = program.slot(draw(widths) + inner, domain)
        operands = tuple(
            Operand(Mode.WANTED if program.domains[slot] < domain else Mode.ROW, at, 0, 0, 1, slot)
            for slot, at in sources
        )
        place = Operand(Mode.ROW, 0, 0, 0, 1, out)
        program.operations.append(Operation(code, domain, 1, inner, place, operands))
        return out

    def part(slot: int, inner: int) -> tuple[int, int]:
        return slot, draw(st.integers(0, filled[slot] - inner))

    filled = {emit(Code.EMBED, draw(widths), [], Domain.ROWS): 40}
    filled[0] = program.operations[0].inner
    domain = Domain.ROWS
    for _ in range(draw(st.integers(1, 14))):
        kind = draw(st.sampled_from(["unary", "binary", "linear", "pieces", "wanted"]))
        if kind == "wanted":
            domain = Domain.WANTED
        chosen = [draw(st.sampled_from(values)) for _ in range(2)]
        inner = draw(st.integers(1, min(filled[slot] for slot in chosen)))
        if kind == "pieces" and inner > 1:
            half = inner // 2
            out = emit(Code.COPY, half, [part(chosen[0], half)], domain)
            rest = part(chosen[1], half)
            source = Operand(
                Mode.WANTED if program.domains[rest[0]] < domain else Mode.ROW,
                *(rest[1], 0, 0, 1, rest[0]),
            )
            place = Operand(Mode.ROW, half, 0, 0, 1, out)
            program.widths[out] = 2 * half
            program.operations.append(Operation(Code.COPY, domain, 1, half, place, (source,)))
            filled[out] = 2 * half
        else:
            code, count = {"binary": (Code.ADD, 2), "linear": (Code.LINEAR, 1)}.get(
                kind, (Code.TANH, 1)
            )
            if kind == "linear" and any(program.domains[s] != domain for s in chosen[:1]):
                code = Code.TANH
            out = emit(code, inner, [part(slot, inner) for slot in chosen[:count]], domain)
            filled[out] = inner
        values.append(out)
        if domain == Domain.ROWS and draw(st.booleans()):
            slot = draw(st.sampled_from(values))
            place = Operand(Mode.ROW, 0, 0, 0, 1, slot)
            site = Site("residual", len(program.operations))
            program.sites[site] = Place(len(program.operations), place, (filled[slot],))
    last = values[-1]
    program.logits = emit(Code.COPY, filled[last], [(last, 0)], Domain.WANTED)
    return program


def results(program: Program, *, threads: int, backwards: bool) -> list[object]:
    """The floats of the wanted rows, and of those at sites, each named by how it came about."""
    memory: Memory = {}
    seen: list[object] = []
    starts = {start for start, _ in program.segments()}
    assert all(place.before in starts for place in program.sites.values())
    for start, stop in program.segments():
        seen += [
            memory[at]
            for place in program.sites.values()
            for row in range(ROWS if place.before == start else 0)
            for at in places(place.operand, place.shape[0], row, thread=-1)
        ]
        operations = program.operations[start:stop]
        if operations[0].by_rows:
            rows = WANTED if operations[0].domain == Domain.WANTED else range(ROWS)
            order = range(len(rows))
            for row in reversed(order) if backwards else order:
                for operation in operations:
                    compute(memory, operation, row, thread=row % threads)
        else:
            count = len(WANTED) if operations[0].domain == Domain.WANTED else ROWS
            for operation in reversed(operations) if backwards else operations:
                for row in range(count):
                    compute(memory, operation, row, thread=0)
    width = program.operations[-1].inner
    return seen + [
        memory[Mode.ROW, program.logits, row, at]
        for row in range(len(WANTED))
        for at in range(width)
    ]


def compute(memory: Memory, operation: Operation, row: int, *, thread: int) -> None:
    operands = [list(places(x, operation.inner, row, thread)) for x in operation.inputs]
    if operation.code == Code.EMBED:
        made: list[object] = [("token", row, i) for i in range(operation.inner)]
    elif operation.code == Code.LINEAR:
        whole = tuple(memory[place] for place in operands[0])
        made = [("linear", i, whole) for i in range(operation.inner)]
    else:
        made = [
            (operation.code, *(memory[place] for place in together))
            for together in zip(*operands, strict=True)
        ]
    for place, value in zip(places(operation.out, operation.inner, row, thread), made, strict=True):
        memory[place] = value


def places(operand: Operand, count: int, row: int, thread: int) -> Iterator[tuple[object, ...]]:
    for at in range(operand.address, operand.address + count):
        if operand.mode == Mode.LOCAL:
            yield Mode.LOCAL, thread, at
        else:
            place = WANTED[row] if operand.mode == Mode.WANTED else row
            yield Mode.ROW, operand.slot, place, at


@settings(max_examples=300, deadline=None)
@given(written(), st.integers(1, 3), st.booleans())
def test_no_value_is_overwritten_while_it_is_needed(
    program: Program, threads: int, backwards: bool
) -> None:
    expected = results(program, threads=1, backwards=False)
    shared = copy.deepcopy(program)
    share_memory(shared)
    assert results(shared, threads=threads, backwards=backwards) == expected
    assert sum(shared.widths) <= sum(program.widths)


def test_control_two_values_in_one_place_are_seen() -> None:
    writer = Writer()
    a = writer.embed(torch.zeros(ROWS, 5))
    b = writer.apply(Code.TANH, a)
    program = writer.finish(writer.apply(Code.ADD, a, b), tokens=ROWS, share=False)
    expected = results(program, threads=1, backwards=False)
    operations = program.operations
    operations[1] = Operation(
        *(Code.TANH, Domain.ROWS, 1, 5, operations[0].out, operations[1].inputs)
    )
    operations[2] = Operation(
        *(Code.ADD, Domain.ROWS, 1, 5, operations[2].out, (operations[0].out,) * 2)
    )
    assert results(program, threads=1, backwards=False) != expected


def test_a_program_computes_the_same_with_and_without_shared_memory() -> None:
    generator = torch.Generator().manual_seed(0)

    def program(*, share: bool) -> Program:
        generator.manual_seed(0)
        writer = Writer()
        value = writer.embed(torch.randn(50, 40, generator=generator))
        for outputs in (24, 64, 40):
            width = 40 if outputs == 24 else (24 if outputs == 64 else 64)
            product = writer.linear(value, torch.randn(outputs, width, generator=generator))
            gate = writer.apply(Code.SILU, product)
            value = writer.apply(Code.ADD, writer.apply(Code.MULTIPLY, gate, product), gate)
        return writer.finish(value, tokens=50, share=share)

    alone, together = program(share=False), program(share=True)
    assert len(together.widths) < len(alone.widths)
    expected = programs.run(alone, 50)
    for threads in (1, 2, 5):
        assert torch.equal(programs.run(together, 50, threads=threads), expected)
