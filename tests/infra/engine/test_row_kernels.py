"""Draws and measures bit by bit, as plain sorting and summing would have them."""

import math
from fractions import Fraction
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numba.core.dispatcher import Dispatcher

from domain.config import SamplingParameters
from domain.ids import TokenId
from infra.engine.kernels import blake2b, compiling, elementary
from infra.engine.sampling import row_kernels
from infra.engine.sampling.row_kernels import kernels
from infra.engine.sampling.sampler import Draw, Row, draw, measure, uniform

WORDS = st.integers(0, 2**64 - 1)


def ulps(found: float, exact: float) -> float:
    return abs(found - exact) / math.ulp(exact)


# functions


@settings(deadline=None)
@given(st.floats(-708, 708))
@example(0.0)
@example(-0.0)
@example(-708.0)
def test_exp_is_within_two_ulp_of_the_library(x: float) -> None:
    assert ulps(elementary.exp(x), math.exp(x)) <= 2


def test_exp_of_zero_is_one_exactly_and_exp_of_a_sum_is_the_product() -> None:
    assert elementary.exp(0.0) == 1.0
    for i in range(1, 100):
        halves = elementary.exp(-i / 7 / 2) ** 2
        assert ulps(elementary.exp(-i / 7), halves) <= 4


@settings(deadline=None)
@given(st.floats(1, 2.0**60))
@example(1.0)
@example(math.nextafter(1, 2))
@example(math.e)
def test_log_is_within_two_ulp_of_the_library(x: float) -> None:
    assert ulps(elementary.log(x), math.log(x)) <= 2


@settings(deadline=None)
@given(WORDS, WORDS, WORDS)
@example(0, 2**64 - 1, 0)
@example(0, 2**64 - 1, 2**64 - 1)
def test_random_numbers_are_those_of_numpy(seed: int, position: int, branch: int) -> None:
    counter = np.array([position, branch, 0, 0], np.uint64)
    bits = np.random.Philox(key=seed, counter=counter).random_raw()
    assert uniform(seed, position, branch) == (int(bits) >> 11) * 2.0**-53


# the draw


def product_added(weight: int, distance: float, total: float) -> float:
    """``weight * distance + total``, rounded once."""
    return float(Fraction(weight) * Fraction(distance) + Fraction(total))


def mean_in_lanes(weights: dict[int, int], distances: dict[int, float]) -> float:
    """The mean distance, summed as the kernel says it does."""
    lanes = [0.0] * 256
    for token in sorted(weights):
        lane = token % len(lanes)
        lanes[lane] = product_added(weights[token], distances[token], lanes[lane])
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = [low + high for low, high in zip(lanes[:half], lanes[half:], strict=True)]
    return lanes[0] / float(sum(weights.values()))


def typical(weights: dict[int, int], distances: dict[int, float], typical_p: float) -> set[int]:
    """Tokens as near to the mean distance as the one with which they weigh enough."""
    mean = mean_in_lanes(weights, distances)
    gaps = {token: abs(distances[token] - mean) for token in weights}
    order = sorted(weights, key=lambda token: gaps[token])
    sums = accumulate(weights[token] for token in order)
    needed = typical_p * sum(weights.values())
    last = next(token for token, mass in zip(order, sums, strict=True) if mass >= max(needed, 1))
    return {token for token in order if gaps[token] <= gaps[last]}


def by_full_sort(logits: Row, sampling: SamplingParameters, point: float) -> Draw:
    """The definition of a draw, step by step over all tokens."""
    scores = logits / np.float32(max(sampling.temperature, 1e-20))
    order = np.argsort(-scores, kind="stable").tolist()  # ties by lower id
    peak = float(scores[order[0]])
    distances = {token: min(peak - float(scores[token]), 32.0) for token in order}
    exact = {token: elementary.exp(-distance) for token, distance in distances.items()}
    weights = {token: round(weight * 2.0**43) for token, weight in exact.items()}
    kept = order
    if 0 < sampling.top_k < len(order):
        kept = [token for token in kept if scores[token] >= scores[order[sampling.top_k - 1]]]
    if sampling.top_p < 1:
        sums = list(accumulate(weights[token] for token in kept))
        needed = sampling.top_p * sums[-1]
        kept = kept[: 1 + next(i for i, mass in enumerate(sums) if mass >= needed)]
    if sampling.min_p > 0:
        limit = -elementary.log(max(sampling.min_p, 1e-300))
        kept = [token for token in kept if distances[token] <= limit]
    if sampling.typical_p < 1:
        those = typical({token: weights[token] for token in kept}, distances, sampling.typical_p)
        kept = [token for token in kept if token in those]
    sums = list(accumulate(weights[token] for token in kept))
    needed = min(int(point * sums[-1]) + 1, sums[-1])
    token = kept[next(i for i, mass in enumerate(sums) if mass >= needed)]
    return Draw(TokenId(token), exact[token] / (sums[-1] / 2.0**43))


clusters = st.lists(st.sampled_from([-1.0, 0.0, 1e-7, 2e-7, 0.5, 2.0, 30.0]), min_size=1)
anything = st.lists(st.floats(-40, 40, width=32), min_size=1)
ruled_out = st.lists(st.sampled_from([-np.inf, -3.0, 0.25, 1.0]), min_size=1).filter(
    lambda values: max(values) > -np.inf
)
rows = st.one_of(clusters, anything, ruled_out).flatmap(
    lambda values: st.integers(1, 12).map(lambda times: np.array(values * times, np.float32))
)
samplings = st.builds(
    SamplingParameters,
    temperature=st.sampled_from([1e-30, 1e-3, 0.1, 0.7, 1.0, 3.0, 100.0, 1e8]),
    top_k=st.one_of(st.sampled_from([0, 1, 2]), st.integers(0, 400)),
    top_p=st.one_of(st.sampled_from([0.0, 1e-300, 0.9, 1 - 2**-53, 1.0]), st.floats(0, 1)),
    min_p=st.one_of(st.sampled_from([0.0, 0.0, 5e-324, 1e-9, 0.5, 1.0]), st.floats(0, 1)),
    typical_p=st.one_of(st.sampled_from([1.0, 1.0, 1e-300, 0.5, 1 - 2**-53]), st.floats(0, 1)),
)


