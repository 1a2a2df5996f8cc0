"""The log followed live: all of it or one state, from any place on, without a gap or a repeat."""

import asyncio
import json
import random
import re
import signal
import socket
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, aclosing, closing, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from app import feed as feeds
from app import sse, streams
from app.feed import PAGE_BYTES, Feeds
from domain.chain import Row
from domain.events import StateDeleted
from domain.ids import Position
from infra.log.sqlite_log import SqliteLog
from tests.app.api import (
    Json,
    assert_problem,
    configure,
    create,
    delete,
    events,
    eventually,
    fork,
    forward,
    head,
    ok,
    stream,
)
from tests.app.held import serving
from tests.builders import BY, append, created, forwarded, state_id
from tests.forking import FastServer, Nursery
from tests.support import Server

pytestmark = pytest.mark.filterwarnings(
    "ignore::litestar.utils.deprecation.LitestarDeprecationWarning"
)

STREAM = "text/event-stream"
KEY = "a-secret-key"


class Event(NamedTuple):
    """One event of a feed; a comment has nothing but its text as ``name``."""

    name: str
    id: int | None
    data: Any


def _read(answer: httpx.Response) -> Iterator[Event]:
    """Events as they come; the advice to come again is one called ``retry``."""
    fields: dict[str, str] = {}
    for line in answer.iter_lines():
        if line:
            name, value = line.split(": ", 1)
            assert name not in fields
            fields[name] = value
            continue
        if "event" in fields:
            position = int(fields["id"]) if "id" in fields else None
            yield Event(fields["event"], position, json.loads(fields["data"]))
        else:
            ((name, value),) = fields.items()
            yield Event(name or f":{value}", None, value)
        fields = {}


@contextmanager
def _following(
    client: httpx.Client,
    path: str = "/v1/events",
    last: int | None = None,
    **parameters: Any,
) -> Iterator[Iterator[Event]]:
    headers = {"Accept": STREAM} | ({} if last is None else {"Last-Event-ID": str(last)})
    with client.stream("GET", path, headers=headers, params=parameters) as answer:
        if not answer.is_success:
            answer.read()
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith(STREAM)
        assert answer.headers["cache-control"] == "no-cache"
        found = _read(answer)
        assert next(found) == Event("retry", None, "2000")
        yield found


def _recorded(found: Iterator[Event], count: int) -> list[Json]:
    """The next so many events."""
    taken: list[Json] = []
    while len(taken) < count:
        event = next(found)
        if event.name.startswith(":"):
            continue
        assert event.name == "recorded"
        assert event.data["position"] == event.id
        taken.append(event.data)
    return taken


def _state(client: httpx.Client) -> str:
    made: str = create(client)["state_id"]
    return made


# what comes


def test_a_feed_gives_what_there_is_and_then_what_comes(client: httpx.Client) -> None:
    one_state = _state(client)
    begin = head(client)["position"]
    for top_k in range(3):
        configure(client, one_state, top_k=top_k)
    with _following(client, after=begin) as found:
        past = _recorded(found, 3)
        forward(client, one_state)
        (coming,) = _recorded(found, 1)
    assert [*past, coming] == ok(client.get("/v1/events", params={"after": begin}))["events"]


def test_a_feed_begins_with_the_first_event_there_is(client: httpx.Client) -> None:
    _state(client)
    (first,) = ok(client.get("/v1/events", params={"limit": 1}))["events"]
    with _following(client) as found:
        assert _recorded(found, 1) == [first]


@pytest.mark.parametrize("of_a_state", [False, True])
def test_a_feed_from_the_head_gives_what_comes_alone(
    client: httpx.Client, of_a_state: bool
) -> None:
    one_state = _state(client)
    path = f"/v1/states/{one_state}/events" if of_a_state else "/v1/events"
    with _following(client, path, after="head") as found:
        configure(client, one_state, top_k=3)
        (event,) = _recorded(found, 1)
    assert (event["state_id"], event["version"]) == (one_state, 2)
    assert ok(client.get(path, params={"after": "head"})) == {"events": [], "next_after": None}


def test_the_last_event_a_client_has_stands_over_where_it_asks_to_begin(
    client: httpx.Client,
) -> None:
    one_state = _state(client)
    for top_k in range(4):
        configure(client, one_state, top_k=top_k)
    last = events(client, one_state)[2]["position"]
    for path, after in (("/v1/events", 0), (f"/v1/states/{one_state}/events", 1)):
        with _following(client, path, last, after=after) as found:
            assert [one["version"] for one in _recorded(found, 2)] == [4, 5]


