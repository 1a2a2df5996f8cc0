"""Verifying a history, against generating it."""

from collections.abc import Iterator
from functools import partial

from benchmarks.bench import Bench
from benchmarks.measured import Measured, Ratio, seconds


def rows(bench: Bench) -> Iterator[Measured]:
    """Texts that were sampled one after the other, verified together."""
    client, sizes = bench.server().client, bench.sizes
    texts: list[list[str]] = []
    tokens = sizes.texts * sizes.verified

    def generate() -> float:
        texts.append([client.create(bench.prompt(sizes.prompt)) for _ in range(sizes.texts)])
        took = [seconds(partial(client.generate, one, sizes.verified)) for one in texts[-1]]
        return tokens / sum(took)

    def verify() -> float:
        return tokens / seconds(lambda: client.verify(*texts[-1]))

    yield bench.pair(
        f"verification of {sizes.texts} states of {sizes.verified} generated tokens, every draw",
        "generating them one after the other",
        "tokens/s",
        Ratio.SPEED,
        ours=verify,
        theirs=generate,
    )
