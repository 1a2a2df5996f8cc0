"""Nothing a client does, or leaves undone, stops the server or leaves work behind."""

import asyncio
import json
import random
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import httpx
import pytest
from torch import Tensor

from infra.engine.engine import Engine
from infra.engine.executor import Executor
from tests.app.api import (
    LONG_TEXT,
    OPENING,
    Json,
    assert_problem,
    assert_verified,
    create,
    events,
    eventually,
    forward,
    generate,
    is_idle,
    metric,
    ok,
    read,
    read_sent,
    tokens_of,
    verify,
)
from tests.app.held import held_after, serving
from tests.support import Server

pytestmark = pytest.mark.filterwarnings(
    "ignore::litestar.utils.deprecation.LitestarDeprecationWarning"
)

LONG: Json = {"max_tokens": 200, "top_logprobs": 20}
"""A generation that takes a while: it ends with its story, after more than a hundred tokens."""


MOST_ROUNDS = 30
"""Of work that is repeated until something was seen; one is enough where nothing else runs."""


def _generation(state_id: str) -> tuple[str, Json]:
    return "/v1/generate/token", {"state_id": state_id, **LONG}


def _prefill(state_id: str) -> tuple[str, Json]:
    return "/v1/forward", {"state_id": state_id, "text": f"{state_id}{LONG_TEXT * 5}"}


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, Engine]]:
    """A server whose engine can be held."""
    with serving(tmp_path_factory.mktemp("held") / "cacher.db") as running:
        yield running


async def test_health_answers_while_a_pass_takes_long(held: tuple[httpx.Client, Engine]) -> None:
    client, engine = held
    requests = [work(create(client)["state_id"]) for work in (_generation, _prefill) * 4]
    async with httpx.AsyncClient(base_url=client.base_url, timeout=120) as tasks:
        with held_after(engine, 1) as pause:
            running = [asyncio.create_task(tasks.post(path, json=body)) for path, body in requests]
            assert await asyncio.to_thread(pause.begun.wait, 60)
            for _ in range(10):
                ok(await tasks.get("/health"))
            assert not all(task.done() for task in running)
        assert all(answer.is_success for answer in await asyncio.gather(*running))


class _Passes:
    """How many passes of models in this process have begun, and how many have ended."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = self.ended = 0
        run = Executor.run

        def counted(*arguments: Any) -> Tensor:
            self.begun += 1
            try:
                return run(*arguments)
            finally:
                self.ended += 1

        monkeypatch.setattr(Executor, "run", counted)

    @property
    def running(self) -> int | None:
        """Which pass runs, if one does."""
        begun, ended = self.begun, self.ended
        return begun if begun > ended else None


@pytest.mark.parametrize("work", [_generation, _prefill], ids=["generation", "prefill"])
async def test_health_answers_while_the_model_works(
    held: tuple[httpx.Client, Engine],
    work: Callable[[str], tuple[str, Json]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is asked and answered within one pass, which holds neither Python's lock nor the loop."""
    client, _ = held
    passes = _Passes(monkeypatch)
    within = 0
    async with httpx.AsyncClient(base_url=client.base_url, timeout=120) as tasks:
        for _ in range(MOST_ROUNDS):
            requests = [work(create(client)["state_id"]) for _ in range(8)]
            running = [asyncio.create_task(tasks.post(path, json=body)) for path, body in requests]
            while not all(task.done() for task in running):
                asked_in = passes.running
                ok(await tasks.get("/health"))
                within += asked_in is not None and passes.running == asked_in
            assert all(task.result().is_success for task in running)
            if within >= 3:
                return
    pytest.fail(f"only {within} were answered within a pass")


def _left_after(client: httpx.Client, state_id: str, count: int, **wish: Any) -> list[int]:
    """Ids of the first ``count`` tokens of a stream that is then left."""
    body = {"state_id": state_id, "stream": True, **LONG, **wish}
    with client.stream("POST", "/v1/generate/token", json=body) as answer:
        stream = read_sent(answer)
        return [next(stream).data["token_id"] for _ in range(count)]


@pytest.fixture(scope="module")
def whole(held: tuple[httpx.Client, Engine]) -> list[int]:
    """The tokens of a stream that nobody leaves."""
    client, _ = held
    tokens: list[int] = generate(client, create(client)["state_id"], **LONG)["token_ids"]
    return tokens


