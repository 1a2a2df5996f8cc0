"""One forward pass over slices of several sequences, through transformers' own model code."""

from collections import defaultdict
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from infra.engine import attention
from infra.engine.blocks import BLOCK_TOKENS
from infra.engine.kv_store import Geometry, KVStore
from infra.engine.scheduler import Slice
from infra.engine.strategies import Strategy, replace_linears


@dataclass(frozen=True)
class Prepared:
    """A model whose linear layers and attention are ours, and how its rows are padded.

    ``quantum`` is for the rows of a pass, ``head_quantum`` for those whose logits are wanted.
    """

    model: Any
    geometry: Geometry
    strategy: Strategy
    dtype: torch.dtype
    quantum: int
    head_quantum: int
    query_tile: int


def prepare(model: Any, strategy: Strategy, dtype: torch.dtype) -> Prepared:
    """Give a transformers model the strategy's linear layers and our attention, in place."""
    config: Any = model.config
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    geometry = Geometry(
        layers=config.num_hidden_layers,
        query_heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=head_dim,
    )
    capped = getattr(config, "final_logit_softcapping", None) is not None
    widths = replace_linears(model, strategy) | {head_dim}
    model.set_attn_implementation(attention.NAME)
    config.pad_token_id = None  # rows are never padding to the model; spares a check per pass
    return Prepared(
        model=model,
        geometry=geometry,
        strategy=strategy,
        dtype=dtype,
        quantum=strategy.quantum(widths),
        head_quantum=strategy.quantum({config.vocab_size} if capped else set()),
        query_tile=strategy.query_tile(head_dim),
    )


class Executor:
    """Runs passes of a prepared model against one KV store."""

    def __init__(self, prepared: Prepared, store: KVStore) -> None:
        self._prepared = prepared
        self.store = store

    @torch.inference_mode()
    def run(self, slices: Seq[Slice]) -> Tensor:
        """Compute slices; their K/V are stored in their sequences' blocks.

        Returns the wanted logits, ``(rows, vocabulary)`` in float32: slice after slice, by
        position. At most one slice per sequence.
        """
        tokens, positions, blocks, wanted = self._rows(slices)
        batch = attention.Pass(
            store=self.store,
            blocks=torch.tensor(blocks),
            offsets=torch.tensor(positions) % BLOCK_TOKENS,
            groups=_groups(slices),
            query_tile=self._prepared.query_tile,
            threads=self._prepared.strategy.threads,
        )
        inputs = {
            "input_ids": torch.tensor([tokens]),
            "position_ids": torch.tensor([positions]),
            "use_cache": False,
            "ragged": batch,
        }
        model = self._prepared.model
        if not wanted:
            model.base_model(**inputs)
            return torch.empty(0, 0)
        rows = wanted + [0] * (-len(wanted) % self._prepared.head_quantum)
        logits: Tensor = model(**inputs, logits_to_keep=torch.tensor(rows)).logits
        return logits[0, : len(wanted)].float()

    def _rows(self, slices: Seq[Slice]) -> tuple[list[int], list[int], list[int], list[int]]:
        """Token, position and block of each row, and which rows' logits are wanted."""
        tokens: list[int] = []
        positions: list[int] = []
        blocks: list[int] = []
        wanted: list[int] = []
        for piece in slices:
            table, span = piece.sequence.table, range(piece.start, piece.start + piece.count)
            wanted += range(
                len(tokens) + piece.wanted.start - piece.start,
                len(tokens) + piece.wanted.stop - piece.start,
            )
            tokens += piece.sequence.tokens[span.start : span.stop]
            positions += span
            blocks += [table[position // BLOCK_TOKENS] for position in span]
        padding = [0] * (-len(tokens) % self._prepared.quantum)
        return tokens + padding, positions + padding, blocks + padding, wanted


def _groups(slices: Seq[Slice]) -> list[attention.Group]:
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
            groups.append(_group([piece], torch.arange(row, row + piece.count)))
        row += piece.count
    for alike in single.values():
        rows = torch.tensor([row for _, row in alike])
        groups.append(_group([piece for piece, _ in alike], rows))
    return groups


def _group(slices: Seq[Slice], rows: Tensor) -> attention.Group:
    count = slices[0].count
    tables = [s.sequence.table[: (s.start + count - 1) // BLOCK_TOKENS + 1] for s in slices]
    longest = max(map(len, tables))
    padded = torch.tensor([table + [0] * (longest - len(table)) for table in tables])
    positions = torch.tensor([list(range(s.start, s.start + count)) for s in slices])
    return attention.Group(rows, padded.t().contiguous(), positions)
