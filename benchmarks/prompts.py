"""Prefill, the time to the first token, and rebuilding a text."""

import time
from collections.abc import Iterator
from typing import Final

from benchmarks.bench import MIN_CACHE_BYTES, Bench
from benchmarks.client import Client
from benchmarks.measured import Measured, Ratio, seconds

_MOST_OTHERS: Final = 1000
"""Texts after which one must have left the cache."""


def rows(bench: Bench) -> Iterator[Measured]:
    """Cold prompts in each dtype, hot ones, rebuilt ones."""
    for dtype in ("float32", "bfloat16"):
        yield prefill(bench, dtype)
    yield hot_text(bench)
    yield hot_state(bench)
    yield from rebuild(bench)


def prefill(bench: Bench, dtype: str) -> Measured:
    """A new state and its first token, against a pass over as many tokens."""
    client, tokens = bench.server(dtype).client, bench.sizes.long
    return bench.pair(
        f"cold prompt of {tokens} tokens: create and generate 1, {dtype}",
        "plain model(ids, use_cache, logits_to_keep=1), float32",
        "ms",
        Ratio.SPEEDUP,
        ours=lambda: 1e3 * _first_token(client, bench.prompt(tokens)),
        theirs=lambda: 1e3 * bench.plain.prefill(bench.prompt(tokens)),
        repeat=3,
    )


def hot_text(bench: Bench) -> Measured:
    """A new state whose text begins with one that is in the cache."""
    client, sizes = bench.server().client, bench.sizes

    def hot() -> float:
        held = bench.prompt(sizes.long)
        client.hold(held)
        return 1e3 * _first_token(client, held + bench.prompt(sizes.added))

    return bench.pair(
        f"first token after {sizes.long} hot and {sizes.added} new tokens: create and stream",
        "the same requests, all cold",
        "ms",
        Ratio.SPEEDUP,
        ours=hot,
        theirs=lambda: 1e3 * _first_token(client, bench.prompt(sizes.long + sizes.added)),
        repeat=3,
    )


def hot_state(bench: Bench) -> Measured:
    """A state that is continued: tokens are appended to it by a request of their own."""
    client, sizes = bench.server().client, bench.sizes

    def continued(state_id: str) -> float:
        start = time.perf_counter()
        client.post("/v1/forward", state_id=state_id, tokens=bench.prompt(sizes.added))
        (first,) = client.stream(state_id, 1)
        return 1e3 * (first - start)

    return bench.pair(
        f"first token after {sizes.long} hot and {sizes.added} new tokens: forward and stream",
        "the same requests, all cold",
        "ms",
        Ratio.SPEEDUP,
        ours=lambda: continued(client.hold(bench.prompt(sizes.long))),
        theirs=lambda: continued(client.create(bench.prompt(sizes.long))),
        repeat=3,
    )


def rebuild(bench: Bench) -> Iterator[Measured]:
    """Tokens generated, then dropped from the cache and computed again, and then verified."""
    sizes = bench.sizes
    few_texts = max(bench.kv_bytes(2 * bench.context_size), MIN_CACHE_BYTES)
    client = bench.server(hot_cache_bytes=str(2 * few_texts)).client  # half of it for one model
    states: list[str] = []

    def generate() -> float:
        states.append(client.create(bench.prompt(sizes.prompt)))
        return 1e3 * seconds(lambda: client.generate(states[-1], sizes.rebuilt))

    def rebuild() -> float:
        _drop(bench, client, states[-1])
        return 1e3 * seconds(lambda: client.generate(states[-1], 1))

    def verify() -> float:
        return 1e3 * seconds(lambda: client.verify(states[-1]))

    generated, rebuilt, verified = bench.measure(generate, rebuild, verify)
    for what, samples in (
        (f"rebuild of {sizes.rebuilt} generated tokens that left the cache", rebuilt),
        (f"verification of {sizes.rebuilt} generated tokens, every draw", verified),
    ):
        yield Measured(
            what=what,
            against="generating them",
            unit="ms",
            ratio=Ratio.SPEEDUP,
            ours=samples,
            theirs=generated,
        )


def _first_token(client: Client, tokens: list[int]) -> float:
    """Seconds from sending a text to its first token."""
    start = time.perf_counter()
    (first,) = client.stream(client.create(tokens), 1)
    return first - start


def _drop(bench: Bench, client: Client, state_id: str) -> None:
    """Have other texts take a state's place in the cache."""
    for _ in range(_MOST_OTHERS):
        if not client.tokens_hot(state_id):
            return
        client.generate(client.create(bench.prompt(bench.context_size - 1)), 1)
    raise AssertionError(f"{_MOST_OTHERS} other texts left it in the cache")
