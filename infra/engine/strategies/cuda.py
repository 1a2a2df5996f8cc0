"""One fixed tile of rows: a library that picks its kernels by shape is left no choice.

cuBLAS picks a kernel, and with it the order of every sum, by the shape of a product. Why the bits
of a row do not depend on what else is in the pass:

* passes are cut into tiles of exactly ``TILE`` rows, so that every product has one shape, always;
* a row attends to the blocks of its own text alone, ``SPAN`` of them at a time, so that these
  products have one shape as well; their sums are added in the order of the text, and what is
  masked adds exact zeros: through how many spans a tile goes changes nothing;
* that a kernel treats each row of a tile alike, wherever it lies, is left to the probe to find out.

On a GPU a tile is replayed as a CUDA graph, one for each number of spans, which spares Python and
launches; no GPU has run it yet. On a CPU the same operations run one by one, slowly: for tests.
"""

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import suppress
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AttentionInterface

from infra.engine.blocks import BLOCK_TOKENS, blocks_for
from infra.engine.forward import Batch, Prepared, Shape, Watch, Weighing, every_site
from infra.engine.kv_store import KVStore
from infra.engine.modules.watching import Ended, Layers, View
from infra.engine.strategies import strategy
from infra.engine.threads import threads

TILE: Final = 64
"""Rows of every product: what one matrix instruction of a recent GPU takes."""

SPAN: Final = 8
"""Blocks of keys that attention takes at once."""

_KEYS: Final = SPAN * BLOCK_TOKENS

_ATTENTION: Final = "cacher_tile"

_TOKENS, _POSITIONS, _BLOCKS, _WANTED, _TABLES = range(5)
"""Rows of a tile's inputs; the tables are all that follow, one row to a block of the text."""

_capturing: Final = threading.Lock()
"""torch captures one graph at a time in a process."""


@strategy
class CudaStrategy:
    """A tile at a time, through transformers' own modules with attention swapped."""

    name = "cuda"

    def __init__(self, threads: int) -> None:
        """What a tile takes on a CPU is not worth sharing among ``threads``."""

    def prepare(self, model: Any, shape: Shape) -> Prepared:
        """Give the model our attention, in place."""
        layers = Layers(model)
        model.set_attn_implementation(_ATTENTION)
        model.config.pad_token_id = None  # rows are never padding; spares a check that waits
        return Prepared(
            strategy=self.name,
            shape=shape,
            bind=lambda store: TileForward(model, layers, store, shape),
            quantum=TILE,
        )


