"""A loaded model behind its port: generation and scoring through the engine's thread."""

import asyncio
import zlib
from pathlib import Path

import numpy as np
import pytest

from domain.errors import ModelUnavailable, TooLarge
from domain.ids import TokenId
from infra.engine.blocks import block_keys
from infra.engine.engine import Engine
from infra.engine.language_model import TransformersModel
from infra.engine.sampling.sampler import digest, draw, measure
from tests.infra.engine import small_models
from tests.infra.engine.asking import GREEDY, redraw, request, score, steps, tokens_of
from tests.infra.engine.bench import text

PROMPT = text(0, 70)


async def test_ten_tokens_are_four_and_then_six(tiny: TransformersModel) -> None:
    for seed in range(3):
        ten = await steps(tiny, request(PROMPT, 10, seed=seed))
        four = await steps(tiny, request(PROMPT, 4, seed=seed))
        longer = [*PROMPT, *tokens_of(four)]
        six = await steps(tiny, request(longer, 6, seed=seed))
        assert [s.drawn for s in ten] == [s.drawn for s in (*four, *six)]
        assert [s.position for s in ten] == list(range(70, 80))
        assert "".join(s.text for s in ten) == "".join(s.text for s in (*four, *six))


async def test_equal_text_and_seed_give_equal_tokens_hot_or_cold(tiny: TransformersModel) -> None:
    prompt = text(1, 70)
    cold = await steps(tiny, request(prompt, 20))
    hits = tiny.counters().hits
    hot = await steps(tiny, request(prompt, 20))
    assert tiny.counters().hits == hits + 2
    await tiny.forget()
    rebuilt = await steps(tiny, request(prompt, 20))
    assert tiny.counters().hits == hits + 2
    assert hot == cold == rebuilt


async def test_another_seed_gives_other_tokens(tiny: TransformersModel) -> None:
    prompt = text(2, 20)
    seen = {tuple(tokens_of(await steps(tiny, request(prompt, 8, seed=i)))) for i in range(6)}
    assert len(seen) > 2


async def test_sixteen_at_once_are_each_what_they_are_alone(tiny: TransformersModel) -> None:
    asked = [
        request(
            text(200 + i % 5, 5 + 17 * (i % 5)),
            8 + i,
            seed=i,
            sampling=GREEDY if i % 4 == 0 else request([0], 1).drawing.sampling,
        )
        for i in range(16)
    ]
    await tiny.forget()
    together = await asyncio.gather(*(steps(tiny, each) for each in asked))
    hits = tiny.counters().hits
    for each, among_others in zip(asked, together, strict=True):
        await tiny.forget()
        assert await steps(tiny, each) == among_others
    assert tiny.counters().hits == hits


async def test_scoring_gives_what_was_recorded_when_the_tokens_were_drawn(
    tiny: TransformersModel,
) -> None:
    made = await steps(tiny, request(PROMPT, 30))
    whole = [*PROMPT, *tokens_of(made)]
    scored = await score(tiny, whole, len(PROMPT))
    drawn = [step.drawn for step in made]
    assert scored.scores.logits_digests == tuple(d.logits_digest for d in drawn)
    assert scored.scores.logprobs == tuple(d.logprob for d in drawn)
    assert scored.scores.ranks == tuple(d.rank for d in drawn)
    assert scored.scores.entropies == tuple(d.entropy for d in drawn)
    assert scored.scores.logsumexps == tuple(d.logsumexp for d in drawn)


async def test_private_scoring_recomputes_everything_and_redraws_the_tokens(
    tiny: TransformersModel,
) -> None:
    asked = request(PROMPT, 30, seed=7, store_logits="full")
    made = await steps(tiny, asked)
    whole = [TokenId(t) for t in (*PROMPT, *tokens_of(made))]
    before = tiny.counters()
    assert tiny.tokens_hot(whole) >= 64
    scored = await score(tiny, whole, 70, redraw(70, 30, asked), private=True)
    assert scored.redrawn == tuple(step.drawn for step in made)
    assert (scored.tokens_reused, scored.tokens_computed) == (0, 100)
    assert tiny.counters() == before
    await tiny.forget()
    await score(tiny, whole, 70, private=True)
    assert tiny.counters().blocks_cached == tiny.tokens_hot(whole) == 0


async def test_a_redraw_with_another_seed_draws_other_tokens(tiny: TransformersModel) -> None:
    made = await steps(tiny, request(PROMPT, 20, seed=1))
    whole = [TokenId(t) for t in (*PROMPT, *tokens_of(made))]
    other = redraw(70, 20, request(PROMPT, 20, seed=2))
    scored = await score(tiny, whole, 70, other, private=True)
    assert [d.token_id for d in scored.redrawn] != tokens_of(made)
    assert [d.logits_digest for d in scored.redrawn] == [s.drawn.logits_digest for s in made]


