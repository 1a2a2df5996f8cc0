"""The logit lens: hidden states through the model's own last normalisation and head."""

from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import UNSET
from torch import Tensor

from domain.analysis.lens import MAX_READINGS, LensFacts, Reading, asked_lens
from domain.analysis.parameters import LensParameters, NextParameters
from domain.analysis.ranges import MAX_ALTERNATIVES
from domain.errors import InvalidInput, ResultTooLarge
from domain.models import Dimensions
from infra.engine.blocks import BLOCK_TOKENS
from infra.engine.engine import Engine
from infra.engine.language_model import TransformersModel
from tests.infra.engine import inside
from tests.infra.engine.asking import score
from tests.infra.engine.inside import FAMILIES, NEAR, TEXT, distance, look, values

VOCABULARY = 1024


async def read(
    model: TransformersModel, private: bool = False, **asked: Any
) -> tuple[LensFacts, Tensor, Tensor]:
    """What is found, and the ids and logprobs of the likeliest tokens."""
    result = await look(model, LensParameters(**asked), private=private)
    assert isinstance(result.facts, LensFacts)
    return result.facts, values(result, "top_token_ids"), values(result, "top_logprobs")


@torch.inference_mode()
def of_transformers(folder: str | Path) -> Tensor:
    """Logprobs ``(layers, positions, vocabulary)`` of hidden states through norm and head."""
    plain = inside.plain(folder)
    states = inside.computed(folder).hidden_states
    base = plain.base_model
    norm = base.ln_f if hasattr(base, "ln_f") else base.norm
    normalised = [*map(norm, states[:-1]), states[-1]]
    return torch.cat([plain.lm_head(each) for each in normalised]).double().log_softmax(-1)


@pytest.fixture(scope="module")
def llama(engine: Engine, folders: dict[str, str | Path]) -> TransformersModel:
    return inside.loaded(folders["llama"], engine)


@pytest.mark.parametrize("family", FAMILIES)
async def test_it_is_the_head_of_the_normalised_hidden_states(
    family: str, engine: Engine, folders: dict[str, str | Path], tiny: TransformersModel
) -> None:
    model = inside.of_family(family, folders, engine, tiny)
    theirs = of_transformers(folders[family])
    layers = model.dimensions.layers + 1
    facts, ids, logprobs = await read(model, top_k=7)
    assert ids.shape == logprobs.shape == (layers, len(TEXT), 7)
    expected, likeliest = theirs.topk(7)
    assert distance(logprobs, expected) < NEAR
    assert (theirs.gather(-1, ids) - expected).abs().max() < NEAR
    assert facts.layers == tuple(range(layers))
    assert facts.token_ids == tuple(TEXT)
    for layer, readings in enumerate(facts.readings):
        for position, reading in enumerate(readings):
            row = theirs[layer, position]
            assert reading.position == position
            assert [each.token_id for each in reading.top] == ids[layer, position].tolist()
            assert reading.entropy == pytest.approx(float(-(row.exp() * row).sum()), abs=1e-4)
            if position + 1 < len(TEXT):
                following = float(row[TEXT[position + 1]])
                assert reading.logprob == pytest.approx(following, rel=NEAR, abs=NEAR)
            else:
                assert reading.logprob is reading.rank is None
    assert not torch.equal(likeliest[0], likeliest[-1])


async def test_the_last_layer_is_what_the_model_says_bit_for_bit(
    engine: Engine, folders: dict[str, str | Path], tiny: TransformersModel
) -> None:
    narrow = inside.loaded(folders["gpt2"], engine, dtype=torch.bfloat16)
    for model in (tiny, inside.loaded(folders["llama"], engine), narrow):
        facts, _, _ = await read(model, top_k=5)
        scores = (await score(model, TEXT, 1)).scores
        last = facts.readings[-1]
        assert tuple(reading.logprob for reading in last[:-1]) == scores.logprobs
        assert tuple(reading.rank for reading in last[:-1]) == scores.ranks
        assert tuple(reading.entropy for reading in last[:-1]) == scores.entropies
        coming = (await look(model, NextParameters(top_k=5))).facts
        assert last[-1].entropy == coming.entropy
        assert [(each.token_id, each.logprob) for each in last[-1].top] == [
            (each.token_id, each.logprob) for each in coming.top
        ]
        earlier = facts.readings[-2]
        assert tuple(reading.logprob for reading in earlier[:-1]) != scores.logprobs


async def test_bits_are_the_same_hot_cold_private_among_others_and_by_itself(
    llama: TransformersModel,
) -> None:
    await llama.forget()
    question = LensParameters(start=10)
    cold = await look(llama, question)
    before = llama.counters()
    position = 2 * BLOCK_TOKENS + 4
    alone, ids, logprobs = await read(llama, position=position)
    assert llama.counters().hits - before.hits >= 2
    private = await look(llama, question, private=True)
    async with inside.streaming(llama):
        among = await look(llama, question, private=True)
    assert cold == private == among
    assert isinstance(cold.facts, LensFacts)
    for whole, one in zip(cold.facts.readings, alone.readings, strict=True):
        assert one == (whole[position - 10],)
    assert torch.equal(values(cold, "top_token_ids")[:, position - 10, None], ids)
    assert torch.equal(values(cold, "top_logprobs")[:, position - 10, None], logprobs)


