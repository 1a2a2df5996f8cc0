"""Attention over fixed key blocks, for a ragged batch, as a function transformers can call.

Why the bits of a row do not depend on what else is in the pass:

* keys come in blocks of ``BLOCK_TOKENS``, so every product has the same inner dimensions;
* query rows are padded to whole tiles, since BLAS takes other paths for very few rows;
* a row's maximum is exact in any order; its weights are summed within each block, then block
  by block in order, and so are the products with V: a block that is masked adds exact zeros;
* only the matrix products use threads, everything element-wise stays on one.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from infra.engine.blocks import BLOCK_TOKENS
from infra.engine.forward import Weighing
from infra.engine.kv_store import KVStore
from infra.engine.modules.watching import View
from infra.engine.threads import threads

NAME = "cacher"


@dataclass(frozen=True)
class Group:
    """Rows of a pass that attend together: ``sequences`` texts with ``count`` rows each.

    ``rows`` (sequences * count) indexes the pass; ``tables`` (blocks, sequences) names the key
    blocks of each text, padded with block 0; ``positions`` (sequences, count) are the rows'.
    ``hidden`` keeps the mask of each sliding window: it is the same in every layer.
    """

    rows: Tensor
    tables: Tensor
    positions: Tensor
    hidden: dict[int | None, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Pass:
    """One forward pass: where its rows store their K/V, and which rows attend to which keys.

    ``view`` is there if somebody looks on.
    """

    store: KVStore
    blocks: Tensor
    offsets: Tensor
    groups: list[Group]
    query_tile: int
    threads: int
    view: View | None = None


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    ragged: Pass,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention for :class:`transformers.AttentionInterface`.

    ``query`` is ``(1, heads, rows, head_dim)``, ``key`` and ``value`` have the K/V heads. The
    rows' K/V are stored first, then each group attends to the blocks of its texts. Returns
    ``(1, rows, heads, head_dim)``; rows that belong to no group are zero.
    """
    layer = module.layer_idx
    assert isinstance(layer, int)
    ragged.store.write(
        layer, ragged.blocks, ragged.offsets, key[0].transpose(0, 1), value[0].transpose(0, 1)
    )
    rows = query[0].transpose(0, 1)
    heads, head_dim = rows.shape[1:]
    scaling = head_dim**-0.5 if scaling is None else scaling
    if ragged.view:
        weighing = Weighing(scaling, sliding_window or 0, softcap or 0.0)
        ragged.view.show("queries", layer, rows, weighing)
    output = torch.zeros(rows.shape, dtype=query.dtype, device=query.device)
    for group in ragged.groups:
        count = group.positions.shape[1]
        output[group.rows] = _attend_group(
            rows[group.rows].view(-1, count, heads, head_dim).float(),
            ragged.store.k[layer],
            ragged.store.v[layer],
            group,
            ragged,
            scaling=scaling,
            window=sliding_window,
            softcap=softcap,
        ).to(query.dtype)
    if ragged.view:
        ragged.view.show("heads", layer, output)
    return output[None], None


def _attend_group(
    query: Tensor,
    store_k: Tensor,
    store_v: Tensor,
    group: Group,
    ragged: Pass,
    *,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attention of one group in float32.

    ``query`` is ``(S, R, H, D)`` for S texts with R rows each; B blocks of T keys. Returns
    ``(S * R, H, D)``.
    """
    texts, count, heads, dim = query.shape
    blocks, kv_heads = group.tables.shape[0], store_k.shape[1]
    shared = heads // kv_heads
    q = query.view(texts, count, kv_heads, shared, dim).transpose(1, 2)
    q = q.reshape(texts * kv_heads, count * shared, dim)  # (S*K, M, D), M rows of one K/V head
    rows = q.shape[1]
    q = nn.functional.pad(q, (0, 0, 0, -rows % ragged.query_tile))
    keys = store_k[group.tables].float().flatten(1, 2)  # (B, S*K, D, T)
    values = store_v[group.tables][..., :dim].float().flatten(1, 2)  # (B, S*K, T, D)
    with threads(ragged.threads, blocks * BLOCK_TOKENS * q.numel()):
        scores = torch.matmul(q, keys)  # (B, S*K, M, T)
    scores *= scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if window not in group.hidden:
        shape = (blocks, kv_heads, shared, q.shape[1])
        group.hidden[window] = _hidden(group.positions, shape, window)
    scores.masked_fill_(group.hidden[window], -torch.inf)
    weights = torch.exp(scores - scores.amax(dim=(0, 3), keepdim=True))
    total = weights.sum(-1).cumsum(0)[-1]  # (S*K, M), block by block
    output = torch.zeros_like(q)
    with threads(ragged.threads, BLOCK_TOKENS * q.numel()):
        for block in range(blocks):
            output = torch.baddbmm(output, weights[block], values[block])
    output = (output / total[..., None])[:, :rows]
    output = output.view(texts, kv_heads, count, shared, dim).transpose(1, 2)
    return output.reshape(texts * count, heads, dim)


def _hidden(positions: Tensor, shape: tuple[int, int, int, int], window: int | None) -> Tensor:
    """Which keys each row must not see: ``(B, S*K, M, T)``. Padding rows see the first key.

    ``shape`` is blocks, K/V heads, query heads of each, and M rows with their padding.
    """
    blocks, kv_heads, shared, padded_rows = shape
    rows = positions.repeat_interleave(shared, dim=1)  # (S, M without padding)
    rows = nn.functional.pad(rows, (0, padded_rows - rows.shape[1]))
    rows = rows.repeat_interleave(kv_heads, dim=0)[None, :, :, None]
    keys = torch.arange(blocks * BLOCK_TOKENS, device=rows.device)
    keys = keys.view(blocks, 1, 1, BLOCK_TOKENS)
    hidden = keys > rows
    if window is not None:
        hidden |= keys <= rows - window
    return hidden


AttentionInterface.register(NAME, attend)
