"""From logits to a token, as a pure function of (logits, parameters, seed, position, branch).

The random number is counter-based (Philox 4x64, Salmon et al. 2011, as in numpy): no generator
state is carried from token to token, so neither batches nor restarts can change a draw. Filters
are those of transformers' ``LogitsProcessor`` classes; the draw is by inverse CDF on the
distribution sorted by falling probability, ties by lower token id. Probabilities are in float64;
the mass of a token is rounded to ``2**-43`` of the likeliest one's, so that sums are exact.

What is computed here is the same on every CPU: see :mod:`infra.engine.row_kernels`.
"""

import hashlib
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from domain.config import SamplingParameters
from domain.ids import Seed, TokenId
from infra.engine import blake2b
from infra.engine.row_kernels import MAX_VOCABULARY, kernels

Row = NDArray[np.float32]

_COLDEST: Final = 1e-20
"""The likeliest token has all the mass long before; below it float32 would overflow."""


_NO_NUMBERS: Final = "the model's logits are not numbers"


def uniform(seed: Seed, position: int, branch: int = 0) -> float:
    """The number in [0, 1) that decides the token at ``position`` of ``branch``."""
    if seed < 0:
        raise ValueError(f"a seed is not negative, as {seed} is")
    return kernels().uniform(seed, position, branch)


def largest(values: Row, count: int) -> NDArray[np.int64]:
    """Indices of the ``count`` largest values, largest first, ties by lower index."""
    if count >= len(values):
        chosen = np.arange(len(values))
    else:
        threshold = np.partition(values, len(values) - count)[len(values) - count]
        above = np.flatnonzero(values > threshold)
        equal = np.flatnonzero(values == threshold)[: count - len(above)]
        chosen = np.sort(np.concatenate((above, equal)))
    return chosen[np.argsort(-values[chosen], kind="stable")]


@dataclass(frozen=True)
class Draw:
    """A drawn token and its probability under the processed distribution."""

    token_id: TokenId
    probability: float


def draw(logits: Row, sampling: SamplingParameters, seed: Seed, position: int) -> Draw:
    """Draw the token at ``position`` from one row of raw logits.

    Raises:
        ValueError: the logits are not numbers, or more than ``MAX_VOCABULARY``.
    """
    row = np.ascontiguousarray(logits, np.float32)
    likeliest = _likeliest(row)
    if sampling.temperature == 0:
        return Draw(likeliest, 1.0)
    if len(row) > MAX_VOCABULARY:
        raise ValueError(f"{len(row)} tokens are more than {MAX_VOCABULARY}")
    temperature = max(sampling.temperature, _COLDEST)
    lowest, point = row[row.argmin()], uniform(seed, position)
    token, probability = kernels().draw(
        row, likeliest, lowest, temperature, sampling.top_k, sampling.top_p, point
    )
    if token < 0:
        raise ValueError(_NO_NUMBERS)
    return Draw(TokenId(token), probability)


def _likeliest(row: Row) -> TokenId:
    """The largest logit, of equals the one with the lowest id."""
    token = TokenId(int(row.argmax()))  # of a row that holds NaN, that one
    if not math.isfinite(row[token]):
        raise ValueError(_NO_NUMBERS)
    return token


@dataclass(frozen=True)
class Measures:
    """What a row of raw logits says about one token; logarithms are natural."""

    logprob: float
    rank: int
    entropy: float
    logsumexp: float


def measure(logits: Row, token_id: TokenId) -> Measures:
    """Score ``token_id`` under the raw distribution of one row.

    Raises:
        ValueError: the logits are not numbers.
    """
    row = np.ascontiguousarray(logits, np.float32)
    peak = row[_likeliest(row)]
    logsumexp, entropy, rank = kernels().measure(row, token_id, peak)
    return Measures(
        logprob=float(row[token_id]) - logsumexp,
        rank=rank,
        entropy=entropy,
        logsumexp=logsumexp,
    )


def _stored(logits: Row) -> NDArray[np.uint8]:
    """The bytes of a row: little-endian float32."""
    return np.ascontiguousarray(logits, "<f4").view(np.uint8)


def digests(rows: Sequence[Row]) -> list[str]:
    """BLAKE2b of 8 bytes, hexadecimal, over each row as little-endian float32 (RFC 7693)."""
    return blake2b.digests([_stored(row) for row in rows])


def digest(logits: Row) -> str:
    """The digest of one row."""
    return digests([logits])[0]


def pack_top_k(logits: Row, k: int) -> bytes:
    """The ``k`` largest raw logits: ids as int32, then values as float32, little endian."""
    order = largest(logits, k)
    return order.astype("<i4").tobytes() + logits[order].astype("<f4").tobytes()


def pack_full(logits: Row) -> bytes:
    """The whole row as little-endian float32, compressed with zlib (RFC 1950)."""
    return zlib.compress(_stored(logits).data, level=1)


def golden(vocabulary: int = 5000) -> str:
    """SHA-256 of draws and measures of fixed rows: part of the numerics fingerprint."""
    ways = [(0.7, 0, 0.9), (1.0, 0, 1.0), (1.5, 50, 1.0), (0.3, 1000, 0.5)]
    values = np.random.Generator(np.random.Philox(0)).random((2 * len(ways), vocabulary))
    rows = list((16 * values).astype(np.float32))
    found = hashlib.sha256("".join((zlib.ZLIB_RUNTIME_VERSION, *digests(rows))).encode())
    for position, row in enumerate(rows):
        temperature, top_k, top_p = ways[position % len(ways)]
        sampling = SamplingParameters(temperature=temperature, top_k=top_k, top_p=top_p)
        drawn = draw(row, sampling, 42, position)
        found.update(repr((drawn, measure(row, drawn.token_id))).encode())
    return found.hexdigest()
