"""Kernel strategies: how linear layers are computed so that a row's bits do not depend on others.

A strategy replaces the model's linear layers and says how rows must be padded; whether it keeps
the contract on this machine is not believed but probed (:mod:`infra.engine.probe`).
"""

from collections.abc import Callable
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from infra.engine.blocks import BLOCK_TOKENS
from infra.engine.threads import threads

MIN_ROWS: Final = 4
"""Linear layers are never called with fewer rows: BLAS libraries treat those as vectors."""

_VECTOR: Final = 64
"""Elements that torch's vectorised loops take at once, at most (two AVX-512 registers, bf16)."""


class Strategy(Protocol):
    """How the linear layers of a model are computed, and what that asks of the rows."""

    name: str
    threads: int

    def linear(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """A module for ``x @ weight.T + bias`` on rows ``x``; ``weight`` is ``(out, in)``."""

    def quantum(self, widths: set[int]) -> int:
        """Rows of a pass are padded to a multiple of this, given the widths of its tensors."""

    def query_tile(self, head_dim: int) -> int:
        """Query rows of attention are padded to a multiple of this."""


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


class TiledLinear(nn.Module):
    """A linear layer computed in tiles of exactly ``TILE`` rows, so BLAS sees one shape only."""

    TILE: Final = 16

    def __init__(self, weight: Tensor, bias: Tensor | None, thread_count: int) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.threads = thread_count

    def forward(self, x: Tensor) -> Tensor:
        """``x`` is ``(..., in)``; returns ``(..., out)``."""
        rows = x.reshape(-1, x.shape[-1])
        padded = nn.functional.pad(rows, (0, 0, 0, -len(rows) % self.TILE))
        with threads(self.threads, self.weight.numel() * self.TILE):
            tiles = [
                nn.functional.linear(tile, self.weight, self.bias)
                for tile in torch.split(padded, self.TILE)
            ]
        return torch.cat(tiles)[: len(rows)].view(*x.shape[:-1], -1)


class _Invariant:
    """What the strategies that aim for equal bits share."""

    def __init__(self, thread_count: int) -> None:
        self.threads = thread_count

    def quantum(self, widths: set[int]) -> int:
        """The fewest rows for which every element-wise tensor is whole vectors."""
        quantum = MIN_ROWS
        while any(quantum * width % _VECTOR for width in widths):
            quantum += MIN_ROWS
        return quantum

    def query_tile(self, head_dim: int) -> int:
        """The smallest tile whose rows BLAS computes as it does within a large product."""
        return measured_query_tile(head_dim)


class OneDnnStrategy(_Invariant):
    """Weights packed by oneDNN: as fast as memory allows for few rows, and row-invariant."""

    name = "onednn"

    def linear(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """A :class:`PackedLinear`."""
        return PackedLinear(weight, bias, self.threads)


class TileStrategy(_Invariant):
    """Plain BLAS on one fixed tile of rows: for machines where oneDNN cannot be used. Slow."""

    name = "tile"

    def linear(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """A :class:`TiledLinear`."""
        return TiledLinear(weight, bias, self.threads)


class PlainStrategy:
    """What everyone else does: BLAS on whatever rows there are. Not deterministic."""

    name = "plain"

    def __init__(self, thread_count: int) -> None:
        self.threads = thread_count

    def linear(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """A plain :class:`torch.nn.Linear`."""
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(bias, requires_grad=False)
        return layer

    def quantum(self, widths: set[int]) -> int:
        """No padding."""
        return 1

    def query_tile(self, head_dim: int) -> int:
        """No padding."""
        return 1


def measured_query_tile(head_dim: int) -> int:
    """Smallest power of two, from 4, at which both products of attention are row-invariant.

    BLAS libraries choose another kernel below a number of rows that depends on the other
    dimensions and on their layout; with head_dim 128 and MKL, 4 rows are too few. Tried with one
    K/V head and with several, in the layout that attention uses.
    """
    generator = torch.Generator().manual_seed(0)
    rows, heads = 256, 3
    query, start = torch.randn(2, heads, rows, head_dim, generator=generator)
    keys = torch.randn(heads, head_dim, BLOCK_TOKENS, generator=generator)
    values = torch.randn(heads, BLOCK_TOKENS, head_dim, generator=generator)
    weights = torch.rand(heads, rows, BLOCK_TOKENS, generator=generator)
    scores = torch.matmul(query, keys)
    output = torch.baddbmm(start, weights, values)

    def invariant(count: int, heads: int) -> bool:
        part = (slice(heads), slice(count))
        return torch.equal(
            torch.matmul(query[part], keys[:heads]), scores[part]
        ) and torch.equal(torch.baddbmm(start[part], weights[part], values[:heads]), output[part])

    def holds(tile: int) -> bool:
        return all(invariant(count, n) for count in range(tile, rows, tile) for n in (1, heads))

    return next(filter(holds, (4, 8, 16, 32, 64)), 128)


def choose(name: str, dtype: torch.dtype, thread_count: int) -> Strategy:
    """The strategy of this name; ``auto`` is oneDNN where the machine can pack ``dtype``."""
    if name == "auto":
        name = "onednn" if _can_pack(dtype) else "tile"
    strategies: dict[str, Callable[[int], Strategy]] = {
        "onednn": OneDnnStrategy,
        "tile": TileStrategy,
        "plain": PlainStrategy,
    }
    return strategies[name](thread_count)


def _can_pack(dtype: torch.dtype) -> bool:
    try:
        PackedLinear(torch.ones(16, 16, dtype=dtype), None, 1)(torch.ones(4, 16, dtype=dtype))
    except (RuntimeError, AttributeError):
        return False
    return True


def replace_linears(model: Any, strategy: Strategy) -> set[int]:
    """Swap every linear layer of ``model`` for the strategy's.

    Returns the widths of the tensors between them: what comes out of the head is not one. Weights
    shared with an embedding stay where the embedding needs them.
    """
    head = model.get_output_embeddings()
    widths: set[int] = set()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Conv1D):
                weight = child.weight.detach().t().contiguous()
            elif type(child) is nn.Linear:
                weight = child.weight.detach()
            else:
                continue
            bias = None if child.bias is None else child.bias.detach()
            setattr(parent, name, strategy.linear(weight, bias))
            widths.update(weight.shape[1:] if child is head else weight.shape)
    return widths
