"""What numba cannot say itself, as LLVM instructions: tiles of a product, sums by lanes, atomics.

Addresses are ``int64`` throughout: the callers know the layout of what is behind them.
"""

import functools
import platform
from collections.abc import Callable
from typing import Any, Final

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

LANES: Final = 16
"""Floats of one vector: two AVX2 registers or one of AVX-512; the bits are the same for any."""

_F32, _I16, _I32, _I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(_F32, LANES)
_FLOAT_BYTES: Final = 4

WIDE: Final = "+avx512f" in cpu_target.target_context.codegen().magic_tuple()[2].split(",")
"""Whether a vector is one register. It decides the shape of tiles, never their bits."""


def _int(value: int) -> ir.Constant:
    return ir.Constant(_I64, value)


def _at(b: ir.IRBuilder, base: ir.Value, index: ir.Value, size: int = _FLOAT_BYTES) -> ir.Value:
    return b.inttoptr(b.add(base, b.mul(index, _int(size))), ir.PointerType())


def _splat(b: ir.IRBuilder, value: ir.Value, vector: ir.VectorType = _VECTOR) -> ir.Value:
    undefined = ir.Constant(vector, ir.Undefined)
    first = b.insert_element(undefined, value, ir.Constant(_I32, 0))
    zeros = ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES)
    return b.shuffle_vector(first, undefined, zeros)


def _function(b: ir.IRBuilder, name: str, result: ir.Type, *arguments: ir.Type) -> Any:
    return cgutils.get_or_insert_function(b.module, ir.FunctionType(result, arguments), name)


def _load(b: ir.IRBuilder, base: ir.Value, index: ir.Value) -> ir.Value:
    return b.load(_at(b, base, index), typ=_VECTOR, align=_FLOAT_BYTES)


def _load_bfloat16(b: ir.IRBuilder, base: ir.Value, index: ir.Value) -> ir.Value:
    """Sixteen bfloat16 as floats: their bits are the upper half of a float's."""
    halves = b.load(_at(b, base, index, 2), typ=ir.VectorType(_I16, LANES), align=2)
    wide = ir.VectorType(_I32, LANES)
    shifted = b.shl(b.zext(halves, wide), ir.Constant(wide, [16] * LANES))
    return b.bitcast(shifted, _VECTOR)


def tile(rows: int, vectors: int, *, bfloat16: bool = False) -> Callable[..., None]:
    """Kernel of a product: ``out[r] = start[r] + sum over i < k of a[r, i] * b[i]``, in order of i.

    Called as ``(a, lda, b, ldb, k, start, ldstart, out, ldout, ahead)``: addresses, and distances
    in elements from row to row. ``b[i]`` and ``out[r]`` are ``vectors * LANES`` wide; the sums stay
    in registers, each step is one fused multiply-add. ``b`` holds floats or bfloat16; what lies
    ``ahead`` bytes after it, if that is not 0, is fetched into the cache meanwhile.
    """
    load, size = (_load_bfloat16, 2) if bfloat16 else (_load, _FLOAT_BYTES)

    @intrinsic
    def kernel(typing, a, lda, b, ldb, k, start, ldstart, out, ldout, ahead):
        def generate(context, builder, signature, arguments):
            *operands, ahead = arguments
            near = builder.icmp_signed("==", ahead, _int(0))
            with builder.if_else(near) as (once, twice):
                with once:
                    _tile(builder, operands, rows, vectors, load)
                with twice:
                    fetch = functools.partial(_prefetch, size=size, ahead=ahead)
                    _tile(builder, operands, rows, vectors, load, fetch)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 10), generate

    return kernel


def _prefetch(
    b: ir.IRBuilder, base: ir.Value, index: ir.Value, *, size: int, ahead: ir.Value
) -> None:
    """Fetch the line ``ahead`` of the vector at ``index`` into the second-level cache."""
    prefetch = _function(b, "llvm.prefetch.p0", ir.VoidType(), ir.PointerType(), _I32, _I32, _I32)
    place = _at(b, b.add(base, ahead), index, size)
    b.call(prefetch, [place, *(ir.Constant(_I32, n) for n in (0, 2, 1))])


