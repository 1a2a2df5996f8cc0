"""Keys and values: as they are stored, with the same bits wherever they come from."""

import math
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from domain.analysis.cache import Block, CacheFacts, Residence, Statistics, shared
from domain.analysis.parameters import CacheParameters
from domain.errors import InvalidInput, ResultTooLarge
from infra.engine.analysis.cache import residence
from infra.engine.analysis.statistics import statistics
from infra.engine.blocks import BLOCK_TOKENS, BlockPool
from infra.engine.engine import Engine
from infra.engine.language_model import TransformersModel
from tests.infra.engine import inside
from tests.infra.engine.asking import request
from tests.infra.engine.inside import FAMILIES, NEAR, TEXT, distance, look, values

NAMES: tuple[Literal["k", "v"], ...] = ("k", "v")


@pytest.fixture(scope="module")
def llama(engine: Engine, folders: dict[str, str | Path]) -> TransformersModel:
    return inside.loaded(folders["llama"], engine)


@pytest.mark.parametrize("family", FAMILIES)
async def test_keys_and_values_are_those_of_transformers(
    family: str, engine: Engine, folders: dict[str, str | Path], tiny: TransformersModel
) -> None:
    model = inside.of_family(family, folders, engine, tiny)
    theirs = inside.computed(folders[family]).past_key_values.layers
    assert len(theirs) == model.dimensions.layers
    for layer, stored in enumerate(theirs):
        for name, expected in zip(NAMES, (stored.keys[0], stored.values[0]), strict=True):
            ours = await look(model, CacheParameters(layer=layer, key_name=name))
            assert distance(values(ours, "cache_data"), expected) < NEAR


async def test_keys_of_the_hot_cache_are_those_computed_anew_bit_for_bit(
    llama: TransformersModel,
) -> None:
    await llama.forget()
    for name in NAMES:
        question = CacheParameters(layer=1, key_name=name)
        first = await look(llama, question)
        before = llama.counters()
        hot = await look(llama, question)
        warm = llama.counters()
        assert warm.hits - before.hits >= 2
        assert warm.misses == before.misses
        private = await look(llama, question, private=True)
        assert private.beside is None
        assert llama.counters().hits == warm.hits
        assert llama.counters().blocks_cached == warm.blocks_cached
        async with inside.streaming(llama):
            among = await look(llama, question, private=True)
        found = [values(result, "cache_data") for result in (first, hot, private, among)]
        assert all(torch.equal(found[0], other) for other in found[1:])
        assert first.facts == hot.facts == private.facts == among.facts
        other = await look(llama, question, [TEXT[0] + 1, *TEXT[1:]])
        assert not torch.equal(values(other, "cache_data")[:, 1:], found[0][:, 1:])


async def test_a_head_and_a_range_are_a_part_of_the_whole(llama: TransformersModel) -> None:
    whole = values(await look(llama, CacheParameters(layer=0, key_name="v")), "cache_data")
    assert whole.shape == (2, len(TEXT), 16)
    question = CacheParameters(layer=0, key_name="v", head=1, start=31, end=40)
    part = await look(llama, question)
    assert torch.equal(values(part, "cache_data"), whole[1, 31:40])
    facts = part.facts
    assert isinstance(facts, CacheFacts)
    assert (facts.head, facts.start, facts.end, facts.shape) == (1, 31, 40, (9, 16))
    (tensor,) = part.tensors
    assert (tensor.layers, tensor.start, tensor.end) == ((0,), 31, 40)


async def test_bfloat16_is_given_as_it_is_stored(
    engine: Engine, folders: dict[str, str | Path]
) -> None:
    model = inside.loaded(folders["gpt2"], engine, dtype=torch.bfloat16)
    theirs = inside.computed(folders["gpt2"]).past_key_values.layers[1].keys[0]
    ours = await look(model, CacheParameters(layer=1, key_name="k"))
    assert values(ours, "cache_data").dtype == torch.bfloat16
    assert distance(values(ours, "cache_data"), theirs) < 0.1
    assert isinstance(ours.facts, CacheFacts)
    assert ours.facts.dtype == "bfloat16"


# statistics


def expected(rows: list[list[float]]) -> Statistics:
    """Sums by one after the other, as their text says."""
    flat = [value for row in rows for value in row]
    mean = sum(flat, 0.0) / len(flat)
    squares = [sum((value * value for value in row), 0.0) for row in rows]
    norms = [math.sqrt(square) for square in squares]
    deviation = sum(((value - mean) * (value - mean) for value in flat), 0.0)
    return Statistics(
        min=min(flat),
        max=max(flat),
        mean=mean,
        standard_deviation=math.sqrt(deviation / len(flat)),
        norm=math.sqrt(sum(squares, 0.0)),
        min_vector_norm=min(norms),
        max_vector_norm=max(norms),
        mean_vector_norm=sum(norms, 0.0) / len(norms),
    )


def rows_of(width: int) -> st.SearchStrategy[list[list[float]]]:
    number = st.floats(-(2.0**60), 2.0**60, width=32)
    return st.lists(st.lists(number, min_size=width, max_size=width), min_size=1, max_size=40)


@given(st.integers(1, 9).flatmap(rows_of))
@settings(max_examples=50, deadline=None)
def test_statistics_are_sums_in_order(rows: list[list[float]]) -> None:
    assert statistics(np.array(rows, np.float32)) == expected(rows)


