"""The history over HTTP and its proof; models, health, metrics, the schema."""

import re
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import pytest
from msgspec import UNSET

from app.schemas import EventList, EventView
from domain.chain import Head, Row, follow
from tests.app.api import (
    LONG_TEXT,
    PROBLEM_JSON,
    Json,
    assert_problem,
    assert_verified,
    configure,
    create,
    delete,
    events,
    fork,
    forward,
    generate,
    head,
    is_idle,
    metric,
    newest,
    nothing_recorded,
    ok,
    read,
    rewind,
    verify,
)


def _everything(client: httpx.Client) -> str:
    """A state that every operation was done to."""
    state_id: str = create(client)["state_id"]
    forward(client, state_id)
    generate(client, state_id, temperature=1.0, seed=7, top_logprobs=2)
    configure(client, state_id, store_logits="full", seed=None)
    client.post("/v1/generate/token", json={"state_id": state_id, "stream": True})
    rewind(client, state_id, version=2)
    generate(client, state_id)
    fork(client, state_id, n=2)
    delete(client, state_id)
    return state_id


TYPES = [
    "state_created",
    "text_forwarded",
    "tokens_generated",
    "config_changed",
    "tokens_generated",
    "head_rewound",
    "tokens_generated",
    "state_deleted",
]


def _pages(client: httpx.Client, path: str, after: int, limit: int) -> Iterator[list[EventView]]:
    following: int | None = after
    while following is not None:
        answer = client.get(path, params={"after": following, "limit": limit})
        page = msgspec.json.decode(answer.content, type=EventList)
        assert len(page.events) <= limit
        following = page.next_after
        yield page.events


def test_every_operation_on_a_state_is_one_event_in_order(client: httpx.Client) -> None:
    found = events(client, _everything(client))
    assert [event["type"] for event in found] == TYPES
    assert [event["version"] for event in found] == list(range(1, 9))
    positions = [event["position"] for event in found]
    assert positions == sorted(set(positions))
    assert all(event["payload"]["type"] == event["type"] for event in found)
    assert {event["actor"] for event in found} == {"anonymous"}


def test_events_of_a_state_come_in_pages_after_a_version(client: httpx.Client) -> None:
    state_id = _everything(client)
    pages = list(_pages(client, f"/v1/states/{state_id}/events", 3, 2))
    assert [[event.version for event in page] for page in pages] == [[4, 5], [6, 7], [8]]
    past_the_end = ok(client.get(f"/v1/states/{state_id}/events", params={"after": 8}))
    assert past_the_end == {"events": [], "next_after": None}


def test_the_events_of_the_whole_log_come_in_pages_after_a_position(client: httpx.Client) -> None:
    before = head(client)["position"]
    state_id = _everything(client)
    pages = list(_pages(client, "/v1/events", before, 3))
    assert [len(page) for page in pages] == [3, 3, 3, 1]
    assert [e.type for page in pages for e in page if e.state_id == state_id] == TYPES
    assert pages[-1][-1].position == head(client)["position"]


@pytest.mark.parametrize("after", ["", "?after=3"])
def test_events_of_a_state_that_never_was_are_not_found(client: httpx.Client, after: str) -> None:
    assert_problem(client.get(f"/v1/states/state-0/events{after}"), 404, "state-not-found")


def _row(view: EventView) -> Row:
    columns: dict[str, Any] = msgspec.structs.asdict(view)
    assert (columns.pop("content"), columns.pop("source")) == (UNSET, UNSET)
    return Row(
        **columns
        | {
            "payload": bytes(view.payload).decode(),
            "previous_hash": bytes.fromhex(view.previous_hash),
            "hash": bytes.fromhex(view.hash),
        }
    )


def test_whoever_kept_a_head_can_recompute_the_chain_from_the_events(
    client: httpx.Client,
) -> None:
    kept = head(client)
    at = Head(kept["position"], bytes.fromhex(kept["hash"]))
    _everything(client)
    rows = [_row(e) for page in _pages(client, "/v1/events", kept["position"], 4) for e in page]
    assert len(rows) == 10
    for row in rows:
        at = follow(at, row)
    assert {"position": at.position, "hash": at.hash.hex()} == newest(client)


def test_reading_and_verifying_record_nothing(client: httpx.Client) -> None:
    state_id = create(client)["state_id"]
    generate(client, state_id)
    with nothing_recorded(client):
        read(client, state_id, include="tokens,cache")
        events(client, state_id)
        verify(client, state_id=state_id)
        for path in ("states", "models", "models/cacher-tiny", "events", "audit/head"):
            ok(client.get(f"/v1/{path}"))
        for path in ("health", "ready"):
            ok(client.get(f"/{path}"))


