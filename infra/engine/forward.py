"""What a forward pass is, and what a kernel strategy has to provide: the engine's extension point.

A strategy is one module in :mod:`infra.engine.strategies` with a class that has a ``name`` and is
marked with ``@strategy``. It turns a transformers model into a :class:`Prepared`; whether that
keeps the contract on this machine is not believed but probed (:mod:`infra.engine.probe`), and its
logits are held against those of plain transformers before it serves anybody.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from infra.engine.kv_store import Geometry, KVStore
from infra.engine.scheduler import Slice


@dataclass(frozen=True)
class Batch:
    """The rows of one pass: slice after slice, one row for each token.

    ``blocks`` are the K/V blocks that rows belong to; ``wanted`` are the rows whose logits are
    asked for.
    """

    slices: Sequence[Slice]
    tokens: list[int]
    positions: list[int]
    blocks: list[int]
    wanted: list[int]


class Forward(Protocol):
    """A model bound to the K/V of one store."""

    def run(self, batch: Batch) -> Tensor:
        """Compute a pass: K/V go to the store, at most one slice per sequence.

        Returns logits ``(wanted rows, vocabulary)`` in float32, on the CPU, which no later pass
        writes to.
        """


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a strategy is told about the model it prepares."""

    geometry: Geometry
    dtype: torch.dtype
    device: torch.device
    context: int
    vocabulary: int


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A model made ready by a strategy.

    ``quantum`` and ``query_tile`` say to multiples of what rows are padded, in a pass and in
    attention; ``tied`` is whether its bits depend on the processor and on torch, rather than on
    its own text alone. ``bind`` gives the forward pass for a store.
    """

    strategy: str
    shape: Shape
    bind: Callable[[KVStore], Forward]
    quantum: int = 1
    query_tile: int = 1
    tied: bool = True

    @property
    def geometry(self) -> Geometry:
        """Shape of the attention."""
        return self.shape.geometry

    @property
    def dtype(self) -> torch.dtype:
        """Type of weights and K/V."""
        return self.shape.dtype


class Unsupported(Exception):
    """A strategy cannot run this model, or not on this machine; says why. The model is intact."""


class Strategy(Protocol):
    """How the forward passes of a model are computed."""

    name: str

    def __init__(self, threads: int) -> None:
        """Use so many threads."""

    def prepare(self, model: Any, shape: Shape) -> Prepared:
        """Make a transformers model ready.

        Raises:
            Unsupported: it cannot, and has changed nothing.
        """
