"""From logits to a token: a pure function, with transformers' filters."""

import hashlib
import zlib
from collections import Counter
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from domain.config import SamplingParameters
from domain.ids import MAX_SEED, TokenId
from infra.engine import sampler
from infra.engine.sampler import Row, draw, largest, measure, uniform

TOLERANCE = 1e-5
NEAR = 1e-4

anything = st.floats(-20, 20, width=32)
few_values = st.sampled_from([-1.0, 0.0, 0.5, 2.0])  # full of ties
rows = st.one_of(
    st.lists(anything, min_size=2, max_size=40), st.lists(few_values, min_size=2, max_size=40)
).map(lambda values: np.array(values, np.float32))
seeds = st.integers(0, MAX_SEED)
samplings = st.builds(
    SamplingParameters,
    temperature=st.one_of(st.sampled_from([0.7, 1.0]), st.floats(0.05, 5)),
    top_k=st.integers(0, 45),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
)


def sampling(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> SamplingParameters:
    return SamplingParameters(temperature=temperature, top_k=top_k, top_p=top_p)


def normal_row(count: int, spread: float, seed: int = 0) -> Row:
    return np.random.default_rng(seed).normal(0, spread, count).astype(np.float32)


class Reference:
    """What the warpers of transformers make of a row: the sorted tokens and how many are kept."""

    def __init__(self, logits: Row, parameters: SamplingParameters) -> None:
        ids = torch.zeros(1, 1, dtype=torch.long)
        scores = TemperatureLogitsWarper(parameters.temperature)(
            ids, torch.from_numpy(logits)[None]
        )
        if parameters.top_k:
            scores = TopKLogitsWarper(parameters.top_k)(ids, scores)
        weights = torch.softmax(scores[0].double(), -1).numpy()
        self.order = np.argsort(-scores[0].numpy(), kind="stable")  # ties by lower id
        self.sorted = weights[self.order]
        self.counts = {self._kept(scores, top_p) for top_p in self._near(parameters.top_p)}

    def _near(self, top_p: float) -> list[float]:
        """Where the mass is this close to ``top_p``, either is right."""
        return [1.0] if top_p >= 1 else [top_p - NEAR, top_p, min(top_p + NEAR, 1 - 1e-9)]

    def _kept(self, scores: torch.Tensor, top_p: float) -> int:
        if top_p < 1:
            scores = TopPLogitsWarper(top_p)(torch.zeros(1, 1, dtype=torch.long), scores)
        return int(torch.isfinite(scores).sum())

    def agrees(self, probabilities: dict[int, float]) -> bool:
        """Whether drawn tokens and their probabilities are those of some allowed count."""
        counts = range(min(self.counts), max(self.counts) + 1)
        return any(self._agrees(probabilities, count) for count in counts)

    def _agrees(self, probabilities: dict[int, float], count: int) -> bool:
        kept = self.sorted[:count] / self.sorted[:count].sum()
        expected = dict(zip(self.order[:count].tolist(), kept.tolist(), strict=True))
        unseen = sum(p for token, p in expected.items() if token not in probabilities)
        return (
            probabilities.keys() <= expected.keys()
            and all(abs(p - expected[token]) < TOLERANCE for token, p in probabilities.items())
            and abs(1 - sum(probabilities.values()) - unseen) < TOLERANCE
        )


def drawn(logits: Row, parameters: SamplingParameters, seed: int, count: int) -> dict[int, float]:
    draws = [draw(logits, parameters, seed, position) for position in range(count)]
    probabilities = {each.token_id: each.probability for each in draws}
    assert all(probabilities[each.token_id] == each.probability for each in draws)
    return probabilities


@settings(max_examples=150, deadline=None)
@given(rows, samplings, seeds)
def test_support_and_probabilities_are_those_of_transformers(
    logits: Row, parameters: SamplingParameters, seed: int
) -> None:
    probabilities = drawn(logits, parameters, seed, 60)
    assert Reference(logits, parameters).agrees(probabilities)


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from([0.01, 1.0, 4.0]),
    st.sampled_from([0, 50, 2000]),
    st.sampled_from([0.1, 0.9, 0.999, 1.0]),
)
def test_a_large_vocabulary_has_the_probabilities_of_transformers_too(
    spread: float, top_k: int, top_p: float
) -> None:
    logits, parameters = normal_row(5000, spread), sampling(0.8, top_k, top_p)
    assert Reference(logits, parameters).agrees(drawn(logits, parameters, 1, 40))


def test_control_the_comparison_with_transformers_can_fail() -> None:
    logits = np.array([2, 1, 0, 0, -1], np.float32)
    assert Reference(logits, sampling(top_k=3)).counts == {4}  # top_k keeps ties
    assert not Reference(logits, sampling(top_k=2)).agrees(drawn(logits, sampling(), 0, 60))
    assert not Reference(logits, sampling(0.9)).agrees(drawn(logits, sampling(), 0, 60))
    assert not Reference(logits, sampling(top_p=0.5)).agrees(
        drawn(logits, sampling(top_p=0.9), 0, 60)
    )


def test_top_k_keeps_ties_and_top_p_the_token_that_reaches_it() -> None:
    logits = np.log(np.array([0.4, 0.2, 0.2, 0.1, 0.1], np.float32))
    assert drawn(logits, sampling(top_k=2), 0, 200).keys() == {0, 1, 2}
    assert drawn(logits, sampling(top_p=0.3), 0, 200).keys() == {0}
    assert drawn(logits, sampling(top_p=0.5), 0, 200).keys() == {0, 1}  # of two equals the lower
    assert drawn(logits, sampling(top_p=0.85), 0, 200).keys() == {0, 1, 2, 3}
    assert drawn(logits, sampling(top_k=1, top_p=0.1), 0, 200) == {0: 1.0}
    assert drawn(np.zeros(4, np.float32), sampling(top_p=0.5), 0, 200) == {0: 0.5, 1: 0.5}


@given(rows)
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
