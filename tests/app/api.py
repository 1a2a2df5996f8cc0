"""Small calls of the API that many tests make, and claims that many tests check."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import httpx

Json = dict[str, Any]

OPENING = "Once upon a time"
LONG_TEXT = " there was a little bear. He had a red coat." * 12
"""More tokens than a few blocks of the KV cache hold."""
PROBLEM_JSON = "application/problem+json"


def ok(answer: httpx.Response) -> Any:
    """The body of an answer that is no problem."""
    assert answer.is_success, answer.text
    return answer.json()


def create(client: httpx.Client, **body: Any) -> Json:
    state: Json = ok(client.post("/v1/states", json={"text": OPENING, **body}))
    return state


def read(client: httpx.Client, state_id: str, **parameters: Any) -> Json:
    state: Json = ok(client.get(f"/v1/states/{state_id}", params=parameters))
    return state


def tokens_of(client: httpx.Client, state_id: str) -> list[int]:
    tokens: list[int] = read(client, state_id, include="tokens")["tokens"]
    return tokens


def forward(client: httpx.Client, state_id: str, text: str = " there was", **body: Any) -> Json:
    given = body or {"text": text}
    forwarded: Json = ok(client.post("/v1/forward", json={"state_id": state_id, **given}))
    return forwarded


def generate(client: httpx.Client, state_id: str, max_tokens: int = 8, **wish: Any) -> Json:
    body = {"state_id": state_id, "max_tokens": max_tokens, **wish}
    generated: Json = ok(client.post("/v1/generate/token", json=body))
    return generated


def multi(
    client: httpx.Client, state_id: str, n: int = 3, max_tokens: int = 8, **wish: Any
) -> Json:
    body = {"state_id": state_id, "n": n, "max_tokens": max_tokens, **wish}
    continued: Json = ok(client.post("/v1/generate/multi", json=body))
    return continued


def beams(client: httpx.Client, state_id: str, **wish: Any) -> Json:
    found: Json = ok(client.post("/v1/generate/beam", json={"state_id": state_id, **wish}))
    return found


def stream(
    client: httpx.Client, state_id: str, max_tokens: int = 8, *, n: int | None = None, **wish: Any
) -> "list[Sent]":
    """Everything that a whole stream sends: of one text, or of ``n`` continuations."""
    body = {"state_id": state_id, "max_tokens": max_tokens, "stream": True, **wish}
    path = "/v1/generate/token"
    if n is not None:
        path, body = "/v1/generate/multi", {**body, "n": n}
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    return sent(answer.text)


def configure(client: httpx.Client, state_id: str, **changes: Any) -> Json:
    body = {"state_id": state_id, "config": changes}
    view: Json = ok(client.post("/v1/states/config", json=body))
    return view


def fork(client: httpx.Client, state_id: str, **body: Any) -> list[Json]:
    forked = ok(client.post("/v1/states/fork", json={"state_id": state_id, **body}))
    states: list[Json] = forked["states"]
    return states


def rewind(client: httpx.Client, state_id: str, **body: Any) -> Json:
    state: Json = ok(client.post("/v1/states/rewind", json={"state_id": state_id, **body}))
    return state


def delete(client: httpx.Client, state_id: str) -> None:
    ok(client.delete(f"/v1/states/{state_id}"))


def events(client: httpx.Client, state_id: str) -> list[Json]:
    """Every event of a state."""
    answer = ok(client.get(f"/v1/states/{state_id}/events", params={"limit": 1000}))
    assert answer["next_after"] is None
    found: list[Json] = answer["events"]
    return found


def head(client: httpx.Client) -> Json:
    found: Json = ok(client.get("/v1/audit/head"))
    return found


def newest(client: httpx.Client) -> Json:
    """Position and hash of the newest event."""
    found = head(client)
    return {"position": found["position"], "hash": found["hash"]}


def verify(client: httpx.Client, **request: Any) -> Json:
    """The report of a verification, however long it takes."""
    answer = client.post("/v1/replay/verify", json=request)
    report: Json = ok(answer)
    if answer.status_code == 202:
        job = answer.headers["location"]
        running = ("waiting", "running")
        eventually(lambda: ok(client.get(job))["status"] not in running, timeout_s=300)
        report = ok(client.get(job))["report"]
    return report


def assert_verified(client: httpx.Client, *state_ids: str) -> None:
    """Re-execution finds every event of these states equal, and found something to re-execute."""
    for state_id in state_ids:
        report = verify(client, state_id=state_id)
        assert report["result"] == "equal", report
        assert report["tokens_recomputed"] > 0
        assert report["tokens_reused"] == 0


def metric(client: httpx.Client, name: str) -> float:
    """A metric, summed over models."""
    lines = client.get("/metrics").text.splitlines()
    values = [float(line.split()[-1]) for line in lines if line.startswith(f"cacher_{name}")]
    assert values or name.startswith("kv_"), f"there is no metric {name}"
    return sum(values)


def eventually(claim: Callable[[], bool], *, timeout_s: float = 60) -> None:
    """Wait for a claim to come true."""
    deadline = time.monotonic() + timeout_s
    while not claim():
        assert time.monotonic() < deadline, "did not come true"
        time.sleep(0.02)


def is_idle(client: httpx.Client) -> bool:
    """Nothing runs, waits, or holds a block of the KV cache."""
    names = ("kv_sequences", "kv_blocks_held", "requests_in_line")
    return all(metric(client, name) == 0 for name in names)


class Sent(NamedTuple):
    """One server-sent event."""

    name: str
    id: str | None
    data: Json


def sent(body: str) -> list[Sent]:
    """The server-sent events in a whole body."""
    return [_sent(block) for block in body.split("\n\n") if block]


def read_sent(answer: httpx.Response) -> Iterator[Sent]:
    """Server-sent events as they come."""
    block = ""
    for line in answer.iter_lines():
        if line:
            block += line + "\n"
        else:
            yield _sent(block)
            block = ""


def _sent(block: str) -> Sent:
    fields = dict(line.split(": ", 1) for line in block.splitlines())
    return Sent(fields["event"], fields.get("id"), json.loads(fields["data"]))


def assert_problem(answer: httpx.Response, status: int, slug: str, *fields: str) -> Json:
    """A problem document (RFC 9457) of this kind, which names all of ``fields`` and no others."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == PROBLEM_JSON
    assert answer.headers["x-request-id"]
    problem: Json = answer.json()
    assert problem["type"] == f"/problems/{slug}", problem
    assert problem["status"] == status
    assert problem["title"]
    assert problem["detail"]
    assert "Traceback" not in answer.text
    assert ".py" not in answer.text
    if fields:
        assert {error["field"] for error in problem["errors"]} == set(fields)
        assert problem["field"] in fields
        assert all(field in problem["detail"] for field in fields)
        assert all(error["message"] for error in problem["errors"])
    return problem


@contextmanager
def nothing_recorded(client: httpx.Client) -> Iterator[None]:
    """What is done within leaves the log as it was."""
    before = head(client)
    yield
    assert head(client) == before
