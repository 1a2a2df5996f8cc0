"""Keys and values as they are stored, and where the blocks of a text are."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec
from torch import Tensor

from domain.analysis.cache import Block, CacheFacts, Residence, asked_cache
from domain.analysis.parameters import CacheParameters
from domain.analysis.result import Dtype, Result
from domain.ids import TokenId
from domain.models import Tier
from infra.engine.analysis.statistics import statistics
from infra.engine.analysis.tensors import packed
from infra.engine.blocks import BLOCK_TOKENS, BlockPool
from infra.engine.observing import Look
from infra.engine.waiting import worked_out

if TYPE_CHECKING:
    from infra.engine.language_model import TransformersModel


async def cached(
    model: "TransformersModel",
    tokens: tuple[TokenId, ...],
    parameters: CacheParameters,
    *,
    private: bool,
) -> Result:
    """Keys or values of a range of tokens and, unless it is private, where its blocks were."""
    dtype = msgspec.convert(model.numerics.dtype, Dtype)
    limit = model.max_result_bytes
    span = asked_cache(parameters, model.dimensions, len(tokens), limit, dtype)
    text = tokens[: span.stop]
    residence = None if private else model.residence(text)
    layer, name = frozenset({parameters.layer}), parameters.key_name
    wanted = Look(tokens=text, start=span.stop - 1)
    look = replace(wanted, keys=layer) if name == "k" else replace(wanted, values=layer)
    seen = await model.observe(look, private=private)
    stored = seen.keys if name == "k" else seen.values
    heads = slice(None) if parameters.head is None else parameters.head
    data = stored[parameters.layer][heads, span.start :]
    result = await worked_out(_found, parameters, span, data)
    return msgspec.structs.replace(result, beside=residence)


def _found(parameters: CacheParameters, span: range, data: Tensor) -> Result:
    found = packed("cache_data", data, layers=(parameters.layer,), start=span.start, end=span.stop)
    facts = CacheFacts(
        layer=parameters.layer,
        key_name=parameters.key_name,
        head=parameters.head,
        start=span.start,
        end=span.stop,
        shape=found.shape,
        dtype=found.dtype,
        statistics=statistics(data.float().flatten(0, -2).numpy()),
    )
    return Result(facts=facts, tensors=(found,))


def residence(pool: BlockPool, keys: Sequence[bytes], block_bytes: int) -> Residence:
    """Where the blocks of a text, by their keys, are; nothing is held nor counted."""
    return Residence(
        blocks=tuple(_block(pool, at, key, block_bytes) for at, key in enumerate(keys))
    )


def _block(pool: BlockPool, at: int, key: bytes, block_bytes: int) -> Block:
    if pool.count_cached([key], on_device=True):
        tier: Tier = "device"
    else:
        tier = "host" if pool.count_cached([key]) else "none"
    return Block(
        start=at * BLOCK_TOKENS,
        end=(at + 1) * BLOCK_TOKENS,
        tier=tier,
        bytes=0 if tier == "none" else block_bytes,
        sequences=pool.holders(key),
    )