def test_one_state_is_verified_by_computing_it_again(client: httpx.Client) -> None:
    state_id = _everything(client)
    report = verify(client, state_id=state_id)
    assert set(report) == {
        "result",
        "head",
        "range",
        "events_checked",
        "analyses",
        "states_checked",
        "imported",
        "imported_from",
        "erased",
        "erased_states",
        "tokens_recomputed",
        "tokens_reused",
        "divergences_found",
        "divergences",
        "drifts_found",
        "drifts",
        "notes",
    }
    assert report["result"] == "equal"
    assert (report["events_checked"], report["states_checked"]) == (8, 1)
    assert report["tokens_recomputed"] > 0
    assert report["tokens_reused"] == 0
    assert report["divergences"] == report["drifts"] == report["notes"] == []
    assert report["head"] == newest(client)


def test_the_whole_log_is_verified_against_a_remembered_head(client: httpx.Client) -> None:
    kept = head(client)
    _everything(client)
    report = verify(client, all=True, head=f"{kept['position']}:{kept['hash']}")
    assert report["result"] == "equal", report
    assert report["head"] == newest(client)
    assert report["events_checked"] == sum(map(len, _pages(client, "/v1/events", 0, 1000)))


def test_a_head_that_is_not_in_the_log_is_a_divergence(client: httpx.Client) -> None:
    state_id = create(client)["state_id"]
    kept = head(client)
    wrong = f"{int(kept['hash'], 16) ^ 1:064x}"
    missing = kept["position"] + 10**9
    for remembered in (f"{kept['position']}:{wrong}", f"{missing}:{kept['hash']}"):
        report = verify(client, state_id=state_id, head=remembered)
        assert report["result"] == "divergent"
        (divergence,) = report["divergences"]
        assert divergence["field"] == "head"
        assert divergence["position"] == int(remembered.partition(":")[0])
        assert divergence["expected"] == remembered.partition(":")[2]


def test_a_state_that_never_was_cannot_be_verified(client: httpx.Client) -> None:
    answer = client.post("/v1/replay/verify", json={"state_id": "state-0"})
    assert_problem(answer, 404, "state-not-found")


def test_models_say_what_they_are_and_whether_they_are_loaded(client: httpx.Client) -> None:
    create(client)
    models = {model["model_id"]: model for model in ok(client.get("/v1/models"))}
    fields = {"model_id", "description", "model_type", "loaded", "embedded"}
    assert all(set(model) == fields and model["description"] for model in models.values())
    claims = {name: (m["model_type"], m["embedded"]) for name, m in models.items()}
    assert claims == {
        "cacher-tiny": ("causal_lm", True),
        "cacher-tiny-sentiment": ("sequence_classification", True),
        "gpt2": (None, False),
    }
    assert models["cacher-tiny"]["loaded"]
    assert not models["gpt2"]["loaded"]


def test_a_model_says_what_it_claims_about_its_bits(client: httpx.Client) -> None:
    model = ok(client.get("/v1/models/cacher-tiny"))
    assert model["config"]["model_type"] == "gpt2"
    numerics = model["numerics"]
    assert {"deterministic", "fingerprint", "strategy", "dtype", "quantum"} <= set(numerics)
    assert (numerics["deterministic"], numerics["dtype"]) == (True, "float32")
    assert numerics["strategy"] == "strict"
    assert numerics["quantum"] == 1
    state_id = create(client)["state_id"]
    generate(client, state_id)
    assert events(client, state_id)[-1]["fingerprint"] == numerics["fingerprint"]
    assert_verified(client, state_id)


def test_a_classifier_says_what_it_claims_about_its_bits_too(client: httpx.Client) -> None:
    model = ok(client.get("/v1/models/cacher-tiny-sentiment"))
    assert model["model_type"] == "sequence_classification"
    assert model["loaded"]
    numerics = model["numerics"]
    assert (numerics["deterministic"], numerics["strategy"]) == (True, "whole")
    assert model["config"]["architectures"] == ["GPT2ForSequenceClassification"]


