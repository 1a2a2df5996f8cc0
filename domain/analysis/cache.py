"""Keys and values: which may be asked for, what is said of them, and where they are kept."""

from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec
from msgspec import Struct

from domain.analysis.parameters import CacheParameters
from domain.analysis.ranges import check_index, check_size, positions
from domain.analysis.result import ITEM_BYTES, Dtype
from domain.ids import TokenId
from domain.models import Dimensions, Tier


class Statistics(Struct, frozen=True, kw_only=True):
    """What the elements of a tensor are like; null where they are not all finite.

    ``standard_deviation`` is that of all of them (not of a sample), ``norm`` the L2 norm of all.
    Vectors are those of one head and token, their norms L2 too.
    """

    min: float | None
    max: float | None
    mean: float | None
    standard_deviation: float | None
    norm: float | None
    min_vector_norm: float | None
    max_vector_norm: float | None
    mean_vector_norm: float | None


class CacheFacts(Struct, frozen=True, kw_only=True):
    """What the tensor ``cache_data`` holds, bit for bit and of the dtype that is stored.

    Keys (turned to their positions, where the model turns them) or values at the tokens from
    ``start`` up to, not with, ``end``: ``(positions, head_dim)`` of one K/V head, and ``(heads,
    positions, head_dim)`` of all.
    """

    layer: int
    key_name: Literal["k", "v"]
    head: int | None
    start: int
    end: int
    shape: tuple[int, ...]
    dtype: Dtype
    statistics: Statistics


class Block(Struct, frozen=True, kw_only=True):
    """Where the K/V of the tokens from ``start`` up to ``end`` is, that of all layers.

    It takes so many ``bytes`` there. So many running ``sequences`` hold it, and so many
    ``other_states`` that the server has in memory begin with the same tokens: they share it.
    """

    start: int
    end: int
    tier: Tier
    bytes: int
    sequences: int
    other_states: int = 0


class Residence(Struct, frozen=True, kw_only=True):
    """The whole blocks of a text up to the end of a range, as they were when it was asked for.

    Tokens after the last whole block are computed whenever they are needed.
    """

    blocks: tuple[Block, ...]


def asked_cache(
    parameters: CacheParameters, dimensions: Dimensions, held: int, limit: int, dtype: Dtype
) -> range:
    """The positions asked for of a text of ``held`` tokens.

    Raises:
        InvalidInput: there is no such layer, head or range.
        ResultTooLarge: it would take more than ``limit`` bytes.
    """
    check_index("layer", parameters.layer, dimensions.layers, of="layers")
    if parameters.head is not None:
        check_index("head", parameters.head, dimensions.kv_heads, of="K/V heads")
    span = positions(parameters.start, parameters.end, held)
    heads = dimensions.kv_heads if parameters.head is None else 1
    size = heads * len(span) * dimensions.head_dim * ITEM_BYTES[dtype]
    check_size(size, limit, "Name one head, or a narrower range with start and end")
    return span


def shared(
    residence: Residence, tokens: Sequence[TokenId], others: Iterable[Sequence[TokenId]]
) -> Residence:
    """With how many of the ``others`` (texts) each block of a text is shared."""
    counts = [0] * len(residence.blocks)
    for other in others:
        for place, block in enumerate(residence.blocks):
            if other[block.start : block.end] != tokens[block.start : block.end]:
                break
            counts[place] += 1
    return Residence(
        blocks=tuple(
            msgspec.structs.replace(block, other_states=count)
            for block, count in zip(residence.blocks, counts, strict=True)
        )
    )