async def test_redraws_with_a_gap_answer_for_their_positions_alone(
    tiny: TransformersModel,
) -> None:
    asked = request(PROMPT, 12)
    made = await steps(tiny, asked)
    whole = [TokenId(t) for t in (*PROMPT, *tokens_of(made))]
    redraws = [redraw(71, 3, asked), redraw(78, 2, asked)]
    scored = await score(tiny, whole, 1, *redraws)
    assert len(scored.scores.logprobs) == len(whole) - 1
    assert scored.redrawn == tuple(made[i].drawn for i in (1, 2, 3, 8, 9))


async def test_a_corrupted_hot_block_misleads_shared_scoring_but_not_private(
    tiny: TransformersModel,
) -> None:
    await tiny.forget()
    tokens = [TokenId(t) for t in text(9, 80)]
    honest = await score(tiny, tokens, 70)
    store = tiny._runner.executor.store
    (block,) = tiny._runner.pool.match(_keys(tiny, tokens)[:1])
    tiny._runner.pool.release([block])
    store.k[:, block] += 1
    misled = await score(tiny, tokens, 70)
    private = await score(tiny, tokens, 70, private=True)
    await tiny.forget()
    healed = await score(tiny, tokens, 70)
    assert misled.tokens_reused == 64
    assert misled.scores.logits_digests != honest.scores.logits_digests
    assert private.scores == honest.scores
    assert healed.scores == honest.scores


def _keys(model: TransformersModel, tokens: list[TokenId]) -> list[bytes]:
    return block_keys(model._root, tokens, limit=len(tokens))


async def test_stored_logits_are_the_row_that_the_digest_names(tiny: TransformersModel) -> None:
    full = await steps(tiny, request(PROMPT, 3, store_logits="full"))
    largest = await steps(tiny, request(PROMPT, 3, store_logits="top_k", top_k_logits=4))
    for whole, part in zip(full, largest, strict=True):
        assert whole.drawn.logits is not None
        assert part.drawn.logits is not None
        row = np.frombuffer(zlib.decompress(whole.drawn.logits), "<f4")
        assert digest(row) == whole.drawn.logits_digest == part.drawn.logits_digest
        ids = np.frombuffer(part.drawn.logits[:16], "<i4")
        assert ids.tolist() == np.argsort(-row, kind="stable")[:4].tolist()
        assert np.frombuffer(part.drawn.logits[16:], "<f4").tolist() == row[ids].tolist()


async def test_the_number_that_decides_a_token_is_that_of_its_absolute_position(
    tiny: TransformersModel,
) -> None:
    asked = request(PROMPT, 6, seed=11, store_logits="full")
    for number, step in enumerate(await steps(tiny, asked)):
        assert step.drawn.logits is not None
        row = np.frombuffer(zlib.decompress(step.drawn.logits), "<f4")
        choice = draw(row, asked.drawing.sampling, 11, len(PROMPT) + number)
        assert choice.token_id == step.drawn.token_id
        assert choice.probability == step.drawn.sampling_probability
        assert measure(row, choice.token_id).logprob == step.drawn.logprob


async def test_alternatives_are_the_likeliest_tokens(tiny: TransformersModel) -> None:
    (step,) = await steps(tiny, request(PROMPT, 1, sampling=GREEDY, top_logprobs=3))
    first, second, third = step.drawn.alternatives
    assert first.token_id == step.drawn.token_id
    assert first.logprob == step.drawn.logprob
    assert first.logprob > second.logprob > third.logprob
    assert (step.drawn.rank, step.drawn.sampling_probability) == (0, 1.0)


async def test_a_generation_ends_at_the_context(tiny: TransformersModel) -> None:
    made = await steps(tiny, request(PROMPT, 10, context_size=73))
    assert [step.finish_reason for step in made] == [None, None, "context_full"]


async def test_a_generation_of_nothing_has_no_steps(tiny: TransformersModel) -> None:
    assert await steps(tiny, request(PROMPT, 0)) == []


async def test_a_text_that_can_never_fit_is_refused_before_any_work(
    tiny: TransformersModel,
) -> None:
    room = tiny.counters().blocks_capacity * tiny.counters().block_tokens
    with pytest.raises(TooLarge, match="KV cache"):
        await steps(tiny, request(PROMPT, room))
    with pytest.raises(TooLarge, match="does not fit"):
        await tiny.encode("a " * 10_000, beginning=True, room=10)


async def test_long_and_short_texts_are_encoded_alike_at_once(tiny: TransformersModel) -> None:
    short = "Once upon a time. "
    texts = [short * 400, short, short * 300, "<|endoftext|>" * 400]
    encoded = await asyncio.gather(
        *(tiny.encode(each, beginning=False, room=100_000) for each in texts * 3)
    )
    for each, tokens in zip(texts * 3, encoded, strict=True):
        assert tiny.fragment([], tokens).text == each


def test_a_cache_too_small_for_one_text_is_refused_with_the_size_it_needs(
    engine: Engine, folders: dict[str, str | Path]
) -> None:
    needed = 7 * 16_384  # 192 tokens are 6 blocks, and block 0 is for padding
    with pytest.raises(ModelUnavailable, match=rf"needs {needed} bytes.*CACHER_HOT_CACHE_BYTES"):
        small_models.language_model(folders["llama"], engine, hot_cache_bytes=needed - 1)
