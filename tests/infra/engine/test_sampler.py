"""From logits to a token: a pure function, with transformers' filters."""

import hashlib
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from domain.config import SamplingParameters
from domain.ids import MAX_SEED, TokenId
from infra.engine.sampling import sampler
from infra.engine.sampling.sampler import Row, draw, largest, measure, uniform

TOLERANCE = 1e-9
NEAR = 1e-9


def to_3_places(value: float) -> float:
    """Such that scores that differ do so after a softmax in double precision too."""
    return round(value, 3)


anything = st.floats(-20, 20).map(to_3_places)
few_values = st.sampled_from([-1.0, 0.0, 0.5, 2.0])  # full of ties
or_ruled_out = st.one_of(anything, st.just(-np.inf))
rows = st.one_of(
    st.lists(anything, min_size=2, max_size=40), st.lists(few_values, min_size=2, max_size=40)
).map(lambda values: np.array(values, np.float32))
processed = st.one_of(
    rows,
    st.lists(or_ruled_out, min_size=2, max_size=40)
    .filter(lambda values: max(values) > -np.inf)
    .map(lambda values: np.array(values, np.float32)),
)
seeds = st.integers(0, MAX_SEED)
samplings = st.builds(
    SamplingParameters,
    temperature=st.one_of(st.sampled_from([0.7, 1.0]), st.floats(0.05, 5)),
    top_k=st.integers(0, 45),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
    min_p=st.one_of(st.just(0.0), st.floats(0, 1)),
    typical_p=st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
)


def sampling(
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    typical_p: float = 1.0,
) -> SamplingParameters:
    return SamplingParameters(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, typical_p=typical_p
    )


def normal_row(count: int, spread: float, seed: int = 0) -> Row:
    return np.random.default_rng(seed).normal(0, spread, count).astype(np.float32)


def warped(warper: LogitsProcessor, scores: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = warper(torch.zeros(1, 1, dtype=torch.long), scores[None])[0]
    return found


class Reference:
    """What the warpers of transformers make of a row: the sets of tokens that may be kept.

    They are one set but where a mass or a probability is this close to where it is cut: there
    either is right. From ``top_p`` on everything is in double precision.
    """

    def __init__(self, scores: Row, parameters: SamplingParameters) -> None:
        tensor = warped(TemperatureLogitsWarper(parameters.temperature), torch.from_numpy(scores))
        if parameters.top_k:
            tensor = warped(TopKLogitsWarper(parameters.top_k), tensor)
        self._parameters = parameters
        self.weights = torch.softmax(tensor.double(), -1).numpy()
        self.kept = {
            frozenset(torch.isfinite(typical).nonzero()[:, 0].tolist())
            for likely in self._likely(tensor.double())
            for above in self._above(likely)
            for typical in self._typical(above)
        }

    def _likely(self, scores: torch.Tensor) -> Iterator[torch.Tensor]:
        """With ``top_p``; of equals the lower ids are kept, where transformers' sort decides."""
        top_p = self._parameters.top_p
        if top_p == 1:
            yield scores
            return
        cuts = (top_p - NEAR, min(top_p + NEAR, 1))
        counts = [int(torch.isfinite(warped(TopPLogitsWarper(cut), scores)).sum()) for cut in cuts]
        order = torch.argsort(-scores, stable=True)
        for count in range(counts[0], counts[1] + 1):
            yield scores.index_fill(0, order[count:], -torch.inf)

    def _above(self, scores: torch.Tensor) -> Iterator[torch.Tensor]:
        min_p = self._parameters.min_p
        for cut in {max(min_p - NEAR, 0), min(min_p + NEAR, 1)} if min_p else {0}:
            yield warped(MinPLogitsWarper(cut), scores)

    def _typical(self, scores: torch.Tensor) -> Iterator[torch.Tensor]:
        typical_p = self._parameters.typical_p
        for cut in (typical_p - NEAR, typical_p + NEAR):
            yield scores if typical_p == 1 else warped(TypicalLogitsWarper(cut), scores)

    def agrees(self, probabilities: dict[int, float]) -> bool:
        """Whether drawn tokens and their probabilities are those of some allowed set."""
        return any(self._agrees(probabilities, kept) for kept in self.kept)

    def _agrees(self, probabilities: dict[int, float], kept: frozenset[int]) -> bool:
        total = self.weights[list(kept)].sum()
        return probabilities.keys() <= kept and all(
            abs(probability - self.weights[token] / total) < TOLERANCE
            for token, probability in probabilities.items()
        )


def drawn(logits: Row, parameters: SamplingParameters, seed: int, count: int) -> dict[int, float]:
    draws = [draw(logits, parameters, seed, position) for position in range(count)]
    probabilities: dict[int, float] = {each.token_id: each.probability for each in draws}
    assert all(probabilities[each.token_id] == each.probability for each in draws)
    return probabilities


@settings(max_examples=250, deadline=None)
@given(processed, samplings, seeds)
@example(np.array([2, 1, 1, 0, 0, 0, 0], np.float32), sampling(typical_p=0.5), 0)
@example(np.array([20, 1, 1, 0], np.float32), sampling(min_p=1.0, typical_p=0.5), 0)
def test_support_and_probabilities_are_those_of_transformers(
    scores: Row, parameters: SamplingParameters, seed: int
) -> None:
    assert Reference(scores, parameters).agrees(drawn(scores, parameters, seed, 60))


@pytest.mark.parametrize(
    "parameters",
    [
        sampling(0.8),
        sampling(1.3, top_k=50),
        sampling(top_p=0.9),
        sampling(top_p=0.999),
        sampling(1.5, min_p=0.05),
        sampling(typical_p=0.2),
        sampling(3.0, typical_p=0.95),
        sampling(1.5, top_k=900, top_p=0.95, min_p=0.01, typical_p=0.8),
    ],
)
@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0])
def test_a_large_vocabulary_has_the_probabilities_of_transformers_too(
    spread: float, parameters: SamplingParameters
) -> None:
    scores = normal_row(5000, spread)
    assert Reference(scores, parameters).agrees(drawn(scores, parameters, 1, 40))
    scores[::3] = -np.inf
    assert Reference(scores, parameters).agrees(drawn(scores, parameters, 1, 40))


