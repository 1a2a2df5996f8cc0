"""Weights packed by oneDNN: row-invariant in the shapes tried, but as the library chooses."""

import torch
from torch import Tensor, nn

from infra.engine.forward import Shape, Unsupported
from infra.engine.modules.strategy import ModuleStrategy
from infra.engine.strategies import strategy
from infra.engine.threads import threads


class PackedLinear(nn.Module):
    """A linear layer on weights that oneDNN has packed once.

    ``torch.ops.mkldnn`` operators are private to torch: the lock file pins torch with them.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, thread_count: int) -> None:
        super().__init__()
        self.size = weight.numel()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 16)
        self.bias = bias
        self.threads = thread_count

    def forward(self, x: Tensor) -> Tensor:
        """``x`` is ``(..., in)`` with at least ``MIN_ROWS`` rows; returns ``(..., out)``."""
        with threads(self.threads, self.size * (x.numel() // x.shape[-1])):
            result: Tensor = torch.ops.mkldnn._linear_pointwise(
                x, self.packed, self.bias, "none", [], ""
            )
        return result


@strategy
class OneDnnStrategy(ModuleStrategy):
    """Linear layers of oneDNN, everything else of torch."""

    name = "onednn"

    def linear(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """A :class:`PackedLinear`."""
        return PackedLinear(weight, bias, self.threads)

    def check(self, shape: Shape) -> None:
        """Packing fails on old processors, for bfloat16 below AVX512BW."""
        if shape.device.type != "cpu":
            raise Unsupported("it runs on a CPU")
        try:
            PackedLinear(torch.ones(16, 16, dtype=shape.dtype), None, 1)(
                torch.ones(4, 16, dtype=shape.dtype)
            )
        except (RuntimeError, AttributeError) as error:
            raise Unsupported(f"oneDNN cannot pack {shape.dtype} here") from error
