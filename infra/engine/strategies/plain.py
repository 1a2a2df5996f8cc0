"""What everyone else does: BLAS on whatever rows there are. Not deterministic; for comparison."""

from torch import Tensor, nn

from infra.engine.forward import Shape
from infra.engine.modules.strategy import ModuleStrategy
from infra.engine.strategies import strategy
from infra.engine.threads import threads


class PlainLinear(nn.Module):
    """A linear layer of torch."""

    def __init__(self, weight: Tensor, bias: Tensor | None, thread_count: int) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.threads = thread_count

    def forward(self, x: Tensor) -> Tensor:
        """``x`` is ``(..., in)``; returns ``(..., out)``."""
        with threads(self.threads, self.weight.numel() * (x.numel() // x.shape[-1])):
            return nn.functional.linear(x, self.weight, self.bias)


@strategy
class PlainStrategy(ModuleStrategy):
    """No padding anywhere."""

    name = "plain"

    def linear(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """A :class:`PlainLinear`."""
        return PlainLinear(weight, bias, self.threads)

    def quantum(self, widths: set[int]) -> int:
        """No padding."""
        return 1

    def query_tile(self, shape: Shape) -> int:
        """No padding."""
        return 1
