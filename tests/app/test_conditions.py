"""Conditions and identities of requests: If-Match, Idempotency-Key, X-Request-ID, the actor."""

import asyncio
import re
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.app.api import (
    Json,
    assert_problem,
    assert_verified,
    configure,
    create,
    delete,
    events,
    fork,
    forward,
    head,
    nothing_recorded,
    ok,
    read,
    read_sent,
    sent,
    verify,
)
from tests.support import Server

Send = Callable[[httpx.Client, str, dict[str, str]], httpx.Response]


def _post(path: str, **body: Any) -> Send:
    def send(client: httpx.Client, state_id: str, headers: dict[str, str]) -> httpx.Response:
        return client.post(path, json={"state_id": state_id, **body}, headers=headers)

    return send


def _create(client: httpx.Client, _: str, headers: dict[str, str]) -> httpx.Response:
    body = {"text": "Once upon a time", "metadata": {"a": 1}}
    return client.post("/v1/states", json=body, headers=headers)


def _delete(client: httpx.Client, state_id: str, headers: dict[str, str]) -> httpx.Response:
    return client.delete(f"/v1/states/{state_id}", headers=headers)


WISH: Json = {"max_tokens": 6, "temperature": 1.0, "top_logprobs": 2, "seed": None}
CHANGES: dict[str, Send] = {
    "config": _post("/v1/states/config", config={"temperature": 0.5}),
    "rewind": _post("/v1/states/rewind", position=2),
    "forward": _post("/v1/forward", text=" there was"),
    "generate": _post("/v1/generate/token", **WISH),
    "stream": _post("/v1/generate/token", stream=True, **WISH),
    "delete": _delete,
}
CONDITIONAL = CHANGES | {"fork": _post("/v1/states/fork", n=3, metadata={"b": 2})}
RECORDING = CONDITIONAL | {"create": _create}

each_change = pytest.mark.parametrize("send", CHANGES.values(), ids=CHANGES)
each_conditional = pytest.mark.parametrize("send", CONDITIONAL.values(), ids=CONDITIONAL)
each_recording = pytest.mark.parametrize("send", RECORDING.values(), ids=RECORDING)


@pytest.fixture
def state_id(client: httpx.Client) -> str:
    made: str = create(client)["state_id"]
    return made


@each_conditional
def test_a_request_whose_condition_holds_is_carried_out(
    client: httpx.Client, state_id: str, send: Send
) -> None:
    answer = client.get(f"/v1/states/{state_id}")
    assert send(client, state_id, {"If-Match": answer.headers["etag"]}).is_success


@each_change
def test_a_star_matches_any_version(client: httpx.Client, state_id: str, send: Send) -> None:
    assert send(client, state_id, {"If-Match": "*"}).is_success


@each_conditional
@pytest.mark.parametrize("version", [0, 1, 3])
def test_a_request_whose_condition_does_not_hold_changes_nothing(
    client: httpx.Client, state_id: str, send: Send, version: int
) -> None:
    forward(client, state_id)
    with nothing_recorded(client):
        answer = send(client, state_id, {"If-Match": f'"{version}"'})
    problem = assert_problem(answer, 412, "precondition-failed")
    assert problem["state_id"] == state_id
    assert (problem["expected_version"], problem["current_version"]) == (version, 2)
    assert answer.headers["x-should-retry"] == "false"
    assert send(client, state_id, {"If-Match": '"2"'}).is_success


@each_change
def test_every_change_gives_the_state_another_etag(
    client: httpx.Client, state_id: str, send: Send
) -> None:
    answer = send(client, state_id, {})
    assert answer.is_success
    assert answer.headers.get("etag", '"2"') == '"2"'
    assert events(client, state_id)[-1]["version"] == 2


async def _at_once(server: Server, state_id: str, headers: dict[str, str]) -> list[httpx.Response]:
    limits = httpx.Limits(max_connections=50)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
        bodies = [{"state_id": state_id, "text": f" {number}"} for number in range(50)]
        posts = [client.post("/v1/forward", json=body, headers=headers) for body in bodies]
        return list(await asyncio.gather(*posts))


