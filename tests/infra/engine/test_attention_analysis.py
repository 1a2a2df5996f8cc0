"""Attention of a state: the weights of transformers, in bits that nothing else has a say in."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from domain.analysis.attention import AttentionFacts
from domain.analysis.parameters import AttentionParameters
from domain.errors import InvalidInput, ResultTooLarge
from domain.ids import TokenId
from infra.engine.analysis.attention_kernels import LayerWeights, roll
from infra.engine.blocks import BLOCK_TOKENS
from infra.engine.engine import Engine
from infra.engine.forward import Weighing
from infra.engine.language_model import MAX_PREFILL_ROWS_BESIDE_STREAMS, TransformersModel
from tests.builders import config
from tests.infra.engine import inside, small_models
from tests.infra.engine.asking import request, steps, tokens_of
from tests.infra.engine.bench import Gate, text
from tests.infra.engine.small_models import EVERY_VOCABULARY

TOKENS: Final = 3 * BLOCK_TOKENS + 9
TEXT: Final = text(3, TOKENS, EVERY_VOCABULARY)
NEAR: Final = 1e-5
DTYPES: Final = {"float32": torch.float32, "int64": torch.int64}


class Found(NamedTuple):
    facts: AttentionFacts
    tensors: dict[str, Tensor]

    @property
    def pattern(self) -> Tensor:
        return self.tensors["attention_pattern"]


async def look(
    model: TransformersModel, tokens: Sequence[int] = TEXT, *, private: bool = False, **asked: Any
) -> Found:
    ids = tuple(map(TokenId, tokens))
    result = await model.look(ids, config(), AttentionParameters(**asked), private=private)
    assert isinstance(result.facts, AttentionFacts)
    tensors = {
        tensor.name: torch.frombuffer(bytearray(tensor.data), dtype=DTYPES[tensor.dtype]).view(
            tensor.shape
        )
        for tensor in result.tensors
    }
    return Found(result.facts, tensors)


@torch.inference_mode()
def of_transformers(folder: str | Path, tokens: Sequence[int] = TEXT) -> Tensor:
    """``(layers, heads, queries, keys)`` by eager attention."""
    plain = small_models.read(folder).model
    plain.set_attn_implementation("eager")
    found = plain(torch.tensor([tokens]), output_attentions=True, use_cache=False)
    return torch.cat(found.attentions)


@pytest.fixture(scope="module")
def llama(engine: Engine, folders: dict[str, str | Path]) -> TransformersModel:
    return inside.loaded(folders["llama"], engine)


# against transformers


@pytest.mark.parametrize(
    ("family", "strategy"),
    [
        ("cacher-tiny", "strict"),
        ("gpt2-untied", "plain"),
        ("llama", "strict"),
        ("mistral", "strict"),
        ("gemma2", "plain"),
    ],
)
async def test_weights_are_those_of_transformers_in_every_layer_and_head(
    family: str,
    strategy: str,
    engine: Engine,
    folders: dict[str, str | Path],
    tiny: TransformersModel,
) -> None:
    if strategy == "strict":
        model = inside.of_family(family, folders, engine, tiny)
    else:
        model = inside.loaded(folders[family], engine, strategy=strategy)
    theirs = of_transformers(folders[family])
    layers, heads = (tuple(range(count)) for count in theirs.shape[:2])
    ours = await look(model, layers=layers, heads=heads)
    assert ours.pattern.shape == theirs.shape
    assert (ours.pattern - theirs).abs().max() < NEAR
    mean = await look(model, layers=layers)
    assert (mean.pattern - theirs.mean(1)).abs().max() < NEAR
    for found in (ours, mean):
        assert (found.pattern.double().sum(-1) - 1).abs().max() < 1e-6
    assert float(theirs[:, :, 1:].max()) > 0.5, "attention that is all the same shows nothing"


async def test_bfloat16_gives_weights_too(engine: Engine, folders: dict[str, str | Path]) -> None:
    theirs = of_transformers(folders["gemma2"])[0]
    model = small_models.language_model(
        folders["gemma2"], engine, strategy="plain", dtype=torch.bfloat16
    )
    found = await look(model, layer=0, heads=(0, 1, 2, 3))
    assert 0 < (found.pattern - theirs).abs().max() < 0.1
    assert (found.pattern.double().sum(-1) - 1).abs().max() < 1e-6


async def test_the_shape_says_what_was_named(llama: TransformersModel) -> None:
    rows = {"start": 5, "end": 12}
    whole = await look(llama, layers=(1, 0), heads=(3, 0, 2), **rows)
    assert whole.pattern.shape == (2, 3, 7, 12)
    for asked, part in (
        ({"layer": 0, "head": 2}, whole.pattern[1, 2]),
        ({"layers": (0,), "head": 2}, whole.pattern[1:, 2]),
        ({"layer": 0, "heads": (0, 2)}, whole.pattern[1, 1:]),
    ):
        found = await look(llama, **rows, **asked)
        assert torch.equal(found.pattern, part)
    facts = whole.facts
    assert (facts.start, facts.end, facts.layers, facts.heads) == (5, 12, (1, 0), (3, 0, 2))
    assert (facts.layer, facts.head, facts.top_k) == (None, None, None)
    assert facts.token_ids == tuple(TEXT[:12])
    assert facts.tokens == llama.fragment((), facts.token_ids).pieces()
    mean = await look(llama, layer=1, **rows)
    assert mean.pattern.shape == (7, 12)
    every = (await look(llama, layer=1, heads=(0, 1, 2, 3), **rows)).pattern
    assert (mean.pattern - every.mean(0)).abs().max() < 1e-7


# rollout and summary


async def test_rollout_is_the_product_of_mixed_mean_weights(llama: TransformersModel) -> None:
    means = (await look(llama, layers=(0, 1))).pattern.double()
    identity = torch.eye(TOKENS, dtype=torch.float64)
    expected = identity
    for layer, mean in enumerate(means):
        mixed = 0.5 * mean + 0.5 * identity
        expected = mixed / mixed.sum(-1, keepdim=True) @ expected
        found = await look(llama, method="rollout", layer=layer)
        assert (found.pattern - expected).abs().max() < 1e-7
        assert found.facts.layer == layer
    every = await look(llama, method="rollout")
    assert torch.equal(every.pattern, found.pattern)
    assert every.facts.layer == 1
    part = await look(llama, method="rollout", start=40, end=70)
    assert torch.equal(part.pattern, every.pattern[40:70, :70])


async def test_a_summary_is_of_each_head_over_the_rows(llama: TransformersModel) -> None:
    rows = {"start": 30, "end": 90}
    weights = (await look(llama, layers=(0, 1), heads=(0, 1, 2, 3), **rows)).pattern.double()
    distances = torch.arange(30, 90)[:, None] - torch.arange(90)
    expected = {
        "entropy": torch.special.entr(weights).sum(-1).mean(-1),
        "distance": (weights * distances).sum(-1).mean(-1),
        "first_token": weights[..., 0].mean(-1),
    }
    found = await look(llama, method="summary", **rows)
    assert (found.facts.layers, found.facts.heads) == ((0, 1), (0, 1, 2, 3))
    assert set(found.tensors) == set(expected)
    for name, values in expected.items():
        assert torch.allclose(found.tensors[name].double(), values, rtol=1e-6, atol=0)
        few = await look(llama, method="summary", layer=1, heads=(2, 0), **rows)
        assert (few.facts.layer, few.facts.layers, few.facts.heads) == (None, (1,), (2, 0))
        assert torch.equal(few.tensors[name], found.tensors[name][1:, [2, 0]])
        one = await look(llama, method="summary", layer=1, head=2, **rows)
        assert torch.equal(one.tensors[name], found.tensors[name][1:, 2:3])


# what is given of rows


async def test_sparse_rows_are_the_largest_of_dense_ones(llama: TransformersModel) -> None:
    asked: dict[str, Any] = {"layers": (0, 1), "head": 1}
    dense = (await look(llama, **asked)).pattern
    for top_k in (1, 7, TOKENS, TOKENS + 20):
        found = await look(llama, format="sparse", top_k=top_k, **asked)
        indices, values = found.tensors["indices"], found.tensors["values"]
        assert values.shape == indices.shape == (2, TOKENS, top_k)
        largest = dense.sort(dim=-1, descending=True, stable=True)
        known = min(top_k, TOKENS)
        assert torch.equal(values[..., :known], largest.values[..., :known])
        filled = values > 0
        assert torch.equal(indices[..., :known][filled[..., :known]],
                           largest.indices[..., :known][filled[..., :known]])  # fmt: skip
        assert (indices[~filled] == -1).all()
        assert (~filled).any() == (top_k > 1), "the first rows see fewer keys"
    assert found.facts.top_k == TOKENS + 20
    assert (await look(llama, format="sparse", layer=0)).facts.top_k == 10


async def test_weights_below_the_threshold_are_zero(llama: TransformersModel) -> None:
    whole = (await look(llama, layer=0, head=0)).pattern
    threshold = float(whole[50].max()) / 2
    found = await look(llama, layer=0, head=0, threshold=threshold)
    assert torch.equal(found.pattern, torch.where(whole >= threshold, whole, 0))
    assert 0 < int((found.pattern > 0).sum()) < int((whole > 0).sum())
    exactly = await look(llama, layer=0, head=0, threshold=float(whole[50].max()))
    assert exactly.pattern[50].max() == whole[50].max(), "what is just as large stays"
    sparse = await look(llama, layer=0, head=0, threshold=threshold, format="sparse")
    assert torch.equal(sparse.tensors["values"] > 0, sparse.tensors["indices"] >= 0)
    assert int((sparse.tensors["values"] > 0).sum()) == int((found.pattern > 0).sum())


# bits


async def test_bits_depend_on_no_range_no_cache_and_no_neighbour(llama: TransformersModel) -> None:
    tokens = text(11, TOKENS)
    asked: dict[str, Any] = {"layers": (0, 1), "heads": (0, 1, 2, 3)}
    await llama.forget()
    cold = (await look(llama, tokens, **asked)).pattern
    before = llama.counters().hits
    for start, end in ((0, 1), (1, TOKENS), (64, 65), (70, 101), (TOKENS - 1, TOKENS)):
        part = await look(llama, tokens, start=start, end=end, **asked)
        assert torch.equal(part.pattern, cold[:, :, start:end, :end])
    assert llama.counters().hits > before, "blocks of the text were found"
    used = llama.counters().hits
    private = await look(llama, tokens, private=True, start=64, **asked)
    assert torch.equal(private.pattern, cold[:, :, 64:])
    assert llama.counters().hits == used, "and not when it was private"
    others = (look(llama, text(seed, 20 + 7 * seed), layer=0) for seed in range(12))
    among, *_ = await asyncio.gather(look(llama, tokens, **asked), *others)
    assert torch.equal(among.pattern, cold)


async def test_another_token_changes_its_own_row_and_none_before(llama: TransformersModel) -> None:
    other = [*TEXT[:50], (TEXT[50] + 1) % 1000, *TEXT[51:]]
    one, two = [(await look(llama, tokens, layer=1)).pattern for tokens in (TEXT, other)]
    assert torch.equal(one[:50], two[:50])
    assert not torch.equal(one[50], two[50])


async def test_a_long_answer_is_made_of_the_same_rows(tiny: TransformersModel) -> None:
    tokens = text(5, 300)
    asked: dict[str, Any] = {"layer": 0, "head": 0}
    whole = (await look(tiny, tokens, **asked)).pattern
    part = (await look(tiny, tokens, start=250, **asked)).pattern
    assert torch.equal(part, whole[250:])
    rolled = (await look(tiny, tokens, method="rollout", layer=1)).pattern
    shorter = (await look(tiny, tokens[:256], method="rollout", layer=1)).pattern
    assert torch.equal(rolled[:256, :256], shorter)


async def test_streams_draw_the_same_tokens_while_attention_is_looked_at(
    llama: TransformersModel,
) -> None:
    asked = [request(text(seed, 10 + 9 * seed), 24, seed=seed) for seed in range(8)]
    await llama.forget()
    alone = [tokens_of(await steps(llama, one)) for one in asked]
    whole = (await look(llama, layers=(0, 1))).pattern
    assert TOKENS > MAX_PREFILL_ROWS_BESIDE_STREAMS, "it takes several passes beside streams"
    starts = (0, 33, 70, 0)
    looks = [look(llama, start=start, layers=(0, 1), private=start == 0) for start in starts]
    with Gate(llama._engine) as gate:
        streams = [asyncio.create_task(steps(llama, one)) for one in asked]
        beside = [asyncio.create_task(each) for each in looks]
        await gate.asked(len(streams) + len(beside))
    for start, found in zip(starts, await asyncio.gather(*beside), strict=True):
        assert torch.equal(found.pattern, whole[:, start:])
    assert [tokens_of(await stream) for stream in streams] == alone


# refusals


@pytest.mark.parametrize(
    ("asked", "field", "allowed"),
    [
        ({"layer": 2}, "layer", "0 to 1"),
        ({"layers": (0, 2)}, "layers[1]", "0 to 1"),
        ({"layers": (0, 0)}, "layers[1]", "twice"),
        ({"layer": 0, "layers": (0,)}, "layers", "not both"),
        ({}, "layer", "name one layer"),
        ({"layer": 0, "head": 4}, "head", "0 to 3"),
        ({"layer": 0, "heads": (1, 4)}, "heads[1]", "0 to 3"),
        ({"layer": 0, "head": 0, "heads": (0,)}, "heads", "not both"),
        ({"layer": 0, "start": TOKENS}, "start", f"0 to {TOKENS - 1}"),
        ({"layer": 0, "end": TOKENS + 1}, "end", f"1 to {TOKENS}"),
        ({"layer": 0, "start": 7, "end": 7}, "end", f"8 to {TOKENS}"),
        ({"layer": 0, "top_k": 10}, "top_k", "sparse"),
        ({"method": "rollout", "layer": 2}, "layer", "0 to 1"),
        ({"method": "rollout", "layers": (0, 1)}, "layers", "up to layer"),
        ({"method": "rollout", "head": 0}, "head", "mean of all heads"),
        ({"method": "rollout", "heads": (0,)}, "heads", "mean of all heads"),
        ({"method": "summary", "format": "sparse"}, "format", "dense"),
        ({"method": "summary", "threshold": 0.5}, "threshold", "must be 0"),
    ],
)
async def test_what_there_is_not_is_refused_by_name(
    llama: TransformersModel, asked: dict[str, Any], field: str, allowed: str
) -> None:
    with pytest.raises(InvalidInput) as refused:
        await look(llama, **asked)
    assert [problem.field for problem in refused.value.facts["errors"]] == [field]
    assert allowed in str(refused.value)


@pytest.mark.parametrize(
    ("limit", "large", "small"),
    [
        (90_000, {"layer": 1, "heads": (0, 1, 2)}, {"layer": 1, "heads": (0, 1)}),
        (90_000, {"layer": 1, "heads": (0, 1, 2)}, {"layer": 1, "heads": (0, 1, 2), "start": 60}),
        (80_000, {"layers": (0, 1), "start": 0}, {"layer": 1}),
        (
            90_000,
            {"layer": 1, "heads": (0, 1, 2), "format": "sparse", "top_k": 99},
            {"layer": 1, "heads": (0, 1, 2), "format": "sparse", "top_k": 9},
        ),
        (40_000, {"method": "rollout"}, {"method": "rollout", "end": 50}),
        (
            20_000,
            {"method": "rollout", "format": "sparse", "top_k": 1},
            {"method": "rollout", "format": "sparse", "top_k": 1, "end": 50},
        ),
        (20_000, {"method": "summary"}, {"method": "summary", "layer": 1}),
    ],
)
async def test_too_large_an_answer_is_refused_before_it_is_computed(
    llama: TransformersModel,
    monkeypatch: pytest.MonkeyPatch,
    limit: int,
    large: dict[str, Any],
    small: dict[str, Any],
) -> None:
    monkeypatch.setattr(llama, "max_result_bytes", limit)
    await llama.forget()
    with pytest.raises(ResultTooLarge, match="Name "):
        await look(llama, **large)
    assert llama.counters().blocks_cached == 0, "nothing was computed"
    found = await look(llama, **small)
    assert sum(tensor.nbytes for tensor in found.tensors.values()) <= limit
    assert llama.counters().blocks_cached > 0


# the kernels alone


def weighed(queries: Tensor, keys: Tensor, weighing: Weighing, start: int) -> Tensor:
    """Weights ``(heads, rows, keys)`` by torch, in float64."""
    group = queries.shape[1] // len(keys)
    every = keys.double().repeat_interleave(group, 0)
    scores = torch.einsum("qhd,hkd->hqk", queries.double(), every) * weighing.scaling
    if weighing.softcap:
        scores = torch.tanh(scores / weighing.softcap) * weighing.softcap
    behind = torch.arange(start, start + len(queries))[:, None] - torch.arange(keys.shape[1])
    hidden = behind < 0
    if weighing.window:
        hidden |= behind >= weighing.window
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 150),
    start=st.integers(0, 149),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    dim=st.integers(1, 40),
    weighing=st.builds(
        Weighing,
        scaling=st.floats(0.05, 2),
        window=st.sampled_from([0, 1, 2, 17, 64, 400]),
        softcap=st.sampled_from([0.0, 3.0, 50.0]),
    ),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    data=st.data(),
)
def test_rows_of_any_shape_are_softmax_of_scores_and_stand_alone(
    tokens: int, start: int, kv_heads: int, group: int, dim: int, weighing: Weighing,
    dtype: torch.dtype, data: st.DataObject,
) -> None:  # fmt: skip
    start %= tokens
    torch.manual_seed(tokens)
    queries = torch.randn(tokens - start, kv_heads * group, dim).to(dtype)
    keys = torch.randn(kv_heads, tokens, dim).to(dtype)
    layer = LayerWeights(queries, weighing, keys, start)
    head = data.draw(st.integers(0, layer.heads - 1))
    found = layer.of_head(head, range(start, tokens))
    expected = weighed(queries, keys, weighing, start)
    assert abs(found - expected[head].numpy()).max() < NEAR
    assert abs(found.sum(1, dtype=np.float64) - 1).max() < 1e-6
    every = range(start, tokens)
    mean = layer.mean(every)
    assert abs(mean - expected.mean(0).numpy()).max() < NEAR
    assert abs(mean.sum(1, dtype=np.float64) - 1).max() < 1e-6
    cut = data.draw(st.integers(start, tokens - 1))
    assert (layer.of_head(head, range(cut, tokens)) == found[cut - start :]).all()
    alone = LayerWeights(
        queries[cut - start :, head : head + 1], weighing, keys[head // group, None], cut
    )
    assert (alone.of_head(0, range(cut, tokens)) == found[cut - start :]).all()


def test_rollout_is_the_same_however_its_rows_are_cut() -> None:
    torch.manual_seed(0)
    layer = LayerWeights(
        torch.randn(150, 2, 8), Weighing(1.0, 0, 0.0), torch.randn(2, 150, 8), start=0
    )
    whole, cut = np.eye(150), np.eye(150)
    for _ in range(3):
        roll(layer.mean(range(150)), 0, whole)
        for rows in (range(97, 150), range(13, 97), range(13)):
            roll(layer.mean(rows), rows.start, cut)
    assert (whole == cut).all()
    assert abs(whole.sum(1) - 1).max() < 1e-12
    assert (np.triu(whole, 1) == 0).all()
