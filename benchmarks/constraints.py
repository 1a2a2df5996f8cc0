"""What a text costs that has to satisfy a JSON Schema."""

import statistics
import time
from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any

from benchmarks.bench import Bench
from benchmarks.client import Client
from benchmarks.measured import Measured, Ratio
from benchmarks.workload import GREEDY


def constrained(name: str) -> Mapping[str, Any]:
    """Asks for a list of objects that is longer than any text here.

    Each has a short string, a number, a boolean and one of three words; the string is called
    ``name``, so that another name makes another schema. Tokens are drawn greedily: nothing but
    the mask then depends on how many tokens are allowed.
    """
    item = {
        "type": "object",
        "properties": {
            name: {"type": "string", "maxLength": 20},
            "count": {"type": "integer", "minimum": 0, "maximum": 9999},
            "done": {"type": "boolean"},
            "colour": {"enum": ["red", "green", "blue"]},
        },
        "required": [name, "count", "done", "colour"],
        "additionalProperties": False,
    }
    schema = {"type": "array", "items": item, "minItems": 1000}
    return {**GREEDY, "constraint": {"json_schema": schema}}


def rows(bench: Bench) -> Iterator[Measured]:
    """Between tokens, and before the first one under a schema that was not seen before."""
    for streams in (bench.sizes.few, bench.sizes.many):
        yield between_tokens(bench, streams)
    yield first_token(bench)


def between_tokens(bench: Bench, streams: int) -> Measured:
    """Time per token of each stream, from its first to its last, under a schema in use."""
    known = constrained("name")
    bench.server().client.generate(bench.server().client.create(bench.prompt(1)), 1, known)
    return bench.pair(
        f"time per token under a JSON Schema, {streams} at once",
        "the same without it",
        "ms",
        Ratio.COST,
        ours=lambda: _step(bench, streams, known),
        theirs=lambda: _step(bench, streams, GREEDY),
    )


def first_token(bench: Bench) -> Measured:
    """The schema is tried, compiled and followed first."""
    client, numbers = bench.server().client, count()
    return bench.pair(
        "first token under a new JSON Schema, cold text",
        "the same without it",
        "ms",
        Ratio.COST,
        ours=lambda: _first(bench, client, constrained(f"name_{next(numbers)}")),
        theirs=lambda: _first(bench, client, GREEDY),
    )


def _step(bench: Bench, streams: int, how: Mapping[str, Any]) -> float:
    served, sizes = bench.server(), bench.sizes
    states = [served.client.create(bench.prompt(sizes.prompt)) for _ in range(streams)]

    def step(client: Client, state_id: str) -> float:
        arrivals = [*client.stream(state_id, sizes.new, how)]
        return (arrivals[-1] - arrivals[0]) / (sizes.new - 1)

    return 1e3 * statistics.fmean(served.together(step, states))


def _first(bench: Bench, client: Client, how: Mapping[str, Any]) -> float:
    state_id = client.create(bench.prompt(bench.sizes.prompt))
    start = time.perf_counter()
    (first,) = client.stream(state_id, 1, how)
    return 1e3 * (first - start)