def _tile(
    b: ir.IRBuilder,
    arguments: list[ir.Value],
    rows: int,
    vectors: int,
    load: Callable[..., Any],
    fetch: Callable[..., None] | None = None,
) -> None:
    x, ldx, w, ldw, k, start, ldstart, out, ldout = arguments
    fma = _function(b, f"llvm.fma.v{LANES}f32", _VECTOR, _VECTOR, _VECTOR, _VECTOR)
    cells = [(row, vector) for row in range(rows) for vector in range(vectors)]

    def place(row: int, vector: int, distance: ir.Value) -> ir.Value:
        return b.add(b.mul(_int(row), distance), _int(vector * LANES))

    sums = [_load(b, start, place(*cell, ldstart)) for cell in cells]
    before, loop, done = b.block, b.append_basic_block("products"), b.append_basic_block("done")
    b.cbranch(b.icmp_signed("<", _int(0), k), loop, done)
    b.position_at_end(loop)
    i = b.phi(_I64)
    running = [b.phi(_VECTOR) for _ in cells]
    line = b.mul(i, ldw)
    if fetch is not None:
        for vector in range(vectors):
            fetch(b, w, b.add(line, _int(vector * LANES)))
    weights = [load(b, w, b.add(line, _int(v * LANES))) for v in range(vectors)]
    inputs = [
        _splat(b, b.load(_at(b, x, b.add(b.mul(_int(row), ldx), i)), typ=_F32, align=4))
        for row in range(rows)
    ]
    added = [
        b.call(fma, [inputs[row], weights[vector], total])
        for (row, vector), total in zip(cells, running, strict=True)
    ]
    following = b.add(i, _int(1))
    i.add_incoming(_int(0), before)
    i.add_incoming(following, loop)
    for phi, first, later in zip(running, sums, added, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(later, loop)
    b.cbranch(b.icmp_signed("<", following, k), loop, done)
    b.position_at_end(done)
    results = [b.phi(_VECTOR) for _ in cells]
    for cell, result, first, later in zip(cells, results, sums, added, strict=True):
        result.add_incoming(first, before)
        result.add_incoming(later, loop)
        b.store(result, _at(b, out, place(*cell, ldout)), align=_FLOAT_BYTES)


def _by_lanes(
    identity: float, step: Callable[[ir.IRBuilder, ir.Value, ir.Value], ir.Value], reduction: str
) -> Callable[..., float]:
    """A reduction of ``n`` floats: lane ``i % LANES`` takes the ``i``-th, lanes join in order."""

    @intrinsic
    def kernel(typing, address, n):
        def generate(context, b, signature, arguments):
            address, n = arguments
            initial = ir.Constant(_VECTOR, [identity] * LANES)
            whole = b.and_(n, _int(-LANES))
            before, loop = b.block, b.append_basic_block("lanes")
            rest = b.append_basic_block("rest")
            b.cbranch(b.icmp_signed("<", _int(0), whole), loop, rest)
            b.position_at_end(loop)
            i, running = b.phi(_I64), b.phi(_VECTOR)
            later = step(b, running, _load(b, address, i))
            following = b.add(i, _int(LANES))
            for phi, first, again in ((i, _int(0), following), (running, initial, later)):
                phi.add_incoming(first, before)
                phi.add_incoming(again, loop)
            b.cbranch(b.icmp_signed("<", following, whole), loop, rest)
            b.position_at_end(rest)
            total = b.phi(_VECTOR)
            total.add_incoming(initial, before)
            total.add_incoming(later, loop)
            total = step(b, total, _load_first(b, address, whole, b.sub(n, whole), identity))
            return _join(b, reduction, total, identity)

        return types.float32(types.int64, types.int64), generate

    return kernel


def _load_first(
    b: ir.IRBuilder, base: ir.Value, index: ir.Value, count: ir.Value, rest: float
) -> ir.Value:
    """A vector of which only the first ``count`` lanes are read; the others are ``rest``."""
    lanes, mask = ir.VectorType(_I64, LANES), ir.VectorType(ir.IntType(1), LANES)
    wanted = b.icmp_signed("<", ir.Constant(lanes, list(range(LANES))), _splat(b, count, lanes))
    load = _function(
        b, f"llvm.masked.load.v{LANES}f32.p0", _VECTOR, ir.PointerType(), _I32, mask, _VECTOR
    )
    other = ir.Constant(_VECTOR, [rest] * LANES)
    return b.call(load, [_at(b, base, index), ir.Constant(_I32, 4), wanted, other])


def _join(b: ir.IRBuilder, reduction: str, lanes: ir.Value, identity: float) -> ir.Value:
    if reduction == "fadd":  # takes the lanes one after the other, since it may not reassociate
        join = _function(b, f"llvm.vector.reduce.fadd.v{LANES}f32", _F32, _F32, _VECTOR)
        return b.call(join, [ir.Constant(_F32, identity), lanes])
    join = _function(b, f"llvm.vector.reduce.{reduction}.v{LANES}f32", _F32, _VECTOR)
    return b.call(join, [lanes])


def _square(b: ir.IRBuilder, total: ir.Value, x: ir.Value) -> ir.Value:
    fma = _function(b, f"llvm.fma.v{LANES}f32", _VECTOR, _VECTOR, _VECTOR, _VECTOR)
    return b.call(fma, [x, x, total])


def _larger(b: ir.IRBuilder, total: ir.Value, x: ir.Value) -> ir.Value:
    return b.select(b.fcmp_ordered(">", x, total), x, total)


total = _by_lanes(0.0, lambda b, total, x: b.fadd(total, x), "fadd")
"""``(address, n)``: the sum of ``n`` floats."""

total_of_squares = _by_lanes(0.0, _square, "fadd")
"""``(address, n)``: the sum of the squares of ``n`` floats."""

largest = _by_lanes(float("-inf"), _larger, "fmax")
"""``(address, n)``: the largest of ``n`` floats, none of which is NaN."""


def _cast(source: Any, source_type: ir.Type, result: Any, result_type: ir.Type) -> Any:
    @intrinsic
    def cast(typing, value):
        def generate(context, builder, signature, arguments):
            return builder.bitcast(arguments[0], result_type)

        return result(source), generate

    return cast


bits_of = _cast(types.float32, _F32, types.int32, _I32)
"""The bits of a float."""

float_of = _cast(types.int32, _I32, types.float32, _F32)
"""The float with these bits."""


def _pointer(item: Any) -> Any:
    @intrinsic
    def pointer(typing, address):
        def generate(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], context.get_value_type(types.CPointer(item)))

        return types.CPointer(item)(types.int64), generate

    return pointer


