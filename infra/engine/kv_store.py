"""The K/V tensors of one model, cut into blocks."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from infra.engine.blocks import BLOCK_TOKENS, Copy, Move

_VECTOR: Final = 16
_CPU: Final = torch.device("cpu")


@dataclass(frozen=True)
class Geometry:
    """Shape of a model's attention, the same in every layer."""

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int

    @property
    def value_dim(self) -> int:
        """``head_dim`` with what fills the last vector: the width of V in a block."""
        return -(-self.head_dim // _VECTOR) * _VECTOR

    def block_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of one block: K and V of all layers for ``BLOCK_TOKENS`` tokens."""
        return self._bytes(self.head_dim, dtype) + self._bytes(self.value_dim, dtype)

    def host_slots(self, dtype: torch.dtype, budget: int) -> int:
        """Blocks that the host can keep in ``budget`` bytes, half of them for K and half for V.

        Each half is rounded down to a power of two: in such sizes torch pins memory.
        """
        half = (1 << (budget // 2).bit_length()) // 2
        return half // self._bytes(self.value_dim, dtype)

    def _bytes(self, width: int, dtype: torch.dtype) -> int:
        return self.layers * self.kv_heads * BLOCK_TOKENS * width * dtype.itemsize


class KVStore:
    """K and V of every layer, in blocks laid out for the products of attention.

    ``k`` is ``(layers, blocks, kv_heads, head_dim, BLOCK_TOKENS)``, so that a query meets all keys
    of a block at once; ``v`` is ``(layers, blocks, kv_heads, BLOCK_TOKENS, value_dim)``.

    Zeroed at the start, so that a slot not written yet holds finite numbers: masked keys have
    weight 0, and 0 times a finite value adds exactly nothing.

    ``host_slots`` blocks that had to leave the device can be kept in the host's memory.
    """

    def __init__(
        self,
        geometry: Geometry,
        blocks: int,
        dtype: torch.dtype,
        *,
        device: torch.device = _CPU,
        host_slots: int = 0,
    ) -> None:
        self.geometry = geometry
        heads = (geometry.layers, blocks, geometry.kv_heads)
        self.k = _zeros((*heads, geometry.head_dim, BLOCK_TOKENS), dtype, device)
        self.v = _zeros((*heads, BLOCK_TOKENS, geometry.value_dim), dtype, device)
        self.host_k = _host_slots(self.k, host_slots)
        self.host_v = _host_slots(self.v, host_slots)

    def write(self, layer: int, blocks: Tensor, offsets: Tensor, k: Tensor, v: Tensor) -> None:
        """Store rows ``k`` and ``v`` (rows, kv_heads, head_dim) at their slots."""
        self.k[layer][blocks, :, :, offsets] = k
        self.v[layer][blocks, :, offsets, : v.shape[-1]] = v

    def clear(self, table: list[int]) -> None:
        """Zero blocks that hold what is not to be met by whoever uses them next."""
        self.k[:, table] = 0
        self.v[:, table] = 0

    def move(self, moves: Iterable[Move]) -> None:
        """Copy blocks within the device, and between it and the host, in this order.

        A GPU copies when its stream gets there, so before the pass that is computed next; the CPU
        does not wait for it, nor look at what the host holds.
        """
        for move in moves:
            for device, host in ((self.k, self.host_k), (self.v, self.host_v)):
                if isinstance(move, Copy):
                    source, target = device[:, move.source], device[:, move.target]
                elif move.to_host:
                    source, target = device[:, move.block], host[move.slot]
                else:
                    source, target = host[move.slot], device[:, move.block]
                target.copy_(source, non_blocking=True)

    def read(self, table: list[int], tokens: int) -> tuple[Tensor, Tensor]:
        """K and V of a text, each ``(layers, kv_heads, tokens, head_dim)``, copied to the CPU."""
        layers = range(self.geometry.layers)
        k = torch.stack([in_order(self.keys(layer, table), tokens) for layer in layers])
        v = torch.stack([in_order(self.values(layer, table), tokens) for layer in layers])
        return k, v

    def keys(self, layer: int, table: list[int]) -> Tensor:
        """K of a text in a layer, copied to the CPU block by block; see :func:`in_order`."""
        index = torch.tensor(table, device=self.k.device)
        return self.k[layer, index].cpu().transpose(-1, -2)

    def values(self, layer: int, table: list[int]) -> Tensor:
        """V of a text in a layer, as :meth:`keys`."""
        index = torch.tensor(table, device=self.v.device)
        return self.v[layer, index].cpu()[..., : self.geometry.head_dim]


def in_order(blocks: Tensor, tokens: int) -> Tensor:
    """K or V of a text ``(kv_heads, tokens, head_dim)``, of ``(blocks, kv_heads, B, head_dim)``."""
    return blocks.transpose(0, 1).flatten(1, 2)[:, :tokens].contiguous()


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that take a CPU's memory only once written to: numpy asks it for zeroed pages."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(size, np.uint8)).view(dtype).view(shape)


def _host_slots(device: Tensor, slots: int) -> Tensor:
    """Places for blocks of ``device`` (layers, blocks, ...), each in one piece to be copied to.

    Pinned where the device is a GPU, so that it copies them while the CPU goes on.
    """
    layers, _, *inside = device.shape
    return torch.empty((slots, layers, *inside), dtype=device.dtype, pin_memory=device.is_cuda)