def test_control_the_comparison_with_transformers_can_fail() -> None:
    logits = np.array([2, 1, 0, 0, -1], np.float32)
    found = drawn(logits, sampling(), 0, 60)
    assert Reference(logits, sampling()).agrees(found)
    assert Reference(logits, sampling(top_k=3)).kept == {frozenset({0, 1, 2, 3})}  # keeps ties
    for other in (
        sampling(0.9),
        sampling(top_k=2),
        sampling(top_p=0.5),
        sampling(min_p=0.2),
        sampling(typical_p=0.5),
    ):
        assert not Reference(logits, other).agrees(found)


def test_every_token_that_is_kept_can_be_drawn_and_the_probabilities_add_to_one() -> None:
    scores = normal_row(30, 1.0)
    for parameters in (sampling(min_p=0.1), sampling(typical_p=0.7), sampling(2.0, 12, 0.9, 0.2)):
        found = drawn(scores, parameters, 0, 3000)
        assert {frozenset(found)} == Reference(scores, parameters).kept
        assert sum(found.values()) == pytest.approx(1, abs=1e-12)


def test_typical_tokens_may_leave_the_likeliest_out() -> None:
    scores = np.log(np.array([0.3, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05], np.float32))
    assert drawn(scores, sampling(typical_p=0.5), 0, 300).keys() == {1, 2, 3, 4, 5, 6}
    assert drawn(scores, sampling(typical_p=0.7), 0, 300).keys() == {0, 1, 2, 3, 4, 5, 6}


def test_top_k_keeps_ties_and_top_p_the_token_that_reaches_it() -> None:
    logits = np.log(np.array([0.4, 0.2, 0.2, 0.1, 0.1], np.float32))
    assert drawn(logits, sampling(top_k=2), 0, 200).keys() == {0, 1, 2}
    assert drawn(logits, sampling(top_p=0.3), 0, 200).keys() == {0}
    assert drawn(logits, sampling(top_p=0.5), 0, 200).keys() == {0, 1}  # of two equals the lower
    assert drawn(logits, sampling(top_p=0.85), 0, 200).keys() == {0, 1, 2, 3}
    assert drawn(logits, sampling(top_k=1, top_p=0.1), 0, 200) == {0: 1.0}
    assert drawn(np.zeros(4, np.float32), sampling(top_p=0.5), 0, 200) == {0: 0.5, 1: 0.5}


@given(processed)
@example(np.array([1, 3, 3, 2], np.float32))
def test_temperature_zero_takes_the_largest_and_of_equals_the_lowest_id(logits: Row) -> None:
    choice = draw(logits, sampling(0.0, top_k=3, top_p=0.1), 5, 9)
    assert choice.token_id == logits.tolist().index(max(logits.tolist()))
    assert choice.probability == 1.0


