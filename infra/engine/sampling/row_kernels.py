"""Compiled work on one row of scores: the draw, the measures.

Every bit is fixed by this text and that of :mod:`infra.engine.kernels.elementary`. It uses
operations of IEEE 754 alone, each rounded once, in the order written here; a multiply-add is fused
where it says so and nowhere else. Sums of floats go by lanes that are named here; weights are
integers, whose sums have no order. So LLVM may use vectors of any width, and every CPU gives the
same bits.
"""

from collections.abc import Callable
from functools import cache
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from infra.engine.kernels import compiling, elementary
from infra.engine.kernels.compiling import compiled, inlined
from infra.engine.kernels.elementary import exp, f64, fma, i64, log, uniform

_LANES: Final = 256


@inlined
def _add_lanes(lanes):  # type: ignore[no-untyped-def]
    """The sum of the lanes: the upper half is added to the lower until one is left."""
    width = len(lanes)
    while width > 1:
        width //= 2
        for i in range(width):
            lanes[i] += lanes[width + i]
    return lanes[0]


# the draw

_FAR: Final = 32.0
"""Nats below the likeliest token from which on a token weighs nothing."""
_UNIT: Final = 2.0**43
"""What the likeliest token weighs, as an integer."""
MAX_VOCABULARY: Final = 2**20 - 1
"""So many tokens weigh less than ``2**63``."""
_BUCKETS: Final = 2048
_FAR_BUCKETS: Final = 64
_STRETCH: Final = 256
_BLOCK: Final = 64


@inlined
def _distance(score, peak):  # type: ignore[no-untyped-def]
    """Nats below the peak, at most ``_FAR``."""
    distance = peak - f64(score)
    return distance if distance < _FAR else _FAR


@inlined
def _weight(distance):  # type: ignore[no-untyped-def]
    """``exp(-distance)`` as an integer."""
    return f64(fma(exp(-distance), _UNIT, 2.0**52)).view(np.int64) - f64(2.0**52).view(np.int64)


@inlined
def _bucket(distance, per_nat, i):  # type: ignore[no-untyped-def]
    """Where a token is put; those that weigh nothing in turns, since waiting for one takes time."""
    return np.uint16(distance * per_nat) + (i & (_FAR_BUCKETS - 1) if distance == _FAR else 0)


@inlined
def _fill_buckets(row, temperature, peak, per_nat, buckets):  # type: ignore[no-untyped-def]
    for i in range(len(row)):
        buckets[i] = _bucket(_distance(row[i] / temperature, peak), per_nat, i)


@inlined
def _weigh(row, temperature, peak, per_nat, floor, weights, buckets):  # type: ignore[no-untyped-def]
    for i in range(len(row)):
        score = row[i] / temperature
        distance = _distance(score, peak)
        weights[i] = _weight(distance) if score >= floor else 0
        buckets[i] = _bucket(distance, per_nat, i)


@inlined
def _reaches(row, temperature, floor):  # type: ignore[no-untyped-def]
    """Whether any token scores that much."""
    found = False
    for i in range(len(row)):
        found |= row[i] / temperature >= floor
    return found


@inlined
def _masses(row, temperature, peak, per_nat, floor, buckets):  # type: ignore[no-untyped-def]
    """What the tokens of each bucket weigh together, of those that score at least ``floor``."""
    masses = np.zeros(_BUCKETS + _FAR_BUCKETS, np.int64)
    weights = np.empty(_STRETCH, np.int64)
    for start in range(0, len(row), _STRETCH):
        part, those = row[start : start + _STRETCH], buckets[start : start + _STRETCH]
        if floor == -np.inf or _reaches(part, temperature, floor):
            _weigh(part, temperature, peak, per_nat, floor, weights, those)
            for i in range(len(those)):
                masses[those[i]] += weights[i]
    return masses


@inlined
def _counts(buckets):  # type: ignore[no-untyped-def]
    counts = np.zeros(_BUCKETS + _FAR_BUCKETS, np.int64)
    for i in range(len(buckets)):
        counts[buckets[i]] += 1
    return counts