async def test_of_fifty_clients_with_the_same_condition_exactly_one_wins(
    client: httpx.Client, server: Server, state_id: str
) -> None:
    answers = await _at_once(server, state_id, {"If-Match": '"1"'})
    (winner,) = (answer for answer in answers if answer.is_success)
    losers = [answer for answer in answers if answer is not winner]
    assert len(losers) == 49
    for answer in losers:
        problem = assert_problem(answer, 412, "precondition-failed")
        assert (problem["expected_version"], problem["current_version"]) == (1, 2)
    assert len(events(client, state_id)) == 2
    written = "".join(token["text"] for token in winner.json()["tokens"])
    assert read(client, state_id)["text"] == f"Once upon a time{written}"


async def test_fifty_clients_without_a_condition_come_one_after_another(
    client: httpx.Client, server: Server, state_id: str
) -> None:
    answers = await _at_once(server, state_id, {})
    assert sorted(answer.json()["version"] for answer in answers) == list(range(2, 52))
    text = read(client, state_id)["text"]
    assert sorted(text.removeprefix("Once upon a time").split()) == sorted(map(str, range(50)))
    assert_verified(client, state_id)


@pytest.fixture
def key() -> dict[str, str]:
    """A key that was never used before."""
    return {"Idempotency-Key": uuid.uuid4().hex}


def _without_changing_parts(answer: httpx.Response) -> tuple[int, bytes, dict[str, str]]:
    changing = {"date", "x-request-id"}
    headers = {name: value for name, value in answer.headers.items() if name not in changing}
    return answer.status_code, answer.content, headers


@each_recording
def test_a_retry_gets_the_same_bytes_and_records_nothing(
    client: httpx.Client, state_id: str, send: Send, key: dict[str, str]
) -> None:
    before = head(client)["position"]
    first = send(client, state_id, key)
    assert first.is_success, first.text
    recorded = head(client)["position"] - before
    assert recorded == (3 if send is CONDITIONAL["fork"] else 1)
    with nothing_recorded(client):
        second = send(client, state_id, key)
    assert _without_changing_parts(second) == _without_changing_parts(first)


@each_recording
def test_without_a_key_the_same_request_is_done_again(
    client: httpx.Client, state_id: str, send: Send
) -> None:
    before = head(client)["position"]
    first = send(client, state_id, {})
    assert first.is_success
    if send is _delete:
        assert_problem(send(client, state_id, {}), 404, "state-deleted")
        return
    recorded = head(client)["position"] - before
    assert send(client, state_id, {}).is_success
    assert head(client)["position"] == before + 2 * recorded


def test_a_retry_gets_its_answer_also_after_the_state_has_moved_on_and_gone(
    client: httpx.Client, key: dict[str, str]
) -> None:
    made = _create(client, "", key)
    state_id = made.json()["state_id"]
    steps = [CHANGES["generate"], CHANGES["config"], CHANGES["rewind"], CONDITIONAL["fork"]]
    conditional = [key | {"If-Match": f'"{version}"'} for version in (1, 2, 3, 4)]
    given = [send(client, state_id, h) for send, h in zip(steps, conditional, strict=True)]
    assert all(answer.is_success for answer in given)
    delete(client, state_id)
    with nothing_recorded(client):
        assert _create(client, "", key).content == made.content
        for send, headers, answer in zip(steps, conditional, given, strict=True):
            assert send(client, state_id, headers).content == answer.content
    assert verify(client, state_id=state_id)["result"] == "equal"


def test_the_retry_of_a_stream_sends_every_event_again(
    client: httpx.Client, state_id: str, key: dict[str, str]
) -> None:
    first, second = (CHANGES["stream"](client, state_id, key) for _ in range(2))
    assert [one.name for one in sent(first.text)] == ["token"] * 6 + ["done"]
    assert second.text == first.text


def test_the_retry_of_a_stream_that_was_cut_off_gets_what_was_recorded(
    client: httpx.Client, state_id: str, key: dict[str, str]
) -> None:
    body = {"state_id": state_id, "max_tokens": 400, "stream": True, "seed": None}
    with client.stream("POST", "/v1/generate/token", json=body, headers=key) as answer:
        received = next(read_sent(answer))
    retry = sent(client.post("/v1/generate/token", json=body, headers=key).text)
    assert retry[0] == received
    recorded = events(client, state_id)
    assert [event["version"] for event in recorded] == [1, 2]
    assert retry[-1].data["token_ids"] == recorded[1]["payload"]["content"]["tokens"]
    assert retry[-1].data["seed"] == recorded[1]["payload"]["seed"]


