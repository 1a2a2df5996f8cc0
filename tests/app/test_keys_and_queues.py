"""A server with keys, a short queue, and a default model that cannot be had."""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from tests.app.api import (
    Sent,
    assert_problem,
    create,
    events,
    eventually,
    forward,
    generate,
    is_idle,
    metric,
    nothing_recorded,
    ok,
    read_sent,
)
from tests.app.held import held_after, serving
from tests.forking import ForkedServer, Nursery
from tests.infra.engine.bench import HeldPass
from tests.support import Server

pytestmark = pytest.mark.filterwarnings(
    "ignore::litestar.utils.deprecation.LitestarDeprecationWarning"
)

KEYS = ("first-secret-key", "second-secret-key")
CLOSED = (
    ("GET", "/v1/states"),
    ("POST", "/v1/states"),
    ("GET", "/v1/states/state-0"),
    ("DELETE", "/v1/states/state-0"),
    ("POST", "/v1/forward"),
    ("POST", "/v1/generate/token"),
    ("GET", "/v1/models"),
    ("GET", "/v1/events"),
    ("GET", "/v1/audit/head"),
    ("POST", "/v1/replay/verify"),
)


@pytest.fixture(scope="module")
def closed(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two keys, two places in the queue, and gpt2, which no nursery has on its disk."""
    folder = tmp_path_factory.mktemp("closed")
    settings = {
        "CACHER_MODEL_NAME": "gpt2",
        "CACHER_API_KEYS": ", ".join(KEYS),
        "CACHER_MAX_QUEUE": "2",
    }
    with ForkedServer(nursery, folder / "cacher.db", **settings) as running:
        yield running


@pytest.fixture(scope="module")
def stranger(closed: Server) -> Iterator[httpx.Client]:
    with closed.client() as connected:
        yield connected


@pytest.fixture(scope="module")
def friend(closed: Server) -> Iterator[httpx.Client]:
    with closed.client(headers={"X-API-Key": KEYS[0]}) as connected:
        yield connected


def _tiny(client: httpx.Client) -> str:
    state_id: str = create(client, model_id="cacher-tiny")["state_id"]
    return state_id


@pytest.mark.parametrize(("method", "path"), CLOSED)
def test_without_a_key_nothing_of_the_api_is_open(
    stranger: httpx.Client, method: str, path: str
) -> None:
    answer = stranger.request(method, path)
    problem = assert_problem(answer, 401, "key-missing")
    assert "X-API-Key" in problem["detail"]
    assert answer.headers["www-authenticate"] == "Bearer"
    basic = stranger.request(method, path, headers={"Authorization": "Basic abc"})
    assert_problem(basic, 401, "key-missing")


WRONG: list[dict[str, Any]] = [
    {"X-API-Key": "wrong"},
    {"X-API-Key": ""},
    {"X-API-Key": KEYS[0][:-1]},
    {"X-API-Key": ", ".join(KEYS)},
    {"X-API-Key": "schlüssel".encode()},
    {"Authorization": "Bearer wrong"},
    {"Authorization": "Bearer"},
    {"Authorization": "Bearer wrong", "X-API-Key": KEYS[0]},
]


@pytest.mark.parametrize(("method", "path"), CLOSED)
@pytest.mark.parametrize("headers", WRONG)
def test_a_wrong_key_is_refused(
    stranger: httpx.Client, method: str, path: str, headers: dict[str, Any]
) -> None:
    answer = stranger.request(method, path, headers=headers)
    assert_problem(answer, 403, "key-not-accepted")
    assert all(key not in answer.text for key in KEYS)


def test_without_a_key_nothing_is_said_of_parameters(stranger: httpx.Client) -> None:
    assert_problem(stranger.get("/v1/states?nonsense=1"), 401, "key-missing")
    answer = stranger.get("/v1/states?nonsense=1", headers={"X-API-Key": KEYS[0]})
    assert_problem(answer, 400, "invalid-input", "nonsense")


def test_a_refused_request_records_nothing(stranger: httpx.Client, friend: httpx.Client) -> None:
    body = {"text": "a", "model_id": "cacher-tiny"}
    with nothing_recorded(friend):
        stranger.post("/v1/states", json=body)
        stranger.post("/v1/states", json=body, headers={"X-API-Key": "wrong"})


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("name", ["X-API-Key", "Bearer", "bearer"])
def test_each_key_opens_the_api_in_either_header(
    stranger: httpx.Client, key: str, name: str
) -> None:
    headers = {name: key} if name == "X-API-Key" else {"Authorization": f"{name} {key}"}
    assert stranger.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/schema/openapi.json"])
def test_health_is_open_to_everyone(stranger: httpx.Client, path: str) -> None:
    assert stranger.get(path).status_code == 200


def test_the_actor_of_an_event_is_a_name_of_the_key_that_does_not_reveal_it(
    stranger: httpx.Client,
) -> None:
    body = {"text": "a", "model_id": "cacher-tiny"}
    actors = []
    for headers in (
        {"X-API-Key": KEYS[0]},
        {"Authorization": f"Bearer {KEYS[0]}"},
        {"X-API-Key": KEYS[1]},
    ):
        state_id = ok(stranger.post("/v1/states", json=body, headers=headers))["state_id"]
        answer = stranger.get(f"/v1/states/{state_id}/events", headers=headers)
        actors.append(answer.json()["events"][0]["actor"])
        assert all(key not in answer.text for key in KEYS)
    assert actors[0] == actors[1] != actors[2]
    assert all(re.fullmatch(r"key-[0-9a-f]{12}", actor) for actor in actors)


def test_a_default_model_that_cannot_be_had_is_a_problem_that_says_what_would_work(
    friend: httpx.Client,
) -> None:
    for _ in range(2):
        with nothing_recorded(friend):
            answer = friend.post("/v1/states", json={"text": "a"})
        problem = assert_problem(answer, 503, "model-unavailable")
        assert problem["model_id"] == "gpt2"
        assert "cannot be loaded" in problem["detail"]
        assert "cacher-tiny" in problem["detail"]
        assert "CACHER_MODEL_NAME" in problem["detail"]
        assert answer.headers["retry-after"]
    assert_problem(friend.get("/v1/models/gpt2"), 503, "model-unavailable")
    ok(friend.get("/ready"))
    assert ok(friend.get(f"/v1/states/{_tiny(friend)}"))["model_id"] == "cacher-tiny"


class Streaming(NamedTuple):
    """A server with two places, one of which a stream has until the engine goes on."""

    client: httpx.Client
    state_id: str
    pause: HeldPass
    rest: Iterator[Sent]


@pytest.fixture
def streaming(database: Path) -> Iterator[Streaming]:
    with serving(database, max_queue=2) as (client, engine):
        state_id = _tiny(client)
        body = {"state_id": state_id, "max_tokens": 20, "stream": True}
        with (
            held_after(engine, 2) as pause,
            client.stream("POST", "/v1/generate/token", json=body) as answer,
        ):
            stream = read_sent(answer)
            next(stream)
            yield Streaming(client, state_id, pause, stream)
        eventually(lambda: is_idle(client))


def test_a_full_queue_refuses_more_and_says_when_to_come_again(streaming: Streaming) -> None:
    friend, state_id, pause, rest = streaming
    others = _tiny(friend)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(forward, friend, state_id)
        eventually(lambda: metric(friend, "requests_in_line") == 2)
        for refused in (state_id, others):
            body = {"state_id": refused, "text": "a"}
            answer = friend.post("/v1/forward", json=body)
            problem = assert_problem(answer, 429, "queue-full")
            assert problem["limit"] == 2
            assert int(answer.headers["retry-after"]) >= 1
        assert len(events(friend, others)) == 1
        pause.goes_on.set()
        assert list(rest)[-1].name == "done"
        assert waiting.result()["version"] == 3
    assert forward(friend, others)["version"] == 2


def test_a_request_with_an_idempotency_key_takes_one_place_in_the_queue(
    streaming: Streaming,
) -> None:
    friend, _, pause, rest = streaming
    state_id = _tiny(friend)
    assert metric(friend, "requests_in_line") == 1
    body = {"state_id": state_id, "text": "a"}
    headers = {"Idempotency-Key": f"one-place-{state_id}"}
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(friend.post, "/v1/forward", json=body, headers=headers)
        eventually(lambda: metric(friend, "requests_in_line") == 2)
        pause.goes_on.set()
        assert answer.result().status_code == 200
    assert list(rest)[-1].name == "done"
    assert generate(friend, state_id, 2)["version"] == 3