@pytest.mark.parametrize("begin", ["version", "position"])
def test_a_feed_of_a_state_gives_its_own_events_alone_and_ends_with_it(
    client: httpx.Client, begin: str
) -> None:
    one_state, other = _state(client), _state(client)
    path = f"/v1/states/{one_state}/events"
    configure(client, other, top_k=1)
    configure(client, one_state, top_k=1)
    second = events(client, one_state)[1]["position"]
    where: Json = {"after": 2} if begin == "version" else {"last": second}
    with _following(client, path, **where) as found:
        configure(client, one_state, top_k=2)
        configure(client, other, top_k=2)
        delete(client, other)
        configure(client, one_state, top_k=3)
        delete(client, one_state)
        rest = list(found)
    assert rest.pop() == Event("end", None, {})
    assert [one.data for one in rest] == events(client, one_state)[2:]
    assert [one.data["type"] for one in rest] == ["config_changed"] * 2 + ["state_deleted"]


def test_the_feed_of_a_deleted_state_gives_its_history_and_ends(client: httpx.Client) -> None:
    one_state = _state(client)
    delete(client, one_state)
    path = f"/v1/states/{one_state}/events"
    with _following(client, path) as found:
        *history, end = found
    assert end.name == "end"
    assert [one.data for one in history] == events(client, one_state)
    for nothing in ({"Last-Event-ID": str(history[-1].id)}, {}):
        answer = client.get(
            path,
            headers={"Accept": STREAM, **nothing},
            params={} if nothing else {"after": "head"},
        )
        assert answer.status_code == 204  # nobody who gets this comes again
        assert answer.content == b""


# without a gap or a repeat


def _write(client: httpx.Client, count: int) -> None:
    one_state = _state(client)
    for step in range(count):
        configure(client, one_state, top_k=step)
    (copy,) = fork(client, one_state)
    delete(client, copy["state_id"])


def _follow_with_cuts(
    client: httpx.Client, path: str, begin: int, seed: int, last_id: Callable[[], int | None]
) -> list[Json]:
    """Everything up to an event, by a client whose connection breaks again and again."""
    chance = random.Random(seed)
    taken: list[Json] = []
    position = begin
    while position != last_id():
        with _following(client, path, position) as found:
            for _ in range(chance.choice([1, 2, 3, 8, 30])):
                taken += _recorded(found, 1)
                position = taken[-1]["position"]
                if position == last_id():
                    break
    return taken


def test_whoever_is_cut_off_again_and_again_while_eight_write_misses_and_repeats_nothing(
    client: httpx.Client, server: Server
) -> None:
    begin = head(client)["position"]
    marked = _state(client)
    last: list[int] = []

    def last_id() -> int | None:
        return last[0] if last else None

    def write(count: int) -> None:
        with server.client() as writing:
            _write(writing, count)

    def follow(seed: int) -> list[Json]:
        with server.client() as following:
            path = f"/v1/states/{marked}/events" if seed == 0 else "/v1/events"
            return _follow_with_cuts(following, path, begin, seed, last_id)

    with ThreadPoolExecutor(12) as pool:
        followed = [pool.submit(follow, seed) for seed in range(4)]
        written = [pool.submit(write, 25) for _ in range(8)]
        for top_k in range(20):
            configure(client, marked, top_k=top_k)
        for one in written:
            one.result()
        # The feeds wait for their next event by now, or come for it: this one ends them all.
        last.append(head(client)["position"] + 1)
        delete(client, marked)
        own, *whole = (one.result() for one in followed)
    expected = ok(client.get("/v1/events", params={"after": begin, "limit": 1000}))["events"]
    assert len(expected) == 1 + 8 * 28 + 20 + 1
    assert own == [event for event in expected if event["state_id"] == marked]
    for found in whole:
        assert found == expected
        positions = [event["position"] for event in found]
        assert all(before < after for before, after in pairwise(positions))


# what is refused


@pytest.mark.parametrize(
    "accept",
    [None, "*/*", "application/json", f"application/json, {STREAM}", f"{STREAM};q=0.1, */*"],
)
def test_whoever_does_not_ask_for_a_stream_gets_a_page(
    client: httpx.Client, accept: str | None
) -> None:
    one_state = _state(client)
    headers = {} if accept is None else {"Accept": accept}
    for path in ("/v1/events", f"/v1/states/{one_state}/events"):
        answer = client.get(path, headers=headers)
        assert answer.headers["content-type"].startswith("application/json")
        assert set(ok(answer)) == {"events", "next_after"}


