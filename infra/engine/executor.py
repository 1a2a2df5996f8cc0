"""One forward pass over slices of several sequences."""

from collections.abc import Collection
from collections.abc import Sequence as Seq
from typing import Any

import torch
from torch import Tensor

from infra.engine import strategies
from infra.engine.blocks import BLOCK_TOKENS
from infra.engine.devices import compute_exactly
from infra.engine.forward import Batch, Prepared, Shape, Site, Watch, not_shown
from infra.engine.kv_store import Geometry, KVStore
from infra.engine.scheduler import Slice


def prepare(
    model: Any,
    strategy: str,
    dtype: torch.dtype,
    *,
    threads: int,
    context: int,
    vocabulary: int,
    device: str = "cpu",
) -> Prepared:
    """Make a transformers model ready with a strategy, ``auto`` for the best one.

    Raises:
        Unsupported: the strategy cannot run it.
    """
    config: Any = model.config
    heads = config.num_attention_heads
    compute_exactly()
    geometry = Geometry(
        layers=config.num_hidden_layers,
        query_heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
    )
    shape = Shape(
        geometry=geometry,
        dtype=dtype,
        device=torch.device(device),
        context=context,
        vocabulary=vocabulary,
    )
    return strategies.prepare(model, strategy, shape, threads=threads)


class Executor:
    """Runs passes of a prepared model against one KV store."""

    def __init__(self, prepared: Prepared, store: KVStore) -> None:
        self.store = store
        self._forward = prepared.bind(store)

    def run(self, slices: Seq[Slice], watch: Watch | None = None) -> Tensor:
        """Compute slices; their K/V are stored in their sequences' blocks.

        Returns the wanted logits, ``(rows, vocabulary)`` in float32: slice after slice, by
        position. At most one slice per sequence.
        """
        batch = Batch(slices, [], [], [], [])
        for piece in slices:
            table, span = piece.sequence.table, range(piece.start, piece.start + piece.count)
            offset = len(batch.tokens) - piece.start
            batch.wanted.extend(position + offset for position in piece.wanted)
            batch.tokens.extend(piece.sequence.tokens[span.start : span.stop])
            batch.positions.extend(span)
            batch.blocks.extend(table[position // BLOCK_TOKENS] for position in span)
        return self._forward.run(batch, watch)

    def check(self, sites: Collection[Site]) -> None:
        """Raise :class:`InvalidInput` where a pass does not show one of the ``sites``."""
        for site in sites:
            if site not in self._forward.sites:
                raise not_shown(site)

    def project(self, hidden: Tensor) -> Tensor:
        """Logits of rows that leave the last layer; see :class:`infra.engine.forward.Forward`."""
        return self._forward.project(hidden)
