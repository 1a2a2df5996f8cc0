"""Questions about the inside of states over HTTP: forms, conditions, limits, and leaving."""

import io
import json
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from app.pictures import MEDIA_TYPES as PICTURES
from app.representations import JSON, NPY, SAFETENSORS, answers
from infra.engine.engine import Engine
from tests.app.api import (
    LONG_TEXT,
    PROBLEM_JSON,
    Json,
    assert_problem,
    create,
    eventually,
    forward,
    head,
    metric,
    nothing_recorded,
    ok,
    read,
)
from tests.app.held import serving
from tests.app.test_random_input import ANYTHING, NUMBERS, TEXTS
from tests.infra.engine.bench import Gate

pytestmark = pytest.mark.filterwarnings(
    "ignore::litestar.utils.deprecation.LitestarDeprecationWarning"
)

PNG, SVG = PICTURES
KEYS: Json = {"layer": 1, "key_name": "k"}
POSTS: dict[str, Json] = {
    "attention": {"layer": 1, "head": 2},
    "cache/inspect": KEYS,
    "hidden": {"layers": [0, 3, 6]},
    "embedding": {"token_index": 2},
    "lens": {"start": 1, "end": 4, "layers": [0, 6]},
    "classify": {"labels": [" a", " the"]},
    "compare": {},
    "intervene": {"replace": {"1": 7}},
}
GETS = ("tokens", "next")
ANSWERS: dict[str, Any] = {
    "tokens": answers.TOKENS,
    "next": answers.NEXT,
    "attention": answers.ATTENTION,
    "cache/inspect": answers.CACHE,
    "hidden": answers.HIDDEN,
    "embedding": answers.EMBEDDING,
    "lens": answers.LENS,
    "classify": answers.LABELS,
    "compare": answers.COMPARE,
    "intervene": answers.INTERVENE,
}


@pytest.fixture(scope="module")
def state_id(client: httpx.Client) -> str:
    """A state of two versions."""
    made: str = create(client)["state_id"]
    forward(client, made, " a little bear")
    return made


def ask(
    client: httpx.Client,
    kind: str,
    state_id: str,
    accept: str = JSON,
    query: Json | None = None,
    headers: dict[str, str] | None = None,
    **asked: Any,
) -> httpx.Response:
    """Ask a question, by default one of its kind that has an answer."""
    headers = {"Accept": accept, **(headers or {})}
    path = f"/v1/analyze/{kind}"
    if kind in GETS:
        query = (query or {}) | asked
        return client.get(f"{path}/{state_id}", params=query, headers=headers)
    body = {"state_id": state_id, **(asked or POSTS[kind])}
    if kind == "compare":
        body.setdefault("other_state_id", state_id)
    return client.post(path, json=body, params=query, headers=headers)


# one finding, several forms


@pytest.mark.parametrize("kind", ANSWERS)
def test_an_answer_is_what_the_schema_describes(
    client: httpx.Client, state_id: str, kind: str
) -> None:
    answer = ask(client, kind, state_id)
    body = ok(answer)
    described = ANSWERS[kind]
    assert set(body) <= set(described.__struct_fields__)
    msgspec.convert(body, described)
    state = read(client, state_id)
    assert {name: body[name] for name in ("state_id", "version", "model_id")} == {
        "state_id": state_id,
        "version": 2,
        "model_id": state["model_id"],
    }
    numerics = ok(client.get(f"/v1/models/{state['model_id']}"))["numerics"]
    assert body["fingerprint"] == numerics["fingerprint"]
    assert answer.headers["etag"] == '"2"'
    assert answer.headers["vary"] == "Accept"


@pytest.mark.parametrize("kind", ["attention", "cache/inspect", "hidden", "embedding"])
def test_json_npy_and_safetensors_hold_the_same_bits(
    client: httpx.Client, state_id: str, kind: str
) -> None:
    body = ok(ask(client, kind, state_id))
    (view,) = body["tensors"]
    npy = ask(client, kind, state_id, NPY)
    assert json.loads(npy.headers["x-tensor"]) == view
    file = ask(client, kind, state_id, SAFETENSORS)
    (read,) = safetensors.torch.load(file.content).values()
    assert list(read.shape) == view["shape"]
    assert read.count_nonzero() > 0
    assert torch.equal(torch.tensor(body[view["name"]]), read)
    assert torch.equal(torch.from_numpy(np.load(io.BytesIO(npy.content))), read)
    for answer, media_type in ((npy, NPY), (file, SAFETENSORS)):
        assert answer.headers["content-type"] == media_type
        assert answer.headers["content-length"] == str(len(answer.content))
        assert answer.headers["etag"] == '"2"'


