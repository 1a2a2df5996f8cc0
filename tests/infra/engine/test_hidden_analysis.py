"""Hidden states: those of transformers, in bits that nothing else has a say in."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from domain.analysis.hidden import EmbeddingFacts, HiddenFacts
from domain.analysis.parameters import EmbeddingParameters, HiddenParameters
from domain.errors import InvalidInput, ResultTooLarge
from infra.engine.analysis.hidden import mean
from infra.engine.blocks import BLOCK_TOKENS
from infra.engine.engine import Engine
from infra.engine.language_model import TransformersModel
from tests.infra.engine import inside
from tests.infra.engine.inside import FAMILIES, NEAR, TEXT, distance, look, values


@pytest.fixture(scope="module")
def llama(engine: Engine, folders: dict[str, str | Path]) -> TransformersModel:
    return inside.loaded(folders["llama"], engine)


@pytest.mark.parametrize("family", FAMILIES)
async def test_hidden_states_are_those_of_transformers(
    family: str, engine: Engine, folders: dict[str, str | Path], tiny: TransformersModel
) -> None:
    model = inside.of_family(family, folders, engine, tiny)
    theirs = torch.cat(inside.computed(folders[family]).hidden_states)
    layers = tuple(range(model.dimensions.layers + 1))
    ours = await look(model, HiddenParameters(layers=layers))
    assert distance(values(ours, "hidden_states"), theirs) < NEAR
    assert isinstance(ours.facts, HiddenFacts)
    assert (ours.facts.layers, ours.facts.start, ours.facts.end) == (layers, 0, len(TEXT))
    some = await look(model, HiddenParameters(layers=(2, 0), start=30, end=50))
    assert distance(values(some, "hidden_states"), theirs[[2, 0], 30:50]) < NEAR
    one = await look(model, EmbeddingParameters(token_index=41))
    assert distance(values(one, "embedding"), theirs[-1, 41]) < NEAR
    assert isinstance(one.facts, EmbeddingFacts)
    assert one.facts.layer == layers[-1]


async def test_one_layer_keeps_its_dimension_and_pooling_takes_that_of_the_positions(
    llama: TransformersModel,
) -> None:
    whole = values(await look(llama, HiddenParameters(start=3, end=60)), "hidden_states")
    assert whole.shape == (1, 57, 64)
    last = await look(llama, HiddenParameters(start=3, end=60, pooling="last"))
    assert torch.equal(values(last, "hidden_states"), whole[:, -1])
    pooled = await look(llama, HiddenParameters(start=3, end=60, pooling="mean"))
    assert torch.equal(values(pooled, "hidden_states"), mean(whole[0])[None])
    assert distance(values(pooled, "hidden_states"), whole.double().mean(1)) < 1e-7
    (tensor,) = last.tensors
    assert (tensor.layers, tensor.start, tensor.end) == ((2,), 3, 60)


@given(
    st.lists(st.lists(st.floats(-(2.0**90), 2.0**90, width=32), min_size=3, max_size=3), min_size=1)
)
@settings(max_examples=50, deadline=None)
def test_the_mean_is_a_sum_in_order_that_is_rounded_at_the_end(rows: list[list[float]]) -> None:
    expected = [sum(column, 0.0) / len(rows) for column in zip(*rows, strict=True)]
    found = mean(torch.tensor(rows, dtype=torch.float32))
    assert found.tolist() == np.array(expected, np.float32).tolist()


def test_another_order_would_be_another_mean() -> None:
    rows = torch.tensor([[1e30], [1.0], [-1e30]])
    assert mean(rows) == 0.0
    assert mean(rows[[0, 2, 1]]) == np.float32(1 / 3)


async def test_bits_are_the_same_hot_cold_private_and_among_others(
    llama: TransformersModel,
) -> None:
    question = HiddenParameters(layers=(0, 1, 2), start=20)
    await llama.forget()
    cold = await look(llama, question)
    before = llama.counters()
    hot = await look(llama, HiddenParameters(layers=(0, 1, 2), start=2 * BLOCK_TOKENS + 1))
    reused = llama.counters().hits - before.hits
    assert reused >= 2, "what comes before the range is not computed again"
    private = await look(llama, question, private=True)
    assert llama.counters().hits - before.hits == reused
    async with inside.streaming(llama):
        among = await look(llama, question, private=True)
    assert cold == private == among
    tail = values(cold, "hidden_states")[:, 2 * BLOCK_TOKENS + 1 - 20 :]
    assert torch.equal(values(hot, "hidden_states"), tail)
    other = await look(llama, question, [*TEXT[:19], TEXT[19] + 1, *TEXT[20:]])
    assert not torch.equal(values(other, "hidden_states"), values(cold, "hidden_states"))


async def test_bfloat16_is_given_as_it_is(engine: Engine, folders: dict[str, str | Path]) -> None:
    model = inside.loaded(folders["gpt2"], engine, dtype=torch.bfloat16)
    theirs = torch.cat(inside.computed(folders["gpt2"]).hidden_states)
    ours = await look(model, HiddenParameters(layers=(0, 1, 2)))
    assert distance(values(ours, "hidden_states"), theirs) < 0.2
    pooled = values(await look(model, HiddenParameters(pooling="mean")), "hidden_states")
    assert pooled.dtype == torch.float32
    assert torch.equal(pooled[0], mean(values(ours, "hidden_states")[2]))


async def test_too_much_is_refused_before_anything_is_computed(
    engine: Engine, folders: dict[str, str | Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = inside.loaded(folders["gpt2"], engine)
    monkeypatch.setattr(model, "max_result_bytes", 4 * 64 * 20)
    before = model.counters()
    for question in (
        HiddenParameters(end=21),
        HiddenParameters(layers=(0, 2), end=11),
        HiddenParameters(layers=(0, 1, 2), end=27, pooling="mean"),
    ):
        with pytest.raises(ResultTooLarge, match="start and end"):
            await look(model, question)
    assert model.counters() == before
    await look(model, HiddenParameters(end=20))
    await look(model, HiddenParameters(pooling="last"))
    await look(model, HiddenParameters(layers=(0, 1, 2), end=26, pooling="mean"))


async def test_what_there_is_not_is_refused_by_name(llama: TransformersModel) -> None:
    for question, field, allowed in (
        (HiddenParameters(layers=(1, 3)), "layers[1]", "0 to 2"),
        (HiddenParameters(layers=(1, 1)), "layers[1]", "twice"),
        (HiddenParameters(start=len(TEXT)), "start", f"0 to {len(TEXT) - 1}"),
        (HiddenParameters(start=5, end=5), "end", f"6 to {len(TEXT)}"),
        (EmbeddingParameters(token_index=len(TEXT)), "token_index", f"0 to {len(TEXT) - 1}"),
        (EmbeddingParameters(token_index=0, layer=3), "layer", "0 to 2"),
    ):
        with pytest.raises(InvalidInput, match=allowed) as refused:
            await look(llama, question)
        assert refused.value.facts["field"] == field