@pytest.mark.parametrize(
    "name", ["nope", "a/b", "a/b/c", "a%2Fb", "..%2F..%2Fetc", "%2Fetc%2Fpasswd", "cacher-tiny/x"]
)
def test_a_model_that_may_not_be_named_is_not_found(client: httpx.Client, name: str) -> None:
    problem = assert_problem(client.get(f"/v1/models/{name}"), 404, "model-not-found")
    assert set(problem["allowed"]) == {"cacher-tiny", "gpt2", "cacher-tiny-sentiment"}
    assert problem["model_id"] in problem["detail"]


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_the_server_says_that_it_is_up_and_ready(client: httpx.Client, path: str) -> None:
    answer = ok(client.get(path))
    assert answer["status"] == "ok"
    assert re.fullmatch(r"\d+\.\d+\.\d+", answer["version"])


METRIC = re.compile(r'[a-z_]+(\{[a-z_]+="[^"]*"(,[a-z_]+="[^"]*")*\})? -?[0-9.e+]+')


def test_metrics_are_in_the_text_format_of_prometheus(client: httpx.Client) -> None:
    create(client)
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    lines = answer.text.splitlines()
    kinds = dict(line.split()[2:] for line in lines if line.startswith("# TYPE"))
    values = [line for line in lines if not line.startswith("#")]
    assert values
    assert all(METRIC.fullmatch(line) for line in values)
    assert {re.split(r"[{ ]", line)[0] for line in values} == set(kinds)
    assert {kind for name, kind in kinds.items() if "hits" in name} == {"counter"}


def test_metrics_count_what_the_kv_cache_did(client: httpx.Client) -> None:
    state_id = create(client, text=f"7f3c{LONG_TEXT}")["state_id"]
    misses, hits = metric(client, "kv_misses_total"), metric(client, "kv_hits_total")
    generate(client, state_id, 1)
    assert metric(client, "kv_misses_total") > misses
    assert metric(client, "kv_hits_total") == hits
    (child,) = fork(client, state_id, version=1)
    generate(client, child["state_id"], 1)
    assert metric(client, "kv_hits_total") > hits
    assert 0 < metric(client, "kv_blocks_cached") <= metric(client, "kv_blocks_capacity")
    assert is_idle(client)


ROUTES = {
    "get": {
        "/health",
        "/ready",
        "/metrics",
        "/v1/states",
        "/v1/states/{state_id}",
        "/v1/states/{state_id}/events",
        "/v1/models",
        "/v1/models/{model_id}",
        "/v1/events",
        "/v1/audit/head",
        "/v1/audit/proof",
        "/v1/audit/key",
    },
    "post": {
        "/v1/states",
        "/v1/states/config",
        "/v1/states/fork",
        "/v1/states/rewind",
        "/v1/states/merge",
        "/v1/forward",
        "/v1/generate/token",
        "/v1/generate/multi",
        "/v1/generate/beam",
        "/v1/replay/verify",
    },
    "delete": {"/v1/states/{state_id}"},
}
LOGITS = {
    "logit_bias",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "bad_words_ids",
}
ENDS = {"stop_token_ids", "ignore_eos"}
SAMPLED = {
    *LOGITS,
    *ENDS,
    "state_id",
    "stream",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "seed",
    "stop_sequences",
    "constraint",
    "top_logprobs",
}
BODIES = {
    "/v1/states": {"model_id", "text", "tokens", "model_type", "config", "metadata"},
    "/v1/states/config": {"state_id", "config"},
    "/v1/states/fork": {
        "state_id",
        "version",
        "position",
        "continuation",
        "n",
        "config",
        "metadata",
    },
    "/v1/states/merge": {"state_ids", "strategy", "config", "metadata"},
    "/v1/states/rewind": {"state_id", "position", "version"},
    "/v1/forward": {"state_id", "text", "tokens"},
    "/v1/replay/verify": {
        *("state_id", "state_ids", "all", "after", "until", "since_verified", "head")
    },
    "/v1/generate/token": SAMPLED,
    "/v1/generate/multi": {*SAMPLED, "n"},
    "/v1/generate/beam": {
        *LOGITS,
        *ENDS,
        "state_id",
        "max_length",
        "num_beams",
        "early_stopping",
        "length_penalty",
        "num_beam_groups",
        "diversity_penalty",
        "no_repeat_ngram_size",
        "num_return",
    },
}


@pytest.fixture(scope="module")
def schema(client: httpx.Client) -> Json:
    document: Json = ok(client.get("/schema/openapi.json"))
    return document


def test_the_schema_is_openapi_3_1_and_holds_every_route(schema: Json) -> None:
    assert re.fullmatch(r"3\.1\.\d+", schema["openapi"])
    for method, paths in ROUTES.items():
        assert paths <= {path for path, item in schema["paths"].items() if method in item}


