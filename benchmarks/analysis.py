"""Looking inside a state: what it takes, and what running streams notice of it."""

from collections.abc import Iterator
from functools import partial
from threading import Event, Thread

from benchmarks.bench import Bench
from benchmarks.measured import Measured, Ratio, seconds


def rows(bench: Bench) -> Iterator[Measured]:
    """Memory first, before other questions have left some to be used again."""
    yield memory(bench)
    yield from attention(bench)
    yield tokens(bench)
    yield streams(bench)


def attention(bench: Bench) -> Iterator[Measured]:
    """The mean over heads of one layer, where theirs gives every layer: it cannot give one.

    A pass goes as far as the layer that is asked about.
    """
    client, plain, sizes = bench.server().client, bench.plain, bench.sizes
    prompt = bench.prompt(sizes.long)
    state_id = client.hold(prompt)

    def took(layer: int) -> float:
        how = {"state_id": state_id, "layer": layer}
        return 1e3 * seconds(partial(client.tensor, "/v1/analyze/attention", **how))

    last = bench.layers - 1
    for name, layer in {"first": 0, "middle": last // 2, "last": last}.items():
        yield bench.pair(
            f"attention of the {name} layer of a hot {sizes.long}-token state, a request",
            "transformers with eager attention, from scratch",
            "ms",
            Ratio.SPEEDUP,
            ours=partial(took, layer),
            theirs=lambda: 1e3 * plain.attentions(prompt),
        )


def tokens(bench: Bench) -> Measured:
    """Tokens that were forwarded, whose scores are in the log, against those of a prompt."""
    client, sizes = bench.server().client, bench.sizes
    first, *others = bench.prompt(sizes.long)
    stored = client.create([first])
    client.post("/v1/forward", state_id=stored, tokens=others)
    computed = client.hold([first, *others])

    def asking(state_id: str) -> float:
        return 1e3 * seconds(lambda: client.get(f"/v1/analyze/tokens/{state_id}"))

    return bench.pair(
        f"scores of {sizes.long} tokens that are in the log, a request",
        "those of a hot state, recomputed",
        "ms",
        Ratio.SPEEDUP,
        ours=lambda: asking(stored),
        theirs=lambda: asking(computed),
    )


def memory(bench: Bench) -> Measured:
    """What the server needs while it works out the rollout over all layers."""
    served, sizes = bench.server(), bench.sizes
    client = served.client
    short, long = (client.hold(bench.prompt(size)) for size in (sizes.prompt, sizes.long))

    def roll_out(state_id: str) -> None:
        client.tensor("/v1/analyze/attention", state_id=state_id, method="rollout")

    roll_out(short)  # what is loaded once is there then
    before = served.resident_bytes()
    return Measured(
        what=f"memory of the server during the attention rollout of a {sizes.long}-token state",
        against="before it",
        unit="MB",
        ratio=Ratio.COST,
        ours=[served.peak_bytes(partial(roll_out, long)) / 1e6],
        theirs=[before / 1e6],
    )


def streams(bench: Bench) -> Measured:
    """Tokens of running streams a second, while one client asks question after question."""
    served, sizes = bench.server(), bench.sizes
    looked_at = served.client.hold(bench.prompt(sizes.long))
    enough = Event()

    def ask() -> None:
        while not enough.is_set():
            served.guest.tensor("/v1/analyze/attention", state_id=looked_at, layer=bench.layers - 1)

    def rate() -> float:
        states = [served.client.create(bench.prompt(sizes.prompt)) for _ in range(sizes.many)]
        _, arrivals = served.beside(states, sizes.new, after=1, do=lambda: None)
        begin, end = min(times[0] for times in arrivals), max(times[-1] for times in arrivals)
        return sizes.many * (sizes.new - 1) / (end - begin)

    def beside() -> float:
        enough.clear()
        asking = Thread(target=ask)
        asking.start()
        try:
            return rate()
        finally:
            enough.set()
            asking.join()

    return bench.pair(
        f"tokens of {sizes.many} streams while attention of {sizes.long} tokens is asked for",
        "nobody asks",
        "tokens/s",
        Ratio.SPEED,
        ours=beside,
        theirs=rate,
    )
