"""Arithmetic with the same bits everywhere: sums rounded once, exponentials in decimal.

Decimal arithmetic is correctly rounded by its specification, unlike ``math.exp``. Nothing raises:
what is too large is infinite.
"""

import math
from collections.abc import Iterable, Sequence
from decimal import Context, Decimal
from typing import Final

_CONTEXT: Final = Context(prec=40, traps=[])


def exp(value: Decimal) -> float:
    """The exponential of a number, to 40 digits before it is a float."""
    return float(_CONTEXT.exp(value))


def softmax(values: Sequence[float]) -> list[float]:
    """The softmax of finite numbers."""
    highest = Decimal(max(values))
    weights = [exp(_CONTEXT.subtract(Decimal(value), highest)) for value in values]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def sigmoid(value: float) -> float:
    """``1 / (1 + exp(-value))`` of a finite number."""
    weight = exp(Decimal(-abs(value)))
    return (1.0 if value >= 0 else weight) / (1.0 + weight)


def perplexity(logprobs: Iterable[float]) -> float | None:
    """The exponential of the mean surprisal (Jelinek et al. 1977).

    Null of no tokens, and where it is larger than a float can be.
    """
    surprisals = [-logprob for logprob in logprobs]
    if not surprisals:
        return None
    try:
        mean = math.fsum(surprisals) / len(surprisals)
    except OverflowError:
        return None
    found = exp(Decimal(mean))
    return found if math.isfinite(found) else None