@given(rows, st.floats(0, 1e-6, exclude_min=True), seeds)
@example(np.array([20, -20], np.float32), 5e-324, 0)
def test_the_smallest_temperatures_draw_among_the_largest_alone(
    logits: Row, temperature: float, seed: int
) -> None:
    top = np.sort(logits)[::-1]
    assume(all(gap == 0 or gap > 1e-3 for gap in (top[0] - top).tolist()))
    choice = draw(logits, sampling(temperature), seed, 3)
    assert logits[choice.token_id] == logits.max()
    assert choice.probability == pytest.approx(1 / np.count_nonzero(logits == logits.max()))


@settings(deadline=None)
@given(rows, samplings, seeds, st.integers(0, 2**40), st.randoms())
def test_a_draw_depends_on_logits_parameters_seed_and_position_alone(
    logits: Row, parameters: SamplingParameters, seed: int, position: int, random: object
) -> None:
    before = logits.copy()
    first = draw(logits, parameters, seed, position)
    np.random.default_rng().random()
    draw(logits[::-1].copy(), parameters, seed + 1, position + 1)
    assert draw(before, parameters, seed, position) == first
    assert logits.tobytes() == before.tobytes()


def test_the_random_numbers_never_change() -> None:
    """Philox 4x64 with the seed as key; a change here makes every recorded draw unverifiable."""
    assert [
        uniform(0, 0),
        uniform(42, 0),
        uniform(42, 1),
        uniform(42, 1000),
        uniform(43, 0),
        uniform(7, 2**40),
        uniform(MAX_SEED, 0),
        uniform(42, 0, branch=1),
    ] == [
        0.011546754286331562,
        0.8201981478608876,
        0.36812845090913937,
        0.42205359532908215,
        0.14007212089728194,
        0.49725446074894275,
        0.40494715267903947,
        0.20650309990981752,
    ]


def test_the_draws_of_a_fixed_row_never_change() -> None:
    logits = (np.arange(50, dtype=np.float32) * 37 % 50) / 10
    tokens = [draw(logits, sampling(0.9, 20, 0.9), 42, position).token_id for position in range(12)]
    assert tokens == [20, 8, 24, 27, 5, 28, 47, 8, 39, 16, 16, 27]


def test_the_fingerprint_sees_random_numbers_draws_measures_and_digests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = sampler.golden()
    assert sampler.golden() == before
    for name in ("uniform", "draw", "measure", "digests"):
        real = getattr(sampler, name)
        with monkeypatch.context() as patched:
            patched.setattr(sampler, name, lambda *given, real=real: _shifted(real(*given)))
            assert sampler.golden() != before, name


def _shifted(result: object) -> object:
    """The smallest change."""
    match result:
        case float():
            return 1 - result
        case sampler.Draw():
            return replace(result, probability=np.nextafter(result.probability, 2))
        case sampler.Measures():
            return replace(result, entropy=np.nextafter(result.entropy, 99))
        case [*digests]:
            return digests[::-1]
    raise AssertionError


def chi_square(tokens: list[int], probabilities: NDArray[np.float64]) -> float:
    counts = Counter(tokens)
    expected = probabilities * len(tokens)
    return float(sum((counts[i] - e) ** 2 / e for i, e in enumerate(expected)))


def test_draws_follow_the_distribution_over_positions_and_over_seeds() -> None:
    logits = normal_row(12, 1.0)
    weights = np.exp(logits.astype(np.float64))
    weights /= weights.sum()
    over_positions = [draw(logits, sampling(), 42, i).token_id for i in range(8000)]
    over_seeds = [draw(logits, sampling(), i, 42).token_id for i in range(8000)]
    assert chi_square(over_positions, weights) < 40  # 11 degrees of freedom
    assert chi_square(over_seeds, weights) < 40
    assert chi_square(over_seeds, np.full(12, 1 / 12)) > 40


def test_uniform_numbers_of_neighbouring_positions_and_branches_are_unrelated() -> None:
    numbers = np.array([[uniform(1, i, branch) for branch in (0, 1)] for i in range(4000)])
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.02
    assert abs(np.corrcoef(numbers[:-1, 0], numbers[1:, 0])[0, 1]) < 0.06
    assert abs(np.corrcoef(numbers[:, 0], numbers[:, 1])[0, 1]) < 0.06


