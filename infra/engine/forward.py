"""What a forward pass is, and what a kernel strategy has to provide: the engine's extension point.

A strategy is one module in :mod:`infra.engine.strategies` with a class that has a ``name`` and is
marked with ``@strategy``. It turns a transformers model into a :class:`Prepared`; whether that
keeps the contract on this machine is not believed but probed (:mod:`infra.engine.probe`), and its
logits are held against those of plain transformers before it serves anybody.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from domain.errors import InvalidInput, invalid
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


@dataclass(frozen=True)
class Site:
    """A place in a pass at which rows can be seen and changed.

    ``residual`` is the stream of hidden states ``(rows, width)``: at ``index`` i what enters layer
    i, at the number of layers what leaves the last one; ``normalised`` (index 0) is the latter
    after the last normalisation. ``queries`` of layer ``index`` are ``(rows, heads, head_dim)``,
    turned to their positions; its ``heads``, in the same shape, what each head gives, before they
    are put together.
    """

    kind: Literal["residual", "normalised", "queries", "heads"]
    index: int


def every_site(layers: int) -> frozenset[Site]:
    """The sites of a model in which nothing is hidden."""
    sites = {Site("normalised", 0), Site("residual", layers)}
    for layer in range(layers):
        sites |= {Site("residual", layer), Site("queries", layer), Site("heads", layer)}
    return frozenset(sites)


def not_shown(site: Site) -> InvalidInput:
    """What is said of a site that a model hides."""
    where = f"{site.kind} {site.index}"
    return invalid("state_id", f"is a state of a model whose {where} cannot be given truly")


class Weighing(NamedTuple):
    """How a layer weighs keys: products with queries times ``scaling``, bounded by ``softcap``.

    A row sees ``window`` keys, itself included. A softcap or window of 0 is none.
    """

    scaling: float
    window: int
    softcap: float


class Watch(Protocol):
    """Looks on while a pass is computed."""

    @property
    def sites(self) -> Collection[Site]:
        """What it looks at."""

    @property
    def until(self) -> Site | None:
        """The site after which nothing of the pass is needed, not even logits, if there is one.

        The pass ends there; where that site is not shown, it goes on.
        """

    def see(self, site: Site, rows: Tensor, weighing: Weighing | None) -> None:
        """Look at rows of the pass at one of the ``sites``, and change them if need be.

        All rows are seen, in their order, at once or in several parts. They are in float32 or the
        model's dtype, in place, and gone after that: a copy is needed of what is kept. By the time
        queries are seen, their keys are in the store; they come with how they are weighed.
        """


class Forward(Protocol):
    """A model bound to the K/V of one store."""

    @property
    def sites(self) -> Collection[Site]:
        """What can be seen of a pass."""

    def run(self, batch: Batch, watch: Watch | None = None) -> Tensor:
        """Compute a pass: K/V go to the store, at most one slice per sequence.

        Returns logits ``(wanted rows, vocabulary)`` in float32, on the CPU, which no later pass
        writes to. A ``watch`` changes no bit of what it does not write to.
        """

    def project(self, hidden: Tensor) -> Tensor:
        """Logits, as those of a pass, of rows that leave the last layer, ``(rows, width)``."""


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