class TileForward:
    """Passes of such a model, in tiles whose inputs and results are always at the same place."""

    def __init__(self, model: Any, layers: Layers, store: KVStore, shape: Shape) -> None:
        self.sites = every_site(store.geometry.layers)
        self._model = model
        self._layers = layers
        self._store = store
        self._device = shape.device
        self._max_spans = -(-blocks_for(shape.context) // SPAN)
        rows = _TABLES + self._max_spans * SPAN
        self._inputs = torch.zeros(rows, TILE, dtype=torch.int64, device=shape.device)
        self._logits = torch.zeros(TILE, shape.vocabulary, device=shape.device)
        self._graphs = _Graphs(shape.device) if shape.device.type == "cuda" else None

    @torch.inference_mode()
    def run(self, batch: Batch, watch: Watch | None = None) -> Tensor:
        """Logits of the wanted rows; see :class:`infra.engine.forward.Forward`."""
        pinned = self._graphs is not None
        logits = torch.empty(len(batch.wanted), self._logits.shape[1], pin_memory=pinned)
        done = 0
        with threads(1, 0):
            for values, count, wanted in self._inputs_of(batch):
                inputs = torch.from_numpy(values)
                inputs = inputs.pin_memory() if pinned else inputs
                self._inputs[: len(inputs)].copy_(inputs, non_blocking=True)
                view = View(watch, count) if watch else None
                self._compute((len(inputs) - _TABLES) // SPAN, head=wanted > 0, view=view)
                part = logits[done : done + wanted]
                part.copy_(self._logits[:wanted], non_blocking=True)
                done += wanted
        if pinned:
            torch.cuda.current_stream(self._device).synchronize()
        return logits

    @torch.inference_mode()
    def project(self, hidden: Tensor) -> Tensor:
        """Logits of rows of the last layer; see :class:`infra.engine.forward.Forward`."""
        logits = torch.empty(len(hidden), self._logits.shape[1])
        nothing = torch.zeros(1, TILE, dtype=torch.int64, device=self._device)
        every = torch.arange(TILE, device=self._device)
        with threads(1, 0):
            for rows, part in zip(*(torch.split(t, TILE) for t in (hidden, logits)), strict=True):
                tile = rows.to(self._device, self._store.k.dtype)
                tile = nn.functional.pad(tile, (0, 0, 0, TILE - len(rows)))
                with self._layers.giving(tile):
                    found = self._model(
                        input_ids=nothing,
                        position_ids=nothing,
                        use_cache=False,
                        logits_to_keep=every,
                    ).logits
                part.copy_(found[0, : len(rows)])
        return logits

    def _inputs_of(self, batch: Batch) -> Iterator[tuple[NDArray[np.int64], int, int]]:
        """Inputs of each tile, how many rows it has, and how many of them are wanted.

        Rows that fill up a tile are token 0 of a text in block 0. The number of spans is a power of
        two, or all that the context has: there are few graphs.
        """
        tables = [piece.sequence.table for piece in batch.slices for _ in range(piece.count)]
        for start in range(0, len(tables), TILE):
            rows = range(len(tables))[start : start + TILE]
            part = slice(rows.start, rows.stop)
            wanted = [row - start for row in batch.wanted if row in rows]
            blocks = max(batch.positions[part]) // BLOCK_TOKENS + 1
            spans = min(1 << (-(-blocks // SPAN) - 1).bit_length(), self._max_spans)
            values = np.zeros((_TABLES + spans * SPAN, TILE), np.int64)
            values[_TOKENS, : len(rows)] = batch.tokens[part]
            values[_POSITIONS, : len(rows)] = batch.positions[part]
            values[_BLOCKS, : len(rows)] = batch.blocks[part]
            values[_WANTED, : len(wanted)] = wanted
            for column, table in enumerate(tables[part]):
                values[_TABLES:, column][: len(table[:blocks])] = table[:blocks]
            yield values, len(rows), len(wanted)

    def _compute(self, spans: int, *, head: bool, view: View | None) -> None:
        """Compute the tile that the inputs describe: K/V into the store, logits of wanted rows.

        A tile that nobody wants logits of goes without the head; one that somebody looks at cannot
        be replayed.
        """
        if self._graphs is None or view:
            with suppress(Ended), self._layers.seen_by(view):
                self._tile(spans, head, view)
        else:
            self._graphs.run((spans, head), lambda: self._tile(spans, head))

    def _tile(self, spans: int, head: bool, view: View | None = None) -> None:
        inputs = {
            "input_ids": self._inputs[_TOKENS][None],
            "position_ids": self._inputs[_POSITIONS][None],
            "use_cache": False,
            "tile": Tile(self._store, self._inputs, spans, view),
        }
        if head:
            logits = self._model(**inputs, logits_to_keep=self._inputs[_WANTED]).logits
            self._logits.copy_(logits[0])
        else:
            self._model.base_model(**inputs)


class _Graphs:
    """Work captured once and replayed. Its inputs and results are tensors that stay in place.

    The graphs share their memory: they run one after the other, and nothing in it is needed after.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._captured: dict[Hashable, torch.cuda.CUDAGraph] = {}

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        """Do ``work`` on the current stream, which ``key`` names."""
        if key not in self._captured:
            self._captured[key] = self._capture(work)
        self._captured[key].replay()

    def _capture(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """A graph of ``work``, which is done once before: libraries set themselves up by that.

        Other threads may use the device meanwhile.
        """
        current, graph = torch.cuda.current_stream(self._device), torch.cuda.CUDAGraph()
        with _capturing:
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                work()
            current.wait_stream(self._stream)
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                work()
        return graph


class Tile:
    """What attention needs to know of a tile: its ``inputs``, and how many ``spans`` it attends to.

    ``tables`` are the spans' blocks, ``(spans, TILE, SPAN)``. ``view`` is there if
    somebody looks on.
    """

    def __init__(
        self, store: KVStore, inputs: Tensor, spans: int, view: View | None = None
    ) -> None:
        self.store = store
        self.view = view
        self.inputs = inputs
        tables = inputs[_TABLES : _TABLES + spans * SPAN]
        self.tables = tables.view(spans, SPAN, TILE).transpose(1, 2)
        self._hidden: dict[int | None, Tensor] = {}

    def hidden(self, window: int | None) -> Tensor:
        """Which keys each row must not see, ``(spans, TILE, 1, 1, keys)``: alike in every layer."""
        if window not in self._hidden:
            rows = self.inputs[_POSITIONS].view(TILE, 1, 1, 1)
            keys = torch.arange(len(self.tables) * _KEYS, device=rows.device)
            keys = keys.view(-1, 1, 1, 1, _KEYS)
            hidden = keys > rows
            self._hidden[window] = hidden if window is None else hidden | (keys <= rows - window)
        return self._hidden[window]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    tile: Tile,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention for :class:`transformers.AttentionInterface`, in float32.

    ``query`` is ``(1, H, R, D)`` for R rows, ``key`` and ``value`` have K heads, each for G of the
    query's. The rows' K/V are stored first, then each row attends to S spans of T keys. Returns
    ``(1, R, H, D)``.
    """
    layer = module.layer_idx
    assert isinstance(layer, int)
    heads, dim = key.shape[1], key.shape[3]
    blocks, offsets = tile.inputs[_BLOCKS], tile.inputs[_POSITIONS] % BLOCK_TOKENS
    tile.store.write(layer, blocks, offsets, key[0].transpose(0, 1), value[0].transpose(0, 1))
    scaling = dim**-0.5 if scaling is None else scaling
    if tile.view:
        weighing = Weighing(scaling, sliding_window or 0, softcap or 0.0)
        tile.view.show("queries", layer, query[0].transpose(0, 1), weighing)
    head = torch.arange(heads, device=key.device)[:, None]
    places = [(span[:, None], head) for span in tile.tables]  # each (R, K, SPAN) blocks of a head
    q = query[0].transpose(0, 1).reshape(TILE, heads, 1, -1, dim).float()  # (R, K, 1, G, D)
    scores = torch.stack([_scores(q, tile.store.k[layer][place]) for place in places])
    scores *= scaling  # (S, R, K, G, T)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores.masked_fill_(tile.hidden(sliding_window), -torch.inf)
    weights = scores.sub_(scores.amax(dim=(0, -1), keepdim=True)).exp_().flatten(1, 2)
    output = weights.new_zeros(*weights.shape[1:3], tile.store.v.shape[-1])  # (R * K, G, D)
    total = weights.new_zeros(*weights.shape[1:3], 1)
    for weight, place in zip(weights, places, strict=True):
        values = tile.store.v[layer][place].float().flatten(0, 1).flatten(1, 2)
        output = torch.baddbmm(output, weight, values)
        total = total + weight.sum(-1, keepdim=True)
    output = (output / total)[..., :dim].reshape(1, TILE, -1, dim).to(query.dtype)
    if tile.view:
        tile.view.show("heads", layer, output[0])
    return output, None


def _scores(q: Tensor, keys: Tensor) -> Tensor:
    """Queries ``(R, K, 1, G, D)`` by a span's keys ``(R, K, SPAN, D, block)``: ``(R, K, G, T)``."""
    return torch.matmul(q, keys.float()).transpose(2, 3).flatten(3)


AttentionInterface.register(_ATTENTION, attend)
