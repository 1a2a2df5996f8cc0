"""Samples of two things that were measured alternately, and their ratio."""

import statistics
import time
from collections.abc import Callable, Sequence
from enum import StrEnum

from msgspec import Struct

Arm = Callable[[], float]
"""Measures once."""


class Ratio(StrEnum):
    """What a ratio says."""

    SPEED = "ours / theirs, more is better"  # of rates
    SPEEDUP = "theirs / ours, more is better"  # of times
    COST = "ours / theirs, less is better"


class Measured(Struct, frozen=True, kw_only=True):
    """``ours[i]`` and ``theirs[i]`` (in ``unit``) were measured one right after the other."""

    what: str
    against: str
    unit: str
    ratio: Ratio
    ours: list[float]
    theirs: list[float]

    def ratios(self) -> list[float]:
        """The ratio of each round."""
        pairs = zip(self.ours, self.theirs, strict=True)
        if self.ratio is Ratio.SPEEDUP:
            return [theirs / ours for ours, theirs in pairs]
        return [ours / theirs for ours, theirs in pairs]


def alternately(*arms: Arm, rounds: int, rest_s: float) -> list[list[float]]:
    """Samples of each arm: all arms in turn, ``rounds`` times.

    The rest after each lets threads that spin for a while after their work go to sleep.
    """
    samples: list[list[float]] = [[] for _ in arms]
    for _ in range(rounds):
        for arm, values in zip(arms, samples, strict=True):
            values.append(arm())
            time.sleep(rest_s)
    return samples


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one run."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def percentile(values: Sequence[float], percent: int) -> float:
    """The given percentile; of a single value that value."""
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