@pytest.mark.parametrize("count", [1, 2, 3, 5, 11, 33])
def test_a_stream_that_is_left_records_what_was_sent_and_frees_everything(
    held: tuple[httpx.Client, Engine], whole: list[int], count: int
) -> None:
    client, engine = held
    state = create(client)
    state_id = state["state_id"]
    with held_after(engine, count):
        received = _left_after(client, state_id, count)
        eventually(lambda: read(client, state_id)["version"] == 2)
    eventually(lambda: is_idle(client))
    payload = events(client, state_id)[-1]["payload"]
    recorded = payload["content"]["tokens"]
    assert len(received) == count
    assert recorded[:count] == received
    assert payload["finish_reason"] == "cancelled"
    assert len(recorded) < len(whole)
    assert tokens_of(client, state_id)[state["head_position"] :] == recorded
    assert recorded == whole[: len(recorded)]
    assert generate(client, state_id, 5)["token_ids"] == whole[len(recorded) :][:5]
    assert_verified(client, state_id)


def test_a_client_that_leaves_before_the_first_token_leaves_a_state_that_can_be_used(
    client: httpx.Client, server: Server
) -> None:
    state_id = create(client)["state_id"]
    body = json.dumps({"state_id": state_id, "stream": True, **LONG}).encode()
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", httpx.URL(server.url).port)) as connection:
            connection.sendall(
                b"POST /v1/generate/token HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
            )
    forward(client, state_id)
    eventually(lambda: is_idle(client))
    version = read(client, state_id)["version"]
    assert generate(client, state_id, 4)["version"] == version + 1
    assert_verified(client, state_id)


def test_clients_that_leave_half_a_request_are_nothing_to_the_server(
    client: httpx.Client, server: Server
) -> None:
    for part in (b"", b"POST /v1/st", b"POST /v1/states HTTP/1.1\r\nContent-Length: 99\r\n\r\n{"):
        with socket.create_connection(("127.0.0.1", httpx.URL(server.url).port)) as connection:
            connection.sendall(part)
    assert create(client)["version"] == 1
    assert is_idle(client)


def _requests(state_ids: list[str], chance: random.Random, count: int) -> list[tuple[str, Json]]:
    """Requests of many kinds."""
    kinds: list[tuple[str, Json]] = [
        ("/v1/states", {"text": OPENING}),
        ("/v1/forward", {"text": LONG_TEXT}),
        ("/v1/generate/token", {"max_tokens": 60}),
        ("/v1/generate/token", {"max_tokens": 60, "stream": True}),
        ("/v1/states/fork", {"n": 2}),
        ("/v1/states/config", {"config": {"temperature": 1}}),
        ("/v1/states/rewind", {"position": 3}),
        ("/v1/replay/verify", {}),
    ]
    chosen = [chance.choice(kinds) for _ in range(count)]
    return [
        (path, body if path == "/v1/states" else {"state_id": chance.choice(state_ids), **body})
        for path, body in chosen
    ]


FOR_THE_MODEL = ("/v1/forward", "/v1/generate/token")


async def _cancelled(
    held: tuple[httpx.Client, Engine],
    requests: list[tuple[str, Json, dict[str, str]]],
    chance: random.Random,
    *,
    in_line: int,
) -> None:
    """Send requests and cancel each: ``in_line`` while they wait for the model, others anywhere."""
    client, engine = held
    loop = asyncio.get_running_loop()
    limits = httpx.Limits(max_connections=100)
    async with httpx.AsyncClient(base_url=client.base_url, timeout=120, limits=limits) as tasks:

        def send(path: str, body: Json, headers: dict[str, str]) -> asyncio.Task[httpx.Response]:
            return asyncio.create_task(tasks.post(path, json=body, headers=headers))

        for_model = [request for request in requests if request[0] in FOR_THE_MODEL][:in_line]
        with held_after(engine, 0):
            waiting = [send(*request) for request in for_model]
            line = partial(metric, client, "requests_in_line")
            await asyncio.to_thread(eventually, lambda: line() == in_line)
            assert not any(task.done() for task in waiting)
            for task in waiting:
                task.cancel()
            await asyncio.wait(waiting)
        assert all(task.cancelled() for task in waiting)
        sent = [send(*request) for request in requests if request not in for_model]
        for task in sent:
            loop.call_later(chance.uniform(0, 0.5), task.cancel)
        results = await asyncio.gather(*sent, return_exceptions=True)
    assert all(isinstance(r, httpx.Response | asyncio.CancelledError) for r in results), results


