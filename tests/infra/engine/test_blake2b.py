"""Rows hashed together have the digests they have alone."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from infra.engine.kernels import blake2b
from infra.engine.kernels.blake2b import DIGEST_BYTES, LANES, digests


def rows_of(length: int, count: int, seed: int = 0) -> list[NDArray[np.uint8]]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, length), np.uint8))


def expected(rows: list[NDArray[np.uint8]]) -> list[str]:
    return [hashlib.blake2b(row.tobytes(), digest_size=DIGEST_BYTES).hexdigest() for row in rows]


@pytest.mark.parametrize("length", [1, 4, 127, 128, 129, 255, 256, 257, 4096, 20_001])
@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 20])
def test_any_number_of_rows_have_the_digests_of_the_standard_library(
    length: int, count: int
) -> None:
    rows = rows_of(length, count)
    assert digests(rows) == expected(rows)


@settings(deadline=None)
@given(st.integers(1, 700), st.integers(1, LANES), st.integers(0, 2**32))
def test_rows_in_vectors_have_the_digests_of_the_standard_library(
    length: int, count: int, seed: int
) -> None:
    rows = rows_of(length, count, seed)
    assert blake2b._together(rows) == expected(rows)


def test_rows_of_different_lengths_are_hashed_too() -> None:
    rows = [rows_of(length, 1)[0] for length in (1, 128, 5, 128, 300)]
    assert digests(rows) == expected(rows)
    assert digests([]) == []


def test_rows_need_not_lie_at_round_addresses() -> None:
    memory = rows_of(10_000, 1)[0]
    rows = [memory[start : start + 999] for start in range(1, 5000, 611)]
    assert digests(rows) == expected(rows)


def test_one_changed_bit_anywhere_changes_the_digest_of_its_row_alone() -> None:
    rows = rows_of(300, LANES)
    for place in (0, 127, 128, 299):
        changed = [row.copy() for row in rows]
        changed[5][place] ^= 1
        differ = [a != b for a, b in zip(digests(rows), digests(changed), strict=True)]
        assert differ == [lane == 5 for lane in range(LANES)]