def _resolve(schema: Json, reference: str) -> Json:
    found = schema
    for name in reference.removeprefix("#/").split("/"):
        found = found[name]
    return found


@pytest.mark.parametrize("path", BODIES)
def test_the_schema_describes_each_body_field_by_field(schema: Json, path: str) -> None:
    body = schema["paths"][path]["post"]["requestBody"]["content"]
    assert set(body) == {"application/json"}
    described = _resolve(schema, body["application/json"]["schema"]["$ref"])
    assert set(described["properties"]) == BODIES[path]


def test_the_schema_describes_every_refusal_as_a_problem(schema: Json) -> None:
    refusals = [
        answer["content"]
        for path, item in schema["paths"].items()
        for method, operation in item.items()
        for status, answer in operation["responses"].items()
        if path.startswith("/v1/") and status >= "400"
    ]
    assert len(refusals) >= len(schema["paths"])
    assert all(set(content) == {PROBLEM_JSON} for content in refusals)
    references = {content[PROBLEM_JSON]["schema"]["$ref"] for content in refusals}
    (described,) = (_resolve(schema, reference) for reference in references)
    assert {"type", "title", "status", "detail"} <= set(described["properties"])


def test_the_schema_says_what_routes_answer_without_a_key(schema: Json) -> None:
    for path, item in schema["paths"].items():
        for operation in item.values():
            assert ({"401", "403"} <= set(operation["responses"])) == path.startswith("/v1/")


def _headers_of(operation: Json) -> set[str]:
    return {one["name"] for one in operation["parameters"] if one["in"] == "header"}


@pytest.mark.parametrize("path", ["/v1/events", "/v1/states/{state_id}/events"])
def test_the_schema_says_that_events_can_be_followed(schema: Json, path: str) -> None:
    operation = schema["paths"][path]["get"]
    content = operation["responses"]["200"]["content"]
    assert set(content) == {"application/json", "text/event-stream"}
    assert "event: recorded" in content["text/event-stream"]["schema"]["description"]
    assert "content" not in operation["responses"]["204"]
    assert _headers_of(operation) == {"Last-Event-ID"}


@pytest.mark.parametrize("path", ["/v1/generate/token", "/v1/generate/multi"])
def test_the_schema_says_that_a_generation_can_be_streamed(schema: Json, path: str) -> None:
    operation = schema["paths"][path]["post"]
    content = operation["responses"]["200"]["content"]
    assert set(content) == {"application/json", "text/event-stream"}
    assert "$ref" in content["application/json"]["schema"]
    told = content["text/event-stream"]["schema"]["description"]
    named = ("event: token", "event: done", "event: error", "position", "logprob")
    assert all(name in told for name in named)
    assert _headers_of(operation) == {"Last-Event-ID"}


def test_the_schema_says_that_a_report_may_come_later(schema: Json) -> None:
    operation = schema["paths"]["/v1/replay/verify"]["post"]
    later = operation["responses"]["202"]
    assert set(later["headers"]) == {"Location", "Retry-After", "Preference-Applied"}
    (content,) = later["content"].values()
    assert "replay_id" in _resolve(schema, content["schema"]["$ref"])["properties"]
    assert _headers_of(operation) == {"Prefer"}


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/v1/events", {"GET"}),
        ("GET", "/v1/states/fork", {"POST"}),
        ("PATCH", "/v1/states/state-0", {"GET", "DELETE"}),
        ("POST", "/health", {"GET"}),
    ],
)
def test_a_method_that_a_route_does_not_have_is_answered_with_those_it_has(
    client: httpx.Client, method: str, path: str, allowed: set[str]
) -> None:
    answer = client.request(method, path)
    assert_problem(answer, 405, "method-not-allowed")
    assert set(answer.headers["allow"].split(", ")) == {*allowed, "OPTIONS"}


@pytest.mark.parametrize(
    "accept",
    [
        "text/event-stream;q=0",
        "text/event-stream; Q=0.000",
        "text/event-stream;q=0, text/html",
        "text/event-stream;q=0, application/json;q=0.1",
    ],
)
def test_who_does_not_accept_a_feed_gets_a_page(client: httpx.Client, accept: str) -> None:
    answer = client.get("/v1/events", headers={"Accept": accept})
    assert answer.headers["content-type"] == "application/json"


def test_every_reference_in_the_schema_leads_somewhere(schema: Json) -> None:
    references = set(re.findall(r"'\$ref': '([^']+)'", str(schema)))
    assert len(references) > 10
    assert all(_resolve(schema, reference) for reference in references)