def _retry(client: httpx.Client, requests: list[tuple[str, Json, dict[str, str]]]) -> None:
    for path, body, headers in requests:
        ok(client.post(path, json=body, headers=headers))


async def test_requests_cancelled_anywhere_leave_a_healthy_server_and_a_log_that_verifies(
    held: tuple[httpx.Client, Engine],
) -> None:
    client, _ = held
    chance = random.Random(11)
    state_ids = [create(client)["state_id"] for _ in range(6)]
    headers: dict[str, str] = {}
    requests = [(path, body, headers) for path, body in _requests(state_ids, chance, 60)]
    await _cancelled(held, requests, chance, in_line=15)
    eventually(lambda: is_idle(client))
    for state_id in state_ids:
        version = read(client, state_id)["version"]
        assert forward(client, state_id)["version"] == version + 1
    report = verify(client, all=True)
    assert report["result"] == "equal", report


async def test_a_cancelled_request_was_carried_out_wholly_or_not_at_all_and_can_be_retried(
    held: tuple[httpx.Client, Engine],
) -> None:
    client, _ = held
    chance = random.Random(12)
    state_id = create(client)["state_id"]
    requests = [
        (
            "/v1/forward",
            {"state_id": state_id, "text": f" {number}{LONG_TEXT[:40]}"},
            {"Idempotency-Key": f"{state_id}-{number}"},
        )
        for number in range(40)
    ]
    await _cancelled(held, requests, chance, in_line=10)
    _retry(client, requests)
    text = read(client, state_id)["text"]
    written = [body["text"] for _, body, _ in requests]
    assert all(text.count(part) == 1 for part in written)
    assert len(text) == len(OPENING) + sum(map(len, written))
    assert len(events(client, state_id)) == 1 + len(requests)


def test_deleting_a_state_ends_its_stream(held: tuple[httpx.Client, Engine]) -> None:
    client, engine = held
    state_id = create(client)["state_id"]
    body = {"state_id": state_id, "stream": True, **LONG}
    with (
        held_after(engine, 3) as pause,
        ThreadPoolExecutor(1) as pool,
        client.stream("POST", "/v1/generate/token", json=body) as answer,
    ):
        stream = read_sent(answer)
        first = next(stream)
        deleting = pool.submit(client.delete, f"/v1/states/{state_id}")
        eventually(lambda: metric(client, "requests_in_line") == 2 or deleting.done())
        pause.goes_on.set()
        assert deleting.result().status_code == 200
        *tokens, done = [first, *stream]
    assert done.name == "done"
    assert (done.data["finished"], done.data["finish_reason"]) == (True, "cancelled")
    assert [one.data["token_id"] for one in tokens] == done.data["token_ids"]
    types = [event["type"] for event in events(client, state_id)]
    assert types == ["state_created", "tokens_generated", "state_deleted"]
    assert_verified(client, state_id)
    eventually(lambda: is_idle(client))


def test_deleting_a_state_ends_the_generation_that_someone_waits_for(
    held: tuple[httpx.Client, Engine],
) -> None:
    client, engine = held
    state_id = create(client)["state_id"]
    with held_after(engine, 3) as pause, ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(generate, client, state_id, **LONG)
        assert pause.begun.wait(60)
        deleting = pool.submit(client.delete, f"/v1/states/{state_id}")
        eventually(lambda: metric(client, "requests_in_line") == 2 or deleting.done())
        pause.goes_on.set()
        assert deleting.result().status_code == 200
        answer = waiting.result()
    assert answer["finish_reason"] == "cancelled"
    assert len(events(client, state_id)) == 3


def test_a_deletion_that_is_refused_ends_nothing(client: httpx.Client) -> None:
    state_id = create(client)["state_id"]
    body = {"state_id": state_id, "stream": True, **LONG}
    with client.stream("POST", "/v1/generate/token", json=body) as answer:
        stream = read_sent(answer)
        next(stream)
        refused = client.delete(f"/v1/states/{state_id}", headers={"If-Match": '"7"'})
        *_, done = stream
    assert_problem(refused, 412, "precondition-failed")
    assert done.data["finish_reason"] != "cancelled"
    assert read(client, state_id)["version"] == 2
