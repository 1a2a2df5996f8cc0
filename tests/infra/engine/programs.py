"""Programs of the strict strategy written by hand, to try its kernels one at a time."""

from collections.abc import Sequence as Seq
from typing import Any, Final

import torch
from torch import Tensor

from infra.engine.blocks import blocks_for
from infra.engine.executor import Executor
from infra.engine.forward import Prepared, Shape
from infra.engine.kv_store import Geometry, KVStore
from infra.engine.scheduler import Sequence, Slice
from infra.engine.strict import linear
from infra.engine.strict.execution import Execution
from infra.engine.strict.program import (
    NOWHERE,
    Code,
    Domain,
    Mode,
    Operand,
    Operation,
    Program,
    share_memory,
)

NO_ATTENTION: Final = Geometry(layers=1, query_heads=1, kv_heads=1, head_dim=16)


class Writer:
    """Writes a program; a value is the number of the slot it is in."""

    def __init__(self) -> None:
        self.program = Program()

    def embed(self, table: Tensor) -> int:
        """The row of ``table`` (tokens, width) that a token names."""
        extra = (self.hold(table.contiguous()), int(table.dtype == torch.bfloat16))
        return self.emit(Code.EMBED, table.shape[1], [], extra)

    def apply(self, code: Code, *slots: int) -> int:
        """A function of whole values, float by float; of one value if it is ``MEAN``."""
        width = self.program.widths[slots[0]]
        if code != Code.MEAN:
            return self.emit(code, width, slots)
        out = self.program.slot(1, Domain.ROWS)
        place = Operand(Mode.ROW, 0, 0, 1, 1, out)
        source = Operand(Mode.ROW, 0, 0, width, 1, slots[0])
        self.program.operations.append(Operation(code, Domain.ROWS, 1, width, place, (source,)))
        return out

    def layer_norm(
        self, slot: int, weight: Tensor | None, bias: Tensor | None, epsilon: float
    ) -> int:
        """Layer normalisation over the whole width."""
        extra = tuple(0 if each is None else self.hold(each) for each in (weight, bias))
        return self.emit(Code.LAYER_NORM, self.program.widths[slot], [slot], extra, real=(epsilon,))

    def linear(self, slot: int, weight: Tensor, bias: Tensor | None = None) -> int:
        """``x @ weight.T + bias``; the value is padded to whole panels."""
        outputs, inputs = weight.shape
        width = linear.padded(outputs)
        full = torch.zeros(width)
        if bias is not None:
            full[:outputs] = bias
        extra = (
            self.hold(linear.pack(weight)),
            self.hold(full),
            inputs,
            width // linear.PANEL,
            int(weight.dtype == torch.bfloat16),
        )
        return self.emit(Code.LINEAR, outputs, [slot], extra, width=width)

    def attend(
        self, slots: Seq[int], geometry: Geometry, scaling: float, window: int, cap: float
    ) -> int:
        """Attention of layer 0 for the values query, key and value."""
        dim = geometry.head_dim
        query, key, value = (Operand(Mode.ROW, 0, 0, dim, 1, slot) for slot in slots)
        operations = self.program.operations
        operations.append(
            Operation(Code.STORE, Domain.ROWS, 1, dim, NOWHERE, (key, value), (0, window))
        )
        out = self.program.slot(geometry.query_heads * dim, Domain.ROWS)
        place = Operand(Mode.ROW, 0, 0, dim, 1, out)
        operations.append(
            Operation(
                *(Code.ATTEND, Domain.ROWS, geometry.query_heads, dim, place, (query,)),
                extra=(0, window),
                real=(scaling, cap),
            )
        )
        return out

    def finish(self, slot: int, *, tokens: int, share: bool = True) -> Program:
        """End with the wanted rows of a value, for texts of so many different tokens."""
        program = self.program
        width = program.widths[slot]
        source = Operand(Mode.WANTED, 0, 0, 0, 1, slot)
        program.logits = program.slot(width, Domain.WANTED)
        program.operations.append(
            Operation(
                *(Code.COPY, Domain.WANTED, 1, width),
                Operand(Mode.ROW, 0, 0, 0, 1, program.logits),
                (source,),
            )
        )
        program.vocabulary = max(width, tokens)
        if share:
            share_memory(program)
        return program

    def hold(self, tensor: Tensor) -> int:
        """Keep a tensor; its address."""
        self.program.alive.append(tensor)
        return tensor.data_ptr()

    def emit(
        self,
        code: Code,
        inner: int,
        slots: Seq[int],
        extra: tuple[int, ...] = (),
        *,
        width: int | None = None,
        real: tuple[float, ...] = (),
    ) -> int:
        """An operation on whole values; returns the slot of its result."""
        out = self.program.slot(inner if width is None else width, Domain.ROWS)
        operands = [Operand(Mode.ROW, 0, 0, 0, 1, slot) for slot in (out, *slots)]
        self.program.operations.append(
            Operation(code, Domain.ROWS, 1, inner, operands[0], tuple(operands[1:]), extra, real)
        )
        return out


def prepared(
    program: Program,
    *,
    geometry: Geometry = NO_ATTENTION,
    dtype: torch.dtype = torch.float32,
    context: int = 192,
    threads: int = 2,
) -> Prepared:
    """What the strict strategy would make of a model whose program this is."""
    shape = Shape(
        geometry=geometry,
        dtype=dtype,
        device=torch.device("cpu"),
        context=context,
        vocabulary=program.vocabulary,
    )
    return Prepared(
        strategy="strict",
        shape=shape,
        bind=lambda store: Execution(program, store, context, threads),
        tied=False,
    )


def run(program: Program, rows: int, **options: Any) -> Tensor:
    """The result for the tokens ``0 .. rows``, in one pass, ``(rows, width)``."""
    made = prepared(program, context=rows, **options)
    blocks = blocks_for(rows)
    store = KVStore(made.geometry, 1 + blocks, made.dtype)
    text = Sequence(list(range(rows)), rows, 0, None, table=list(range(1, 1 + blocks)))
    width = program.widths[program.logits]
    return Executor(made, store).run([Slice(text, 0, rows)])[:, :width]
