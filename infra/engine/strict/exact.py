"""Tables that torch would fill differently from one processor to the next, written out.

What a model computes from positions alone is evaluated by torch when the model is loaded. Addition,
multiplication and whatever moves numbers are the same everywhere; functions are not: torch takes
them from a library that was written for the processor at hand. The two that models need are here,
in operations of double precision, each rounded by IEEE 754; the frequencies of rotary positions
are powers, taken by decimal arithmetic. Whatever else would be needed is refused.
"""

import math
from collections.abc import Callable, Sequence
from decimal import Context, Decimal
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from infra.engine.forward import Unsupported
from infra.engine.strict.operators import ALIKE, ARITHMETIC, RESHAPING

_SAME: Final = (
    RESHAPING
    | ALIKE
    | ARITHMETIC.keys()
    | {"neg", "cat", "stack", "embedding", "index", "repeat_interleave", "where"}
    | {"full", "ones", "zeros", "arange"}
)
"""Operations that IEEE 754 and their name define."""

# Sine and cosine after fdlibm (Sun Microsystems, 1993): pi / 2 in parts whose products with a
# number of quarter turns are exact, and polynomials in the square of what is left.
_HALF_PI: Final = (1.57079632673412561417, 6.07710050630396597660e-11, 2.02226624871116645580e-21)
_SINE: Final = (
    *(1.58969099521155010221e-10, -2.50507602534068634195e-08, 2.75573137070700676789e-06),
    *(-1.98412698298579493134e-04, 8.33333333332248946124e-03, -1.66666666666666324348e-01),
)
_COSINE: Final = (
    *(-1.13596475577881948265e-11, 2.08757232129817482790e-09, -2.75573143513906633035e-07),
    *(2.48015872894767294178e-05, -1.38888888888741095749e-03, 4.16666666666666019037e-02),
)
_AT_ONCE: Final = 1 << 20
_DECIMAL: Final = Context(prec=40)


def evaluate(target: Any, name: str, arguments: Any, options: Any) -> Any:
    """The result of an operation of a traced graph on what is known at load.

    Raises:
        Unsupported: it may differ between processors.
    """
    if name in _FUNCTIONS:
        return _FUNCTIONS[name](*arguments)
    result = target(*arguments, **options)
    parts = result if isinstance(result, list | tuple) else [result]
    if name not in _SAME and any(isinstance(p, Tensor) and p.is_floating_point() for p in parts):
        raise Unsupported(f"the operation {name} of positions or weights")
    return result


def rotary_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The frequencies of a model's rotary positions by name, as its own code makes them.

    Raises:
        Unsupported: its code cannot be called for that.
    """
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if "RotaryEmbedding" not in type(module).__name__:
            continue
        kind: Any = type(module)
        try:
            with _ExactPowers():  # type: ignore[no-untyped-call]
                made = dict(kind(module.config).named_buffers())
        except Exception as error:
            raise Unsupported(f"rotary positions of type {kind.__name__}: {error}") from error
        for name, buffer in module.named_buffers():
            found[f"{path}.{name}"] = made[name].to(buffer)
    return found


class _ExactPowers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it, powers are those of :func:`_power`."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func.overloadpacket is torch.ops.aten.pow:
            return _power(*args)
        return func(*args, **(kwargs or {}))


def _power(base: Tensor | float, exponent: Tensor | float) -> Tensor:
    """Powers in 40 digits, rounded."""
    pairs = [torch.as_tensor(value, dtype=torch.float64) for value in (base, exponent)]
    bases, exponents = torch.broadcast_tensors(*pairs)  # type: ignore[no-untyped-call]
    values = [
        float(_DECIMAL.power(Decimal(x), Decimal(y)))
        for x, y in zip(bases.flatten().tolist(), exponents.flatten().tolist(), strict=True)
    ]
    return torch.tensor(values, dtype=torch.result_type(base, exponent)).view(bases.shape)


def _polynomial(coefficients: Sequence[float], x: Tensor) -> Tensor:
    total = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        total = total * x + coefficient
    return total


def _sine(x: Tensor, ahead: int) -> Tensor:
    """The sine of ``x``, so many quarter turns ahead."""
    turns = torch.round(x * (2 / math.pi))
    rest = x
    for part in _HALF_PI:
        rest = rest - turns * part
    square = rest * rest
    sine = rest + rest * square * _polynomial(_SINE, square)
    cosine = 1 - square * 0.5 + square * square * _polynomial(_COSINE, square)
    quarter = (turns.long() + ahead) & 3
    value = torch.where(quarter % 2 == 0, sine, cosine)
    return torch.where(quarter < 2, value, -value)


def _each(ahead: int) -> Callable[[Tensor], Tensor]:
    """A function of the values of a tensor, computed in double precision and rounded."""

    def function(x: Tensor) -> Tensor:
        parts = [_sine(part.double(), ahead).to(x.dtype) for part in x.flatten().split(_AT_ONCE)]  # type: ignore[no-untyped-call]
        return torch.cat(parts).view(x.shape)

    return function


_FUNCTIONS: Final = {"sin": _each(0), "cos": _each(1)}
