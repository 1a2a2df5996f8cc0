"""Kernels that work on one row at a time: arithmetic, activations, norms.

Functions are written out in single precision (constants are ``float32``, or numba would compute in
double), so that no library and no processor decides a bit. LLVM vectorises the loops; lanes are
independent, so that changes nothing. After Cephes (S. Moshier): exp within 2 ulp, tanh within 3.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from infra.engine.kernels.compiling import inlined
from infra.engine.strict.program import Code
from infra.engine.strict.vectors import bits_of, float_of, floats, total, total_of_squares

f32 = np.float32
i32 = np.int32

_ZERO, _HALF, _ONE, _TWO = f32(0), f32(0.5), f32(1), f32(2)
_LOG2_E = f32(1.44269504088896341)
_LN2_HIGH, _LN2_LOW = f32(0.693359375), f32(-2.12194440e-4)
_EXP_MIN, _EXP_MAX = f32(-87.0), f32(88.0)
_ROUNDING = f32(12582912.0)  # 1.5 * 2**23: adding it leaves an integer in the lowest bits
_ROUNDING_BITS = i32(0x4B400000)
_EXPONENT_BIAS, _MANTISSA_BITS = i32(127), i32(23)
_E0, _E1, _E2 = f32(1.9875691500e-4), f32(1.3981999507e-3), f32(8.3334519073e-3)
_E3, _E4, _E5 = f32(4.1665795894e-2), f32(1.6666665459e-1), f32(5.0000001201e-1)
_T0, _T1, _T2 = f32(-5.70498872745e-3), f32(2.06390887954e-2), f32(-5.37397155531e-2)
_T3, _T4, _SMALL = f32(1.33314422036e-1), f32(-3.33332819422e-1), f32(0.625)
_SQRT_HALF = f32(0.7071067811865476)
_SQRT_2_OVER_PI, _CUBIC = f32(0.7978845608028654), f32(0.044715)
# Abramowitz and Stegun, 7.1.26: within 1.5e-7.
_ERF_P, _ERF_1, _ERF_2 = f32(0.3275911), f32(0.254829592), f32(-0.284496736)
_ERF_3, _ERF_4, _ERF_5 = f32(1.421413741), f32(-1.453152027), f32(1.061405429)


@inlined
def exp(x):
    """The exponential; 0 below -87, for ``-inf`` too, and above 88 what it is there."""
    clamped = min(max(x, _EXP_MIN), _EXP_MAX)
    shifted = clamped * _LOG2_E + _ROUNDING
    whole = shifted - _ROUNDING
    r = clamped - whole * _LN2_HIGH - whole * _LN2_LOW
    p = ((((_E0 * r + _E1) * r + _E2) * r + _E3) * r + _E4) * r + _E5
    p = p * (r * r) + r + _ONE
    exponent = bits_of(shifted) - _ROUNDING_BITS + _EXPONENT_BIAS
    power = float_of(i32(exponent << _MANTISSA_BITS))
    return _ZERO if x < _EXP_MIN else p * power


@inlined
def tanh(x):
    """The hyperbolic tangent."""
    size = abs(x)
    z = x * x
    small = ((((_T0 * z + _T1) * z + _T2) * z + _T3) * z + _T4) * z * x + x
    large = _ONE - _TWO / (exp(size + size) + _ONE)
    return small if size < _SMALL else (large if x > _ZERO else -large)


@inlined
def _erf(x):
    size = abs(x)
    t = _ONE / (_ONE + _ERF_P * size)
    p = ((((_ERF_5 * t + _ERF_4) * t + _ERF_3) * t + _ERF_2) * t + _ERF_1) * t
    y = _ONE - p * exp(-size * size)
    return y if x > _ZERO else -y


@inlined
def _sigmoid(x):
    return _ONE / (_ONE + exp(-x))


@inlined
def _silu(x):
    return x / (_ONE + exp(-x))


@inlined
def _gelu(x):
    return _HALF * x * (_ONE + _erf(x * _SQRT_HALF))


@inlined
def _gelu_tanh(x):
    return _HALF * x * (_ONE + tanh(_SQRT_2_OVER_PI * (x + _CUBIC * (x * x * x))))


@inlined
def _copy(x):
    return x


@inlined
def _negative(x):
    return -x


@inlined
def _relu(x):
    return max(x, _ZERO)


@inlined
def _square(x):
    return x * x


@inlined
def _cube(x):
    return x * x * x


@inlined
def _rsqrt(x):
    return _ONE / np.sqrt(x)


@inlined
def _add(x, y):
    return x + y


@inlined
def _subtract(x, y):
    return x - y


@inlined
def _multiply(x, y):
    return x * y


@inlined
def _divide(x, y):
    return x / y


def _each(function: Callable[..., Any]) -> Any:
    """A loop that applies ``function`` to ``n`` floats."""

    @inlined
    def loop(out, x, step, n):
        target, source = floats(out), floats(x)
        if step == 1:
            for i in range(n):
                target[i] = function(source[i])
        else:
            for i in range(n):
                target[i] = function(source[i * step])

    return loop


def _pairwise(function: Callable[..., Any]) -> Any:
    """A loop over two operands; a step of 0 repeats the first float of one."""

    @inlined
    def loop(out, x, x_step, y, y_step, n):
        target, left, right = floats(out), floats(x), floats(y)
        zero = np.int64(0)
        if x_step == 1 and y_step == 1:
            for i in range(n):
                target[i] = function(left[i], right[i])
        elif x_step == 1 and y_step == 0:
            value = right[zero]
            for i in range(n):
                target[i] = function(left[i], value)
        elif x_step == 0 and y_step == 1:
            value = left[zero]
            for i in range(n):
                target[i] = function(value, right[i])
        else:
            for i in range(n):
                target[i] = function(left[i * x_step], right[i * y_step])

    return loop


_add_all, _subtract_all = _pairwise(_add), _pairwise(_subtract)
_multiply_all, _divide_all = _pairwise(_multiply), _pairwise(_divide)
_copy_all, _negative_all, _relu_all, _tanh_all = map(_each, (_copy, _negative, _relu, tanh))
_sigmoid_all, _silu_all, _gelu_all = map(_each, (_sigmoid, _silu, _gelu))
_gelu_tanh_all, _rsqrt_all = _each(_gelu_tanh), _each(_rsqrt)
_square_all, _cube_all, _exp_all = map(_each, (_square, _cube, exp))

_COPY, _NEGATIVE, _RELU, _TANH = Code.COPY, Code.NEGATIVE, Code.RELU, Code.TANH
_SIGMOID, _SILU, _GELU, _GELU_TANH = Code.SIGMOID, Code.SILU, Code.GELU, Code.GELU_TANH
_RSQRT, _SQUARE, _CUBE, _EXP = Code.RSQRT, Code.SQUARE, Code.CUBE, Code.EXP
_MEAN, _ADD, _SUBTRACT = Code.MEAN, Code.ADD, Code.SUBTRACT
_MULTIPLY, _DIVIDE = Code.MULTIPLY, Code.DIVIDE


@inlined
def unary(code, out, x, step, n):
    """Apply the function ``code`` to ``n`` floats."""
    if code == _COPY:
        _copy_all(out, x, step, n)
    elif code == _NEGATIVE:
        _negative_all(out, x, step, n)
    elif code == _RELU:
        _relu_all(out, x, step, n)
    elif code == _TANH:
        _tanh_all(out, x, step, n)
    elif code == _SIGMOID:
        _sigmoid_all(out, x, step, n)
    elif code == _SILU:
        _silu_all(out, x, step, n)
    elif code == _GELU:
        _gelu_all(out, x, step, n)
    elif code == _GELU_TANH:
        _gelu_tanh_all(out, x, step, n)
    elif code == _RSQRT:
        _rsqrt_all(out, x, step, n)
    elif code == _SQUARE:
        _square_all(out, x, step, n)
    elif code == _CUBE:
        _cube_all(out, x, step, n)
    elif code == _EXP:
        _exp_all(out, x, step, n)
    elif code == _MEAN:
        floats(out)[np.int64(0)] = total(x, n) / f32(n)


@inlined
def binary(code, out, x, x_step, y, y_step, n):
    """Combine ``n`` pairs of floats by the operation ``code``."""
    if code == _ADD:
        _add_all(out, x, x_step, y, y_step, n)
    elif code == _SUBTRACT:
        _subtract_all(out, x, x_step, y, y_step, n)
    elif code == _MULTIPLY:
        _multiply_all(out, x, x_step, y, y_step, n)
    elif code == _DIVIDE:
        _divide_all(out, x, x_step, y, y_step, n)


@inlined
def layer_norm(out, x, n, weight, bias, epsilon):
    """Layer normalisation (Ba et al. 2016) of ``n`` floats; ``weight``, ``bias`` may be 0: none."""
    target, source = floats(out), floats(x)
    mean = total(x, n) / f32(n)
    for i in range(n):
        target[i] = source[i] - mean
    scale = _ONE / np.sqrt(total_of_squares(out, n) / f32(n) + epsilon)
    if weight != 0 and bias != 0:
        factors, offsets = floats(weight), floats(bias)
        for i in range(n):
            target[i] = target[i] * scale * factors[i] + offsets[i]
    elif weight != 0:
        factors = floats(weight)
        for i in range(n):
            target[i] = target[i] * scale * factors[i]
    else:
        for i in range(n):
            target[i] = target[i] * scale