def assert_drawn_as_by_full_sort(
    logits: Row, sampling: SamplingParameters, seed: int, position: int
) -> None:
    expected = by_full_sort(logits, sampling, uniform(seed, position))
    found = draw(logits, sampling, seed, position)
    assert found.token_id == expected.token_id
    assert found.probability == pytest.approx(expected.probability, rel=1e-15)


@settings(max_examples=400, deadline=None)
@given(rows, samplings, st.integers(0, 2**53 - 1), st.integers(0, 2**40))
def test_a_draw_is_that_of_a_full_sort(
    logits: Row, sampling: SamplingParameters, seed: int, position: int
) -> None:
    assert_drawn_as_by_full_sort(logits, sampling, seed, position)


@settings(deadline=None)
@given(rows, samplings, st.sampled_from([0.0, 2.0**-53, 0.5, 1 - 2.0**-53]))
def test_the_first_and_the_last_number_draw_the_first_and_the_last_token(
    logits: Row, sampling: SamplingParameters, point: float
) -> None:
    temperature = max(sampling.temperature, 1e-20)
    token, _ = kernels().draw(
        logits, int(logits.argmax()), logits.min(), temperature,
        sampling.top_k, sampling.top_p, sampling.min_p, sampling.typical_p, point,
    )  # fmt: skip
    assert token == by_full_sort(logits, sampling, point).token_id


@pytest.mark.parametrize("spread", [0.0, 0.01, 0.5, 3.0, 30.0])
@pytest.mark.parametrize("count", [255, 256, 257, 4096, 9001])
def test_a_draw_from_many_tokens_is_that_of_a_full_sort(count: int, spread: float) -> None:
    logits = np.random.default_rng(count).normal(0, spread, count).astype(np.float32)
    logits[count // 3] += 2 * spread
    for position, (temperature, top_k, top_p, min_p, typical_p) in enumerate(
        [
            (0.7, 0, 0.9, 0.0, 1.0),
            (1.0, 0, 1.0, 0.0, 1.0),
            (1.0, 40, 1.0, 0.0, 1.0),
            (2.0, 3000, 0.5, 0.0, 1.0),
            (0.05, 200, 0.999, 0.0, 1.0),
            (1.5, 0, 1.0, 0.05, 1.0),
            (1.0, 0, 1.0, 0.0, 0.5),
            (2.0, 3000, 0.99, 0.01, 0.9),
        ]
    ):
        sampling = SamplingParameters(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, typical_p=typical_p
        )
        for seed in range(3):
            assert_drawn_as_by_full_sort(logits, sampling, seed, position)


def test_a_vocabulary_that_the_weights_cannot_hold_is_refused() -> None:
    sampling = SamplingParameters(temperature=1.0, top_k=0, top_p=1.0)
    flat = np.zeros(row_kernels.MAX_VOCABULARY + 1, np.float32)
    with pytest.raises(ValueError, match="more than"):
        draw(flat, sampling, 0, 0)
    draws = [draw(flat[1:], sampling, 0, position) for position in range(4)]
    assert {each.probability for each in draws} == {1 / row_kernels.MAX_VOCABULARY}
    assert len({each.token_id for each in draws}) == 4


# the measures


@settings(deadline=None)
@given(st.integers(1, 1100), st.floats(0, 30), st.floats(-1000, 1000), st.integers(0, 2**32))
def test_measures_are_those_of_exact_sums(
    count: int, spread: float, shift: float, seed: int
) -> None:
    random = np.random.default_rng(seed)
    logits = random.normal(shift, spread, count).round(1).astype(np.float32)  # has ties
    token = int(random.integers(count))
    found = measure(logits, TokenId(token))
    values = logits.astype(float).tolist()
    weights = [math.exp(value - max(values)) for value in values]
    total = math.fsum(weights)
    moment = math.fsum(w * (max(values) - x) for w, x in zip(weights, values, strict=True))
    assert found.logsumexp == pytest.approx(max(values) + math.log(total), rel=1e-15, abs=1e-14)
    assert found.entropy == pytest.approx(math.log(total) + moment / total, rel=1e-14, abs=1e-14)
    assert found.logprob == values[token] - found.logsumexp
    assert found.rank == np.argsort(-logits, kind="stable").tolist().index(token)


def parts(function: Any) -> set[str]:
    """The files of a kernel and of everything compiled into it."""
    code, names = function.__code__, function.__globals__
    called = [names.get(name) for name in code.co_names]
    inner = [parts(each.py_func) for each in called if isinstance(each, Dispatcher)]
    return {code.co_filename}.union(*inner)


def test_the_cache_of_compiled_code_knows_every_file_it_comes_from() -> None:
    for module in (row_kernels, blake2b):
        named = {module.__file__, compiling.__file__, elementary.__file__}
        for name, function in vars(module).items():
            if isinstance(function, Dispatcher) or name in ("_draw", "_measure", "_hash"):
                assert parts(getattr(function, "py_func", function)) <= named