@pytest.mark.parametrize(
    ("accept", "headers", "query", "field"),
    [
        (STREAM, {}, "limit=3", "limit"),
        (STREAM, {}, "after=-1", "after"),
        (STREAM, {}, "after=tail", "after"),
        ("*/*", {}, "after=tail", "after"),
        (STREAM, {"Last-Event-ID": "x"}, "", "Last-Event-ID"),
        (STREAM, {"Last-Event-ID": "-1"}, "", "Last-Event-ID"),
        (STREAM, {"Last-Event-ID": str(10**14)}, "", "Last-Event-ID"),
        ("application/json", {"Last-Event-ID": "1"}, "", "Last-Event-ID"),
    ],
)
def test_a_feed_that_makes_no_sense_is_refused(
    client: httpx.Client, accept: str, headers: dict[str, str], query: str, field: str
) -> None:
    one_state = _state(client)
    for path in ("/v1/events", f"/v1/states/{one_state}/events"):
        answer = client.get(f"{path}?{query}", headers={"Accept": accept, **headers})
        assert_problem(answer, 400, "invalid-input", field)


def test_a_feed_from_beyond_the_end_is_refused(client: httpx.Client) -> None:
    one_state, headers = _state(client), {"Accept": STREAM}
    beyond = head(client)["position"] + 1
    problem = assert_problem(
        client.get(f"/v1/events?after={beyond}", headers=headers), 400, "invalid-input", "after"
    )
    assert str(beyond - 1) in problem["detail"]
    path = f"/v1/states/{one_state}/events"
    problem = assert_problem(
        client.get(f"{path}?after=2", headers=headers), 404, "version-not-found"
    )
    assert problem["current_version"] == 1
    refused = client.get(f"{path}?version=1", headers=headers)
    assert_problem(refused, 400, "invalid-input", "version")
    unknown = client.get("/v1/states/state-0/events", headers=headers)
    assert_problem(unknown, 404, "state-not-found")


# places, and who holds them


LARGE = 1 << 14
"""Characters of the text of a large event; each is a token, with its place in the text."""


async def _fill(database: Path, count: int, length: int = LARGE) -> None:
    """A log of so many states that hold a text of this length."""
    async with await SqliteLog.open(database) as log:
        for first in range(0, count, 25):
            appends = [
                append(created("x" * length), state=number)
                for number in range(first, min(first + 25, count))
            ]
            await log.append(appends, provenance=BY)


@contextmanager
def _small(tmp_path: Path, count: int, length: int, **settings: Any) -> Iterator[httpx.Client]:
    """A server with two places for streams and a key, on a log of so many states."""
    database = tmp_path / "cacher.db"
    asyncio.run(_fill(database, count, length))
    given = {"max_queue": 2, "api_keys": (KEY,), **settings}
    with serving(database, **given) as (client, _):
        client.headers["X-API-Key"] = KEY
        yield client


def _is_full(client: httpx.Client) -> bool:
    with client.stream("GET", "/v1/events", headers={"Accept": STREAM}) as answer:
        return answer.status_code == 429


def test_feeds_are_bounded_and_a_client_that_leaves_makes_room(tmp_path: Path) -> None:
    with _small(tmp_path, 1, 3) as client:
        path = f"/v1/states/{state_id()}/events"
        with _following(client) as found, _following(client, path):
            _recorded(found, 1)
            answer = client.get(path, headers={"Accept": STREAM})
            problem = assert_problem(answer, 429, "queue-full")
            assert problem["limit"] == 2
            assert problem["detail"].startswith("2 feeds are open already")
            assert stream(client, _state(client), 2)[-1].name == "done"  # which are not theirs
            assert client.get(f"/v1/states/{state_id()}/export").status_code == 200
            assert int(answer.headers["retry-after"]) >= 1
        eventually(lambda: not _is_full(client))
        with _following(client) as found:
            _recorded(found, 1)
        stranger = client.get("/v1/events", headers={"Accept": STREAM, "X-API-Key": ""})
        assert_problem(stranger, 403, "key-not-accepted")


