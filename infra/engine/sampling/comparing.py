"""A row of logits held against what is known of another one: the KL divergence, the likeliest.

``KL(was || now)``, the sum of ``p (log p - log q)`` (Kullback and Leibler 1951), in float64 and
from logarithms: ratios of probabilities are not formed. A probability below ``exp(-708)``, where
float64 ends, counts as that, so every divergence is finite; what rounding leaves of one below 0
is 0.
"""

import math
import zlib
from functools import cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from domain.errors import invalid
from domain.ids import TokenId
from domain.work import Comparison, Reference, RowKind
from infra.engine.kernels import compiling, elementary
from infra.engine.kernels.compiling import compiled, inlined
from infra.engine.kernels.elementary import exp, f64, fma, log
from infra.engine.sampling import sampler
from infra.engine.sampling.row_kernels import MAX_VOCABULARY
from infra.engine.sampling.sampler import Row

_FARTHEST: Final = 708.0
"""Nats from which on nothing is less likely."""
_COARSE: Final = 1e-5
_LANES: Final = 256


def compare(reference: Reference, logits: Row, logsumexp: float) -> Comparison:
    """Hold a row, with the ``logsumexp`` of it, against a reference.

    Raises:
        InvalidInput: the reference is not the row that it says it is.
    """
    row = np.ascontiguousarray(logits, np.float32)
    likeliest = TokenId(int(row.argmax()))
    ids: NDArray[np.integer[Any]]
    if reference.kind is None or reference.row is None:
        ids, values = np.empty(0, np.int64), np.empty(0, np.float32)
        before = reference.token_id if reference.rank == 0 else None
    else:
        ids, values = _unpack(reference.kind, reference.row)
        before = TokenId(int(ids[values.argmax()]))
    if len(ids) == len(row) and reference.kind != "top_k":
        return Comparison(kl=divergence(values, row), exact=True, greedy=(before, likeliest))
    told = (ids >= 0) & (ids < len(row))
    known, was = ids[told], values[told].astype(np.float64) - reference.logsumexp
    if reference.token_id not in known:
        known, was = np.append(known, reference.token_id), np.append(was, reference.logprob)
    kl = _of_known(known, was, row, logsumexp)
    return Comparison(kl=kl, exact=False, greedy=(before, likeliest))


def pack(logits: Row, kind: RowKind, k: int) -> bytes:
    """A row as it is kept; ``k`` values of it if it is ``top_k``."""
    match kind:
        case "top_k":
            return sampler.pack_top_k(logits, k)
        case "full":
            return sampler.pack_full(logits)
        case "raw":
            return np.ascontiguousarray(logits, "<f4").tobytes()


def largest(row: bytes, k: int) -> bytes:
    """The ``k`` largest logits of a row kept ``full``, as ``top_k`` keeps them.

    Raises:
        InvalidInput: it is no such row.
    """
    _, logits = _unpack("full", row)
    return sampler.pack_top_k(logits, k)


def _unpack(kind: RowKind, data: bytes) -> tuple[NDArray[np.integer[Any]], Row]:
    """The ids and logits of the tokens that a kept row knows."""
    try:
        if kind == "full":
            data = zlib.decompressobj().decompress(data, 4 * MAX_VOCABULARY)
        if kind == "top_k":
            ids = np.frombuffer(data, "<i4", len(data) // 8)
            values = np.frombuffer(data, "<f4", offset=ids.nbytes)
        else:
            values = np.frombuffer(data, "<f4")
            ids = np.arange(len(values))
    except (ValueError, zlib.error) as error:
        raise invalid("references", f"a kept row is no {kind} row: {error}") from error
    if len(values) != len(ids) or not len(values) or not math.isfinite(values.max()):
        raise invalid("references", f"a kept row is no {kind} row of logits")
    return ids, values


def _of_known(
    known: NDArray[np.integer[Any]], was: NDArray[np.float64], row: Row, logsumexp: float
) -> float:
    """The divergence over tokens whose logprobs are known, and all others as one."""
    was, now = np.maximum(was, -_FARTHEST), _logprobs(row[known], logsumexp)
    masses = np.exp(was)
    divergence = float((masses * (was - now)).sum())
    was_rest, now_rest = 1.0 - float(masses.sum()), 1.0 - float(np.exp(now).sum())
    if was_rest > 0:
        if now_rest < _COARSE * was_rest:  # what sums leave of 1 is too coarse for that
            others = np.exp(_logprobs(np.delete(row, known), logsumexp))
            now_rest = max(float(others.sum()), math.exp(-_FARTHEST))
        divergence += was_rest * math.log(was_rest / now_rest)
    return max(0.0, divergence)


def _logprobs(logits: Row, logsumexp: float) -> NDArray[np.float64]:
    return np.maximum(logits.astype(np.float64) - logsumexp, -_FARTHEST)


def divergence(was: Row, now: Row) -> float:
    """``KL(was || now)`` (nats) of two rows of logits, over the whole vocabulary.

    The same on every CPU: see :mod:`infra.engine.sampling.row_kernels`.
    """
    found: float = kernel()(was, now, was.max(), now.max())
    return max(0.0, found)


@inlined
def _distance(logit, peak):  # type: ignore[no-untyped-def]
    """Nats below the peak, at most ``_FARTHEST``."""
    distance = f64(peak) - f64(logit)
    return distance if distance < _FARTHEST else _FARTHEST


def _divergence(was, now, was_peak, now_peak):  # type: ignore[no-untyped-def]
    """From sums of ``exp(was) (was - now)``, ``exp(was)`` and ``exp(now)``, all below their peaks.

    Lane ``i % _LANES`` sums over the tokens ``i``.
    """
    moments, was_masses, now_masses = np.zeros(_LANES), np.zeros(_LANES), np.zeros(_LANES)
    for start in range(0, len(was), _LANES):
        old, new = was[start : start + _LANES], now[start : start + _LANES]
        for i in range(len(old)):
            far = _distance(old[i], was_peak)
            near = _distance(new[i], now_peak)
            weight = exp(-far)
            was_masses[i] += weight
            now_masses[i] += exp(-near)
            moments[i] = fma(weight, near - far, moments[i])
    was_mass = was_masses.sum()
    return moments.sum() / was_mass + log(now_masses.sum() / was_mass)


@cache
def kernel() -> Any:
    """What adds up a divergence, compiled when first wanted."""
    row = "Array(f4, 1, 'C', True)"
    sources = (__file__, elementary.__file__, compiling.__file__)
    return compiled(_divergence, f"f8({row}, {row}, f4, f4)", sources, nogil=True)
