"""What a state draws is its own affair: others in the batch, their parameters, cuts, memory."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Final

import pytest
import torch

from domain.config import SamplingParameters
from domain.work import GenerationRequest, Step
from infra.engine.blocks import BLOCK_TOKENS
from infra.engine.engine import Engine
from infra.engine.forward import Prepared
from infra.engine.language_model import TransformersModel
from tests.infra.engine import small_models
from tests.infra.engine.asking import request, steps, tokens_of
from tests.infra.engine.bench import Bench, Gate, text
from tests.infra.engine.small_models import CACHER_TINY, CONTEXT

ROUNDS: Final = 64
OTHERS: Final = 31
PREFIXES: Final = 300


@pytest.fixture(scope="module")
def model(engine: Engine, folders: dict[str, str | Path]) -> TransformersModel:
    """Room for all of them in a batch, but not for all of their blocks in the cache."""
    return small_models.language_model(
        folders["llama"], engine, max_batch=1 + OTHERS, hot_cache_bytes=100 * 16_384
    )


def any_request(random: Random) -> GenerationRequest:
    """Some text, some of it begun by others too, with parameters of its own."""
    tokens = text(random.randrange(5), random.randint(1, 110))
    return request(
        [*tokens, random.randrange(1024)],
        random.randint(1, 30),
        seed=random.randrange(2**53),
        sampling=any_sampling(random),
    )


def any_sampling(random: Random) -> SamplingParameters:
    return SamplingParameters(
        temperature=random.choice((0.0, 0.3, 1.0, 2.0)),
        top_k=random.choice((0, 1, 7, 500)),
        top_p=random.choice((1.0, 0.9, 0.2)),
    )


async def after(delay_s: float, model: TransformersModel, asked: GenerationRequest) -> list[Step]:
    await asyncio.sleep(delay_s)
    return await steps(model, asked)


async def together(
    model: TransformersModel, asked: Sequence[GenerationRequest], random: Random
) -> list[list[Step]]:
    """All of them at once, some a little later than others."""
    delays = [random.choice((0.0, 0.0, 0.01 * random.random())) for _ in asked]
    return await asyncio.gather(
        *(after(delay_s, model, each) for delay_s, each in zip(delays, asked, strict=True))
    )


async def test_a_state_alone_is_what_it_is_at_any_place_among_many(
    model: TransformersModel,
) -> None:
    random = Random(0)
    subject = request(text(1, 75), 25, seed=11)
    alone = await steps(model, subject)
    assert len(set(tokens_of(alone))) > 5
    before = model.counters()
    for _ in range(ROUNDS):
        if random.random() < 0.3:
            await model.forget()
        asked = [any_request(random) for _ in range(random.randint(1, OTHERS))]
        place = random.randint(0, len(asked))
        made = await together(model, [*asked[:place], subject, *asked[place:]], random)
        assert made[place] == alone
    after = model.counters()
    assert after.hits > before.hits
    assert after.evictions > before.evictions


async def test_each_of_many_is_what_it_is_alone(model: TransformersModel) -> None:
    random = Random(1)
    asked = [any_request(random) for _ in range(OTHERS)]
    made = await together(model, asked, random)
    await model.forget()
    for each, among_others in zip(asked, made, strict=True):
        assert await steps(model, each) == among_others


async def test_the_parameters_of_a_neighbour_change_no_token(model: TransformersModel) -> None:
    random = Random(2)
    prompt = text(3, 40)
    subject = request(prompt, 20, seed=1)
    alone = await steps(model, subject)
    seen = set()
    for _ in range(8):
        asked = [
            request(prompt, 20, seed=random.choice((1, 2)), sampling=any_sampling(random))
            for _ in range(7)
        ]
        made = await together(model, [*asked[:4], subject, *asked[4:]], random)
        assert made[4] == alone
        seen |= {tuple(tokens_of(each)) for each in made}
    assert len(seen) > 5


async def test_control_with_plain_kernels_a_state_depends_on_its_neighbours(
    engine: Engine, folders: dict[str, str | Path]
) -> None:
    plain = small_models.language_model(folders["llama"], engine, strategy="plain", max_batch=32)
    random = Random(0)
    subject = request(text(1, 75), 25, seed=11)
    alone = await steps(plain, subject)
    asked = [any_request(random) for _ in range(OTHERS)]
    with Gate(engine) as gate:
        running = asyncio.gather(*(steps(plain, each) for each in [*asked, subject]))
        await gate.asked(OTHERS + 1)
    made = await running
    digests, among_others = (
        [step.drawn.logits_digest for step in each] for each in (alone, made[-1])
    )
    assert digests != among_others


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_prefill_may_be_cut_anywhere_around_the_edges_of_blocks(
    folders: dict[str, str | Path], dtype: torch.dtype, threads: int
) -> None:
    prepared = small_models.prepared(folders["mistral"], dtype, threads=threads)
    tokens = text(4, 3 * BLOCK_TOKENS + 2)
    expected = Bench(prepared).compute(tokens)
    around = range(-2, 3)
    for first in (BLOCK_TOKENS + i for i in around):
        for second in (2 * BLOCK_TOKENS + i for i in around):
            bench = Bench(prepared)
            cuts = [first, second - first, len(tokens) - second]
            assert bench.compute(tokens, cuts).equal(expected)
            hot = bench.compute(tokens, cuts, first_wanted=first - 1)
            assert bench.pool.hits == int(first >= BLOCK_TOKENS)
            assert hot.equal(expected)


@pytest.fixture(scope="module")
def tiny_prepared() -> Prepared:
    return small_models.prepared(CACHER_TINY)


def test_a_decoded_token_is_that_of_a_prefill_for_every_prefix_of_a_long_text(
    tiny_prepared: Prepared,
) -> None:
    tokens = text(5, PREFIXES)
    decoded = Bench(tiny_prepared).compute(tokens, [1] * PREFIXES)
    bench = Bench(tiny_prepared, max_rows=PREFIXES)
    for length in range(1, PREFIXES + 1):
        prefill = bench.compute(tokens[:length], first_wanted=length - 1, root=None)
        assert torch.equal(prefill.logits[-1], decoded.logits[length - 1])
    assert torch.equal(prefill.k, decoded.k)
    assert torch.equal(prefill.v, decoded.v)
    assert bench.pool.hits == 0
    assert PREFIXES > CONTEXT