floats = _pointer(types.float32)
"""What lies at an address, as an array of floats without bounds."""

doubles = _pointer(types.float64)
"""The same, of doubles."""

integers = _pointer(types.int64)
"""The same, of 64-bit integers."""

halves = _pointer(types.uint16)
"""The same, of 16-bit integers: the bits of bfloat16."""


@intrinsic
def fetch_add(typing, address, value):
    """Add to an ``int64`` in one step that no thread can come between; returns what was there."""

    def generate(context, builder, signature, arguments):
        place = builder.inttoptr(arguments[0], ir.PointerType())
        return builder.atomic_rmw("add", place, arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def load_shared(typing, address):
    """Read an ``int64`` that other threads write."""

    def generate(context, builder, signature, arguments):
        place = builder.inttoptr(arguments[0], ir.PointerType())
        return builder.load_atomic(place, "seq_cst", 8, typ=_I64)

    return types.int64(types.int64), generate


@intrinsic
def store_shared(typing, address, value):
    """Write an ``int64`` that other threads read, after everything written before."""

    def generate(context, builder, signature, arguments):
        place = builder.inttoptr(arguments[0], ir.PointerType())
        builder.atomic_rmw("xchg", place, arguments[1], "seq_cst")
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def pause(typing):
    """Tell the processor that this thread spins."""

    def generate(context, builder, signature, arguments):
        if platform.machine().lower() in ("x86_64", "amd64"):
            builder.call(_function(builder, "llvm.x86.sse2.pause", ir.VoidType()), [])
        return context.get_dummy_value()

    return types.void(), generate
