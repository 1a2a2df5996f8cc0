"""The K/V tensors of one model, cut into blocks."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from infra.engine.blocks import BLOCK_TOKENS


@dataclass(frozen=True)
class Geometry:
    """Shape of a model's attention, the same in every layer."""

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int

    def block_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of one block: K and V of all layers for ``BLOCK_TOKENS`` tokens."""
        return 2 * self.layers * self.kv_heads * BLOCK_TOKENS * self.head_dim * dtype.itemsize


class KVStore:
    """K and V of every layer: ``(layers, blocks, kv_heads, BLOCK_TOKENS, head_dim)`` each.

    Zeroed at the start, so that a slot not written yet holds finite numbers: masked keys have
    weight 0, and 0 times a finite value adds exactly nothing.
    """

    def __init__(self, geometry: Geometry, blocks: int, dtype: torch.dtype) -> None:
        shape = (
            geometry.layers,
            blocks,
            geometry.kv_heads,
            BLOCK_TOKENS,
            geometry.head_dim,
        )
        self.k = _lazy_zeros(shape, dtype)
        self.v = _lazy_zeros(shape, dtype)

    def write(self, layer: int, blocks: Tensor, offsets: Tensor, k: Tensor, v: Tensor) -> None:
        """Store rows ``k`` and ``v`` (rows, kv_heads, head_dim) at their slots."""
        self.k[layer][blocks, :, offsets] = k
        self.v[layer][blocks, :, offsets] = v

    def read(self, table: list[int], tokens: int) -> tuple[Tensor, Tensor]:
        """K and V of a text, each ``(layers, kv_heads, tokens, head_dim)``, copied."""
        index = torch.tensor(table)
        k, v = (
            store[:, index].transpose(1, 2).flatten(2, 3)[:, :, :tokens]
            for store in (self.k, self.v)
        )
        return k, v


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that take memory only once written to: numpy asks the system for zeroed pages."""
    size = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(size, np.uint8)).view(dtype).view(shape)
