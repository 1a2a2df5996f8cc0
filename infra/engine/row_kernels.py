"""Compiled work on one row of logits: the random number, the draw, the measures.

Every bit is fixed by this text. It uses operations of IEEE 754 alone, each rounded once, in the
order written here; a multiply-add is fused where it says so and nowhere else. Sums of floats go
by lanes that are named here; weights are integers, whose sums have no order. So LLVM may use
vectors of any width, and every CPU gives the same bits.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, Final, NamedTuple

import numpy as np
from numba import types
from numba.extending import intrinsic

from infra.engine import compiling
from infra.engine.compiling import compiled, inlined

f64, i64, u64 = np.float64, np.int64, np.uint64

_LOG2_E: Final = 1.4426950408889634
_LN2_HIGH: Final = float.fromhex("0x1.62e42fefa3800p-1")
"""With so few bits that its product with any exponent is exact."""
_LN2_LOW: Final = float.fromhex("0x1.ef35793c76730p-45")
_ROUNDING: Final = 1.5 * 2.0**52
"""Adding it leaves an integer in the lowest bits."""

# exp(r) = 1 + r + r**2 * (E2 + E3 * r + ...) for |r| <= ln(2) / 2; Remez, relative error 4e-18.
_E2, _E3, _E4 = 0.5000000000000011, 0.16666666666666413, 0.041666666666530267
_E5, _E6, _E7 = 0.008333333333494333, 0.001388888894359769, 0.00019841269506779664
_E8, _E9, _E10 = 2.4801493136197254e-05, 2.7557586266408486e-06, 2.7630233914958636e-07
_E11 = 2.5000072292151244e-08

# log((1 + s) / (1 - s)) / s = 2 + z * (L1 + z * L2 ...), z = s**2: fdlibm (Sun Microsystems).
_SQRT_HALF_BITS: Final = 0x3FE6A09E00000000
_L1, _L2, _L3 = 6.666666666666735130e-01, 3.999999999940941908e-01, 2.857142874366239149e-01
_L4, _L5, _L6 = 2.222219843214978396e-01, 1.818357216161805012e-01, 1.531383769920937332e-01
_L7 = 1.479819860511658591e-01
_LOG_HIGH: Final = 6.93147180369123816490e-01
_LOG_LOW: Final = 1.90821492927058770002e-10


def _generate_fma(typing, a, b, c):  # type: ignore[no-untyped-def]
    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.fma(*arguments)

    return types.float64(types.float64, types.float64, types.float64), generate


_fma: Final[Any] = intrinsic(_generate_fma)
"""``a * b + c``, rounded once (IEEE 754-2008, fusedMultiplyAdd)."""


@inlined
def _exp(x):  # type: ignore[no-untyped-def]
    """The exponential for -708 <= x <= 708, within 1 ulp."""
    shifted = _fma(x, _LOG2_E, _ROUNDING)
    n = shifted - _ROUNDING
    r = _fma(n, -_LN2_LOW, _fma(n, -_LN2_HIGH, x))
    p = _fma(r, _E11, _E10)
    p = _fma(r, p, _E9)
    p = _fma(r, p, _E8)
    p = _fma(r, p, _E7)
    p = _fma(r, p, _E6)
    p = _fma(r, p, _E5)
    p = _fma(r, p, _E4)
    p = _fma(r, p, _E3)
    p = _fma(r, p, _E2)
    p = _fma(r, p, 1.0)
    p = _fma(r, p, 1.0)
    return i64(f64(p).view(np.int64) + (f64(shifted).view(np.int64) << 52)).view(np.float64)


@inlined
def _log(x):  # type: ignore[no-untyped-def]
    """The natural logarithm of a normal positive number, within 1 ulp."""
    bits = f64(x).view(np.int64)
    exponent = (bits - _SQRT_HALF_BITS) >> 52
    f = i64(bits - (exponent << 52)).view(np.float64) - 1.0
    n = f64(exponent)
    s = f / (2.0 + f)
    z = s * s
    rest = z * (_L1 + z * (_L2 + z * (_L3 + z * (_L4 + z * (_L5 + z * (_L6 + z * _L7))))))
    half = 0.5 * f * f
    return s * (half + rest) + n * _LOG_LOW - half + f + n * _LOG_HIGH


# the random number

_LOW: Final = u64(0xFFFFFFFF)
_HALF: Final = u64(32)
_M0, _M1 = u64(0xD2E7470EE14C6C93), u64(0xCA5A826395121157)
_W0, _W1 = u64(0x9E3779B97F4A7C15), u64(0xBB67AE8584CAA73B)
_ONE, _NONE = u64(1), u64(0)
_UNUSED_BITS: Final = u64(11)


@inlined
def _high(a, b):  # type: ignore[no-untyped-def]
    """The upper 64 bits of the product of two numbers of 64."""
    a0, a1, b0, b1 = a & _LOW, a >> _HALF, b & _LOW, b >> _HALF
    middle = a1 * b0 + ((a0 * b0) >> _HALF)
    return a1 * b1 + (middle >> _HALF) + ((a0 * b1 + (middle & _LOW)) >> _HALF)


def _uniform(seed, position, branch):  # type: ignore[no-untyped-def]
    """Philox 4x64-10 with key (seed, 0) and counter (position, branch, 0, 0) as numpy counts."""
    c0 = position + _ONE
    c1 = branch + (_ONE if c0 == _NONE else _NONE)
    c2 = _ONE if c0 == _NONE and c1 == _NONE else _NONE
    c3, k0, k1 = _NONE, seed, _NONE
    for _ in range(10):
        c0, c1, c2, c3 = _high(_M1, c2) ^ c1 ^ k0, _M1 * c2, _high(_M0, c0) ^ c3 ^ k1, _M0 * c0
        k0, k1 = k0 + _W0, k1 + _W1
    return f64(i64(c0 >> _UNUSED_BITS)) * 2.0**-53


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
    return f64(_fma(_exp(-distance), _UNIT, 2.0**52)).view(np.int64) - f64(2.0**52).view(np.int64)


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
def _reach(row, temperature, peak, buckets, sums, needed, counting):  # type: ignore[no-untyped-def]
    """In sorted order: the token at which the weights (or the count) reach ``needed``; their sum.

    ``sums`` are those of the buckets.
    """
    bucket, before = 0, 0
    while before + sums[bucket] < needed:
        before += sums[bucket]
        bucket += 1
    tokens = _members(buckets, bucket)
    scores = np.empty(len(tokens), np.float32)
    weights = np.empty(len(tokens), np.int64)
    for i in range(len(tokens)):
        scores[i] = row[tokens[i]] / temperature
        weights[i] = 1 if counting else _weight(_distance(scores[i], peak))
    token, mass = _select(tokens, scores, weights, needed - before)
    return token, before + mass


def _draw(row, likeliest, lowest, temperature, top_k, top_p, point):  # type: ignore[no-untyped-def]
    """A token and its probability; -1 where there is no likeliest token.

    Each filter keeps the first tokens of the sorted order: one by score raises ``floor``, one by
    mass lowers ``kept``. What changes logits has done so before.
    """
    peak = f64(row[likeliest] / temperature)
    buckets = np.empty(len(row), np.uint16)
    per_nat = _BUCKETS / max(_distance(lowest / temperature, peak), 1e-6)
    floor = np.float32(-np.inf)
    if 0 < top_k < len(row):
        _fill_buckets(row, temperature, peak, per_nat, buckets)
        last, _ = _reach(row, temperature, peak, buckets, _counts(buckets), top_k, True)
        floor = row[last] / temperature
    masses = _masses(row, temperature, peak, per_nat, floor, buckets)
    kept = masses.sum()
    if kept == 0:
        return i64(-1), 0.0
    if top_p < 1.0:
        needed = min(max(i64(np.ceil(top_p * f64(kept))), 1), kept)
        _, kept = _reach(row, temperature, peak, buckets, masses, needed, False)
    needed = min(i64(point * f64(kept)) + 1, kept)
    token, _ = _reach(row, temperature, peak, buckets, masses, needed, False)
    probability = _exp(-_distance(row[token] / temperature, peak)) * (_UNIT / f64(kept))
    return i64(token), probability


# the measures

_LANES: Final = 256
_FARTHEST: Final = 708.0


@inlined
def _add_lanes(lanes):  # type: ignore[no-untyped-def]
    """The sum of the lanes: the upper half is added to the lower until one is left."""
    width = len(lanes)
    while width > 1:
        width //= 2
        for i in range(width):
            lanes[i] += lanes[width + i]
    return lanes[0]


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
            weight = _exp(-distance)
            totals[i] += weight
            moments[i] = _fma(weight, distance, moments[i])
            ahead += (part[i] > value) | ((part[i] == value) & (i < earlier))
    total = _add_lanes(totals)
    logarithm = _log(total)
    return peak + logarithm, logarithm + _add_lanes(moments) / total, ahead


class Kernels(NamedTuple):
    """What is called from Python; see :mod:`infra.engine.sampler`."""

    uniform: Callable[[int, int, int], float]
    draw: Callable[..., tuple[int, float]]
    measure: Callable[..., tuple[float, float, int]]


@cache
def kernels() -> Kernels:
    """The kernels, compiled when first wanted: seconds, the first time on a machine."""
    sources = (__file__, compiling.__file__)
    row = "Array(f4, 1, 'C', True)"
    return Kernels(
        uniform=compiled(_uniform, "f8(u8, u8, u8)", sources, nogil=False),
        draw=compiled(
            _draw, f"Tuple((i8, f8))({row}, i8, f4, f4, i8, f8, f8)", sources, nogil=False
        ),
        measure=compiled(_measure, f"Tuple((f8, f8, i8))({row}, i8, f8)", sources, nogil=True),
    )
