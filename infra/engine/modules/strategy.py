"""Forward passes through transformers' own modules, with linear layers and attention swapped.

What the strategies share that leave the model as it is: each says how a linear layer is computed
and to how many rows passes and attention are padded for that.
"""

from collections import defaultdict
from collections.abc import Sequence as Seq
from contextlib import suppress
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from infra.engine.blocks import BLOCK_TOKENS
from infra.engine.forward import Batch, Prepared, Shape, Watch, every_site
from infra.engine.kv_store import KVStore
from infra.engine.modules import attention
from infra.engine.modules.watching import Ended, Layers, View
from infra.engine.scheduler import Slice

MIN_ROWS: Final = 4
"""Linear layers are never called with fewer rows: BLAS libraries treat those as vectors."""

_VECTOR: Final = 64
"""Elements that torch's vectorised loops take at once, at most (two AVX-512 registers, bf16)."""


class ModuleStrategy:
    """A strategy that swaps linear layers and attention, in place, and pads rows."""

    name: str

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def linear(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """A module for ``x @ weight.T + bias`` on rows ``x``; ``weight`` is ``(out, in)``."""
        raise NotImplementedError

    def quantum(self, widths: set[int]) -> int:
        """Rows of a pass are padded to a multiple of this, given the widths of its tensors.

        The fewest for which every element-wise tensor is whole vectors.
        """
        quantum = MIN_ROWS
        while any(quantum * width % _VECTOR for width in widths):
            quantum += MIN_ROWS
        return quantum

    def query_tile(self, shape: Shape) -> int:
        """Query rows of attention are padded to a multiple of this.

        The smallest tile whose rows BLAS computes as it does within a large product.
        """
        return measured_query_tile(shape.geometry.head_dim, shape.device)

    def check(self, shape: Shape) -> None:
        """Raise :class:`Unsupported` where this strategy cannot be used."""

    def prepare(self, model: Any, shape: Shape) -> Prepared:
        """Give the model the strategy's linear layers and our attention, in place."""
        self.check(shape)
        layers = Layers(model)
        capped = getattr(model.config, "final_logit_softcapping", None) is not None
        widths = replace_linears(model, self) | {shape.geometry.head_dim}
        model.set_attn_implementation(attention.NAME)
        model.config.pad_token_id = None  # rows are never padding; spares a check per pass
        quantum = self.quantum(widths)
        head_quantum = self.quantum({model.config.vocab_size} if capped else set())
        query_tile = self.query_tile(shape)
        return Prepared(
            strategy=self.name,
            shape=shape,
            bind=lambda store: ModuleForward(
                model,
                layers,
                store,
                quantum=quantum,
                head_quantum=head_quantum,
                query_tile=query_tile,
                threads=self.threads,
            ),
            quantum=quantum,
            query_tile=query_tile,
        )


class ModuleForward:
    """Passes of such a model. ``head_quantum`` is for the rows whose logits are wanted."""

    def __init__(
        self,
        model: Any,
        layers: Layers,
        store: KVStore,
        *,
        quantum: int,
        head_quantum: int,
        query_tile: int,
        threads: int,
    ) -> None:
        self.sites = every_site(store.geometry.layers)
        self._model = model
        self._layers = layers
        self._store = store
        self._quantum = quantum
        self._head_quantum = head_quantum
        self._query_tile = query_tile
        self._threads = threads

    @torch.inference_mode()
    def run(self, batch: Batch, watch: Watch | None = None) -> Tensor:
        """Logits of the wanted rows; see :class:`infra.engine.forward.Forward`."""
        device = self._store.k.device
        view = View(watch, len(batch.tokens)) if watch else None
        padding = [0] * (-len(batch.tokens) % self._quantum)
        positions = torch.tensor(batch.positions + padding, device=device)
        ragged = attention.Pass(
            store=self._store,
            blocks=torch.tensor(batch.blocks + padding, device=device),
            offsets=positions % BLOCK_TOKENS,
            groups=_groups(batch.slices, device),
            query_tile=self._query_tile,
            threads=self._threads,
            view=view,
        )
        tokens = torch.tensor([batch.tokens + padding], device=device)
        with suppress(Ended), self._layers.seen_by(view):
            return self._compute(tokens, positions[None], batch.wanted, ragged=ragged)
        return torch.empty(0, 0)

    @torch.inference_mode()
    def project(self, hidden: Tensor) -> Tensor:
        """Logits of rows of the last layer; see :class:`infra.engine.forward.Forward`."""
        device = self._store.k.device
        rows = hidden.to(device, self._store.k.dtype)
        rows = nn.functional.pad(rows, (0, 0, 0, -len(rows) % self._quantum))
        nothing = torch.zeros(1, len(rows), dtype=torch.int64, device=device)
        with self._layers.giving(rows):
            return self._compute(nothing, nothing, list(range(len(hidden))))

    def _compute(
        self, tokens: Tensor, positions: Tensor, wanted: list[int], **context: Any
    ) -> Tensor:
        inputs = {"input_ids": tokens, "position_ids": positions, "use_cache": False, **context}
        if not wanted:
            self._model.base_model(**inputs)
            return torch.empty(0, 0)
        rows = wanted + [0] * (-len(wanted) % self._head_quantum)
        kept = torch.tensor(rows, device=tokens.device)
        logits: Tensor = self._model(**inputs, logits_to_keep=kept).logits
        return logits[0, : len(wanted)].float().cpu()


def measured_query_tile(head_dim: int, device: torch.device | None = None) -> int:
    """Smallest power of two, from 4, at which both products of attention are row-invariant.

    BLAS libraries choose another kernel below a number of rows that depends on the other
    dimensions and on their layout; with head_dim 128 and MKL, 4 rows are too few. Tried with one
    K/V head and with several, in the layout that attention uses.
    """
    generator = torch.Generator().manual_seed(0)
    rows, heads = 256, 3

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device=device)

    query, start = some(2, heads, rows, head_dim)
    keys = some(heads, head_dim, BLOCK_TOKENS)
    values = some(heads, BLOCK_TOKENS, head_dim)
    weights = some(heads, rows, BLOCK_TOKENS)
    scores = torch.matmul(query, keys)
    output = torch.baddbmm(start, weights, values)

    def invariant(count: int, heads: int) -> bool:
        part = (slice(heads), slice(count))
        return torch.equal(torch.matmul(query[part], keys[:heads]), scores[part]) and torch.equal(
            torch.baddbmm(start[part], weights[part], values[:heads]), output[part]
        )

    def holds(tile: int) -> bool:
        return all(invariant(count, n) for count in range(tile, rows, tile) for n in (1, heads))

    return next(filter(holds, (4, 8, 16, 32, 64)), 128)