def test_a_feed_that_nothing_happens_in_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeds, "HEARTBEAT_S", 0.05)
    path = f"/v1/states/{state_id()}/events"
    with (
        _small(tmp_path, 20, 3) as client,
        _following(client, after="head") as found,
        _following(client, path) as own,
    ):
        _recorded(own, 1)
        assert [next(found).name for _ in range(3)] == [":nothing new"] * 3
        for number in range(1, 20):  # what happens to others is nothing new here
            delete(client, state_id(number))
        assert next(own).name == ":nothing new"
        assert [one["version"] for one in _recorded(found, 19)] == [2] * 19
        delete(client, state_id())
        (event,) = _recorded(own, 1)
        assert event["version"] == 2


class Slow:
    """A client that has asked for a feed and takes nothing by itself."""

    def __init__(self, client: httpx.Client) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._socket.settimeout(60)
        self._socket.connect(("127.0.0.1", client.base_url.port))
        self._socket.sendall(
            f"GET /v1/events HTTP/1.1\r\nHost: x\r\nAccept: {STREAM}\r\n"
            f"X-API-Key: {KEY}\r\nConnection: close\r\n\r\n".encode()
        )

    def __enter__(self) -> "Slow":
        self._taken = self._socket.recv(4096)
        assert b" 200 OK" in self._taken
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def rest(self, end: bytes) -> bytes:
        """What it was sent until the connection ends, or something comes."""
        taken = bytearray(self._taken)
        while end not in taken[-2 * LARGE :] and (data := self._socket.recv(1 << 20)):
            taken += data
        return bytes(taken)


NEVER = b"\0"
COUNT, LAST = 120, 121
"""More large events than the buffers between a server and a client hold, and the one after them."""


def test_a_reader_that_takes_nothing_is_let_go_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "PATIENCE_S", 0.3)
    with _small(tmp_path, COUNT, LARGE, max_queue=1) as client, Slow(client) as slow:
        eventually(lambda: not _is_full(client))
        taken = slow.rest(NEVER)
        assert b"event: recorded" in taken
        assert not taken.endswith(b"0\r\n\r\n")  # what it was sent is not all
        assert taken.count(b"event: recorded") < COUNT


def test_a_slow_reader_holds_up_nobody_and_gets_everything_in_the_end(tmp_path: Path) -> None:
    with _small(tmp_path, COUNT, LARGE) as client, Slow(client) as slow:
        with _following(client) as found:
            assert [one["position"] for one in _recorded(found, COUNT)] == list(range(1, LAST))
            delete(client, state_id())
            _recorded(found, 1)
        taken = slow.rest(b"\nid: %d\n" % LAST)
        assert re.findall(rb"\nid: (\d+)\n", taken) == [b"%d" % at for at in range(1, LAST + 1)]


def test_a_log_that_cannot_be_read_any_more_is_said(tmp_path: Path) -> None:
    database = tmp_path / "cacher.db"
    with _small(tmp_path, COUNT, LARGE) as client, Slow(client) as slow:
        with closing(sqlite3.connect(database)) as connection:
            connection.execute("ALTER TABLE events RENAME TO lost")
        taken = slow.rest(NEVER)
        error = taken.split(b"event: error\ndata: ")[1].splitlines()[0]
        assert json.loads(error)["type"] == "/problems/log-unavailable"
        assert taken.endswith(b"0\r\n\r\n")
        with closing(sqlite3.connect(database)) as connection:
            connection.execute("ALTER TABLE lost RENAME TO events")


# what it costs


class CountingLog(SqliteLog):
    """Counts the pages that are read, and how much the largest holds."""

    pages = largest = 0
    reading = asyncio.Event()

    async def page(self, **asked: Any) -> list[Row]:
        self.pages += 1
        self.reading.set()
        rows = await super().page(**asked)
        self.largest = max(self.largest, sum(len(row.payload) for row in rows))
        return rows


async def test_a_reader_holds_one_page_and_a_page_is_bounded_in_bytes(tmp_path: Path) -> None:
    database = tmp_path / "cacher.db"
    await _fill(database, 100)
    async with await CountingLog.open(database) as log:
        size = max(len(row.payload) for row in await log.rows())
        async with aclosing(Feeds(log).follow(Position(0))) as found:
            await anext(found)
            assert log.pages == 0
            for taken in range(1, 4):
                await anext(found)
                assert log.pages == taken  # nothing is read ahead
    assert PAGE_BYTES <= log.largest <= PAGE_BYTES + 4 * size < 100 * size


