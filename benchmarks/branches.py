"""Several ways on from one text: continuations, beam search, and verifying both."""

from collections.abc import Callable, Iterator

from benchmarks.bench import Bench
from benchmarks.measured import Measured, Ratio, seconds
from benchmarks.workload import SAMPLED


def rows(bench: Bench) -> Iterator[Measured]:
    """Against plain transformers, and against their own verification."""
    sizes, client = bench.sizes, bench.server().client
    continuations = (
        f"{sizes.branches} continuations of a {sizes.long}-token text by {sizes.branch_new} tokens"
    )
    yield from against_generate(bench, continuations)
    for tokens in (sizes.prompt, sizes.long):
        yield beam_search(bench, tokens)
    yield verification(
        bench,
        continuations,
        lambda state_id: client.branch(state_id, sizes.branches, sizes.branch_new, SAMPLED),
    )
    yield verification(
        bench,
        _search(bench, sizes.long),
        lambda state_id: client.search(state_id, sizes.beams, sizes.branch_new),
    )


def against_generate(bench: Bench, what: str) -> Iterator[Measured]:
    """A cold text and one request, against as many calls, and against one call with a batch."""
    client, plain, sizes = bench.server().client, bench.plain, bench.sizes
    count, new = sizes.branches, sizes.branch_new

    def ours() -> float:
        state_id = client.create(bench.prompt(sizes.long))
        return count * new / seconds(lambda: client.branch(state_id, count, new, SAMPLED))

    def separately() -> float:
        """One of the calls, which come one after the other."""
        return new / plain.generate(bench.prompt(sizes.long), new, SAMPLED)

    def as_a_batch() -> float:
        text = bench.prompt(sizes.long)
        return count * new / plain.generate(text, new, SAMPLED, sequences=count)

    for against, theirs in (
        (f"plain generate, {count} calls", separately),
        (f"plain generate, num_return_sequences={count}", as_a_batch),
    ):
        yield bench.pair(what, against, "tokens/s", Ratio.SPEED, ours=ours, theirs=theirs)


def beam_search(bench: Bench, tokens: int) -> Measured:
    """The same search of the same text, which neither has seen."""
    client, plain, sizes = bench.server().client, bench.plain, bench.sizes
    beams, new = sizes.beams, sizes.branch_new
    texts = [bench.prompt(tokens) for _ in range(bench.rounds)]
    given, given_to_plain = iter(texts), iter(texts)

    def ours() -> float:
        state_id = client.create(next(given))
        return 1e3 * seconds(lambda: client.search(state_id, beams, new))

    return bench.pair(
        _search(bench, tokens),
        f"plain generate, num_beams={beams}",
        "ms",
        Ratio.SPEEDUP,
        ours=ours,
        theirs=lambda: 1e3 * plain.generate(next(given_to_plain), new, beams=beams),
    )


def verification(bench: Bench, what: str, generate: Callable[[str], None]) -> Measured:
    """Computing everything again, privately, against having generated it from a cold text."""
    client = bench.server().client
    states: list[str] = []

    def generated() -> float:
        states.append(client.create(bench.prompt(bench.sizes.long)))
        return 1e3 * seconds(lambda: generate(states[-1]))

    return bench.pair(
        f"verification of {what}",
        "generating them",
        "ms",
        Ratio.SPEEDUP,
        ours=lambda: 1e3 * seconds(lambda: client.verify(states[-1])),
        theirs=generated,
    )


def _search(bench: Bench, tokens: int) -> str:
    sizes = bench.sizes
    return f"{sizes.beams} beams of {sizes.branch_new} tokens on a {tokens}-token text"