def test_statistics_are_what_they_are_called() -> None:
    values = np.random.default_rng(1).normal(size=(500, 24)).astype(np.float32)
    found = statistics(values)
    norms = np.linalg.norm(values.astype(np.float64), axis=1)
    assert found.mean == pytest.approx(values.mean(dtype=np.float64), abs=1e-12)
    assert found.standard_deviation == pytest.approx(values.std(dtype=np.float64), abs=1e-12)
    assert found.norm == pytest.approx(np.linalg.norm(values.astype(np.float64)), abs=1e-9)
    assert (found.min, found.max) == (values.min(), values.max())
    assert found.min_vector_norm == pytest.approx(norms.min(), abs=1e-12)
    assert found.max_vector_norm == pytest.approx(norms.max(), abs=1e-12)
    assert found.mean_vector_norm == pytest.approx(norms.mean(), abs=1e-12)


@pytest.mark.parametrize("zeros", [(0.0, -0.0), (-0.0, 0.0), (-0.0, -0.0)])
def test_zero_has_no_sign(zeros: tuple[float, float]) -> None:
    found = statistics(np.array([zeros], np.float32))
    assert all(str(getattr(found, field)) == "0.0" for field in found.__struct_fields__)


def test_what_is_no_number_is_null() -> None:
    found = statistics(np.array([[1.0, np.inf], [np.nan, 2.0]], np.float32))
    assert all(getattr(found, field) is None for field in found.__struct_fields__)


# where blocks are


async def test_it_tells_which_blocks_were_hot_and_how_many_hold_them(
    llama: TransformersModel,
) -> None:
    await llama.forget()
    question = CacheParameters(layer=1, key_name="k")
    cold = (await look(llama, question)).beside
    assert isinstance(cold, Residence)
    assert [(block.start, block.end) for block in cold.blocks] == [(0, 32), (32, 64)]
    assert {(block.tier, block.bytes, block.sequences) for block in cold.blocks} == {("none", 0, 0)}
    hot = (await look(llama, question)).beside
    assert isinstance(hot, Residence)
    size = llama.counters().block_bytes
    assert [(block.tier, block.bytes) for block in hot.blocks] == [("device", size)] * 2
    generation = llama.generate(request([*TEXT[:32], 5], 60))
    await anext(generation)
    held = (await look(llama, question)).beside
    assert isinstance(held, Residence)
    assert [block.sequences for block in held.blocks] == [1, 0]
    await generation.aclose()


async def test_blocks_are_told_up_to_the_end_of_the_range(llama: TransformersModel) -> None:
    question = CacheParameters(layer=0, key_name="k", start=40, end=50)
    found = (await look(llama, question)).beside
    assert isinstance(found, Residence)
    assert [block.end for block in found.blocks] == [BLOCK_TOKENS]


def test_a_block_may_be_on_the_host_while_the_one_after_it_is_on_the_device() -> None:
    pool = BlockPool(3, host_slots=4)
    keys = [bytes([number]) for number in range(3)]
    for key in keys:  # the first has to leave
        block = pool.allocate()
        pool.publish(block, key)
        pool.release([block])
    pool.match([keys[1]])
    before = (pool.hits, pool.restores, pool.held)
    found = residence(pool, [*keys, b"no"], 100)
    assert [block.tier for block in found.blocks] == ["host", "device", "device", "none"]
    assert [block.bytes for block in found.blocks] == [100, 100, 100, 0]
    assert [block.sequences for block in found.blocks] == [0, 1, 0, 0]
    assert (pool.hits, pool.restores, pool.held) == before


def test_a_block_is_shared_with_those_that_begin_with_all_up_to_its_end() -> None:
    def block(place: int, others: int = 0) -> Block:
        start, end = place * 2, place * 2 + 2
        return Block(start=start, end=end, tier="none", bytes=0, sequences=0, other_states=others)

    found = shared(
        Residence(blocks=(block(0), block(1), block(2))),
        (1, 2, 3, 4, 5, 6, 7),
        [(1, 2, 3, 4, 5), (1, 2, 9, 4, 5, 6), (1,), (8, 2, 3, 4, 5, 6), (1, 2, 3, 4, 5, 6, 8)],
    )
    assert found.blocks == (block(0, 3), block(1, 2), block(2, 1))


# what is refused


async def test_what_there_is_not_is_refused_by_name(llama: TransformersModel) -> None:
    for field, changes, allowed in (
        ("layer", {"layer": 2}, "0 to 1: the model has 2 layers"),
        ("head", {"head": 2}, "0 to 1: the model has 2 K/V heads"),
        ("start", {"start": len(TEXT)}, f"0 to {len(TEXT) - 1}"),
        ("end", {"start": 3, "end": 3}, f"4 to {len(TEXT)}"),
        ("end", {"end": len(TEXT) + 1}, f"1 to {len(TEXT)}"),
    ):
        with pytest.raises(InvalidInput, match=allowed) as refused:
            await look(llama, CacheParameters(**{"layer": 0, "key_name": "k"} | changes))
        assert refused.value.facts["field"] == field


async def test_too_much_is_refused_before_anything_is_computed(
    engine: Engine, folders: dict[str, str | Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = inside.loaded(folders["gpt2"], engine)
    monkeypatch.setattr(model, "max_result_bytes", 4 * 64 * 20)
    before = model.counters()
    with pytest.raises(ResultTooLarge, match="one head"):
        await look(model, CacheParameters(layer=0, key_name="k", end=21))
    assert model.counters() == before
    await look(model, CacheParameters(layer=0, key_name="k", end=20))
    await look(model, CacheParameters(layer=0, key_name="k", end=73, head=3))
