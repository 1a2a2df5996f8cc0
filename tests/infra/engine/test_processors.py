"""Scores of the next token as a function of the text so far: transformers' processors."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import (
    LogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from domain.config import LogitsParameters, SamplingParameters
from domain.ids import TokenId
from infra.engine.sampling.processors import Processors
from infra.engine.sampling.sampler import Row
from tests.infra.engine.test_sampler import Reference, drawn, samplings, to_3_places

WIDTH = 12

tokens = st.integers(0, WIDTH - 1).map(TokenId)
texts = st.one_of(  # of few tokens: full of repetitions
    st.lists(tokens, min_size=1, max_size=20),
    st.lists(st.integers(0, 2).map(TokenId), min_size=1, max_size=30),
)
scores = st.floats(-20, 20).map(to_3_places) | st.sampled_from([-np.inf, -0.0, 0.0])
rows = st.lists(scores, min_size=WIDTH, max_size=WIDTH).map(lambda row: np.array(row, np.float32))
penalties = st.floats(0.01, 100)
additives = st.floats(-100, 100).map(to_3_places)
biases = st.dictionaries(tokens, additives, max_size=4)
words = st.lists(st.integers(0, 2).map(TokenId), min_size=1, max_size=4).map(tuple)
bad_words = st.lists(words, max_size=5).map(tuple)
sizes = st.integers(0, 6)
masks = st.lists(st.booleans(), min_size=WIDTH, max_size=WIDTH).map(np.array)
parameters = st.builds(
    LogitsParameters,
    logit_bias=biases,
    repetition_penalty=st.just(1.0) | penalties,
    presence_penalty=st.just(0.0) | additives,
    frequency_penalty=st.just(0.0) | additives,
    bad_words_ids=bad_words,
)


def packed(mask: NDArray[np.bool_]) -> NDArray[np.int32]:
    """A mask as ``llguidance`` has it."""
    whole = np.append(mask, np.zeros(-len(mask) % 32, np.bool_))
    return np.packbits(whole, bitorder="little").view(np.int32)


def by_transformers(processor: LogitsProcessor, text: list[TokenId], row: Row) -> Row:
    found: Row = processor(torch.tensor([text]), torch.from_numpy(row.copy())[None])[0].numpy()
    return found


def by_definition(parameters: LogitsParameters, text: list[TokenId], row: Row) -> Row:
    """Presence and frequency penalties, which transformers does not have."""
    counts = np.bincount(text, minlength=len(row))
    amounts = parameters.presence_penalty * (counts > 0) + parameters.frequency_penalty * counts
    return (row - amounts).astype(np.float32)


def in_order(parameters: LogitsParameters, size: int, text: list[TokenId], row: Row) -> Row:
    """All of them, those of transformers as it is called by its own ``generate``."""
    if parameters.logit_bias:
        bias = {(token,): amount for token, amount in parameters.logit_bias.items()}
        row = by_transformers(SequenceBiasLogitsProcessor(bias), text, row)
    if parameters.repetition_penalty != 1:
        penalty = RepetitionPenaltyLogitsProcessor(parameters.repetition_penalty)
        row = by_transformers(penalty, text, row)
    row = by_definition(parameters, text, row)
    if size:
        row = by_transformers(NoRepeatNGramLogitsProcessor(size), text, row)
    if parameters.bad_words_ids:
        bad = [list(word) for word in parameters.bad_words_ids]
        row = by_transformers(NoBadWordsLogitsProcessor(bad), text, row)
    return row


@given(biases, texts, rows)
def test_bias_is_that_of_transformers(
    bias: dict[TokenId, float], text: list[TokenId], row: Row
) -> None:
    parameters = LogitsParameters(logit_bias=bias)
    found = Processors(parameters, text).process(row)
    np.testing.assert_array_equal(found, in_order(parameters, 0, text, row))


@given(penalties, texts, rows)
def test_the_repetition_penalty_is_that_of_transformers(
    penalty: float, text: list[TokenId], row: Row
) -> None:
    parameters = LogitsParameters(repetition_penalty=penalty)
    found = Processors(parameters, text).process(row)
    np.testing.assert_array_equal(found, in_order(parameters, 0, text, row))


@given(additives, additives, texts, rows)
def test_presence_and_frequency_penalties_count_the_whole_text(
    presence: float, frequency: float, text: list[TokenId], row: Row
) -> None:
    parameters = LogitsParameters(presence_penalty=presence, frequency_penalty=frequency)
    found = Processors(parameters, text).process(row)
    np.testing.assert_array_equal(found, by_definition(parameters, text, row))


@given(st.integers(1, 6), texts, rows)
@example(2, [TokenId(1)] * 3, np.zeros(WIDTH, np.float32))
def test_repeated_ngrams_are_ruled_out_as_by_transformers(
    size: int, text: list[TokenId], row: Row
) -> None:
    found = Processors(LogitsParameters(), text, no_repeat_ngram_size=size).process(row)
    expected = by_transformers(NoRepeatNGramLogitsProcessor(size), text, row)
    np.testing.assert_array_equal(found, expected)


@given(bad_words, texts, rows)
@example(((TokenId(1), TokenId(1), TokenId(1)),), [TokenId(1)], np.zeros(WIDTH, np.float32))
def test_bad_words_are_ruled_out_as_by_transformers(
    bad: tuple[tuple[TokenId, ...], ...], text: list[TokenId], row: Row
) -> None:
    parameters = LogitsParameters(bad_words_ids=bad)
    found = Processors(parameters, text).process(row)
    np.testing.assert_array_equal(found, in_order(parameters, 0, text, row))


@settings(max_examples=200)
@given(parameters, sizes, texts, rows, st.none() | masks)
def test_all_together_come_in_the_order_of_transformers(
    parameters: LogitsParameters,
    size: int,
    text: list[TokenId],
    row: Row,
    mask: NDArray[np.bool_] | None,
) -> None:
    processors = Processors(parameters, text, no_repeat_ngram_size=size)
    found = processors.process(row, None if mask is None else packed(mask))
    expected = in_order(parameters, size, text, row)
    if mask is not None:
        expected = np.where(mask, expected, -np.inf)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)


@settings(deadline=None)
@given(parameters, sizes, texts, rows, samplings)
def test_tokens_are_drawn_from_the_distribution_that_all_of_transformers_leave(
    parameters: LogitsParameters,
    size: int,
    text: list[TokenId],
    row: Row,
    sampling: SamplingParameters,
) -> None:
    expected = in_order(parameters, size, text, row)
    assume(np.isfinite(expected).any())
    found = Processors(parameters, text, no_repeat_ngram_size=size).process(row)
    assert Reference(expected, sampling).agrees(drawn(found, sampling, 0, 60))


def test_control_another_order_gives_other_scores() -> None:
    parameters = LogitsParameters(logit_bias={TokenId(0): 1.0}, repetition_penalty=2.0)
    row = np.array([3, 1], np.float32)
    assert Processors(parameters, [TokenId(0)]).process(row).tolist() == [2.0, 1.0]
    assert by_transformers(RepetitionPenaltyLogitsProcessor(2.0), [TokenId(0)], row)[0] + 1 == 2.5


@settings(max_examples=200)
@given(parameters, sizes, texts, st.integers(0, 30), rows)
def test_a_text_pushed_token_by_token_is_one_given_at_once(
    parameters: LogitsParameters, size: int, text: list[TokenId], given_first: int, row: Row
) -> None:
    pushed = Processors(parameters, text[:given_first], no_repeat_ngram_size=size)
    for end, token in enumerate(text[given_first:], given_first + 1):
        pushed.push(token)
        at_once = Processors(parameters, text[:end], no_repeat_ngram_size=size)
        assert pushed.process(row).tobytes() == at_once.process(row).tobytes()


@given(parameters, sizes, texts, texts, rows)
def test_a_copy_and_the_original_go_on_alone(
    parameters: LogitsParameters, size: int, text: list[TokenId], other: list[TokenId], row: Row
) -> None:
    original = Processors(parameters, text, no_repeat_ngram_size=size)
    twin = original.copy()
    for first, second in zip(text, other, strict=False):
        original.push(first)
        twin.push(second)
    common = min(len(text), len(other))
    for processors, end in ((original, text), (twin, other)):
        alone = Processors(parameters, text + end[:common], no_repeat_ngram_size=size)
        assert processors.process(row).tobytes() == alone.process(row).tobytes()


@given(parameters, sizes, st.lists(tokens, max_size=1), rows)
def test_a_row_is_never_written_to(
    parameters: LogitsParameters, size: int, text: list[TokenId], row: Row
) -> None:
    before = row.tobytes()
    row.setflags(write=False)
    Processors(parameters, text, no_repeat_ngram_size=size).process(row)
    assert row.tobytes() == before


def test_where_nothing_changes_the_row_itself_is_handed_on() -> None:
    row = np.zeros(4, np.float32)
    nothing = Processors(LogitsParameters(), [TokenId(1)])
    assert nothing.process(row) is row
    later = Processors(LogitsParameters(bad_words_ids=((TokenId(1), TokenId(2)),)), [])
    assert later.process(row) is row
    later.push(TokenId(1))
    assert later.process(row).tolist() == [0, 0, -np.inf, 0]


@pytest.mark.parametrize("width", [31, 32, 33, 50, 70])
def test_only_what_a_mask_allows_keeps_its_score(width: int) -> None:
    random = np.random.default_rng(width)
    row, mask = random.normal(size=width).astype(np.float32), random.random(width) < 0.5
    processors = Processors(LogitsParameters(), [])
    assert processors.process(row, packed(mask)).tolist() == np.where(mask, row, -np.inf).tolist()
    short = packed(mask[:20])
    assert not np.isfinite(processors.process(row, short)[20:]).any()


def test_in_a_text_held_to_no_repeated_pair_no_pair_comes_twice() -> None:
    random = np.random.default_rng(0)
    text = [TokenId(0)]
    processors = Processors(LogitsParameters(), text, no_repeat_ngram_size=2)
    while np.isfinite(row := processors.process(random.normal(size=6).astype(np.float32))).any():
        text.append(TokenId(int(row.argmax())))
        processors.push(text[-1])
    pairs = list(pairwise(text))
    assert len(set(pairs)) == len(pairs) > 20
