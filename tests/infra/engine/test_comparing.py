"""The KL divergence of what was from what is, over as many tokens as are known of what was."""

import math
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from domain.errors import InvalidInput
from domain.ids import TokenId
from domain.work import Comparison, Reference, RowKind
from infra.engine.sampling import comparing, sampler
from infra.engine.sampling.sampler import Row

KINDS: tuple[RowKind, ...] = ("raw", "full", "top_k")
VOCABULARY = 997


def row(seed: int, size: int = VOCABULARY, scale: float = 4.0) -> Row:
    values = np.random.Generator(np.random.Philox(seed)).normal(0, scale, size)
    return values.astype(np.float32)


def reference(logits: Row, token: int, kind: RowKind | None = None, k: int = 20) -> Reference:
    measures = sampler.measure(logits, TokenId(token))
    return Reference(
        token_id=TokenId(token),
        logprob=measures.logprob,
        logsumexp=measures.logsumexp,
        rank=measures.rank,
        kind=kind,
        row=comparing.pack(logits, kind, k) if kind else None,
    )


def compare(was: Reference, now: Row) -> Comparison:
    return comparing.compare(was, now, sampler.measure(now, TokenId(0)).logsumexp)


def grouped(was: Row, now: Row, known: list[int] | None = None) -> float:
    """The divergence by torch; over these tokens, and all others as one."""
    logprobs = [torch.from_numpy(one).double().log_softmax(-1) for one in (now, was)]
    if known is not None:
        rest = torch.ones(len(was), dtype=torch.bool)
        rest[known] = False
        logprobs = [torch.cat([one[known], one[rest].logsumexp(0)[None]]) for one in logprobs]
    found = torch.nn.functional.kl_div(*logprobs, reduction="sum", log_target=True)
    return float(found)


# against torch


@pytest.mark.parametrize("kind", ["raw", "full"])
@pytest.mark.parametrize("noise", [0.0, 1e-6, 0.01, 1.0, 8.0])
def test_over_all_tokens_it_is_the_divergence_that_torch_computes(
    kind: RowKind, noise: float
) -> None:
    was = row(1)
    now = (was + noise * row(2)).astype(np.float32)
    found = compare(reference(was, 3, kind), now)
    assert found.exact
    assert found.kl == pytest.approx(grouped(was, now), abs=1e-9, rel=1e-9)
    assert (found.kl > 0) == (noise > 0)


@settings(max_examples=30)
@given(
    seeds=st.tuples(st.integers(0, 999), st.integers(0, 999)),
    scale=st.floats(0.01, 30),
    size=st.integers(2, 600),
    k=st.integers(1, 40),
    token=st.integers(0, 599),
)
def test_over_some_tokens_it_is_that_of_torch_with_all_others_as_one_and_never_more_than_the_whole(
    seeds: tuple[int, int], scale: float, size: int, k: int, token: int
) -> None:
    was, now = (row(seed, size, scale) for seed in seeds)
    token %= size
    top = [int(one) for one in sampler.largest(was, k)]
    whole = compare(reference(was, token, "raw"), now).kl
    some = compare(reference(was, token, "top_k", k), now)
    one = compare(reference(was, token), now)
    assert whole == pytest.approx(grouped(was, now), abs=1e-9, rel=1e-9)
    assert not some.exact
    assert not one.exact
    if {*top, token} != set(range(size)):
        assert some.kl == pytest.approx(grouped(was, now, [*{*top, token}]), abs=1e-9, rel=1e-9)
    assert one.kl == pytest.approx(grouped(was, now, [token]), abs=1e-9, rel=1e-9)
    assert one.kl <= some.kl + 1e-9 <= whole + 2e-9


# the same


@pytest.mark.parametrize("kind", [*KINDS, None])
@pytest.mark.parametrize("seed", range(5))
def test_of_a_row_from_itself_it_is_exactly_0(kind: RowKind | None, seed: int) -> None:
    logits = row(seed, 50 + seed * 211, 6.0)
    for token in (0, 7, int(logits.argmax())):
        assert compare(reference(logits, token, kind), logits).kl == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_the_smallest_change_of_a_likely_logit_shows(kind: RowKind) -> None:
    was = row(1)
    now = was.copy()
    now[was.argmax()] = np.nextafter(was.max(), np.float32(0), dtype=np.float32)
    assert 0 < compare(reference(was, 3, kind), now).kl < 1e-9