@pytest.mark.parametrize("what", sorted(RECORDING.keys() - {"delete"}))
def test_a_key_belongs_to_one_body(
    client: httpx.Client, state_id: str, what: str, key: dict[str, str]
) -> None:
    send = RECORDING[what]
    first = send(client, state_id, key)
    other = first.request.content.replace(b'"state_id":"', b'"state_id":"x').replace(
        b'"text":"Once', b'"text":"Twice'
    )
    assert other != first.request.content
    with nothing_recorded(client):
        answer = client.post(
            first.request.url.path,
            content=other,
            headers={**key, "content-type": "application/json"},
        )
    problem = assert_problem(answer, 409, "idempotency-key-reused")
    assert problem["idempotency_key"] == key["Idempotency-Key"]
    assert answer.headers["x-should-retry"] == "false"
    assert send(client, state_id, key).content == first.content


def test_a_key_belongs_to_one_path_and_one_client(
    client: httpx.Client, state_id: str, key: dict[str, str]
) -> None:
    send = CHANGES["forward"]
    assert send(client, state_id, key).json()["version"] == 2
    assert send(client, state_id, key | {"X-API-Key": "me"}).json()["version"] == 3
    assert send(client, state_id, key | {"X-API-Key": "you"}).json()["version"] == 4
    assert CHANGES["rewind"](client, state_id, key).json()["version"] == 5
    assert send(client, state_id, key).json()["version"] == 2


@each_recording
def test_requests_with_one_key_at_once_are_one_event(
    client: httpx.Client, state_id: str, send: Send, key: dict[str, str]
) -> None:
    before = head(client)["position"]
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: send(client, state_id, key), range(6)))
    assert answers[0].is_success
    assert len({_without_changing_parts(answer)[:2] for answer in answers}) == 1
    recorded = 3 if send is CONDITIONAL["fork"] else 1
    assert head(client)["position"] == before + recorded


def test_a_refusal_is_not_remembered(client: httpx.Client, key: dict[str, str]) -> None:
    state_id = create(client, config={"context_size": 8})["state_id"]
    send = _post("/v1/forward", text=" there was a little bear with a red coat")
    assert_problem(send(client, state_id, key), 413, "too-large")
    configure(client, state_id, context_size=64)
    assert ok(send(client, state_id, key))["version"] == 3
    assert send(client, state_id, key).json()["version"] == 3


def test_a_failed_condition_is_not_remembered(
    client: httpx.Client, state_id: str, key: dict[str, str]
) -> None:
    send = CHANGES["forward"]
    assert_problem(send(client, state_id, key | {"If-Match": '"2"'}), 412, "precondition-failed")
    assert send(client, state_id, key | {"If-Match": '"1"'}).json()["version"] == 2


PLACES = ["/health", "/v1/states", "/v1/states/state-0", "/nope", "/v1/events?after=x"]


@pytest.mark.parametrize("path", PLACES)
def test_a_request_id_is_echoed_on_every_answer_or_made(client: httpx.Client, path: str) -> None:
    answer = client.get(path, headers={"X-Request-ID": "mine-1"})
    assert answer.headers.get_list("x-request-id") == ["mine-1"]
    made = {client.get(path).headers["x-request-id"] for _ in range(3)}
    assert len(made) == 3
    assert all(re.fullmatch(r"[0-9a-f]{32}", one) for one in made)


@pytest.mark.parametrize("given", ["x" * 201, "", "a b", "ä".encode()])
def test_a_request_id_that_is_not_of_our_form_is_replaced(client: httpx.Client, given: Any) -> None:
    answer = client.get("/health", headers={"X-Request-ID": given})
    assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"])


@each_change
def test_the_request_and_who_sent_it_are_in_the_event(
    client: httpx.Client, state_id: str, send: Send
) -> None:
    answer = send(client, state_id, {"X-API-Key": "my secret"})
    event = events(client, state_id)[-1]
    assert event["request_id"] == answer.headers["x-request-id"]
    assert re.fullmatch(r"key-[0-9a-f]{12}", event["actor"])
    assert "secret" not in str(events(client, state_id))


def test_every_state_of_one_fork_names_its_request(client: httpx.Client, state_id: str) -> None:
    with client.stream(
        "POST",
        "/v1/states/fork",
        json={"state_id": state_id, "n": 3},
        headers={"X-Request-ID": "forked-by-me"},
    ) as answer:
        answer.read()
    children = answer.json()["states"]
    found = {events(client, child["state_id"])[0]["request_id"] for child in children}
    assert found == {"forked-by-me"}
    assert events(client, fork(client, state_id)[0]["state_id"])[0]["request_id"] not in found
