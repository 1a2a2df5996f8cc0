"""Too little memory, cancelled work and failing jobs: nothing leaks and no result changes."""

import asyncio
from pathlib import Path
from random import Random
from typing import Any

import pytest

from domain.work import Redraw
from infra.engine.engine import Engine
from infra.engine.language_model import TransformersModel
from tests.infra.engine import small_models
from tests.infra.engine.asking import WARM, drawing, request, score, steps
from tests.infra.engine.bench import held_at_next_pass, text
from tests.infra.engine.small_models import CONTEXT

BLOCK_BYTES = 16_384
ONE_TEXT = (CONTEXT // 32 + 1) * BLOCK_BYTES


@pytest.fixture(scope="module")
def roomy(engine: Engine, folders: dict[str, str | Path]) -> TransformersModel:
    return small_models.language_model(folders["llama"], engine)


@pytest.fixture(scope="module")
def cramped(engine: Engine, folders: dict[str, str | Path]) -> TransformersModel:
    """The same model with room for one full text in its cache."""
    return small_models.language_model(folders["llama"], engine, hot_cache_bytes=ONE_TEXT)


async def assert_nothing_is_held(model: TransformersModel) -> None:
    await model.forget()  # comes after what was asked of the engine before
    counters = model.counters()
    assert (counters.blocks_held, counters.sequences, counters.blocks_cached) == (0, 0, 0)


async def test_a_cache_for_one_text_serves_many_with_the_results_of_a_large_one(
    cramped: TransformersModel, roomy: TransformersModel
) -> None:
    assert cramped.counters().blocks_capacity == CONTEXT // 32
    random = Random(0)
    asked = []
    for i in range(12):
        prompt = text(i % 7, random.randint(20, 150))
        asked.append(request(prompt, random.randint(5, CONTEXT - 150), seed=i))
    expected = await asyncio.gather(*(steps(roomy, each) for each in asked))
    got = await asyncio.gather(*(steps(cramped, each) for each in asked))
    assert got == expected
    assert cramped.counters().evictions > 0
    assert roomy.counters().evictions == 0
    assert cramped.fingerprint == roomy.fingerprint
    await assert_nothing_is_held(cramped)


async def test_texts_that_begin_alike_share_blocks_in_a_cramped_cache_too(
    cramped: TransformersModel, roomy: TransformersModel
) -> None:
    await cramped.forget()
    hits = cramped.counters().hits
    begun = text(50, 96)
    for seed in range(4):
        asked = request([*begun, seed], 8, seed=seed)
        assert await steps(cramped, asked) == await steps(roomy, asked)
    assert cramped.counters().hits == hits + 9
    await assert_nothing_is_held(cramped)


async def test_many_continuations_of_one_cold_prompt_compute_it_once(
    cramped: TransformersModel, roomy: TransformersModel
) -> None:
    prompt = text(51, 128)
    asked = [request(prompt, 20, seed=seed) for seed in range(16)]
    expected = [await steps(cramped, each) for each in asked]
    before = roomy.counters()
    assert await asyncio.gather(*(steps(roomy, each) for each in asked)) == expected
    after = roomy.counters()
    assert (after.misses - before.misses, after.hits - before.hits) == (4, 15 * 4)
    await assert_nothing_is_held(roomy)
    assert roomy.counters().blocks_free == roomy.counters().blocks_capacity


async def test_closing_a_generation_at_any_step_frees_its_blocks(
    roomy: TransformersModel,
) -> None:
    asked = request(text(4, 50), 20)
    whole = await steps(roomy, asked)
    assert len(whole) == 20
    for taken in (1, 2, 7, 19, 20):
        generation = roomy.generate(asked)
        first = [await anext(generation) for _ in range(taken)]
        await generation.aclose()
        assert first == whole[:taken]
        await assert_nothing_is_held(roomy)


@pytest.mark.parametrize("seed", range(4))
async def test_cancelling_tasks_at_random_moments_leaves_nothing_behind(
    cramped: TransformersModel, roomy: TransformersModel, seed: int
) -> None:
    random = Random(seed)
    asked = [request(text(70 + i, random.randint(5, 100)), 60, seed=i) for i in range(5)]
    with held_at_next_pass(cramped, before=random.randint(1, 20)) as held:
        tasks: list[asyncio.Task[Any]] = [
            *(asyncio.create_task(steps(cramped, each)) for each in asked),
            asyncio.create_task(score(cramped, text(60, 150), 1)),
        ]
        assert await asyncio.to_thread(held.begun.wait, 60)
        for place, task in enumerate(random.sample(tasks, len(tasks))):
            if place == 2:
                held.goes_on.set()
            task.cancel()
            await asyncio.sleep(0)
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert any(isinstance(each, asyncio.CancelledError) for each in ended)
    await assert_nothing_is_held(cramped)
    after = request(text(61, 40), 10)
    assert await steps(cramped, after) == await steps(roomy, after)


async def test_a_job_that_fails_fails_alone(roomy: TransformersModel) -> None:
    asked = request(text(4, 40), 20)
    expected = await steps(roomy, asked)
    broken = Redraw(start=30, stop=31, drawing=drawing(WARM, seed=-1))  # no random numbers for it
    failed, made = await asyncio.gather(
        score(roomy, text(5, 40), 1, broken), steps(roomy, asked), return_exceptions=True
    )
    assert isinstance(failed, ValueError)
    assert made == expected
    await assert_nothing_is_held(roomy)


async def test_a_forward_pass_that_fails_does_not_stop_the_engine(
    roomy: TransformersModel,
) -> None:
    asked = request(text(4, 40), 20)
    expected = await steps(roomy, asked)
    with pytest.raises(IndexError):
        await score(roomy, [*text(6, 40), 1_000_000, 3], 1)  # the model has no such token
    await assert_nothing_is_held(roomy)
    assert await steps(roomy, asked) == expected
