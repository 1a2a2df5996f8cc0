"""Erasure over HTTP: what is gone, what stays, and what is told of it."""

import base64
import json
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import msgspec
import pytest

from domain.ids import StateId
from infra.engine.engine import Engine
from infra.log.keyring import Keyring, key_file, prepare
from tests.app.api import (
    LONG_TEXT,
    Json,
    assert_problem,
    assert_verified,
    create,
    delete,
    events,
    eventually,
    fork,
    forward,
    generate,
    head,
    metric,
    nothing_recorded,
    ok,
    read,
    read_sent,
    stream,
    tokens_of,
    verify,
)
from tests.app.held import held_after, serving
from tests.forking import FastServer, Nursery
from tests.support import Server

SECRET = "The zebra owns a purple xylophone"


@pytest.fixture(scope="module")
def vault(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server on an erasable log."""
    database = tmp_path_factory.mktemp("erasable") / "cacher.db"
    with FastServer(nursery, database, CACHER_ERASABLE="1") as running:
        yield running


@pytest.fixture(scope="module")
def client(vault: Server) -> Iterator[httpx.Client]:
    with vault.client() as connected:
        yield connected


def erase(client: httpx.Client, state_id: str, *, forks: bool = False) -> Json:
    answer: Json = ok(client.delete(f"/v1/states/{state_id}", params=asking(forks)))
    return answer


def asking(forks: bool = False) -> dict[str, str]:
    return {"erase": "true", "forks": "true"} if forks else {"erase": "true"}


def assert_erased(answer: httpx.Response, state_id: str) -> None:
    problem = assert_problem(answer, 410, "state-erased")
    assert problem["state_id"] == state_id


def holding(folder: Path, *wanted: bytes) -> set[str]:
    """Names of the files that hold any of some bytes."""
    files = [file for file in folder.iterdir() if file.is_file()]
    return {file.name for file in files if any(one in file.read_bytes() for one in wanted)}


def traces(state: Json, tokens: list[int]) -> tuple[bytes, ...]:
    """What a file would hold if it held a state: its text, its tokens, either in base64."""
    plain = [state["text"].encode(), json.dumps(tokens, separators=(",", ":")).encode()[1:-1]]
    shifted = [bytes(shift) + one + bytes(2 - shift) for one in plain for shift in range(3)]
    return (*plain, *(base64.b64encode(one)[4:-8] for one in shifted))


# what an erasure does


def test_an_erased_state_is_gone_from_every_answer_and_every_file(
    client: httpx.Client, vault: Server
) -> None:
    state_id = create(client, text=SECRET, config={"store_logits": "full"})["state_id"]
    forward(client, state_id, " in Albania")
    generate(client, state_id, 8)
    stream(client, state_id, 4)
    state, tokens = read(client, state_id), tokens_of(client, state_id)
    log_id = prepare(vault.database, erasable=True)
    assert log_id is not None
    with closing(Keyring.open(vault.database, log_id)) as ring:
        (key,) = ring.find([state_id]).values()  # type: ignore[list-item]
    folder = vault.database.parent
    assert holding(folder, key) == {"cacher.db.keys"}
    assert holding(folder, *traces(state, tokens)) == set()

    answer = erase(client, state_id)

    assert answer == {"state_id": state_id, "message": answer["message"], "erased": [state_id]}
    assert holding(folder, key, *traces(state, tokens)) == set()
    for method, path, body in (
        ("GET", f"/v1/states/{state_id}", None),
        ("GET", f"/v1/states/{state_id}?version=1", None),
        ("GET", f"/v1/states/{state_id}?include=tokens", None),
        ("POST", "/v1/generate/token", {"state_id": state_id}),
        ("POST", "/v1/generate/multi", {"state_id": state_id, "n": 2}),
        ("POST", "/v1/generate/beam", {"state_id": state_id, "num_beams": 2, "max_length": 2}),
        ("POST", "/v1/forward", {"state_id": state_id, "text": "x"}),
        ("POST", "/v1/states/fork", {"state_id": state_id}),
        ("POST", "/v1/states/rewind", {"state_id": state_id, "position": 1}),
        ("POST", "/v1/states/config", {"state_id": state_id, "config": {"seed": 1}}),
        ("DELETE", f"/v1/states/{state_id}", None),
        ("DELETE", f"/v1/states/{state_id}?erase=true", None),
    ):
        with nothing_recorded(client):
            assert_erased(client.request(method, path, json=body), state_id)
    listed = ok(client.get("/v1/states", params={"limit": 100}))["states"]
    assert state_id not in {one["state_id"] for one in listed}


def test_a_log_that_is_not_erasable_holds_it_all_and_is_not_served_as_one(
    server: Server, nursery: Nursery, tmp_path: Path
) -> None:
    """The control of the test before: that search finds what is there. Nothing of it is erased."""
    with server.client() as client:
        state = create(client, text=SECRET)
        wanted = traces(state, tokens_of(client, state["state_id"]))[0]
        assert holding(server.database.parent, wanted) & {"cacher.db", "cacher.db-wal"}
        assert not key_file(server.database).exists()
        answer = client.delete(f"/v1/states/{state['state_id']}", params=asking())
        assert_problem(answer, 409, "not-erasable")
        assert read(client, state["state_id"]) == state
    copy = copied(server.database, tmp_path)
    run = nursery.run("serve", CACHER_DATABASE=str(copy), CACHER_ERASABLE="1")
    assert run.returncode == 2
    assert "was not created erasable" in " ".join(run.stderr.split())
    assert "Traceback" not in run.stderr


def copied(database: Path, folder: Path) -> Path:
    copy = folder / database.name
    with closing(sqlite3.connect(database)) as log, closing(sqlite3.connect(copy)) as other:
        log.backup(other)
    return copy


def test_its_events_stay_and_say_nothing(client: httpx.Client) -> None:
    state_id = create(client, text=SECRET)["state_id"]
    generate(client, state_id, 4)
    before = events(client, state_id)
    assert all(set(event["payload"]) == {"sealed"} for event in before)
    assert before[0]["content"]["content"]["text"] == SECRET
    assert before[1]["content"]["type"] == "tokens_generated"
    erase(client, state_id)
    *after, last = events(client, state_id)
    assert after == [
        {name: value for name, value in event.items() if name != "content"} for event in before
    ]
    assert (last["type"], last["payload"]) == ("state_erased", {"type": "state_erased"})
    everything = ok(client.get("/v1/events", params={"after": before[0]["position"] - 1}))
    assert everything["events"][:2] == after


def test_everything_else_stays_as_it_was_and_is_verified(client: httpx.Client) -> None:
    kept = create(client, text="The pig went to bed")["state_id"]
    generate(client, kept, 8)
    gone = create(client, text=SECRET)["state_id"]
    generate(client, gone, 8)
    remembered = head(client)
    state, rows = read(client, kept, include="tokens"), events(client, kept)
    erase(client, gone)
    assert (read(client, kept, include="tokens"), events(client, kept)) == (state, rows)
    assert_verified(client, kept)
    report = verify(client, all=True, head=f"{remembered['position']}:{remembered['hash']}")
    assert report["result"] == "equal", report
    assert report["erased"] > 0
    proof = {"first": remembered["size"], "second": head(client)["size"]}
    found = ok(client.get("/v1/audit/proof", params=proof))
    assert found["first_root"] == remembered["root"]


def test_a_deleted_state_can_be_erased(client: httpx.Client) -> None:
    state_id = create(client, text=SECRET)["state_id"]
    delete(client, state_id)
    assert events(client, state_id)[0]["content"]["content"]["text"] == SECRET
    assert erase(client, state_id)["erased"] == [state_id]
    assert_erased(client.get(f"/v1/states/{state_id}"), state_id)


def test_what_was_computed_from_it_is_dropped(client: httpx.Client) -> None:
    """Another state with the same text shows what is hot."""

    def hot() -> int:
        state_id = create(client, text=LONG_TEXT)["state_id"]
        tier: int = read(client, state_id, include="cache")["cache"]["tokens_hot"]
        return tier

    state_id = create(client, text=LONG_TEXT)["state_id"]
    generate(client, state_id, 1)
    assert hot() > 0
    erase(client, state_id)
    assert hot() == 0


@pytest.mark.filterwarnings("ignore::litestar.utils.deprecation.LitestarDeprecationWarning")
def test_a_generation_that_runs_is_ended_first_and_erased_too(database: Path) -> None:
    with serving(database, erasable=True) as (client, engine):
        _erases_what_runs(client, engine)


def _erases_what_runs(client: httpx.Client, engine: Engine) -> None:
    state_id = create(client)["state_id"]
    child = fork(client, state_id)[0]["state_id"]
    body = {"max_tokens": 200, "top_logprobs": 20}
    asked = {"state_id": state_id, "stream": True, **body}
    with (
        held_after(engine, 3) as pause,
        ThreadPoolExecutor(2) as pool,
        client.stream("POST", "/v1/generate/token", json=asked) as answer,
    ):
        sent = read_sent(answer)
        first = next(sent)
        waiting = pool.submit(generate, client, child, **body)
        eventually(lambda: metric(client, "requests_in_line") == 2)
        erasing = pool.submit(erase, client, state_id, forks=True)
        eventually(lambda: metric(client, "requests_in_line") == 3)
        pause.goes_on.set()
        assert erasing.result()["erased"] == [state_id, child]
        *_, done = [first, *sent]
        waiting.result()
    assert done.data["finish_reason"] == "cancelled"
    kinds = ["state_created", "tokens_generated", "state_erased"]
    for one in (state_id, child):
        assert [event["type"] for event in events(client, one)] == kinds
        assert not any("content" in event for event in events(client, one))


# other states that hold it


def test_states_that_began_with_it_are_named_or_erased_with_it(client: httpx.Client) -> None:
    state_id = create(client, text=SECRET)["state_id"]
    child = fork(client, state_id)[0]["state_id"]
    other = create(client)["state_id"]
    merged = ok(client.post("/v1/states/merge", json={"state_ids": [other, child]}))["state_id"]
    with nothing_recorded(client):
        refused = client.delete(f"/v1/states/{state_id}", params=asking())
    problem = assert_problem(refused, 409, "has-descendants")
    assert problem["descendants"] == [child, merged]
    assert refused.headers["x-should-retry"] == "false"
    assert erase(client, state_id, forks=True)["erased"] == [state_id, child, merged]
    for one in (state_id, child, merged):
        assert_erased(client.get(f"/v1/states/{one}"), one)
    assert read(client, other)["version"] == 1


def test_forks_that_are_asked_for_meanwhile_are_erased_or_refused(client: httpx.Client) -> None:
    state_id = create(client, text=SECRET)["state_id"]

    def try_to_fork(_: int) -> httpx.Response:
        return client.post("/v1/states/fork", json={"state_id": state_id, "n": 2})

    with ThreadPoolExecutor(5) as pool:
        asked = pool.map(try_to_fork, range(30))
        erased = erase(client, state_id, forks=True)["erased"]
        answers = list(asked)
    made = [
        one["state_id"]
        for answer in answers
        if answer.is_success
        for one in answer.json()["states"]
    ]
    assert sorted(erased) == sorted([state_id, *made])
    for answer in answers:
        if not answer.is_success:
            assert_erased(answer, state_id)


# retries, conditions, bad input


def test_a_retry_of_an_erased_answer_is_gone(client: httpx.Client) -> None:
    created = {"json": {"text": SECRET}, "headers": {"Idempotency-Key": "erasure-create"}}
    state_id = ok(client.post("/v1/states", **created))["state_id"]
    wish = {
        "json": {"state_id": state_id, "max_tokens": 2},
        "headers": {"Idempotency-Key": "erasure-generate"},
    }
    first = ok(client.post("/v1/generate/token", **wish))
    assert ok(client.post("/v1/generate/token", **wish)) == first
    erase(client, state_id)
    for answer in (client.post("/v1/states", **created), client.post("/v1/generate/token", **wish)):
        assert_problem(answer, 410, "state-erased")


def test_a_retry_of_the_erasure_is_answered_alike(client: httpx.Client) -> None:
    state_id = create(client, text=SECRET)["state_id"]
    fork(client, state_id)
    headers = {"Idempotency-Key": "erasure-erase"}
    path = f"/v1/states/{state_id}"
    first = ok(client.delete(path, params=asking(forks=True), headers=headers))
    with nothing_recorded(client):
        assert ok(client.delete(path, params=asking(forks=True), headers=headers)) == first
        for other in (asking(), {}):
            answer = client.delete(path, params=other, headers=headers)
            assert_problem(answer, 409, "idempotency-key-reused")


def test_the_key_of_a_deletion_does_not_stand_for_an_erasure(client: httpx.Client) -> None:
    state_id = create(client, text=SECRET)["state_id"]
    headers = {"Idempotency-Key": "erasure-delete"}
    ok(client.delete(f"/v1/states/{state_id}", headers=headers))
    with nothing_recorded(client):
        answer = client.delete(f"/v1/states/{state_id}", params=asking(), headers=headers)
    assert_problem(answer, 409, "idempotency-key-reused")


def test_an_erasure_may_be_conditional(client: httpx.Client) -> None:
    state_id = create(client, text=SECRET)["state_id"]
    path = f"/v1/states/{state_id}"
    with nothing_recorded(client):
        refused = client.delete(path, params=asking(), headers={"If-Match": '"7"'})
    assert_problem(refused, 412, "precondition-failed")
    ok(client.delete(path, params=asking(), headers={"If-Match": '"1"'}))


def test_what_cannot_be_meant_is_refused(client: httpx.Client) -> None:
    state_id = create(client)["state_id"]
    with nothing_recorded(client):
        assert_problem(client.delete("/v1/states/none", params=asking()), 404, "state-not-found")
        answer = client.delete(f"/v1/states/{state_id}", params={"forks": "true"})
        assert_problem(answer, 400, "invalid-input", "forks")
        answer = client.delete(f"/v1/states/{state_id}", params={"erase": "perhaps"})
        assert_problem(answer, 400, "invalid-input", "erase")


# keys that cannot be destroyed yet, or are gone already


@contextmanager
def keys_held(database: Path) -> Iterator[None]:
    """Nobody else can write to the file of the keys meanwhile."""
    with closing(sqlite3.connect(key_file(database), isolation_level=None)) as keys:
        keys.execute("BEGIN IMMEDIATE")
        yield


def test_nothing_of_it_is_served_while_its_key_cannot_be_destroyed(
    client: httpx.Client, vault: Server
) -> None:
    state_id = create(client, text=LONG_TEXT)["state_id"]
    generate(client, state_id, 2)
    child = fork(client, state_id)[0]["state_id"]
    other = create(client)["state_id"]
    path = f"/v1/states/{state_id}"
    headers = {"Idempotency-Key": "erasure-keys-held"}
    log_id = prepare(vault.database, erasable=True)
    assert log_id is not None
    with closing(Keyring.open(vault.database, log_id)) as ring:
        keys = ring.find([StateId(state_id), StateId(child)])
        assert len(keys) == 2
        with keys_held(vault.database):
            for _ in range(2):
                answer = client.delete(path, params=asking(forks=True), headers=headers)
                problem = assert_problem(answer, 503, "log-unavailable")
                assert "recorded as erased" in problem["detail"]
            assert ring.find(keys) == keys
            for one in (state_id, child):
                assert_erased(client.get(f"/v1/states/{one}"), one)
                assert_erased(client.get(f"/v1/states/{one}?version=1"), one)
                assert_problem(client.get(f"/v1/states/{one}/export"), 410, "state-erased")
                assert not any("content" in event for event in events(client, one))
            forward(client, other)  # others go on
        answer = ok(client.delete(path, params=asking(forks=True), headers=headers))
        assert answer["erased"] == [state_id, child]
        assert ring.find(keys) == {}


def test_what_was_computed_from_it_is_dropped_before_its_key_is(
    client: httpx.Client, vault: Server
) -> None:
    text = "A zebra" + LONG_TEXT
    state_id, alike = create(client, text=text)["state_id"], create(client, text=text)["state_id"]
    generate(client, state_id, 1)
    before = read(client, alike, include="cache")["cache"]["tokens_hot"]
    with keys_held(vault.database):
        answer = client.delete(f"/v1/states/{state_id}", params=asking())
        assert_problem(answer, 503, "log-unavailable")
        assert before > read(client, alike, include="cache")["cache"]["tokens_hot"] == 0


@pytest.fixture(scope="module")
def worn(
    nursery: Nursery, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[httpx.Client, list[str]]]:
    """A server on a log with a state whose key is gone, its fork, two damaged ones, a good one."""
    database = tmp_path_factory.mktemp("worn") / "cacher.db"
    with FastServer(nursery, database, CACHER_ERASABLE="1") as server:
        with server.client() as client:
            first = create(client, text=SECRET)["state_id"]
            ids = [first, fork(client, first)[0]["state_id"]]
            ids += [create(client)["state_id"] for _ in range(3)]
        server.stop()
        with closing(sqlite3.connect(key_file(database), isolation_level=None)) as keys:
            keys.execute("UPDATE keys SET key = zeroblob(32) WHERE state_id = ?", ids[:1])
        change = "UPDATE events SET payload = ? WHERE state_id = ?"
        with closing(sqlite3.connect(database, isolation_level=None)) as log:
            log.execute(change, ("[" * 50_000, ids[2]))
            log.execute(change, ('{"type":"unheard_of"}', ids[3]))
        server.start()
        with server.client() as client:
            yield client, ids


def test_states_that_cannot_be_read_are_named_beside_those_that_can(
    worn: tuple[httpx.Client, list[str]],
) -> None:
    client, (lost, child, *damaged, good) = worn
    page = ok(client.get("/v1/states"))
    assert [one["state_id"] for one in page["states"]] == [good, child]
    assert page["unreadable"] == [*reversed(damaged), lost]
    for one in damaged:
        assert_problem(client.get(f"/v1/states/{one}"), 503, "log-damaged")
    assert_problem(client.get(f"/v1/states/{lost}"), 410, "state-erased")
    assert "unreadable" not in ok(client.get("/v1/states", params={"limit": 1}))


def test_a_payload_that_is_nested_too_deep_is_shown_as_a_text(
    worn: tuple[httpx.Client, list[str]],
) -> None:
    client, (_, _, deep, *_) = worn
    (shown,) = [one for one in ok(client.get("/v1/events"))["events"] if one["state_id"] == deep]
    assert shown["payload"] == "[" * 50_000
    assert events(client, deep) == [shown]
    accept = {"Accept": "text/event-stream"}
    with client.stream("GET", f"/v1/states/{deep}/events", headers=accept) as answer:
        sent = next(line for line in answer.iter_lines() if line.startswith("data: "))
    assert json.loads(sent.removeprefix("data: ")) == shown


def test_a_state_whose_key_is_gone_is_erased_all_the_same(
    worn: tuple[httpx.Client, list[str]],
) -> None:
    client, (lost, child, damaged, *_) = worn
    with nothing_recorded(client):
        refused = client.delete(f"/v1/states/{lost}", params=asking(), headers={"If-Match": '"2"'})
        assert_problem(refused, 412, "precondition-failed")
        problem = client.delete(f"/v1/states/{lost}", params=asking())
        assert assert_problem(problem, 409, "has-descendants")["descendants"] == [child]
    assert erase(client, lost, forks=True)["erased"] == [lost, child]
    assert erase(client, damaged)["erased"] == [damaged]
    for one in (lost, child, damaged):
        assert_erased(client.get(f"/v1/states/{one}"), one)
        assert_erased(client.delete(f"/v1/states/{one}", params=asking()), one)
    assert not {lost, child, damaged} & set(ok(client.get("/v1/states"))["unreadable"])


# crashes and starts


def test_what_was_acknowledged_survives_a_crash_and_what_was_kept_does_too(
    vault: Server, client: httpx.Client
) -> None:
    kept = create(client)["state_id"]
    state_id = create(client, text=SECRET)["state_id"]
    state, tokens = read(client, state_id), tokens_of(client, state_id)
    erase(client, state_id)
    vault.kill()
    assert holding(vault.database.parent, *traces(state, tokens)) == set()
    vault.start()
    assert_erased(client.get(f"/v1/states/{state_id}"), state_id)
    assert read(client, kept)["version"] == 1


def test_a_start_that_could_not_open_what_is_sealed_is_refused(
    vault: Server, nursery: Nursery, tmp_path: Path
) -> None:
    copy = copied(vault.database, tmp_path)
    run = nursery.run("serve", CACHER_DATABASE=str(copy), CACHER_MODEL_NAME="cacher-tiny")
    assert run.returncode == 2
    assert f"the file of its keys is not at {copy}.keys" in " ".join(run.stderr.split())
    assert "Traceback" not in run.stderr


def test_a_copy_without_its_keys_is_neither_equal_nor_divergent(
    vault: Server, client: httpx.Client, nursery: Nursery, tmp_path: Path
) -> None:
    create(client)
    erase(client, create(client)["state_id"])
    copy = copied(vault.database, tmp_path)
    settings = {"CACHER_DATABASE": str(copy), "CACHER_MODEL_NAME": "cacher-tiny"}
    run = nursery.run("verify", "--json", **settings)
    report = msgspec.json.decode(run.stdout)
    assert (run.returncode, report["result"], report["divergences"]) == (2, "unverified", [])
    assert report["notes"] == ["sealed events were not re-executed: their keys are not here"]
    whole = verify(client, all=True)
    assert report["states_checked"] > report["erased"] == whole["erased"] > 0