async def test_layers_and_positions_may_be_named(llama: TransformersModel) -> None:
    whole, _, _ = await read(llama)
    facts, ids, _ = await read(llama, layers=(2, 0), start=5, end=8, top_k=2)
    assert ids.shape == (2, 3, 2)
    assert (facts.start, facts.end, facts.token_ids) == (5, 8, tuple(TEXT[5:8]))
    assert facts.layers == (2, 0)
    for layer, readings in zip(facts.layers, facts.readings, strict=True):
        for reading, expected in zip(readings, whole.readings[layer][5:8], strict=True):
            assert reading.position == expected.position
            assert reading.top == expected.top[:2]
            assert reading.rank == expected.rank


async def test_tokens_are_told_by_what_they_would_add_and_by_their_bytes(
    tiny: TransformersModel,
) -> None:
    """The text ends inside a character: what comes after it may complete that."""
    tokens = await tiny.encode("Once upon a time there was a 🐻", beginning=True, room=100)
    tokens = tokens[:-1]
    result = await look(tiny, LensParameters(top_k=100), tokens)
    assert isinstance(result.facts, LensFacts)
    assert "".join(result.facts.tokens) == tiny.fragment((), tokens).text
    told = [
        (tokens[: each.position + 1], each.top) for row in result.facts.readings for each in row
    ]
    assert all(len(top) == 100 for _, top in told)
    partial = set()
    for before, top in told:
        for each in top:
            content = tiny.fragment(before, (each.token_id,))
            assert each.text == content.text
            assert each.bytes == content.bytes_of(0)
            if each.bytes is not UNSET:
                partial.add(bytes(each.bytes))
    assert len(partial) > 1, "there are tokens that are no whole characters, each its own"


async def test_more_alternatives_than_tokens_are_all_tokens(
    llama: TransformersModel,
) -> None:
    facts, ids, _ = await read(llama, position=3, layers=(1,), top_k=100)
    ((reading,),) = facts.readings
    assert isinstance(reading, Reading)
    assert ids.shape == (1, 1, 100)
    assert len({each.token_id for each in reading.top}) == 100


async def test_what_there_is_not_is_refused_by_name(llama: TransformersModel) -> None:
    last = len(TEXT) - 1
    for asked, field, allowed in (
        ({"layers": (3,)}, "layers[0]", "0 to 2: the model has 3 hidden states"),
        ({"layers": (0, 0)}, "layers[1]", "twice"),
        ({"position": len(TEXT)}, "position", f"0 to {last}"),
        ({"position": 3, "start": 1}, "position", "start and end"),
        ({"position": 3, "end": 9}, "position", "start and end"),
        ({"start": len(TEXT)}, "start", f"0 to {last}"),
        ({"start": 4, "end": 4}, "end", f"5 to {len(TEXT)}"),
    ):
        with pytest.raises(InvalidInput, match=allowed) as refused:
            await read(llama, **asked)
        assert refused.value.facts["field"] == field


def test_too_much_is_refused_and_told_how_to_ask_for_less() -> None:
    small = Dimensions(layers=7, heads=1, kv_heads=1, head_dim=1, width=1)
    held = MAX_READINGS
    asked_lens(LensParameters(top_k=1, end=held // 8), small, held, 1 << 30)
    with pytest.raises(ResultTooLarge, match="Name fewer layers, one position"):
        asked_lens(LensParameters(top_k=1, end=held // 8 + 1), small, held, 1 << 30)
    many = LensParameters(layers=(0,), top_k=100, end=MAX_ALTERNATIVES // 100)
    asked_lens(many, small, held, 1 << 30)
    with pytest.raises(ResultTooLarge, match="lower top_k"):
        asked_lens(
            LensParameters(layers=(0,), top_k=100, end=MAX_ALTERNATIVES // 100 + 1),
            small,
            held,
            1 << 30,
        )
    asked_lens(LensParameters(end=10, top_k=2), small, held, 8 * 10 * 2 * 12)
    with pytest.raises(ResultTooLarge, match="lower top_k"):
        asked_lens(LensParameters(end=10, top_k=2), small, held, 8 * 10 * 2 * 12 - 1)
    wide = Dimensions(layers=7, heads=1, kv_heads=1, head_dim=100, width=100)
    asked_lens(LensParameters(end=10, top_k=1), wide, held, 8 * 10 * 100)
    with pytest.raises(ResultTooLarge, match="What an answer is made from counts too"):
        asked_lens(LensParameters(end=10, top_k=1), wide, held, 8 * 10 * 100 - 1)
