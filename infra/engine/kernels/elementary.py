"""Functions of numbers that kernels are made of: exponential, logarithm, random number.

Every bit is fixed by this text, on every CPU: operations of IEEE 754, each rounded once, in the
order written here.
"""

from typing import Any, Final

import numpy as np
from numba import types
from numba.extending import intrinsic

from infra.engine.kernels.compiling import inlined

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


fma: Final[Any] = intrinsic(_generate_fma)
"""``a * b + c``, rounded once (IEEE 754-2008, fusedMultiplyAdd)."""


@inlined
def exp(x):  # type: ignore[no-untyped-def]
    """The exponential for -708 <= x <= 708, within 1 ulp."""
    shifted = fma(x, _LOG2_E, _ROUNDING)
    n = shifted - _ROUNDING
    r = fma(n, -_LN2_LOW, fma(n, -_LN2_HIGH, x))
    p = fma(r, _E11, _E10)
    p = fma(r, p, _E9)
    p = fma(r, p, _E8)
    p = fma(r, p, _E7)
    p = fma(r, p, _E6)
    p = fma(r, p, _E5)
    p = fma(r, p, _E4)
    p = fma(r, p, _E3)
    p = fma(r, p, _E2)
    p = fma(r, p, 1.0)
    p = fma(r, p, 1.0)
    return i64(f64(p).view(np.int64) + (f64(shifted).view(np.int64) << 52)).view(np.float64)


@inlined
def log(x):  # type: ignore[no-untyped-def]
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


def uniform(seed, position, branch):  # type: ignore[no-untyped-def]
    """Philox 4x64-10 with key (seed, 0) and counter (position, branch, 0, 0) as numpy counts."""
    c0 = position + _ONE
    c1 = branch + (_ONE if c0 == _NONE else _NONE)
    c2 = _ONE if c0 == _NONE and c1 == _NONE else _NONE
    c3, k0, k1 = _NONE, seed, _NONE
    for _ in range(10):
        c0, c1, c2, c3 = _high(_M1, c2) ^ c1 ^ k0, _M1 * c2, _high(_M0, c0) ^ c3 ^ k1, _M0 * c0
        k0, k1 = k0 + _W0, k1 + _W1
    return f64(i64(c0 >> _UNUSED_BITS)) * 2.0**-53
