"""How long running streams wait for their next token when a long prompt arrives."""

import statistics
import time
from collections.abc import Callable, Iterator
from itertools import pairwise

from benchmarks.bench import Bench
from benchmarks.measured import Measured, Ratio, percentile

Gaps = list[float]


def rows(bench: Bench) -> Iterator[Measured]:
    """Gaps between tokens in units of the step that is usual before the prompt comes."""
    sizes = bench.sizes
    rounds = [arrival(bench) for _ in range(bench.rounds)]
    measures: dict[str, Callable[[Gaps], float]] = {
        "median": statistics.median,
        "p99": lambda gaps: percentile(gaps, 99),
        "longest": max,
    }
    for name, of in measures.items():
        yield Measured(
            what=(
                f"{name} gap in {sizes.running} streams while a"
                f" {sizes.arriving}-token prompt arrives"
            ),
            against="their usual step",
            unit="ms",
            ratio=Ratio.COST,
            ours=[1e3 * of(gaps) for gaps, _ in rounds],
            theirs=[1e3 * usual for _, usual in rounds],
        )


def arrival(bench: Bench) -> tuple[Gaps, float]:
    """Gaps (s) that overlap the time from sending a prompt to its first token; the usual step."""
    served, sizes = bench.server(), bench.sizes
    early = sizes.running_new // 4
    states = [served.client.create(bench.prompt(sizes.prompt)) for _ in range(sizes.running)]
    late = served.client.create(bench.prompt(sizes.arriving))

    def arrive() -> tuple[float, float]:
        sent = time.perf_counter()
        (first,) = served.client.stream(late, 1)
        return sent, first

    (sent, answered), streams = served.beside(states, sizes.running_new, after=early, do=arrive)
    assert min(stream[-1] for stream in streams) > answered, "the streams were too short"
    gaps = [gap for stream in streams for gap in pairwise(stream[early // 2 :])]
    return (
        [end - start for start, end in gaps if end > sent and start < answered],
        statistics.median(end - start for start, end in gaps if end <= sent),
    )
