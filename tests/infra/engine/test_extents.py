"""How much an answer tells is known before it is computed."""

import math
from pathlib import Path

import pytest

from domain.analysis.attention import AttentionFacts
from domain.analysis.extent import extent
from domain.analysis.lens import LensFacts
from domain.analysis.parameters import (
    AttentionParameters,
    CacheParameters,
    EmbeddingParameters,
    HeadAt,
    HiddenParameters,
    Inside,
    InterveneParameters,
    LensParameters,
    NextParameters,
)
from infra.engine.engine import Engine
from tests.infra.engine import inside
from tests.infra.engine.inside import TEXT, look

QUESTIONS: list[Inside] = [
    AttentionParameters(layer=1),
    AttentionParameters(layers=(0, 1), heads=(0, 2, 3), start=3, end=40),
    AttentionParameters(layer=0, head=1, format="sparse", start=70),
    AttentionParameters(layers=(1,), heads=(2, 0), format="sparse", top_k=99, end=5),
    AttentionParameters(method="rollout", start=9),
    AttentionParameters(method="summary", heads=(1, 3)),
    CacheParameters(layer=0, key_name="k"),
    CacheParameters(layer=1, key_name="v", head=1, start=7, end=9),
    HiddenParameters(layers=(2, 0), start=5),
    HiddenParameters(layers=(2, 0), start=5, pooling="mean"),
    HiddenParameters(pooling="last"),
    EmbeddingParameters(token_index=4),
    LensParameters(layers=(1, 2), start=60, end=63),
    LensParameters(position=8),
    NextParameters(),
    InterveneParameters(zero_heads=(HeadAt(layer=0, head=1),)),
]


@pytest.mark.parametrize("asked", QUESTIONS)
async def test_as_much_is_told_as_was_said_before(
    asked: Inside, engine: Engine, folders: dict[str, str | Path]
) -> None:
    model = inside.loaded(folders["llama"], engine)
    said = extent(asked, model.dimensions, len(TEXT), model.max_result_bytes)
    result = await look(model, asked)
    told = [math.prod(tensor.shape) for tensor in result.tensors if tensor.inline]
    assert said.numbers == sum(told)
    match result.facts:
        case AttentionFacts(method="summary"):
            assert not said.positions
        case AttentionFacts() as facts:
            assert said.positions == range(facts.start, facts.end)
            assert (said.layers, said.heads) == (len(facts.layers or "1"), len(facts.heads or "1"))
        case LensFacts() as facts:
            assert said.positions == range(facts.start, facts.end)
            assert said.layers == len(facts.layers)
        case _:
            assert not said.positions