# the ends of float64


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("far", [800.0, 1e30, math.inf])
def test_where_probabilities_underflow_it_is_finite_and_not_negative(
    kind: RowKind, far: float
) -> None:
    was = np.array([0.0, 1.0, -far, -far], np.float32)
    now = np.array([-far, -far, 0.0, 1.0], np.float32)
    for token in range(4):
        logprob = max(float(was[token]) - float(np.logaddexp(0, 1)), -1e300)
        told = Reference(
            token_id=TokenId(token),
            logprob=logprob,
            logsumexp=float(np.logaddexp(0, 1)),
            kind=kind,
            row=comparing.pack(was, kind, 2),
        )
        found = comparing.compare(told, now, float(np.logaddexp(0, 1)))
        assert math.isfinite(found.kl)
        assert found.kl > 700
        assert compare(told, was).kl == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("far", [5.0, 30.0, 36.0, 100.0, 600.0])
def test_a_rest_too_small_for_sums_of_float64_is_measured_all_the_same(far: float) -> None:
    was = np.array([0.0, 0.0, -1.0], np.float32)
    now = np.array([0.0, -far, -far], np.float32)
    assert compare(reference(was, 0), now).kl == pytest.approx(grouped(was, now, [0]), rel=1e-9)


# the likeliest


@pytest.mark.parametrize("kind", KINDS)
def test_the_likeliest_are_those_with_the_largest_logit_and_of_equals_the_lowest_id(
    kind: RowKind,
) -> None:
    was = np.array([1.0, 3.0, 3.0, 0.0], np.float32)
    now = np.array([2.0, 0.0, 5.0, 5.0], np.float32)
    assert compare(reference(was, 3, kind), now).greedy == (1, 2)


@pytest.mark.parametrize(("token", "likeliest"), [(0, None), (1, 1), (2, None)])
def test_without_a_row_the_likeliest_is_known_where_it_is_the_token(
    token: int, likeliest: int | None
) -> None:
    was = np.array([1.0, 3.0, 3.0], np.float32)
    assert compare(reference(was, token), was).greedy == (likeliest, 1)


# rows that are kept


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("top_k", sampler.pack_top_k(row(4), 9)), ("full", sampler.pack_full(row(4)))],
)
def test_a_row_is_kept_as_stored_logits_are(kind: RowKind, expected: bytes) -> None:
    assert comparing.pack(row(4), kind, 9) == expected


def test_a_raw_row_is_its_floats() -> None:
    assert np.array_equal(np.frombuffer(comparing.pack(row(4), "raw", 0), "<f4"), row(4))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(600, 640), (640, 600)])
def test_of_another_width_all_tokens_that_both_have_are_held_against_each_other(
    kind: RowKind, sizes: tuple[int, int]
) -> None:
    was, now = row(1, sizes[0]), row(2, sizes[1])
    was[:3] += 20  # tokens that both have
    found = compare(reference(was, 0, kind, k=700), now)
    assert not found.exact
    assert found.greedy == (was.argmax(), now.argmax())
    q, p = (torch.from_numpy(one).double().log_softmax(-1) for one in (now, was))
    expected = float((p[:600].exp() * (p[:600] - q[:600])).sum())
    if len(p) > 600:
        rest = p[600:].logsumexp(0)
        expected += float(rest.exp() * (rest + 708))  # what has become of it has no mass
    assert found.kl == pytest.approx(expected, abs=1e-9)


BROKEN: dict[str, tuple[RowKind, Any]] = {
    "raw, cut": ("raw", row(1).tobytes()[:-1]),
    "raw, empty": ("raw", b""),
    "raw, not numbers": ("raw", np.full(9, np.nan, np.float32).tobytes()),
    "raw, infinite": ("raw", np.full(9, np.inf, np.float32).tobytes()),
    "full, not compressed": ("full", row(1).tobytes()),
    "full, cut in a float": ("full", zlib.compress(row(1).tobytes()[:-1])),
    "top_k, cut": ("top_k", sampler.pack_top_k(row(1), 9)[:-3]),
    "top_k, empty": ("top_k", b""),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_row_that_is_none_is_refused(name: str) -> None:
    kind, data = BROKEN[name]
    told = Reference(token_id=TokenId(0), logprob=-1.0, logsumexp=1.0, kind=kind, row=data)
    with pytest.raises(InvalidInput, match=f"no {kind} row"):
        compare(told, row(2))
