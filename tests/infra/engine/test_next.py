"""What could come next: the raw distribution, and exactly the one that tokens are drawn by."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from domain.analysis.next import Candidate, Distribution, NextFacts
from domain.analysis.parameters import NextParameters
from domain.analysis.result import Result, digest
from domain.config import SamplingParameters, StateConfig
from domain.errors import TooLarge
from domain.ids import TokenId
from infra.engine.analysis.next import Said, distribution
from infra.engine.language_model import TransformersModel
from infra.engine.sampling import sampler
from infra.engine.sampling.sampler import Row
from tests.infra.engine import small_models
from tests.infra.engine.asking import GREEDY, WARM, request, steps
from tests.infra.engine.bench import text

NEAR = 1e-5
CONTEXT = 1024
PROMPT = tuple(map(TokenId, text(0, 70)))
ALL = SamplingParameters(temperature=1.0, top_k=0, top_p=1.0)


async def look(
    model: TransformersModel,
    tokens: tuple[TokenId, ...] = PROMPT,
    sampling: SamplingParameters = ALL,
    *,
    top_k: int = 1000,
    private: bool = False,
) -> Result:
    config = StateConfig(
        **{name: getattr(sampling, name) for name in SamplingParameters.__struct_fields__},
        seed=1,
        context_size=CONTEXT,
        store_logits="none",
        top_k_logits=1,
    )
    return await model.look(tokens, config, NextParameters(top_k=top_k), private=private)


def facts_of(result: Result) -> NextFacts:
    assert isinstance(result.facts, NextFacts)
    return result.facts


def by_id(candidates: tuple[Candidate, ...]) -> dict[int, Candidate]:
    return {each.token_id: each for each in candidates}


def logits_of(result: Result) -> Row:
    (tensor,) = result.tensors
    assert (tensor.name, tensor.dtype, tensor.inline) == ("logits", "float32", False)
    return np.frombuffer(tensor.data, "<f4")


# the raw distribution


@pytest.mark.parametrize("held", [1, 70, CONTEXT])
async def test_the_distribution_is_that_of_transformers(tiny: TransformersModel, held: int) -> None:
    tokens = tuple(map(TokenId, text(3, held)))
    result = await look(tiny, tokens)
    found = facts_of(result)
    plain = small_models.read(small_models.CACHER_TINY).model
    with torch.inference_mode():
        logprobs = plain(torch.tensor([tokens])).logits[0, -1].double().log_softmax(-1)
    assert found.position == result.tensors[0].start == held
    assert [each.rank for each in found.top] == list(range(1000))
    listed = torch.tensor([each.token_id for each in found.top])
    told = torch.tensor([each.logprob for each in found.top], dtype=torch.float64)
    assert torch.allclose(told, logprobs[listed], rtol=NEAR, atol=NEAR)
    assert [each.probability for each in found.top] == pytest.approx(told.exp().tolist(), rel=1e-14)
    assert found.entropy == pytest.approx(float(-(logprobs.exp() * logprobs).sum()), rel=NEAR)
    raw = torch.tensor(logits_of(result)).double()
    assert found.logsumexp == pytest.approx(float(raw.logsumexp(-1)), rel=1e-12)
    assert (raw[listed] - found.logsumexp).tolist() == told.tolist()


async def test_one_token_more_than_the_context_is_refused(tiny: TransformersModel) -> None:
    with pytest.raises(TooLarge):
        await look(tiny, tuple(map(TokenId, text(3, CONTEXT + 1))))


async def test_what_comes_next_is_the_same_hot_cold_and_private(tiny: TransformersModel) -> None:
    await tiny.forget()
    cold = await look(tiny)
    hits = tiny.counters().hits
    hot = await look(tiny)
    assert tiny.counters().hits > hits
    before = tiny.counters()
    private = await look(tiny, private=True)
    assert tiny.counters() == before
    assert digest(cold) == digest(hot) == digest(private)
    other = await look(tiny, PROMPT[1:])
    assert digest(other) != digest(cold)


# the distribution of draws


@pytest.mark.parametrize(
    "sampling",
    [
        ALL,
        WARM,
        SamplingParameters(temperature=1.5, top_k=0, top_p=1.0, min_p=0.02, typical_p=0.8),
        SamplingParameters(
            temperature=2.0,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.7,
            presence_penalty=0.5,
            frequency_penalty=0.25,
            logit_bias={TokenId(7): 9.0},
            bad_words_ids=((PROMPT[-1], TokenId(7)), (TokenId(9),)),
        ),
    ],
)
async def test_the_probability_of_a_token_is_the_one_that_its_draw_records(
    tiny: TransformersModel, sampling: SamplingParameters
) -> None:
    found = facts_of(await look(tiny, sampling=sampling))
    listed = by_id(found.top) | by_id(found.sampled)
    drawn = set()
    for seed in range(30):
        (step,) = await steps(tiny, request(PROMPT, 1, sampling=sampling, seed=seed))
        one = listed[step.drawn.token_id]
        assert one.sampling_probability == step.drawn.sampling_probability
        assert (one.logprob, one.rank) == (step.drawn.logprob, step.drawn.rank)
        assert (found.entropy, found.logsumexp) == (step.drawn.entropy, step.drawn.logsumexp)
        drawn.add(step.drawn.token_id)
    assert len(drawn) > 1
    chances = [each.sampling_probability for each in found.sampled]
    assert chances == sorted(chances, reverse=True)
    assert found.sampled_from >= len(drawn)
    if found.sampled_from <= 1000:
        assert len(chances) == found.sampled_from
        assert math.fsum(chances) == pytest.approx(1, abs=1e-9)


async def test_a_greedy_state_has_one_token_to_choose(tiny: TransformersModel) -> None:
    found = facts_of(await look(tiny, sampling=GREEDY, top_k=5))
    (step,) = await steps(tiny, request(PROMPT, 1, sampling=GREEDY))
    (chosen,) = found.sampled
    assert (chosen.token_id, chosen.sampling_probability) == (step.drawn.token_id, 1.0)
    assert found.sampled_from == 1
    assert [each.sampling_probability for each in found.top] == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_tokens_that_are_ruled_out_cannot_be_sampled(tiny: TransformersModel) -> None:
    said = Said(np.array([0.5, 3.0, 1.0, 3.0], np.float32))

    def without(*banned: int) -> Distribution:
        words = tuple((TokenId(token),) for token in banned)
        sampling = SamplingParameters(temperature=1.0, top_k=0, top_p=1.0, bad_words_ids=words)
        return distribution(tiny, said, PROMPT, sampling, 10)

    whole, some, none = without(), without(1, 2), without(0, 1, 2, 3)
    assert [(each.token_id, each.rank) for each in whole.top] == [(1, 0), (3, 1), (2, 2), (0, 3)]
    assert whole.sampled == whole.top
    assert [(each.token_id, each.rank) for each in some.sampled] == [(3, 1), (0, 3)]
    assert (some.sampled_from, none.sampled, none.sampled_from) == (2, (), 0)
    assert [each.sampling_probability for each in none.top] == [0.0] * 4


@given(st.lists(st.integers(-9, 9), min_size=1, max_size=60))
@settings(max_examples=50, deadline=None)
def test_ranks_and_logprobs_are_those_that_a_draw_is_measured_with(values: list[int]) -> None:
    row = np.array(values, np.float32)
    said = Said(row)
    logprobs = said.logprobs(range(len(row)))
    for token in map(TokenId, range(len(row))):
        measures = sampler.measure(row, token)
        assert (logprobs[token], said.ranks[token]) == (measures.logprob, measures.rank)
        assert (said.entropy, said.logsumexp) == (measures.entropy, measures.logsumexp)


scores = st.lists(st.integers(-40, 40).map(lambda v: v / 4), min_size=1, max_size=40)
samplings = st.builds(
    SamplingParameters,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 4.0]),
    top_k=st.integers(0, 45),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
    typical_p=st.floats(0.01, 1),
)


@given(scores, samplings, st.lists(st.integers(0, 2**53 - 1), min_size=5, max_size=5))
@settings(max_examples=200, deadline=None)
def test_a_token_is_drawn_with_its_probability_and_no_other_is(
    values: list[float], sampling: SamplingParameters, seeds: list[int]
) -> None:
    row = np.array(values, np.float32)
    chances = sampler.distribution(row, sampling)
    assert math.fsum(chances) == pytest.approx(1, abs=1e-9)
    for seed in seeds:
        drawn = sampler.draw(row, sampling, seed, 0)
        assert chances[drawn.token_id] == drawn.probability > 0
