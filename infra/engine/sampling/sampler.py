"""From logits to a token, as a pure function of (logits, parameters, seed, position, branch).

The random number is counter-based (Philox 4x64, Salmon et al. 2011, as in numpy): no generator
state is carried from token to token, so neither batches nor restarts can change a draw. Filters
are those of transformers' ``LogitsProcessor`` classes; the draw is by inverse CDF on the
distribution sorted by falling probability, ties by lower token id. Probabilities are in float64;
the mass of a token is rounded to ``2**-43`` of the likeliest one's, so that sums are exact.

What is computed here is the same on every CPU: see :mod:`infra.engine.sampling.row_kernels`.
"""

import hashlib
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from domain.config import SamplingParameters
from domain.ids import Seed, TokenId
from infra.engine.kernels import blake2b
from infra.engine.sampling.row_kernels import MAX_VOCABULARY, kernels

Row = NDArray[np.float32]

_COLDEST: Final = 1e-20
"""The likeliest token has all the mass long before; below it float32 would overflow."""


_NO_NUMBERS: Final = "the model's logits are not numbers"


class NothingLeft(ValueError):
    """No token can be drawn: every one is ruled out."""


def uniform(seed: Seed, position: int, branch: int = 0) -> float:
    """The number in [0, 1) that decides the token at ``position`` of ``branch``."""
    if seed < 0:
        raise ValueError(f"a seed is not negative, as {seed} is")
    return kernels().uniform(seed, position, branch)


def largest(values: NDArray[np.floating[Any]], count: int) -> NDArray[np.int64]:
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


def draw(
    scores: Row, sampling: SamplingParameters, seed: Seed, position: int, branch: int = 0
) -> Draw:
    """Draw the token at ``position`` of ``branch`` from one row of processed scores.

    A score of minus infinity rules a token out.

    Raises:
        ValueError: the scores are not numbers, rule out every token, or are more than
            ``MAX_VOCABULARY``.
    """
    row = np.ascontiguousarray(scores, np.float32)
    likeliest = _likeliest(row)
    if sampling.temperature == 0:
        return Draw(likeliest, 1.0)
    point = uniform(seed, position, branch)
    token, probability = kernels().draw(*_arguments(row, likeliest, sampling), point)
    if token < 0:
        raise ValueError(_NO_NUMBERS)
    return Draw(TokenId(token), probability)


def distribution(scores: Row, sampling: SamplingParameters) -> NDArray[np.float64]:
    """With which probability :func:`draw` draws each token of one row of processed scores.

    Raises:
        ValueError: as for :func:`draw`.
    """
    row = np.ascontiguousarray(scores, np.float32)
    likeliest = _likeliest(row)
    if sampling.temperature == 0:
        certain = np.zeros(len(row))
        certain[likeliest] = 1.0
        return certain
    return kernels().distribution(*_arguments(row, likeliest, sampling))


def _arguments(row: Row, likeliest: TokenId, sampling: SamplingParameters) -> tuple[Any, ...]:
    """What the kernels are told about a draw."""
    if len(row) > MAX_VOCABULARY:
        raise ValueError(f"{len(row)} tokens are more than {MAX_VOCABULARY}")
    return (
        row,
        likeliest,
        row[row.argmin()],
        max(sampling.temperature, _COLDEST),
        sampling.top_k,
        sampling.top_p,
        sampling.min_p,
        sampling.typical_p,
    )


def _likeliest(row: Row) -> TokenId:
    """The largest logit, of equals the one with the lowest id."""
    token = TokenId(int(row.argmax()))  # of a row that holds NaN, that one
    if row[token] == -np.inf:
        raise NothingLeft("every token is ruled out")
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


_WAYS: Final = (
    SamplingParameters(temperature=0.7, top_k=0, top_p=0.9),
    SamplingParameters(temperature=1.0, top_k=0, top_p=1.0),
    SamplingParameters(temperature=1.5, top_k=50, top_p=1.0),
    SamplingParameters(temperature=0.3, top_k=1000, top_p=0.5),
    SamplingParameters(temperature=2.0, top_k=0, top_p=1.0, min_p=0.1),
    SamplingParameters(temperature=1.5, top_k=0, top_p=1.0, typical_p=0.9),
    SamplingParameters(temperature=3.0, top_k=900, top_p=0.95, min_p=0.02, typical_p=0.5),
)


def golden(vocabulary: int = 5000) -> str:
    """SHA-256 of draws and measures of fixed rows: part of the numerics fingerprint."""
    values = np.random.Generator(np.random.Philox(0)).random((2 * len(_WAYS), vocabulary))
    rows = list((16 * values).astype(np.float32))
    found = hashlib.sha256("".join((zlib.ZLIB_RUNTIME_VERSION, *digests(rows))).encode())
    for position, row in enumerate(rows):
        branch, way = divmod(position, len(_WAYS))
        scores = np.where(row < 4 * branch, -np.inf, row)
        drawn = draw(scores, _WAYS[way], 42, position, branch)
        found.update(repr((drawn, measure(row, drawn.token_id))).encode())
    return found.hexdigest()