def test_one_of_several_tensors_is_named(client: httpx.Client, state_id: str) -> None:
    with nothing_recorded(client):
        refused = ask(client, "tokens", state_id, NPY)
        problem = assert_problem(refused, 400, "invalid-input", "tensor")
    assert "ranks" in problem["detail"]
    answer = ask(client, "tokens", state_id, NPY, {"tensor": "ranks"})
    assert json.loads(answer.headers["x-tensor"])["dtype"] == "int64"
    scored = read(client, state_id)["head_position"] - 1  # nothing comes before the first
    assert np.load(io.BytesIO(answer.content)).shape == (scored,)


@pytest.mark.parametrize("kind", ["attention", "tokens", "lens"])
def test_what_can_be_drawn_is_drawn(client: httpx.Client, state_id: str, kind: str) -> None:
    png = ask(client, kind, state_id, "image/png, application/json;q=0.5")
    assert (png.status_code, png.headers["content-type"]) == (200, PNG)
    assert png.content.startswith(b"\x89PNG")


def test_what_cannot_be_given_is_refused_by_what_can(client: httpx.Client, state_id: str) -> None:
    with nothing_recorded(client):
        for kind, accept, available in (
            ("next", PNG, [JSON, SAFETENSORS, NPY]),
            ("attention", "text/html", [JSON, SAFETENSORS, NPY, PNG, SVG]),
            ("classify", NPY, [JSON]),
        ):
            refused = ask(client, kind, state_id, accept)
            problem = assert_problem(refused, 406, "not-acceptable")
            assert problem["available"] == available


def test_what_the_form_cannot_hold_is_refused_before_it_is_computed(client: httpx.Client) -> None:
    large = create(client, text="A large one" + LONG_TEXT * 4)["state_id"]
    every: Json = {"layers": [0, 1, 2, 3, 4, 5], "heads": [0, 1, 2, 3]}
    before = metric(client, "kv_misses_total")
    with nothing_recorded(client):
        for kind, accept, asked, unit in (
            ("attention", JSON, every, "numbers in JSON"),
            ("attention", PNG, every, "weights in one picture"),
            ("lens", PNG, {"layers": [0]}, "positions in one picture"),
            ("tokens", SVG, {}, "tokens in one picture"),
        ):
            refused = ask(client, kind, large, accept, **asked)
            assert unit in assert_problem(refused, 413, "result-too-large")["detail"]
    assert metric(client, "kv_misses_total") == before
    ok(ask(client, "next", large))
    assert metric(client, "kv_misses_total") > before


def test_a_large_answer_is_given_in_the_forms_that_hold_it(client: httpx.Client) -> None:
    large = create(client, text="Once upon a time" + LONG_TEXT * 2)["state_id"]
    asked = {"layers": [0, 1, 2, 3, 4, 5], "heads": [0, 1, 2, 3]}
    with nothing_recorded(client):
        refused = ask(client, "attention", large, **asked)
        problem = assert_problem(refused, 413, "result-too-large")
    assert SAFETENSORS in problem["detail"]
    with client.stream(
        "POST",
        "/v1/analyze/attention",
        json={"state_id": large, **asked},
        headers={"Accept": SAFETENSORS},
    ) as answer:
        parts = list(answer.iter_raw())
    assert len(parts) > 2
    assert int(answer.headers["content-length"]) == sum(map(len, parts)) > 4_000_000
    pattern = safetensors.torch.load(b"".join(parts))["attention_pattern"]
    assert pattern.shape[:2] == (6, 4)
    assert (pattern.sum(-1) - 1).abs().max() < 1e-6


# versions, conditions and retries


def test_an_answer_is_of_the_version_that_was_asked_about(
    client: httpx.Client, state_id: str
) -> None:
    then = ask(client, "hidden", state_id, version=1)
    assert (ok(then)["version"], then.headers["etag"]) == (1, '"1"')
    now = ok(ask(client, "hidden", state_id))
    assert (now["version"], now["end"] > then.json()["end"]) == (2, True)
    before = ok(ask(client, "tokens", state_id, version=1))
    assert (before["version"], before["end"]) == (1, then.json()["end"])


@pytest.mark.parametrize("kind", ["tokens", "hidden"])
def test_what_there_is_not_is_not_found(client: httpx.Client, state_id: str, kind: str) -> None:
    with nothing_recorded(client):
        for version in (0, -1, 3, 10**30):
            refused = ask(client, kind, state_id, version=version)
            assert_problem(refused, 404, "version-not-found")
        refused = ask(client, kind, "state-unknown", **POSTS.get(kind, {}))
        assert_problem(refused, 404, "state-not-found")
        assert_problem(ask(client, kind, state_id, version="x"), 400, "invalid-input", "version")


