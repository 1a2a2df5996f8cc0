"""Tokens per second of states that generate at the same time, over HTTP."""

from collections import deque
from collections.abc import Iterator, Mapping

from benchmarks.bench import Bench
from benchmarks.client import Client
from benchmarks.measured import Measured, Ratio, seconds
from benchmarks.served import Served
from benchmarks.workload import GREEDY, SAMPLED


def rows(bench: Bench) -> Iterator[Measured]:
    """Greedy, sampled, streamed and bfloat16, and what slows a single stream down."""
    few, many = bench.sizes.few, bench.sizes.many
    for count in bench.sizes.streams:
        yield against_generate(bench, count)
    yield against_generate(bench, many, sampling=SAMPLED)
    for count in (few, many):
        yield against_generate(bench, count, streamed=True)
    for count in (few, many):
        yield against_generate(bench, count, dtype="bfloat16")
    yield against_memory(bench, "float32")
    yield against_memory(bench, "bfloat16")
    for count in (few, many):
        yield against_plain_kernels(bench, count)


def against_generate(
    bench: Bench,
    count: int,
    *,
    sampling: Mapping[str, float] = GREEDY,
    streamed: bool = False,
    dtype: str = "float32",
) -> Measured:
    """So many states against one sequence of plain transformers in float32."""
    served, plain, sizes = bench.server(dtype), bench.plain, bench.sizes
    kinds = ("sampled" * (sampling is SAMPLED), "streamed" * streamed, dtype)
    return bench.pair(
        ", ".join([_states(count), *filter(None, kinds)]),
        "plain generate, one sequence, float32",
        "tokens/s",
        Ratio.SPEED,
        ours=lambda: rate(bench, served, count, sampling=sampling, streamed=streamed),
        theirs=lambda: sizes.new / plain.generate(bench.prompt(sizes.prompt), sizes.new, sampling),
    )


def against_memory(bench: Bench, dtype: str) -> Measured:
    """One stream, from its first token to its last, against reading each weight once a token."""
    served, sizes = bench.server(dtype), bench.sizes
    bytes_per_token = bench.plain.weights_per_token * {"float32": 4, "bfloat16": 2}[dtype]

    def ours() -> float:
        state_id = served.client.create(bench.prompt(sizes.prompt))
        arrivals = [*served.client.stream(state_id, sizes.new)]
        return (sizes.new - 1) / (arrivals[-1] - arrivals[0])

    return bench.pair(
        f"1 state, streamed, from its first token on, {dtype}",
        "the limit that reading the weights sets",
        "tokens/s",
        Ratio.SPEED,
        ours=ours,
        theirs=lambda: bench.memory.bytes_per_second() / bytes_per_token,
    )


def against_plain_kernels(bench: Bench, count: int) -> Measured:
    """The same engine with kernels whose bits depend on the batch."""
    default, plain = bench.server(), bench.server(strategy="plain")
    return bench.pair(
        f"{_states(count)}, float32",
        "the same engine with CACHER_STRATEGY=plain",
        "tokens/s",
        Ratio.SPEED,
        ours=lambda: rate(bench, default, count),
        theirs=lambda: rate(bench, plain, count),
    )


def rate(
    bench: Bench,
    served: Served,
    count: int,
    *,
    sampling: Mapping[str, float] = GREEDY,
    streamed: bool = False,
) -> float:
    """Tokens per second of ``count`` states together, prompts included."""
    new = bench.sizes.new
    states = [served.client.create(bench.prompt(bench.sizes.prompt)) for _ in range(count)]

    def work(client: Client, state_id: str) -> None:
        if streamed:
            deque(client.stream(state_id, new, sampling), maxlen=0)
        else:
            client.generate(state_id, new, sampling)

    return count * new / seconds(lambda: served.together(work, states))


def _states(count: int) -> str:
    return "1 state" if count == 1 else f"{count} states together"
