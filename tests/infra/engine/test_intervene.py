"""What would come next if something were otherwise: what transformers says with hooks."""

import asyncio
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from domain.analysis.intervene import InterveneFacts
from domain.analysis.parameters import (
    Addition,
    CacheParameters,
    HeadAt,
    InterveneParameters,
    NextParameters,
)
from domain.errors import InvalidInput
from infra.engine.engine import Engine
from infra.engine.language_model import TransformersModel
from tests.infra.engine import inside
from tests.infra.engine.asking import request, score, steps
from tests.infra.engine.bench import text
from tests.infra.engine.inside import FAMILIES, NEAR, TEXT, look, values

HEADS = (HeadAt(layer=1, head=0), HeadAt(layer=0, head=1), HeadAt(layer=1, head=2))
REPLACED = {0: 7, 5: 1000, 70: 3}


def vector(width: int, seed: int = 0) -> tuple[float, ...]:
    random = Random(seed)
    return tuple(random.gauss(0, 1) for _ in range(width))


def additions(width: int) -> tuple[Addition, ...]:
    return (
        Addition(layer=1, vector=vector(width), start=10, end=50),
        Addition(layer=0, vector=vector(width, 1)),
        Addition(layer=1, vector=vector(width, 2), start=40),
    )


@pytest.fixture(scope="module")
def llama(engine: Engine, folders: dict[str, str | Path]) -> TransformersModel:
    return inside.loaded(folders["llama"], engine)


async def intervene(
    model: TransformersModel, private: bool = False, **edits: Any
) -> tuple[InterveneFacts, Tensor, Tensor]:
    """What is found, and both rows of logits."""
    result = await look(model, InterveneParameters(**edits), private=private)
    assert isinstance(result.facts, InterveneFacts)
    return result.facts, values(result, "original_logits"), values(result, "edited_logits")