def test_a_failed_condition_is_refused_and_a_kept_one_is_not(
    client: httpx.Client, state_id: str
) -> None:
    for kind in ("next", "hidden"):
        with nothing_recorded(client):
            refused = ask(client, kind, state_id, headers={"If-Match": '"1"'})
            assert_problem(refused, 412, "precondition-failed")
        ok(ask(client, kind, state_id, headers={"If-Match": '"2"'}))
        ok(ask(client, kind, state_id, headers={"If-Match": '"2"'}, version=1))


@pytest.mark.parametrize("kind", ["next", "hidden"])
def test_a_retry_is_told_the_same_and_recorded_once(
    client: httpx.Client, state_id: str, kind: str
) -> None:
    key = {"Idempotency-Key": f"once-{kind}"}
    asked = {"version": 1}
    first = ask(client, kind, state_id, headers=key, **asked)
    with nothing_recorded(client):
        assert ok(ask(client, kind, state_id, headers=key, **asked)) == ok(first)
        other = ask(client, kind, state_id, headers=key, version=2)
        assert_problem(other, 409, "idempotency-key-reused")
        file = ask(client, kind, state_id, SAFETENSORS, headers=key, **asked)
        assert len(safetensors.torch.load(file.content)) == 1
    before = head(client)
    ok(ask(client, kind, state_id, **asked))
    assert head(client)["position"] == before["position"] + 1


def test_two_states_are_compared_as_they_are_unless_versions_are_named(
    client: httpx.Client, state_id: str
) -> None:
    as_they_are = ok(ask(client, "compare", state_id))
    assert as_they_are["common_prefix"]["tokens"] == read(client, state_id)["head_position"]
    earlier = ok(ask(client, "compare", state_id, other_version=1))
    assert (earlier["a"]["version"], earlier["b"]["version"]) == (2, 1)
    unknown = ask(client, "compare", state_id, other_state_id="state-unknown")
    assert_problem(unknown, 404, "state-not-found")


# bounded, and for somebody


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, Engine]]:
    """A server whose engine can be held, and whose answers are small."""
    with serving(tmp_path_factory.mktemp("held") / "cacher.db", max_result_bytes=1 << 20) as one:
        yield one


def test_a_larger_result_than_the_setting_allows_is_refused(
    held: tuple[httpx.Client, Engine],
) -> None:
    client, _ = held
    state_id = create(client, text="Once upon a time" + LONG_TEXT * 2)["state_id"]
    every: Json = {"layers": [0, 1, 2, 3, 4, 5, 6]}
    with nothing_recorded(client):
        refused = ask(client, "hidden", state_id, SAFETENSORS, **every)
        problem = assert_problem(refused, 413, "result-too-large")
    assert problem["limit"] == 1 << 20
    assert problem["size"] > problem["limit"]
    assert "fewer layers" in problem["detail"]
    assert ask(client, "hidden", state_id, SAFETENSORS, **every, end=20).is_success


@pytest.mark.parametrize("kind", ["next", "tokens", "attention", "hidden", "lens", "intervene"])
def test_nobody_works_on_for_a_client_that_has_left(
    held: tuple[httpx.Client, Engine], kind: str
) -> None:
    client, engine = held
    state_id = create(client, text=f"Once upon a {kind}")["state_id"]
    leaving = httpx.Client(base_url=client.base_url, timeout=0.3)
    with leaving, nothing_recorded(client), Gate(engine) as gate:
        gate.reach()
        with pytest.raises(httpx.ReadTimeout):
            ask(leaving, kind, state_id)
        eventually(lambda: metric(client, "requests_in_line") == 0)
        with Gate(engine) as behind:
            gate.open()
            behind.reach()  # the engine has done what it was told, and made no step
            assert metric(client, "kv_sequences") == 0
            assert metric(client, "kv_blocks_held") == 0
    ok(ask(client, kind, state_id))


# whatever is sent