def replace_linears(model: Any, strategy: ModuleStrategy) -> set[int]:
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


def _groups(slices: Seq[Slice], device: torch.device) -> list[attention.Group]:
    """Slices of one row attend together with those of like length, each longer one on its own.

    Texts whose blocks need the same number of bits go together: padding to the longest then
    gathers at most twice the blocks there are.
    """
    groups: list[attention.Group] = []
    single: dict[int, list[tuple[Slice, int]]] = defaultdict(list)
    row = 0
    for piece in slices:
        if piece.count == 1:
            single[(piece.start // BLOCK_TOKENS + 1).bit_length()].append((piece, row))
        else:
            groups.append(_group([piece], range(row, row + piece.count), device))
        row += piece.count
    for alike in single.values():
        pieces, rows = zip(*alike, strict=True)
        groups.append(_group(pieces, rows, device))
    return groups


def _group(slices: Seq[Slice], rows: Seq[int], device: torch.device) -> attention.Group:
    count = slices[0].count
    tables = [s.sequence.table[: (s.start + count - 1) // BLOCK_TOKENS + 1] for s in slices]
    longest = max(map(len, tables))
    padded = [table + [0] * (longest - len(table)) for table in tables]
    positions = [list(range(s.start, s.start + count)) for s in slices]
    return attention.Group(
        torch.tensor(rows, device=device),
        torch.tensor(padded, device=device).t().contiguous(),
        torch.tensor(positions, device=device),
    )
