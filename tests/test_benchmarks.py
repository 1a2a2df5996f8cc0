"""The benchmarks run, on sizes so small that their figures say nothing."""

import math
import re
from collections.abc import Iterator
from functools import partial
from typing import Final

import msgspec
import pytest

import benchmarks.bench
from app.settings import from_environment
from benchmarks import scale
from benchmarks.__main__ import PARTS, main, measure
from benchmarks.bench import Bench
from benchmarks.constraints import constrained
from benchmarks.machine import describe
from benchmarks.measured import Measured, Ratio, alternately
from benchmarks.served import Served
from benchmarks.table import as_json, cells, show
from benchmarks.vocabulary import tokenizer
from benchmarks.workload import GREEDY, Sizes
from tests.forking import ForkedServer, Nursery

TINY: Final = Sizes(
    shape={"n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 4096, "n_positions": 1024},
    prompt=4,
    new=6,
    streams=(1, 2),
    many=2,
    long=64,
    added=3,
    forks=6,
    branches=3,
    beams=2,
    branch_new=8,
    rebuilt=40,
    arriving=60,
    running=6,
    running_new=900,
    fork_requests=2,
    departures=2,
    requests=4,
    appends=8,
    writers=(1, 2),
    texts=2,
    verified=20,
    events=2000,
    longest=100,
    moved=300,
    buffer_bytes=1 << 20,
)
ROUNDS: Final = 2


class OneServer(Bench):
    """Has one server for everything: a start takes seconds, and no figure is looked at."""

    def server(self, dtype: str = "float32", **settings: str) -> Served:
        wanted = {"dtype": dtype, **settings}
        from_environment({f"CACHER_{name.upper()}": value for name, value in wanted.items()})
        return super().server(hot_cache_bytes=str(16 << 20))


@pytest.fixture(scope="module")
def bench(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("bench"))
        for module in (benchmarks.bench, scale):
            patch.setattr(module, "Server", partial(ForkedServer, nursery))
        with OneServer(TINY, threads=1, rounds=ROUNDS, rest_s=0) as made:
            yield made


@pytest.fixture(scope="module")
def parts(bench: Bench) -> dict[str, list[Measured]]:
    return measure(bench, PARTS)


def row(parts: dict[str, list[Measured]], beginning: str) -> Measured:
    (found,) = [one for rows in parts.values() for one in rows if one.what.startswith(beginning)]
    return found


def test_every_pair_is_measured_in_every_round(parts: dict[str, list[Measured]]) -> None:
    counts = {
        "forks": 5,
        "branches": 6,
        "throughput": 11,
        "constraints": 3,
        "prompts": 6,
        "analysis": 6,
        "audit": 1,
        "stalls": 3,
        "disconnects": 2,
        "log": 8,
        "scale": 10,
        "requests": 4,
    }
    assert {name: len(rows) for name, rows in parts.items()} == counts
    rows = [one for part in parts.values() for one in part]
    assert len({(one.what, one.against) for one in rows}) == len(rows)
    for one in rows:
        assert len(one.ours) == len(one.theirs)
        assert len(one.ours) in ((1,) if one.unit == "MB" else (ROUNDS, 3 * ROUNDS))
        assert all(0 < value < math.inf for value in (*one.ours, *one.theirs)), one


def test_forks_are_counted_as_holding_what_they_hold(parts: dict[str, list[Measured]]) -> None:
    assert row(parts, "K/V of a 64-token state and its 6 forks").ratios() == [1]
    assert row(parts, "K/V of 64 tokens").ratios() == [1]
    assert max(row(parts, "K/V held while 6 forks").ratios()) < 1


def test_the_longest_gap_is_the_longest(parts: dict[str, list[Measured]]) -> None:
    gaps = [row(parts, f"{name} gap in 6 streams").ours for name in ("median", "p99", "longest")]
    assert all(a <= b <= c for a, b, c in zip(*gaps, strict=True))


def test_the_longest_departure_is_the_longest_and_none_is_left(
    parts: dict[str, list[Measured]], bench: Bench
) -> None:
    median, longest = (
        row(parts, f"{name} time from a disc").ours for name in ("median", "longest")
    )
    assert all(a <= b for a, b in zip(median, longest, strict=True))
    assert bench.server().kv()["sequences"] == 0


def test_what_is_measured_under_a_schema_is_held_to_it(bench: Bench) -> None:
    client, texts = bench.server().client, {}
    for how in (GREEDY, constrained("length")):
        state_id = client.create(bench.prompt(4))
        answer = client.post("/v1/generate/token", state_id=state_id, max_tokens=100, **how)
        texts["constraint" in how] = answer["text"]
    beginning = re.compile(r'\[\{"length": "[^"]{0,20}(", "count": \d|$)')
    assert beginning.match(texts[True])
    assert not beginning.match(texts[False])


@pytest.mark.parametrize("size", [256, 5000])
def test_the_tokenizer_has_as_many_tokens_as_asked_for_and_every_byte(size: int) -> None:
    made, text = tokenizer(size), "Grüße, 12 \U0001f642\n"
    ids = made.encode(text)
    assert len(made) == size
    assert made.decode(ids) == text
    assert len(ids) == len(text.encode())


def test_the_table_and_the_json_hold_every_row(
    parts: dict[str, list[Measured]], bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    about = describe(bench)
    show(parts, about)
    printed = capsys.readouterr().out
    written = msgspec.json.decode(as_json(parts, about))
    rows = [one for part in parts.values() for one in part]
    assert [one["ours"] for one in written["rows"]] == [one.ours for one in rows]
    assert written["about"] == about
    assert all(f" {cells(one)[5]} " in printed for one in rows)
    assert all(name in printed for name in about)


def test_a_generation_that_ends_early_is_an_error_and_no_figure(bench: Bench) -> None:
    client = bench.server().client
    full = bench.prompt(bench.context_size - 1)
    with pytest.raises(AssertionError, match="context_full"):
        client.generate(client.create(full), 2)
    with pytest.raises(AssertionError, match="context_full"):
        list(client.stream(client.create(full), 2))
    with pytest.raises(RuntimeError, match="tokens"):
        client.create([bench.vocabulary_size])


def test_arms_are_measured_in_turn() -> None:
    calls: list[str] = []

    def arm(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    samples = alternately(lambda: arm("a"), lambda: arm("b"), rounds=2, rest_s=0)
    assert calls == ["a", "b", "a", "b"]
    assert samples == [[1, 3], [2, 4]]


@pytest.mark.parametrize(("ratio", "expected"), [("SPEED", 2), ("SPEEDUP", 0.5), ("COST", 2)])
def test_a_ratio_above_one_is_faster_or_more(ratio: str, expected: float) -> None:
    pair = Measured(what="", against="", unit="", ratio=Ratio[ratio], ours=[4, 2], theirs=[2, 1])
    assert pair.ratios() == [expected, expected]


def test_an_unknown_measurement_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks", "throughput", "nothing"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "no measurement is called nothing" in capsys.readouterr().err