@inlined
def _members(buckets, bucket):  # type: ignore[no-untyped-def]
    """The tokens in a bucket, by id."""
    tokens = np.empty(len(buckets), np.int32)
    size = 0
    for start in range(0, len(buckets), _BLOCK):
        block = buckets[start : start + _BLOCK]
        found = False
        for i in range(len(block)):
            found |= block[i] == bucket
        if found:
            for i in range(len(block)):
                if block[i] == bucket:
                    tokens[size] = start + i
                    size += 1
    return tokens[:size]


@inlined
def _select(tokens, scores, weights, needed):  # type: ignore[no-untyped-def]
    """By falling score, ties by id: the token at which the weights reach ``needed``, their sum."""
    size = len(tokens)
    before = 0
    while True:
        pivot = scores[size // 2]
        above, equal = 0, 0
        for i in range(size):
            if scores[i] > pivot:
                above += weights[i]
            elif scores[i] == pivot:
                equal += weights[i]
        if before + above < needed <= before + above + equal:
            before += above
            for i in range(size):
                if scores[i] == pivot:
                    before += weights[i]
                    if before >= needed:
                        return tokens[i], before
        higher = needed <= before + above
        if not higher:
            before += above + equal
        kept = 0
        for i in range(size):
            if (scores[i] > pivot) if higher else (scores[i] < pivot):
                tokens[kept], scores[kept], weights[kept] = tokens[i], scores[i], weights[i]
                kept += 1
        size = kept


@inlined
def _bucket_reaching(sums, needed):  # type: ignore[no-untyped-def]
    """The first bucket with which the sums reach ``needed``, and the sum of those before it."""
    bucket, before = 0, 0
    while before + sums[bucket] < needed:
        before += sums[bucket]
        bucket += 1
    return bucket, before


@inlined
def _reach(row, temperature, peak, buckets, sums, needed, counting):  # type: ignore[no-untyped-def]
    """In sorted order: the token at which the weights (or the count) reach ``needed``; their sum.

    ``sums`` are those of the buckets.
    """
    bucket, before = _bucket_reaching(sums, needed)
    tokens = _members(buckets, bucket)
    scores = np.empty(len(tokens), np.float32)
    weights = np.empty(len(tokens), np.int64)
    for i in range(len(tokens)):
        scores[i] = row[tokens[i]] / temperature
        weights[i] = 1 if counting else _weight(_distance(scores[i], peak))
    token, mass = _select(tokens, scores, weights, needed - before)
    return token, before + mass


@inlined
def _share(mass, part):  # type: ignore[no-untyped-def]
    """The least weight, 1 or more, that is at least this part of a mass."""
    return min(max(i64(np.ceil(part * f64(mass))), 1), mass)


@inlined
def _mass_within(row, temperature, peak, per_nat, buckets, masses, limit):  # type: ignore[no-untyped-def]
    """What the tokens at most ``limit`` nats below the peak weigh together."""
    bucket = i64(min(limit * per_nat, f64(_BUCKETS)))
    mass = masses[:bucket].sum()
    tokens = _members(buckets, bucket)
    for i in range(len(tokens)):
        distance = _distance(row[tokens[i]] / temperature, peak)
        mass += _weight(distance) if distance <= limit else 0
    return mass


@inlined
def _weigh_first(row, temperature, peak, last):  # type: ignore[no-untyped-def]
    """Distances and weights of all tokens, those after ``last`` weigh nothing; sum of the products.

    Lane ``i % _LANES`` sums over the tokens ``i``.
    """
    distances, weights = np.empty(len(row)), np.empty(len(row), np.int64)
    lanes = np.zeros(_LANES)
    lowest = row[last] / temperature
    for start in range(0, len(row), _LANES):
        part = row[start : start + _LANES]
        far, heavy, until = distances[start:], weights[start:], last - start
        for i in range(len(part)):
            score = part[i] / temperature
            first = (score > lowest) | ((score == lowest) & (i <= until))
            far[i] = _distance(score, peak)
            heavy[i] = _weight(far[i]) if first else 0
            lanes[i] = fma(f64(heavy[i]), far[i], lanes[i])
    return distances, weights, _add_lanes(lanes)


@inlined
def _typical(row, temperature, peak, per_nat, last, kept, typical_p):  # type: ignore[no-untyped-def]
    """What the tokens likelier than the typical ones weigh, and what the typical ones weigh.

    Those up to ``last`` are looked at. The surprise of each is as far from their entropy, which is
    the mean surprise, as its distance from the peak is from the mean distance; the nearest are
    typical (Meister et al. 2022).
    """
    distances, weights, moment = _weigh_first(row, temperature, peak, last)
    mean = moment / f64(kept)
    buckets = np.empty(len(row), np.uint16)
    masses = np.zeros(_BUCKETS + 1, np.int64)
    for i in range(len(row)):
        buckets[i] = np.uint16(abs(distances[i] - mean) * per_nat)
    for i in range(len(row)):
        masses[buckets[i]] += weights[i]
    needed = _share(kept, typical_p)
    bucket, before = _bucket_reaching(masses, needed)
    tokens = _members(buckets, bucket)
    closeness, those = np.empty(len(tokens)), np.empty(len(tokens), np.int64)
    for i in range(len(tokens)):
        closeness[i] = -abs(distances[tokens[i]] - mean)
        those[i] = weights[tokens[i]]
    token, _ = _select(tokens, closeness, those, needed - before)
    limit = abs(distances[token] - mean)
    likelier, typical = 0, 0
    for i in range(len(row)):
        typical += weights[i] if abs(distances[i] - mean) <= limit else 0
        likelier += weights[i] if mean - distances[i] > limit else 0
    return likelier, typical


@inlined
def _filter(row, likeliest, lowest, temperature, top_k, top_p, min_p, typical_p, buckets):  # type: ignore[no-untyped-def]
    """What is left to draw from: the peak, the masses of the buckets, ``likelier``, ``kept``.

    Each filter keeps a run of the sorted order: by score it raises ``floor``, by mass it lowers
    ``kept``; only the last one, the typical tokens, may begin after some ``likelier`` ones. What
    changes logits has done so before. Where there is no likeliest token nothing is kept.
    """
    peak = f64(row[likeliest] / temperature)
    per_nat = _BUCKETS / max(_distance(lowest / temperature, peak), 1e-6)
    floor = np.float32(-np.inf)
    if 0 < top_k < len(row):
        _fill_buckets(row, temperature, peak, per_nat, buckets)
        last, _ = _reach(row, temperature, peak, buckets, _counts(buckets), top_k, True)
        floor = row[last] / temperature
    masses = _masses(row, temperature, peak, per_nat, floor, buckets)
    kept, likelier = masses.sum(), 0
    if kept == 0:
        return peak, masses, likelier, kept
    if top_p < 1.0:
        _, kept = _reach(row, temperature, peak, buckets, masses, _share(kept, top_p), False)
    if min_p > 0.0:
        limit = -log(max(min_p, 1e-300))
        kept = min(kept, _mass_within(row, temperature, peak, per_nat, buckets, masses, limit))
    if typical_p < 1.0:
        last, _ = _reach(row, temperature, peak, buckets, masses, kept, False)
        likelier, kept = _typical(row, temperature, peak, per_nat, last, kept, typical_p)
    return peak, masses, likelier, kept


def _draw(row, likeliest, lowest, temperature, top_k, top_p, min_p, typical_p, point):  # type: ignore[no-untyped-def]
    """A token and its probability; -1 where there is no likeliest token."""
    buckets = np.empty(len(row), np.uint16)
    peak, masses, likelier, kept = _filter(
        row, likeliest, lowest, temperature, top_k, top_p, min_p, typical_p, buckets
    )
    if kept == 0:
        return i64(-1), 0.0
    needed = likelier + min(i64(point * f64(kept)) + 1, kept)
    token, _ = _reach(row, temperature, peak, buckets, masses, needed, False)
    probability = exp(-_distance(row[token] / temperature, peak)) * (_UNIT / f64(kept))
    return i64(token), probability


def _distribution(row, likeliest, lowest, temperature, top_k, top_p, min_p, typical_p):  # type: ignore[no-untyped-def]
    """The probability with which each token is drawn; 0 for all where nothing can be."""
    buckets = np.empty(len(row), np.uint16)
    peak, masses, likelier, kept = _filter(
        row, likeliest, lowest, temperature, top_k, top_p, min_p, typical_p, buckets
    )
    probabilities = np.zeros(len(row))
    if kept == 0:
        return probabilities
    first, _ = _reach(row, temperature, peak, buckets, masses, likelier + 1, False)
    last, _ = _reach(row, temperature, peak, buckets, masses, likelier + kept, False)
    highest, least = row[first] / temperature, row[last] / temperature
    for i in range(len(row)):
        score = row[i] / temperature
        begun = (score < highest) | ((score == highest) & (i >= first))
        on = (score > least) | ((score == least) & (i <= last))
        distance = _distance(score, peak)
        if begun & on & (_weight(distance) > 0):
            probabilities[i] = exp(-distance) * (_UNIT / f64(kept))
    return probabilities


# the measures

_FARTHEST: Final = 708.0


def _measure(row, token, peak):  # type: ignore[no-untyped-def]
    """The logarithm of the sum of exponentials, the entropy, and how many tokens come first.

    Lane ``i % _LANES`` sums over the tokens ``i``.
    """
    totals, moments = np.zeros(_LANES), np.zeros(_LANES)
    value = row[token]
    ahead = 0
    for start in range(0, len(row), _LANES):
        part = row[start : start + _LANES]
        earlier = token - start
        for i in range(len(part)):
            distance = peak - f64(part[i])
            distance = distance if distance < _FARTHEST else _FARTHEST
            weight = exp(-distance)
            totals[i] += weight
            moments[i] = fma(weight, distance, moments[i])
            ahead += (part[i] > value) | ((part[i] == value) & (i < earlier))
    total = _add_lanes(totals)
    logarithm = log(total)
    return peak + logarithm, logarithm + _add_lanes(moments) / total, ahead


def _exponentials(values):  # type: ignore[no-untyped-def]
    """The exponential of each value of 0 or less; below ``-_FARTHEST`` it counts as that."""
    found = np.empty(len(values))
    for i in range(len(values)):
        found[i] = exp(max(values[i], -_FARTHEST))
    return found


class Kernels(NamedTuple):
    """What is called from Python; see :mod:`infra.engine.sampling.sampler`."""

    uniform: Callable[[int, int, int], float]
    draw: Callable[..., tuple[int, float]]
    distribution: Callable[..., NDArray[np.float64]]
    measure: Callable[..., tuple[float, float, int]]
    exponentials: Callable[[NDArray[np.float64]], NDArray[np.float64]]


@cache
def kernels() -> Kernels:
    """The kernels, compiled when first wanted: seconds, the first time on a machine."""
    sources = (__file__, elementary.__file__, compiling.__file__)
    row = "Array(f4, 1, 'C', True)"
    return Kernels(
        uniform=compiled(uniform, "f8(u8, u8, u8)", sources, nogil=False),
        draw=compiled(
            _draw, f"Tuple((i8, f8))({row}, i8, f4, f4, i8, f8, f8, f8, f8)", sources, nogil=False
        ),
        distribution=compiled(
            _distribution, f"f8[::1]({row}, i8, f4, f4, i8, f8, f8, f8)", sources, nogil=True
        ),
        measure=compiled(_measure, f"Tuple((f8, f8, i8))({row}, i8, f8)", sources, nogil=True),
        exponentials=compiled(_exponentials, "f8[::1](f8[::1])", sources, nogil=True),
    )
