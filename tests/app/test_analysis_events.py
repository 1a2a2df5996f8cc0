"""Looking inside a state is recorded, and leaves the state as it is."""

import gzip
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from domain.analysis.result import FORM
from tests.app.api import (
    Json,
    assert_problem,
    assert_verified,
    create,
    delete,
    events,
    forward,
    generate,
    head,
    nothing_recorded,
    ok,
    read,
    verify,
)
from tests.app.held import serving

pytestmark = pytest.mark.filterwarnings(
    "ignore::litestar.utils.deprecation.LitestarDeprecationWarning"
)

GZIP = {"Content-Type": "application/gzip"}
STREAM = {"Accept": "text/event-stream"}


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Another server, with a log of its own."""
    with serving(tmp_path_factory.mktemp("elsewhere") / "cacher.db") as (connected, _):
        yield connected


def ask(client: httpx.Client, state_id: str, key: str | None = None, **parameters: Any) -> Json:
    """What comes next."""
    headers = {} if key is None else {"Idempotency-Key": key}
    path = f"/v1/analyze/next/{state_id}"
    found: Json = ok(client.get(path, params=parameters, headers=headers))
    return found


def compare(client: httpx.Client, state_id: str, **fields: Any) -> Json:
    found: Json = ok(client.post("/v1/analyze/compare", json={"state_id": state_id, **fields}))
    return found


def analyses(client: httpx.Client, state_id: str, **paging: int) -> Json:
    found: Json = ok(client.get(f"/v1/states/{state_id}/analyses", params=paging))
    return found


def newest(client: httpx.Client) -> Json:
    """The newest event of the log."""
    after = head(client)["position"] - 1
    (event,) = ok(client.get("/v1/events", params={"after": after}))["events"]
    found: Json = event
    return found


def test_a_look_is_an_event_and_leaves_the_state_as_it_is(client: httpx.Client) -> None:
    state_id = create(client)["state_id"]
    forward(client, state_id)
    before = client.get(f"/v1/states/{state_id}")
    history = events(client, state_id)
    ask(client, state_id, top_k=3)
    event = newest(client)
    assert (event["type"], event["version"], event["at_version"]) == ("state_analyzed", None, 2)
    assert event["payload"]["parameters"] == {"kind": "next", "top_k": 3}
    assert (event["payload"]["form"], len(event["payload"]["result_digest"])) == (FORM, 64)
    assert event["fingerprint"]
    after = client.get(f"/v1/states/{state_id}")
    assert (after.content, after.headers["etag"]) == (before.content, before.headers["etag"])
    assert events(client, state_id) == history
    assert_verified(client, state_id)


def test_a_look_is_no_conflict_and_makes_none(client: httpx.Client) -> None:
    state_id = create(client)["state_id"]
    tag = client.get(f"/v1/states/{state_id}").headers["etag"]
    ask(client, state_id)
    body = {"state_id": state_id, "max_tokens": 2}
    drawn = client.post("/v1/generate/token", json=body, headers={"If-Match": tag})
    assert ok(drawn)["version"] == 2
    ask(client, state_id, version=1)
    assert newest(client)["at_version"] == 1
    path = f"/v1/analyze/next/{state_id}"
    with nothing_recorded(client):
        refused = client.get(path, headers={"If-Match": tag})
        assert_problem(refused, 412, "precondition-failed")
        assert_problem(client.get(path, params={"version": 3}), 404, "version-not-found")
    ok(client.get(path, params={"version": 1}, headers={"If-Match": '"2"'}))
    assert read(client, state_id)["version"] == 2


def test_the_analyses_of_a_state_are_listed_in_pages(client: httpx.Client) -> None:
    state_id, other = create(client)["state_id"], create(client)["state_id"]
    asked = []
    for top_k in (1, 2, 3):
        ask(client, state_id, top_k=top_k)
        asked.append(newest(client))
        ask(client, other)
    assert analyses(client, state_id) == {"events": asked, "next_after": None}
    first = analyses(client, state_id, limit=2)
    assert first == {"events": asked[:2], "next_after": asked[1]["position"]}
    rest = analyses(client, state_id, after=first["next_after"], limit=2)
    assert rest == {"events": asked[2:], "next_after": None}
    delete(client, state_id)
    assert analyses(client, state_id)["events"] == asked
    missing = client.get(f"/v1/states/state-{'0' * 32}/analyses")
    assert_problem(missing, 404, "state-not-found")
    for wrong in ({"after": -1}, {"after": "x"}, {"limit": 0}, {"limit": 1001}):
        answer = client.get(f"/v1/states/{state_id}/analyses", params=wrong)
        assert_problem(answer, 400, "invalid-input", *wrong)


def test_a_deleted_state_takes_no_looks(client: httpx.Client) -> None:
    state_id = create(client)["state_id"]
    ask(client, state_id)
    delete(client, state_id)
    with nothing_recorded(client):
        for parameters in ({}, {"version": 1}):
            answer = client.get(f"/v1/analyze/next/{state_id}", params=parameters)
            assert_problem(answer, 404, "state-deleted")
    assert verify(client, state_id=state_id)["analyses"] == 1
    assert verify(client, state_id=state_id)["result"] == "equal"


def test_a_retry_looks_at_what_was_looked_at_first_and_records_nothing(
    client: httpx.Client,
) -> None:
    state_id = create(client)["state_id"]
    first = ask(client, state_id, key="look-1", top_k=3)
    forward(client, state_id)
    with nothing_recorded(client):
        assert ask(client, state_id, key="look-1", top_k=3) == first
        path, headers = f"/v1/analyze/next/{state_id}", {"Idempotency-Key": "look-1"}
        answer = client.get(path, params={"top_k": 4}, headers=headers)
        assert_problem(answer, 409, "idempotency-key-reused")
    assert ask(client, state_id, top_k=3) != first


def test_a_comparison_is_retried_against_the_version_that_it_was_made_with_also_once_it_is_gone(
    client: httpx.Client,
) -> None:
    state_id, other = create(client)["state_id"], create(client, text="Once more")["state_id"]
    headers = {"Idempotency-Key": "look-2"}
    body = {"state_id": state_id, "other_state_id": other}
    first = ok(client.post("/v1/analyze/compare", json=body, headers=headers))
    forward(client, other)
    with nothing_recorded(client):
        again = ok(client.post("/v1/analyze/compare", json=body, headers=headers))
        changed = client.post("/v1/analyze/compare", json={**body, "start": 1}, headers=headers)
        assert_problem(changed, 409, "idempotency-key-reused")
    assert again == first
    delete(client, other)
    with nothing_recorded(client):
        assert ok(client.post("/v1/analyze/compare", json=body, headers=headers)) == first
        assert_problem(client.post("/v1/analyze/compare", json=body), 404, "state-deleted")
    assert verify(client, state_id=state_id)["result"] == "equal"


def test_a_state_is_followed_with_its_looks_in_the_order_of_the_log(client: httpx.Client) -> None:
    state_id = create(client)["state_id"]
    ask(client, state_id)
    forward(client, state_id)
    ask(client, state_id, version=1)
    delete(client, state_id)
    path = f"/v1/states/{state_id}/events"
    for after, expected in {0: [1, None, 2, None, 3], 1: [None, 2, None, 3], 2: [None, 3]}.items():
        body = client.get(path, params={"after": after}, headers=STREAM).text
        data = [line[6:] for line in body.split("\n") if line.startswith('data: {"position"')]
        versions = [httpx.Response(200, text=one).json()["version"] for one in data]
        assert (after, versions) == (after, expected)
    assert [event["version"] for event in events(client, state_id)] == [1, 2, 3]


# export


def versions_in(exported: bytes, state_id: str) -> list[tuple[int | None, int | None]]:
    """Of each event of a state in an export, the version that it led to or that it saw."""
    lines = map(json.loads, gzip.decompress(exported).splitlines())
    events = [line for line in lines if line.get("state_id") == state_id]
    return [(event["version"], event.get("at_version")) for event in events]


def take_in(client: httpx.Client, exported: bytes) -> Json:
    answer = client.post("/v1/states/import", content=exported, headers=GZIP)
    assert answer.status_code == 201, answer.text
    found: Json = answer.json()
    return found


def test_the_analyses_of_a_state_leave_with_it(
    client: httpx.Client, elsewhere: httpx.Client
) -> None:
    parent = create(client)["state_id"]
    ask(client, parent)
    body = {"state_id": parent}
    state_id = ok(client.post("/v1/states/fork", json=body))["states"][0]["state_id"]
    generate(client, state_id, max_tokens=3)
    ask(client, state_id, version=1)
    compare(client, state_id, other_state_id=state_id, other_version=1)
    compare(client, state_id, other_state_id=parent)
    forward(client, state_id)
    ask(client, state_id)
    ask(client, parent)
    told = [event["position"] for event in analyses(client, state_id)["events"]]
    whole = client.get(f"/v1/states/{state_id}/export").content
    part = client.get(f"/v1/states/{state_id}/export", params={"version": 1}).content
    assert verify(client, state_id=state_id)["analyses"] == 4
    arrived = take_in(elsewhere, whole)
    assert (arrived["state"]["version"], arrived["events"]) == (3, 7)
    found = analyses(elsewhere, state_id)["events"]
    assert [event["at_version"] for event in found] == [1, 2, 3]
    assert [event["source"]["position"] for event in found] == [told[0], told[1], told[3]]
    assert analyses(elsewhere, parent)["events"] == []
    assert_verified(elsewhere, state_id)
    assert verify(elsewhere, state_id=state_id)["analyses"] == 3
    forward(elsewhere, state_id)
    again = elsewhere.get(f"/v1/states/{state_id}/export", params={"version": 3}).content
    left = [(1, None), (2, None), (None, 1), (None, 2), (3, None), (None, 3)]
    assert versions_in(whole, state_id) == versions_in(again, state_id) == left
    assert versions_in(part, state_id) == [(1, None), (None, 1)]
    assert_problem(
        elsewhere.post("/v1/states/import", content=part, headers=GZIP), 409, "state-exists"
    )


def test_an_earlier_version_leaves_without_what_was_seen_later(
    client: httpx.Client, elsewhere: httpx.Client
) -> None:
    state_id = create(client)["state_id"]
    forward(client, state_id)
    ask(client, state_id)
    ask(client, state_id, version=1)
    part = client.get(f"/v1/states/{state_id}/export", params={"version": 1}).content
    arrived = take_in(elsewhere, part)
    assert (arrived["state"]["version"], arrived["events"]) == (1, 2)
    assert [event["at_version"] for event in analyses(elsewhere, state_id)["events"]] == [1]
    assert verify(elsewhere, state_id=state_id)["result"] == "equal"