@contextmanager
def edited(plain: Any, heads: tuple[HeadAt, ...], added: tuple[Addition, ...]) -> Iterator[None]:
    """Within, a model of transformers computes as edited."""
    base = plain.base_model
    layers = base.h if hasattr(base, "h") else base.layers
    head_dim = plain.config.hidden_size // plain.config.num_attention_heads

    def silence(module: Any, given: tuple[Tensor], head: int) -> tuple[Tensor]:
        rows = given[0].clone()
        rows[..., head * head_dim : (head + 1) * head_dim] = 0
        return (rows,)

    def add(module: Any, given: tuple[Tensor, ...], addition: Addition) -> tuple[Tensor, ...]:
        rows = given[0].clone()
        rows[:, addition.start : addition.end] += torch.tensor(addition.vector)
        return (rows, *given[1:])

    hooks = []
    for at in heads:
        layer = layers[at.layer]
        projection = layer.attn.c_proj if hasattr(layer, "attn") else layer.self_attn.o_proj
        hooks.append(
            projection.register_forward_pre_hook(
                lambda module, given, head=at.head: silence(module, given, head)
            )
        )
    hooks += [
        layers[each.layer].register_forward_pre_hook(
            lambda module, given, addition=each: add(module, given, addition)
        )
        for each in added
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("family", FAMILIES)
async def test_the_edited_logits_are_those_of_transformers_with_hooks(
    family: str, engine: Engine, folders: dict[str, str | Path], tiny: TransformersModel
) -> None:
    folder = folders[family]
    model = inside.of_family(family, folders, engine, tiny)
    plain = inside.plain(folder)
    added = additions(model.dimensions.width)
    tokens = [REPLACED.get(at, token) for at, token in enumerate(TEXT)]
    original = inside.computed(folder).logits[0, -1]
    for edits in (
        {"replace": REPLACED},
        {"zero_heads": HEADS},
        {"add": added},
        {"replace": REPLACED, "zero_heads": HEADS, "add": added},
    ):
        with edited(plain, edits.get("zero_heads", ()), edits.get("add", ())):
            theirs = inside.computed(folder, tokens if "replace" in edits else TEXT).logits[0, -1]
        facts, before, after = await intervene(model, **edits, top_k=4)
        assert inside.distance(before, original) < NEAR
        assert inside.distance(after, theirs) < NEAR
        assert (theirs - original).abs().max() > 0.1, "the edit changes something"
        now, was = theirs.double().log_softmax(-1), original.double().log_softmax(-1)
        assert facts.kl == pytest.approx(float((now.exp() * (now - was)).sum()), rel=1e-4)
        assert facts.greedy == (int(original.argmax()), int(theirs.argmax()))
        assert facts.greedy_changed == (facts.greedy[0] != facts.greedy[1])
        assert facts.position == len(TEXT)


async def test_both_distributions_are_told_and_how_tokens_moved(llama: TransformersModel) -> None:
    facts, before, after = await intervene(llama, zero_heads=HEADS, top_k=4)
    for row, found in ((before, facts.original), (after, facts.edited)):
        logprobs = row.double().log_softmax(-1)
        expected, ids = logprobs.topk(4)
        assert [each.token_id for each in found.top] == ids.tolist()
        assert [each.logprob for each in found.top] == pytest.approx(expected.tolist(), abs=1e-9)
        assert found.entropy == pytest.approx(float(-(logprobs.exp() * logprobs).sum()), abs=1e-9)
    tops = {each.token_id for each in (*facts.original.top, *facts.edited.top)}
    assert len(tops) > 4, "an edit that leaves the likeliest tokens shows little"
    assert {shift.token_id for shift in facts.shifts} == tops
    assert [shift.edited_rank for shift in facts.shifts[:4]] == [0, 1, 2, 3]
    for shift in facts.shifts:
        for row, logprob, rank in (
            (before, shift.original_logprob, shift.original_rank),
            (after, shift.edited_logprob, shift.edited_rank),
        ):
            assert logprob == pytest.approx(float(row.double().log_softmax(-1)[shift.token_id]))
            assert rank == int((row > row[shift.token_id]).sum())
        content = llama.fragment(TEXT, (shift.token_id,))
        assert (shift.text, shift.bytes) == (content.text, content.bytes_of(0))


async def test_the_original_is_what_comes_next(llama: TransformersModel) -> None:
    facts, _, _ = await intervene(llama, replace={3: 5}, top_k=6)
    coming = (await look(llama, NextParameters(top_k=6))).facts
    assert facts.original.top == coming.top
    assert facts.original.entropy == coming.entropy


async def test_an_edit_of_nothing_changes_nothing(llama: TransformersModel) -> None:
    width = llama.dimensions.width
    for edits in (
        {"replace": {4: TEXT[4]}},
        {"add": (Addition(layer=1, vector=(0.0,) * width),)},
    ):
        facts, before, after = await intervene(llama, **edits)
        assert torch.equal(before, after)
        assert facts.kl == 0
        assert not facts.greedy_changed
        assert facts.original == facts.edited


async def test_bits_are_the_same_hot_cold_private_and_among_others(
    llama: TransformersModel,
) -> None:
    question = InterveneParameters(
        replace={40: 2}, zero_heads=HEADS, add=additions(llama.dimensions.width)
    )
    await llama.forget()
    cold = await look(llama, question)
    before = llama.counters()
    hot = await look(llama, question)
    assert llama.counters().hits > before.hits, "the original is found, not computed again"
    private = await look(llama, question, private=True)
    async with inside.streaming(llama):
        among = await look(llama, question, private=True)
    assert cold == hot == private == among
    other = await look(llama, InterveneParameters(zero_heads=HEADS[:2]))
    assert other != cold


async def test_streams_beside_interventions_draw_what_they_draw_alone(
    llama: TransformersModel,
) -> None:
    asked = [request(text(seed, 40), 40, seed=seed) for seed in range(8)]
    alone = [await steps(llama, each) for each in asked]
    question = InterveneParameters(zero_heads=HEADS, add=additions(llama.dimensions.width))
    edited = [look(llama, question, private=True) for _ in range(4)]
    beside = await asyncio.gather(*(steps(llama, each) for each in asked), *edited)
    assert beside[:8] == alone
    assert all(result == beside[8] for result in beside[9:])


async def test_what_was_edited_is_never_taken_for_the_text(llama: TransformersModel) -> None:
    keys = CacheParameters(layer=1, key_name="k")
    width = llama.dimensions.width
    edit = InterveneParameters(
        add=(Addition(layer=0, vector=(9.0,) * width),), zero_heads=(HeadAt(layer=0, head=0),)
    )
    expected = await score(llama, TEXT, 1, private=True)
    await llama.forget()
    await asyncio.gather(*[look(llama, edit) for _ in range(3)], score(llama, TEXT, 1))
    hits = llama.counters().hits
    assert (await score(llama, TEXT, len(TEXT) - 1)).scores == _last(expected.scores)
    assert llama.counters().hits > hits
    hot, private = await look(llama, keys), await look(llama, keys, private=True)
    assert torch.equal(values(hot, "cache_data"), values(private, "cache_data"))
    assert hot.facts == private.facts


def _last(scores: Any) -> Any:
    return type(scores)(**{name: getattr(scores, name)[-1:] for name in scores.__struct_fields__})


async def test_what_there_is_not_is_refused_by_name(llama: TransformersModel) -> None:
    held, width = len(TEXT), llama.dimensions.width
    right = (0.5,) * width
    largest = struct.unpack("f", b"\xff\xff\x7f\x7f")[0]
    for edits, field, allowed in (
        ({}, "replace", "zero_heads or add"),
        ({"replace": {held: 1}}, f"replace.{held}", f"0 to {held - 1}"),
        ({"replace": {2: 1024}}, "replace.2", "0 to 1023"),
        ({"replace": {2: -1}}, "replace.2", "0 to 1023"),
        ({"zero_heads": (HeadAt(layer=2, head=0),)}, "zero_heads[0].layer", "0 to 1"),
        ({"zero_heads": (*HEADS, HeadAt(layer=1, head=4))}, "zero_heads[3].head", "0 to 3"),
        ({"zero_heads": (*HEADS, HEADS[1])}, "zero_heads[3]", "twice"),
        ({"add": (Addition(layer=2, vector=right),)}, "add[0].layer", "0 to 1"),
        ({"add": (Addition(layer=0, vector=right, start=held),)}, "add[0].start", "0 to"),
        ({"add": (Addition(layer=0, vector=right, start=9, end=9),)}, "add[0].end", "10 to"),
        (
            {"add": (Addition(layer=0, vector=right), Addition(layer=0, vector=right[1:]))},
            "add[1].vector",
            f"must hold {width} numbers",
        ),
        (
            {"add": (Addition(layer=0, vector=(*right[1:], 2 * largest)),)},
            f"add[0].vector[{width - 1}]",
            "too large",
        ),
    ):
        with pytest.raises(InvalidInput, match=allowed) as refused:
            await intervene(llama, **edits)
        assert refused.value.facts["field"] == field


async def test_an_edit_after_which_nothing_is_a_number_is_refused(
    engine: Engine, folders: dict[str, str | Path]
) -> None:
    model = inside.loaded(folders["gpt2"], engine)
    much = Addition(layer=1, vector=(3e38, -3e38) * (model.dimensions.width // 2))
    with pytest.raises(InvalidInput, match="is a number") as refused:
        await intervene(model, add=(much,))
    assert refused.value.facts["field"] == "add"
