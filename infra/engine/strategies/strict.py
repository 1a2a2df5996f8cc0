"""Kernels of our own whose order is in their text: fast, and with the same bits on any CPU."""

from typing import Any

import torch

from infra.engine.forward import Prepared, Shape, Unsupported
from infra.engine.strategies import strategy
from infra.engine.strict.execution import Execution
from infra.engine.strict.lowering import lower


@strategy
class StrictStrategy:
    """See :mod:`infra.engine.strict`."""

    name = "strict"

    def __init__(self, threads: int) -> None:
        self._threads = threads

    def prepare(self, model: Any, shape: Shape) -> Prepared:
        """Trace the model into a program; it is not needed after that."""
        if shape.device.type != "cpu" or shape.dtype not in (torch.float32, torch.bfloat16):
            raise Unsupported(f"it runs on a CPU in float32 or bfloat16, not {shape.dtype}")
        program = lower(model, shape)
        return Prepared(
            strategy=self.name,
            shape=shape,
            bind=lambda store: Execution(program, store, shape.context, self._threads),
            tied=False,
        )