async def test_readers_at_one_place_share_one_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers, count = 50, 20
    async with await CountingLog.open(tmp_path / "cacher.db") as log, AsyncExitStack() as stack:
        await log.append([append(created())], provenance=BY)
        hub = Feeds(log)
        of_whom = [None, state_id()]
        found = [hub.follow(Position(1), of_whom[n % 2]) for n in range(readers)]
        with monkeypatch.context() as soon:  # one that says so waits for what comes
            soon.setattr(feeds, "HEARTBEAT_S", 0.01)
            for one in found:
                await stack.enter_async_context(aclosing(one))
                await anext(one)
                assert await anext(one) == sse.HEARTBEAT
        before = log.pages
        for version in range(1, count + 1):
            waiting = [asyncio.create_task(anext(one)) for one in found]
            await asyncio.sleep(0)
            await log.append([append(forwarded(2 + version), version)], provenance=BY)
            chunks = await asyncio.gather(*waiting)
            assert chunks == chunks[:1] * readers
            assert b"\nid: %d\n" % (version + 1) in chunks[0]
        assert log.pages - before == count


async def test_readers_that_come_while_a_state_changes_miss_nothing(tmp_path: Path) -> None:
    count = 40
    async with await SqliteLog.open(tmp_path / "cacher.db") as log:
        await log.append([append(created())], provenance=BY)
        hub = Feeds(log)

        async def follow(after: int) -> list[int]:
            chunks = [chunk async for chunk in hub.follow(Position(after), state_id())]
            assert chunks[-1] == sse.event("end", {})
            return [int(at) for at in re.findall(rb"\nid: (\d+)\n", b"".join(chunks))]

        followed = []
        for version in range(1, count):
            for _ in range(10):  # they begin at the newest event, some before the next is on disk
                followed.append((version, asyncio.create_task(follow(version))))
                await asyncio.sleep(0.0001)
            await log.append([append(forwarded(2 + version), version)], provenance=BY)
        await log.append([append(StateDeleted(), count)], provenance=BY)
        for after, one in followed:
            assert await one == list(range(after + 1, count + 2))


async def test_a_reader_that_leaves_takes_the_page_from_nobody(tmp_path: Path) -> None:
    async with await CountingLog.open(tmp_path / "cacher.db") as log:
        await log.append([append(created())], provenance=BY)
        hub = Feeds(log)
        found = [hub.follow(Position(0)) for _ in range(3)]
        for one in found:
            await anext(one)
        waiting = [asyncio.create_task(anext(one)) for one in found]
        await log.reading.wait()
        waiting[0].cancel()
        chunks = await asyncio.gather(*waiting, return_exceptions=True)
        assert isinstance(chunks[0], asyncio.CancelledError)
        assert isinstance(chunks[1], bytes)
        assert chunks[1] == chunks[2]
        assert b"event: recorded" in chunks[1]
        assert log.pages == 1
        for one in found:
            await one.aclose()


# the end of the server


COMMANDS = {
    "cacher serve": ["cacher", "serve"],
    "uvicorn": ["uvicorn", "app.main:app", "--log-level", "error", "--port"],
}


@pytest.mark.parametrize("how", COMMANDS)
def test_a_server_that_stops_ends_its_feeds_in_an_orderly_way(
    nursery: Nursery, tmp_path: Path, how: str
) -> None:
    database, errors = tmp_path / "cacher.db", tmp_path / "errors"
    asyncio.run(_fill(database, 3, 3))
    server = FastServer(nursery, database, CACHER_LOG_LEVEL="error")
    command = COMMANDS[how] + ([str(server.port)] if how == "uvicorn" else [])
    process = nursery.fork(command, server.environment, errors=errors)
    try:
        with server.client() as client:
            eventually(lambda: _answers(client))
            path = f"/v1/states/{state_id()}/events"
            with _following(client) as whole, _following(client, path, after="head") as own:
                _recorded(whole, 3)
                process.send_signal(signal.SIGTERM)
                # A body that was cut off, as that of a feed that does not end by itself would be
                # after ten seconds or never, is an error of the client's.
                assert [one.name for one in [*whole, *own] if not one.name.startswith(":")] == []
        assert process.wait(timeout=60) in (0, -signal.SIGTERM)
    finally:
        process.send_signal(signal.SIGKILL)
    written = errors.read_bytes()
    assert b"Cancel" not in written
    assert b"Traceback" not in written


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("/ready").is_success
    except httpx.ConnectError:
        return False