LAYERS = st.integers(-1, 8) | NUMBERS
PLACES = st.integers(-1, 8) | NUMBERS
LIKELY: dict[str, st.SearchStrategy[Any]] = {
    "version": st.none() | st.integers(-1, 3) | NUMBERS,
    "layer": LAYERS,
    "layers": st.none() | st.lists(LAYERS, max_size=3),
    "head": st.none() | LAYERS,
    "heads": st.none() | st.lists(LAYERS, max_size=3),
    "method": st.sampled_from(["weights", "rollout", "summary", "flow"]),
    "format": st.sampled_from(["dense", "sparse"]),
    "threshold": st.floats(-0.1, 1.1),
    "start": PLACES,
    "end": st.none() | PLACES,
    "position": st.none() | PLACES,
    "token_index": PLACES,
    "top_k": st.integers(-1, 12) | NUMBERS,
    "key_name": st.sampled_from(["k", "v", "q"]),
    "pooling": st.sampled_from(["none", "mean", "last", "max"]),
    "text": st.none() | TEXTS,
    "labels": st.none() | st.lists(TEXTS, max_size=3),
    "other_version": st.none() | st.integers(-1, 3),
    "replace": st.dictionaries(PLACES.map(str) | TEXTS, st.integers(-1, 1030), max_size=2),
    "zero_heads": st.lists(
        st.fixed_dictionaries({"layer": LAYERS, "head": LAYERS}) | ANYTHING, max_size=2
    ),
    "add": st.lists(
        st.fixed_dictionaries(
            {"layer": LAYERS, "vector": st.lists(st.floats(-1, 1), max_size=2) | ANYTHING},
            optional={"start": PLACES, "end": PLACES},
        ),
        max_size=2,
    ),
}
FIELDS = {
    "attention": "layer layers head heads method format threshold start end top_k",
    "cache/inspect": "layer key_name head start end",
    "hidden": "layers start end pooling",
    "embedding": "token_index layer",
    "lens": "position layers start end top_k",
    "classify": "text labels",
    "compare": "other_version start end",
    "intervene": "replace zero_heads add top_k",
}
ACCEPTED = st.sampled_from([JSON, SAFETENSORS, NPY, "*/*", "text/html", f"{NPY};q=x, */*"])


def _assert_answered(client: httpx.Client, kind: str, answer: httpx.Response, before: Json) -> bool:
    """Whether there was an answer, as described; a refusal is a problem, and recorded nothing."""
    if answer.is_success:
        if answer.headers["content-type"] == JSON:
            body, described = answer.json(), ANSWERS[kind]
            assert set(body) <= set(described.__struct_fields__)
            msgspec.convert(body, described)  # no null where a number is promised
        return True
    assert answer.status_code in (400, 404, 406, 413), answer.text
    assert answer.headers["content-type"] == PROBLEM_JSON
    assert answer.json()["status"] == answer.status_code
    assert head(client) == before
    return False


@st.composite
def _questions(draw: st.DrawFn, kind: str, state_id: str) -> Any:
    """Mostly what the route takes, with anything here and there."""
    seldom = st.sampled_from([False] * 6 + [True])
    body: Json = {"state_id": state_id, **POSTS[kind]}
    if kind == "compare":
        body["other_state_id"] = state_id
    for field in draw(st.sets(st.sampled_from(["version", *FIELDS[kind].split()]), max_size=4)):
        body[field] = draw(ANYTHING if draw(seldom) else LIKELY[field])
    if draw(seldom):
        body |= draw(st.dictionaries(TEXTS, ANYTHING, max_size=1))
    return draw(ANYTHING) if draw(seldom) else body


@pytest.mark.parametrize("kind", POSTS)
def test_no_question_makes_the_server_fail(client: httpx.Client, state_id: str, kind: str) -> None:
    outcomes = set()

    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(body=_questions(kind, state_id), accept=ACCEPTED)
    def check(body: Any, accept: str) -> None:
        before = head(client)
        answer = client.post(f"/v1/analyze/{kind}", json=body, headers={"Accept": accept})
        outcomes.add(_assert_answered(client, kind, answer, before))

    check()
    assert outcomes == {True, False}


@pytest.mark.parametrize("kind", GETS)
def test_no_query_makes_the_server_fail(client: httpx.Client, state_id: str, kind: str) -> None:
    outcomes = set()
    value = st.integers(-1, 12) | NUMBERS | TEXTS

    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(
        query=st.dictionaries(
            st.sampled_from(["top_k", "start", "end", "version", "tensor"]), value, max_size=2
        ),
        accept=ACCEPTED,
    )
    def check(query: Json, accept: str) -> None:
        before = head(client)
        answer = ask(client, kind, state_id, accept, query)
        outcomes.add(_assert_answered(client, kind, answer, before))

    check()
    assert outcomes == {True, False}


# the schema


@pytest.fixture(scope="module")
def operations(client: httpx.Client) -> Json:
    """What the OpenAPI document says of each kind of question."""
    paths = ok(client.get("/schema/openapi.json"))["paths"]
    found = {kind: paths[f"/v1/analyze/{kind}"]["post"] for kind in POSTS}
    return found | {kind: paths[f"/v1/analyze/{kind}/{{state_id}}"]["get"] for kind in GETS}


@pytest.mark.parametrize("kind", ANSWERS)
def test_the_schema_says_in_which_forms_a_question_is_answered(operations: Json, kind: str) -> None:
    operation = operations[kind]
    answer = operation["responses"]["200"]
    drawn = PICTURES if kind in ("attention", "tokens", "lens") else ()
    assert set(answer["content"]) == {JSON, SAFETENSORS, NPY, *drawn}
    assert set(answer["headers"]) == {"ETag", "X-Tensor"}
    assert set(operation["responses"]["406"]["content"]) == {PROBLEM_JSON}
    assert "tensor" in {one["name"] for one in operation["parameters"]}
