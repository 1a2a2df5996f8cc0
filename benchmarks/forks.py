"""Forks of a long text: what they hold, how fast they are made."""

from collections.abc import Iterator

from benchmarks.bench import Bench
from benchmarks.measured import Measured, Ratio, percentile, seconds
from benchmarks.workload import SAMPLED


def rows(bench: Bench) -> Iterator[Measured]:
    """Memory first, while the server's cache has room."""
    yield from memory(bench)
    yield fork_request(bench)


def memory(bench: Bench) -> Iterator[Measured]:
    """What a state and its forks hold. Counted once: no clock has a part in it."""
    served, plain, sizes = bench.server(), bench.plain, bench.sizes
    client, new = served.client, sizes.running_new
    before = served.kv()["cached_bytes"]
    state_id = client.hold(bench.prompt(sizes.long))
    of_one = served.kv()["cached_bytes"] - before
    hot = client.tokens_hot(state_id)
    forks = client.fork(state_id, sizes.forks)
    with_forks = served.kv()["cached_bytes"] - before
    running, _ = served.beside(forks, new, after=new // 2, do=served.kv, sampling=SAMPLED)
    assert running["sequences"] == sizes.forks, "the forks were too short"
    now = served.kv()
    assert now["evictions_total"] == 0, "what was evicted is missing from these figures"
    plain_bytes = plain.kv_bytes(plain.kv_cache(bench.prompt(sizes.long)))

    yield _bytes(
        f"K/V of a {sizes.long}-token state and its {sizes.forks} forks",
        "K/V of that state",
        with_forks,
        of_one,
    )
    yield _bytes(
        f"K/V held while {sizes.forks} forks of a {sizes.long}-token state run",
        "K/V they would hold if they shared none",
        running["held_bytes"],
        running["held_bytes"] + running["shared_bytes"],
    )
    yield _bytes(
        f"K/V of {hot} tokens",
        "K/V of as many in plain transformers",
        of_one,
        plain_bytes * hot / sizes.long,
    )
    yield _bytes(
        "memory of the server (resident)",
        "its weights and the K/V it holds",
        served.resident_bytes(),
        plain.weights_bytes + now["cached_bytes"],
    )


def fork_request(bench: Bench) -> Measured:
    """The median of some requests that fork a state."""
    client, plain, sizes = bench.server().client, bench.plain, bench.sizes
    state_id = client.hold(bench.prompt(sizes.long))
    kv_cache = plain.kv_cache(bench.prompt(sizes.long))

    def ours() -> float:
        times = [seconds(lambda: client.fork(state_id, 1)) for _ in range(sizes.fork_requests)]
        return 1e3 * percentile(times, 50)

    def theirs() -> float:
        times = [plain.copy(kv_cache) for _ in range(sizes.fork_requests)]
        return 1e3 * percentile(times, 50)

    return bench.pair(
        f"fork of a {sizes.long}-token state, p50 of {sizes.fork_requests} requests",
        "copying the KV cache of plain transformers",
        "ms",
        Ratio.SPEEDUP,
        ours=ours,
        theirs=theirs,
    )


def _bytes(what: str, against: str, ours: float, theirs: float) -> Measured:
    """Bytes, shown in MB."""
    return Measured(
        what=what,
        against=against,
        unit="MB",
        ratio=Ratio.COST,
        ours=[ours / 1e6],
        theirs=[theirs / 1e6],
    )
