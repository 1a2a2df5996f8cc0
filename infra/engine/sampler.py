"""From logits to a token, as a pure function of (logits, parameters, seed, position, branch).

The random number is counter-based (Philox 4x64, Salmon et al. 2011, as in numpy): no generator
state is carried from token to token, so neither batches nor restarts can change a draw. Filters
are those of transformers' ``LogitsProcessor`` classes; the draw is by inverse CDF, in float64, on
the distribution sorted by falling probability, ties by lower token id.
"""

import hashlib
import zlib
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from domain.config import SamplingParameters
from domain.ids import Seed, TokenId

Row = NDArray[np.float32]

_HEAD: Final = 1024
"""Most draws end among so many of the likeliest tokens; only those are sorted at first."""

_COLDEST: Final = 1e-20
"""The likeliest token has all the mass long before; below it float32 would overflow."""


def uniform(seed: Seed, position: int, branch: int = 0) -> float:
    """The number in [0, 1) that decides the token at ``position`` of ``branch``."""
    bits = np.random.Philox(key=seed, counter=(position, branch, 0, 0)).random_raw()
    return float((int(bits) >> 11) * 2.0**-53)


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
    """Draw the token at ``position`` from one row of raw logits."""
    if sampling.temperature == 0:
        return Draw(TokenId(int(np.argmax(logits))), 1.0)
    scaled = logits / np.float32(max(sampling.temperature, _COLDEST))
    candidates = _top_k(scaled, sampling.top_k)
    peak = float(scaled[candidates].max())
    total = float(_weights(scaled[candidates], peak).sum())
    point = uniform(seed, position)
    for count in (min(_HEAD, len(candidates)), len(candidates)):
        order = candidates[largest(scaled[candidates], count)]
        mass = np.cumsum(_weights(scaled[order], peak))
        kept = _nucleus(mass, total, sampling.top_p)
        norm = total if kept is None else float(mass[kept - 1])
        index = int(np.searchsorted(mass, point * norm, side="right"))
        if count == len(candidates) or kept is not None or (sampling.top_p >= 1 and index < count):
            break
    index = min(index, (kept or count) - 1)
    weight = float(mass[index] - (mass[index - 1] if index else 0.0))
    return Draw(TokenId(int(order[index])), weight / norm)


def _weights(scaled: Row, peak: float) -> NDArray[np.float64]:
    return np.exp(scaled.astype(np.float64) - peak)


def _top_k(scaled: Row, top_k: int) -> NDArray[np.int64]:
    """Tokens that ``top_k`` keeps, in order of id; ties with the last are kept."""
    if not 0 < top_k < len(scaled):
        return np.arange(len(scaled))
    return np.flatnonzero(scaled >= np.partition(scaled, len(scaled) - top_k)[-top_k])


def _nucleus(mass: NDArray[np.float64], total: float, top_p: float) -> int | None:
    """How many of the sorted tokens ``top_p`` keeps; none if that is not within ``mass``.

    A token is kept while those before it hold less than ``top_p`` of the mass.
    """
    if top_p >= 1:
        return None
    before = int(np.searchsorted(mass, top_p * total, side="left"))
    return before + 1 if before < len(mass) else None


@dataclass(frozen=True)
class Measures:
    """What a row of raw logits says about one token; logarithms are natural."""

    logprob: float
    rank: int
    entropy: float
    logsumexp: float
    digest: str


def measure(logits: Row, token_id: TokenId) -> Measures:
    """Score ``token_id`` under the raw distribution of one row."""
    values = logits.astype(np.float64)
    peak = float(values.max())
    weights = np.exp(values - peak)
    total = float(weights.sum())
    logsumexp = peak + float(np.log(total))
    value = values[token_id]
    ahead = np.count_nonzero(values > value) + np.count_nonzero(values[:token_id] == value)
    return Measures(
        logprob=float(value) - logsumexp,
        rank=int(ahead),
        entropy=logsumexp - float((weights * values).sum()) / total,
        logsumexp=logsumexp,
        digest=digest(logits),
    )


def digest(logits: Row) -> str:
    """BLAKE2b of 8 bytes, hexadecimal, over the row as little-endian float32 (RFC 7693)."""
    return hashlib.blake2b(logits.astype("<f4", copy=False).tobytes(), digest_size=8).hexdigest()


def pack_top_k(logits: Row, k: int) -> bytes:
    """The ``k`` largest raw logits: ids as int32, then values as float32, little endian."""
    order = largest(logits, k)
    return order.astype("<i4").tobytes() + logits[order].astype("<f4").tobytes()


def pack_full(logits: Row) -> bytes:
    """The whole row as little-endian float32, compressed with zlib (RFC 1950)."""
    return zlib.compress(logits.astype("<f4", copy=False).tobytes(), level=1)


def golden(rows: int = 8, vocabulary: int = 5000) -> str:
    """SHA-256 of draws and measures of fixed rows: part of the numerics fingerprint.

    The bits of exp, log and sums depend on how numpy was built and on the CPU.
    """
    values = np.random.Generator(np.random.Philox(0)).standard_normal((rows, vocabulary))
    sampling = SamplingParameters(temperature=0.7, top_k=0, top_p=0.9)
    found = hashlib.sha256(zlib.ZLIB_RUNTIME_VERSION.encode())
    for position, row in enumerate((3 * values).astype(np.float32)):
        drawn = draw(row, sampling, 42, position)
        found.update(repr((drawn, measure(row, drawn.token_id))).encode())
    return found.hexdigest()
