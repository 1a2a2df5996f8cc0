"""Plain BLAS on one fixed tile of rows: needs nothing of the machine. Slow."""

from typing import Final

import torch
from torch import Tensor, nn

from infra.engine.modules.strategy import ModuleStrategy
from infra.engine.strategies import strategy
from infra.engine.threads import threads


class TiledLinear(nn.Module):
    """A linear layer computed in tiles of exactly ``TILE`` rows, so BLAS sees one shape only.

    On one thread: with several, some shapes are cut otherwise for each number of them.
    """

    TILE: Final = 16

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """``x`` is ``(..., in)``; returns ``(..., out)``."""
        rows = x.reshape(-1, x.shape[-1])
        padded = nn.functional.pad(rows, (0, 0, 0, -len(rows) % self.TILE))
        with threads(1, 0):
            tiles = [
                nn.functional.linear(tile, self.weight, self.bias)
                for tile in torch.split(padded, self.TILE)
            ]
        return torch.cat(tiles)[: len(rows)].view(*x.shape[:-1], -1)


@strategy
class TileStrategy(ModuleStrategy):
    """Linear layers by tiles, everything else of torch."""

    name = "tile"

    def linear(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """A :class:`TiledLinear`."""
        return TiledLinear(weight, bias)
