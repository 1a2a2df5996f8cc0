"""A killed server loses nothing it has acknowledged, and goes on as if nothing had been."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from itertools import islice
from typing import Any, NamedTuple

import httpx
import pytest

from tests.end_to_end.calls import (
    LONG,
    OPENING,
    Ask,
    Json,
    ServerSentEvent,
    events_of,
    query,
    server_sent,
    token_ids,
    walk_chain,
)
from tests.forking import FastServer, Nursery

SAMPLED = {"temperature": 1.0, "top_p": 1.0}
RECEIVED = 5
"""Tokens of a stream that its client has when the server is killed."""


class Exchange(NamedTuple):
    """A request and the answer that acknowledged it."""

    ask: Ask
    status: int
    body: bytes


class Client:
    """Sends requests with keys and remembers what was acknowledged."""

    def __init__(self, server: FastServer) -> None:
        self.http = server.client()
        self.exchanges: list[Exchange] = []

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def ask(self, method: str, path: str, body: Json | None = None) -> httpx.Response:
        ask = Ask(method, path, body, f"key-{len(self.exchanges)}")
        answer = ask.send(self.http)
        assert answer.is_success, answer.text
        self.exchanges.append(Exchange(ask, answer.status_code, answer.content))
        return answer

    def create(self, text: str, **config: Any) -> str:
        answer = self.ask("POST", "/v1/states", {"text": text, "config": SAMPLED | config})
        state_id: str = answer.json()["state_id"]
        return state_id

    def post(self, path: str, state_id: str, **body: Any) -> httpx.Response:
        return self.ask("POST", f"/v1/{path}", {"state_id": state_id, **body})

    def grow(self, state_id: str, count: int) -> None:
        """Generate ``count`` tokens, also past the end of a story."""
        while count > 0:
            grown = self.post("generate/token", state_id, max_tokens=count).json()
            count -= len(grown["token_ids"])


def snapshot(client: httpx.Client, state_ids: list[str]) -> dict[str, bytes]:
    """Everything a reader can see, as bytes."""
    paths = ["/v1/states?limit=100", "/v1/events?limit=1000", "/v1/audit/head"]
    for state_id in state_ids:
        paths += [f"/v1/states/{state_id}?include=tokens", f"/v1/states/{state_id}/events"]
        paths += [f"/v1/states/{state_id}?version=1"]
    return {path: client.get(path).content for path in paths}


def operate(client: Client) -> list[str]:
    """Every kind of operation; returns the states that were begun."""
    first = client.create(LONG, seed=11, store_logits="full")
    client.post("forward", first, text="Every day the bear")
    client.post("generate/token", first, max_tokens=12, top_logprobs=2)
    client.post("generate/token", first, max_tokens=6, stream=True)
    client.post("generate/token?include=sampling", first, max_tokens=3, seed=None)
    client.post("states/config", first, config={"temperature": 0.5, "seed": None})
    client.post("generate/token", first, max_tokens=4, stream=True)
    client.post("states/rewind", first, position=70)
    forks = client.post("states/fork", first, n=2, metadata={"of": "first"}).json()["states"]
    kept, deleted = (fork["state_id"] for fork in forks)
    client.ask("DELETE", f"/v1/states/{deleted}")
    return [first, kept, deleted]


def tokens_hot(client: httpx.Client, state_id: str) -> int:
    state = client.get(f"/v1/states/{state_id}?include=cache").json()
    hot: int = state["cache"]["tokens_hot"]
    return hot


class Killed(NamedTuple):
    """A server that was killed between two requests, and stands again."""

    server: FastServer
    client: Client
    before: dict[str, bytes]
    after: dict[str, bytes]
    grown: str
    hot_before: int
    hot_after: int


@pytest.fixture(scope="module")
def killed(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killed]:
    server = FastServer(nursery, tmp_path_factory.mktemp("killed") / "cacher.db")
    with server, Client(server) as client:
        state_ids = operate(client)
        grown = client.create(LONG, seed=3)
        client.grow(grown, 8)
        hot_before = tokens_hot(client.http, grown)
        before = snapshot(client.http, [*state_ids, grown])
        server.kill()
        server.start()
        after = snapshot(client.http, [*state_ids, grown])
        hot_after = tokens_hot(client.http, grown)
        yield Killed(server, client, before, after, grown, hot_before, hot_after)


def test_what_was_acknowledged_is_there_byte_for_byte(killed: Killed) -> None:
    assert killed.after == killed.before
    assert b"state_deleted" in killed.after["/v1/events?limit=1000"]


def test_the_chain_holds_after_a_kill(killed: Killed) -> None:
    reached = walk_chain(killed.server.database)
    head = killed.client.http.get("/v1/audit/head").json()
    assert (head["position"], head["hash"]) == (reached.position, reached.hash.hex())


def test_every_request_sent_again_gets_the_same_bytes_and_records_nothing(killed: Killed) -> None:
    head = killed.client.http.get("/v1/audit/head").content
    again = [exchange.ask.send(killed.client.http) for exchange in killed.client.exchanges]
    assert len({exchange.ask.path for exchange in killed.client.exchanges}) >= 8
    for exchange, answer in zip(killed.client.exchanges, again, strict=True):
        assert (answer.status_code, answer.content) == (exchange.status, exchange.body)
    assert killed.client.http.get("/v1/audit/head").content == head


class Cut(NamedTuple):
    """A stream that the crash of its server cut off; what a reader saw before it and after."""

    ask: Ask
    received: list[ServerSentEvent]
    before: dict[str, bytes]
    after: dict[str, bytes]


def cut_streams(server: FastServer, *state_ids: str) -> list[Cut]:
    """Begin long streams, kill the server when some of each has come, start it again.

    A stream that came to its end before the kill is no use: then all are begun once more.
    """
    for attempt in range(10):
        asks = [stream_of(state_id, f"cut-{attempt}-{state_id}") for state_id in state_ids]
        with server.client() as client:
            before = snapshot(client, list(state_ids))
            received = received_until_killed(server, client, asks)
            server.start()
            after = snapshot(client, list(state_ids))
        if all(event.name == "token" for events in received for event in events):
            pairs = zip(asks, received, strict=True)
            return [Cut(ask, events, before, after) for ask, events in pairs]
    raise AssertionError("every stream came to its end before the kill")


def stream_of(state_id: str, key: str) -> Ask:
    body = {"state_id": state_id, "max_tokens": 300, "stream": True}
    return Ask("POST", "/v1/generate/token", body, key)


def received_until_killed(
    server: FastServer, client: httpx.Client, asks: list[Ask]
) -> list[list[ServerSentEvent]]:
    """Some events of each stream, then the kill, then what of each was still on its way."""
    with ExitStack() as opened:
        streams = [
            server_sent(
                opened.enter_context(client.stream(a.method, a.path, **a.options)).iter_lines()
            )
            for a in asks
        ]
        received = [list(islice(stream, RECEIVED)) for stream in streams]
        server.kill()
        for events, stream in zip(received, streams, strict=True):
            with suppress(httpx.TransportError):
                events.extend(stream)
    return received


@pytest.fixture(scope="module")
def cut(killed: Killed) -> Cut:
    """A cut stream of a state that draws a fresh seed each time."""
    return cut_streams(killed.server, killed.client.create(OPENING, seed=None))[0]


@pytest.fixture(scope="module")
def resent(killed: Killed, cut: Cut) -> httpx.Response:
    """The answer to the same request after the crash."""
    answer = cut.ask.send(killed.client.http)
    assert answer.is_success
    return answer


def test_a_stream_cut_by_a_crash_leaves_its_state_at_its_base_version(cut: Cut) -> None:
    assert len(cut.received) >= RECEIVED
    assert cut.after == cut.before


def test_a_stream_cut_by_a_crash_leaves_its_intent(killed: Killed, cut: Cut) -> None:
    sql = "SELECT base_version, state_id, request_id FROM generations_started WHERE key = ?"
    intents = query(killed.server.database, sql, cut.ask.key)
    assert cut.ask.body is not None
    state_id = cut.ask.body["state_id"]
    base = json.loads(cut.before[f"/v1/states/{state_id}?include=tokens"])["version"]
    assert intents[0] == (base, state_id, cut.ask.key)


def test_a_cut_stream_sent_again_draws_the_same_tokens_although_its_seed_was_left_open(
    cut: Cut, resent: httpx.Response
) -> None:
    events = events_of(resent)
    assert events[: len(cut.received)] == cut.received
    assert events[-1].name == "done"
    assert events[-1].data["token_ids"] == token_ids(events)


def test_a_cut_stream_sent_again_becomes_one_event_with_the_seed_of_its_intent(
    killed: Killed, cut: Cut, resent: httpx.Response
) -> None:
    sql = "SELECT json_extract(payload, '$.seed') FROM events WHERE request_id = ?"
    intended = "SELECT json_extract(payload, '$.seed') FROM generations_started WHERE key = ?"
    seeds = query(killed.server.database, sql, cut.ask.key)
    assert seeds == [(events_of(resent)[-1].data["seed"],)]
    assert set(query(killed.server.database, intended, cut.ask.key)) == set(seeds)


def test_a_cut_stream_sent_a_third_time_gets_the_same_bytes(
    killed: Killed, cut: Cut, resent: httpx.Response
) -> None:
    head = killed.client.http.get("/v1/audit/head").content
    assert cut.ask.send(killed.client.http).content == resent.content
    assert killed.client.http.get("/v1/audit/head").content == head


def test_a_cut_stream_is_drawn_again_only_where_the_same_tokens_must_come(
    killed: Killed, nursery: Nursery
) -> None:
    first, second = (killed.client.create(OPENING, seed=None) for _ in range(2))
    overtaken, elsewhere = cut_streams(killed.server, first, second)
    killed.server.stop()
    database = killed.server.database
    with FastServer(nursery, database, CACHER_DTYPE="bfloat16") as other, other.client() as client:
        refused = elsewhere.ask.send(client)
    killed.server.start()
    assert (refused.status_code, refused.json()["type"]) == (409, "/problems/fingerprint-changed")
    killed.client.post("forward", first, text="So it went on.")
    moved_on = overtaken.ask.send(killed.client.http)
    assert (moved_on.status_code, moved_on.json()["type"]) == (409, "/problems/version-conflict")
    drawn_again = events_of(elsewhere.ask.send(killed.client.http))
    assert drawn_again[: len(elsewhere.received)] == elsewhere.received


def test_another_key_draws_other_tokens(killed: Killed, resent: httpx.Response) -> None:
    fresh = killed.client.create(OPENING, seed=None)
    other = killed.client.post("generate/token", fresh, max_tokens=300, stream=True)
    assert token_ids(events_of(other)) != token_ids(events_of(resent))


def drawn(client: httpx.Client, state_id: str) -> dict[str, list[Any]]:
    """Everything recorded of each token that a state has drawn, one list per kind."""
    found: dict[str, list[Any]] = {}
    for event in client.get(f"/v1/states/{state_id}/events?limit=1000").json()["events"]:
        if event["type"] == "tokens_generated":
            payload = event["payload"]
            of_each = payload["scores"] | {
                "tokens": payload["content"]["tokens"],
                "sampling_probabilities": payload["sampling_probabilities"],
            }
            for kind, values in of_each.items():
                found.setdefault(kind, []).extend(values)
    return found


def test_a_state_goes_on_after_crashes_as_one_that_was_never_interrupted(killed: Killed) -> None:
    client = killed.client
    assert killed.hot_before > 0
    assert killed.hot_after == 0
    client.grow(killed.grown, 8)
    again = cut_streams(killed.server, killed.grown)[0].ask.send(client.http)
    assert len(token_ids(events_of(again))) > RECEIVED
    interrupted = drawn(client.http, killed.grown)
    count = len(interrupted["tokens"])
    twin, other = client.create(LONG, seed=3), client.create(LONG, seed=4)
    client.grow(twin, count)
    client.grow(other, count)
    assert drawn(client.http, twin) == interrupted
    assert drawn(client.http, other)["logits_digests"] != interrupted["logits_digests"]


def test_the_log_of_a_server_that_was_killed_is_verified(killed: Killed, cut: Cut) -> None:
    report = killed.client.http.post("/v1/replay/verify", json={"all": True}).json()
    assert (report["result"], report["divergences"]) == ("equal", [])
    assert (report["tokens_reused"], report["tokens_recomputed"] > 0) == (0, True)