@given(rows, st.integers(1, 50))
def test_the_largest_come_first_and_of_equals_the_lowest_index(logits: Row, count: int) -> None:
    assert largest(logits, count).tolist() == np.argsort(-logits, kind="stable")[:count].tolist()


@settings(deadline=None)
@given(rows, st.integers(0, 39))
def test_measures_are_those_of_a_log_softmax_in_double_precision(logits: Row, token: int) -> None:
    token %= len(logits)
    found = measure(logits, TokenId(token))
    exact = torch.from_numpy(logits).double()
    logprobs = torch.log_softmax(exact, -1)
    assert found.logprob == pytest.approx(logprobs[token].item(), abs=1e-10)
    assert found.logsumexp == pytest.approx(torch.logsumexp(exact, -1).item(), abs=1e-10)
    assert found.entropy == pytest.approx(-(logprobs.exp() * logprobs).sum().item(), abs=1e-10)
    assert found.rank == np.argsort(-logits, kind="stable").tolist().index(token)


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf])
def test_what_is_no_number_is_refused_and_never_drawn_from(bad: float) -> None:
    logits = np.array([1, bad, 3, 2], np.float32)
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="not numbers"):
            draw(logits, sampling(temperature), 0, 0)
    with pytest.raises(ValueError, match="not numbers"):
        measure(logits, TokenId(0))


def test_a_token_that_was_ruled_out_is_never_drawn_and_changes_nothing() -> None:
    logits = np.array([1, -np.inf, 3, 2], np.float32)
    without = np.array([1, 3, 2], np.float32)
    assert 1 not in drawn(logits, sampling(50.0), 0, 200)
    found, expected = measure(logits, TokenId(2)), measure(without, TokenId(1))
    assert asdict(found) == pytest.approx(asdict(expected), abs=1e-15)


@given(st.lists(st.just(-np.inf), min_size=1, max_size=40), samplings)
def test_where_every_token_was_ruled_out_the_error_says_so(
    scores: list[float], parameters: SamplingParameters
) -> None:
    for each in (parameters, sampling(0.0)):
        with pytest.raises(sampler.NothingLeft):
            draw(np.array(scores, np.float32), each, 0, 0)


@settings(deadline=None)
@given(processed, samplings, seeds)
def test_what_was_ruled_out_is_never_drawn(
    scores: Row, parameters: SamplingParameters, seed: int
) -> None:
    found = drawn(scores, parameters, seed, 20)
    assert np.isfinite(scores[list(found)]).all()


def test_each_branch_draws_with_numbers_of_its_own() -> None:
    scores = normal_row(1000, 1.0)
    branches = [[draw(scores, sampling(), 7, i, branch) for i in range(20)] for branch in range(9)]
    assert branches[0] == [draw(scores, sampling(), 7, i) for i in range(20)]
    assert len({tuple(each.token_id for each in branch) for branch in branches}) == 9
    flat = np.zeros(1000, np.float32)
    for branch in range(9):
        assert draw(flat, sampling(), 7, 3, branch).token_id == int(1000 * uniform(7, 3, branch))


def test_a_seed_below_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="seed"):
        uniform(-1, 0)


def test_the_digest_is_of_the_bytes_of_the_row() -> None:
    logits = np.arange(4, dtype=np.float32)
    assert sampler.digest(logits) == "47ade8f7ab29454c"
    stored = bytes.fromhex("000000000000803f0000004000004040")
    assert hashlib.blake2b(stored, digest_size=8).hexdigest() == "47ade8f7ab29454c"
    assert sampler.digest(logits.astype(">f4")) == "47ade8f7ab29454c"
    assert sampler.digest(np.array([-0.0, 1, 2, 3], np.float32)) != "47ade8f7ab29454c"


@given(rows, st.integers(1, 45))
def test_packed_logits_hold_the_exact_bits(logits: Row, k: int) -> None:
    assert zlib.decompress(sampler.pack_full(logits)) == logits.astype("<f4").tobytes()
    packed, k = sampler.pack_top_k(logits, k), min(k, len(logits))
    ids = np.frombuffer(packed[: 4 * k], "<i4")
    assert ids.tolist() == np.argsort(-logits, kind="stable")[:k].tolist()
    assert packed[4 * k :] == logits[ids].astype("<f4").tobytes()


def test_the_layout_of_packed_logits_never_changes() -> None:
    packed = sampler.pack_top_k(np.array([1, 5, 5, -2], np.float32), 2)
    assert packed.hex() == "01000000020000000000a0400000a040"
