"""How soon the place of a stream is free once its client has gone."""

import statistics
import time
from collections.abc import Callable, Iterator
from itertools import islice, pairwise
from typing import Final

from benchmarks.bench import Bench
from benchmarks.client import TIMEOUT_S
from benchmarks.measured import Measured, Ratio

EARLY: Final = 6
"""Tokens that a client reads before it goes."""
_POLL_S: Final = 0.001
"""Between two looks at the counter, which the server's engine pays for."""


def rows(bench: Bench) -> Iterator[Measured]:
    """In units of the step that such a stream has."""
    departures = bench.sizes.departures
    rounds = [
        [*zip(*(departure(bench, n / departures) for n in range(departures)), strict=True)]
        for _ in range(bench.rounds)
    ]
    measures: dict[str, Callable[[tuple[float, ...]], float]] = {
        "median": statistics.median,
        "longest": max,
    }
    for name, of in measures.items():
        yield Measured(
            what=f"{name} time from a disconnect to the freed place, of {departures}",
            against="the stream's usual step",
            unit="ms",
            ratio=Ratio.COST,
            ours=[1e3 * of(freed) for freed, _ in rounds],
            theirs=[1e3 * statistics.median(steps) for _, steps in rounds],
        )


def departure(bench: Bench, phase: float) -> tuple[float, float]:
    """Seconds from leaving, ``phase`` of a step after a token, to the freed place; of a step."""
    served, sizes = bench.server(), bench.sizes
    tokens = served.guest.stream(
        served.client.create(bench.prompt(sizes.prompt)), sizes.running_new
    )
    step = statistics.median(end - start for start, end in pairwise(islice(tokens, EARLY)))
    assert served.kv()["sequences"] == 1, "the stream was too short"
    next(tokens)
    time.sleep(phase * step)
    left = time.perf_counter()
    tokens.close()
    served.guest.close()
    while served.kv()["sequences"]:
        assert time.perf_counter() - left < TIMEOUT_S, "the place was never free"
        time.sleep(_POLL_S)
    return time.perf_counter() - left, step
