"""What is refused, and how: every refusal is a problem document, and nothing is recorded."""

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.app.api import (
    OPENING,
    Json,
    assert_problem,
    create,
    delete,
    fork,
    forward,
    nothing_recorded,
    ok,
    read,
)

JSON = {"content-type": "application/json"}
NO_STATE = "state-00000000000000000000000000000000"

CREATE, CONFIG, FORK = "/v1/states", "/v1/states/config", "/v1/states/fork"
REWIND, FORWARD = "/v1/states/rewind", "/v1/forward"
GENERATE, VERIFY = "/v1/generate/token", "/v1/replay/verify"
MULTI, BEAM = "/v1/generate/multi", "/v1/generate/beam"
POSTS = (CREATE, CONFIG, FORK, REWIND, FORWARD, GENERATE, MULTI, BEAM, VERIFY)

BAD_TOKENS: dict[str, Any] = {
    "tokens": [
        5,
        "abc",
        ["a"],
        [1.5],
        [True],
        [None],
        [-1],
        [2, 1024],
        [2**31],
        [-(2**31) - 1],
        [2**63],
        [-(2**63) - 1],
        [2**64],
        [10**30],
    ]
}
BAD_LOGITS: dict[str, list[Any]] = {
    "logit_bias": [
        5, None, [], [[1, 2]], {"a": 1}, {"-1": 1}, {"1024": 1}, {"1.5": 1}, {"": 1},
        {str(2**64): 1}, {"5": 101}, {"5": -100.5}, {"5": None}, {"5": "1"}, {"5": [1]},
        {str(token): 0 for token in range(1025)},
    ],
    "repetition_penalty": [0, -1, 0.009, 100.5, "1", None, True],
    "presence_penalty": [-100.5, 101, "1", None],
    "frequency_penalty": [-100.5, 101, "1", None],
    "bad_words_ids": [
        5, None, [5], [[]], [[-1]], [[1024]], [[5, "a"]], [[1.5]], [[1] * 33], [[1]] * 257,
        {"1": [1]},
    ],
}  # fmt: skip
BAD_SAMPLING: dict[str, list[Any]] = BAD_LOGITS | {
    "temperature": [-0.1, -1, 1e308, "0.7", None, True, [1]],
    "top_p": [0, -0.5, 1.0001, 2, "1", None],
    "top_k": [-1, 1.5, 10**30, "1", None],
    "min_p": [-0.1, 1.1, "0", None, True],
    "typical_p": [0, -0.1, 1.1, "1", None],
    "seed": [-1, 2**53, 10**30, 1.5, True, "1"],
}
BAD_STOPS: dict[str, list[Any]] = {
    "stop_sequences": ["abc", [5], [""], ["x"] * 17, ["x" * 1001], None],
    "stop_token_ids": [5, [-1], [1024], [2**63], [10**30], ["a"], [1.5], [1] * 65],
    "ignore_eos": ["yes", 1, None],
}
BAD_CONFIG: dict[str, list[Any]] = (
    BAD_SAMPLING
    | BAD_STOPS
    | {
        "on_full": ["shift", None, True, ""],
        "context_size": [0, -5, 1025, 10**30, 1.5, "64"],
        "store_logits": ["all", 1, None, ""],
        "top_k_logits": [0, -1, 1001, 10**30, None],
        "nonsense": [1],
    }
)
BAD_FIELDS: dict[str, dict[str, list[Any]]] = {
    CREATE: {
        "model_id": [5, []],
        "text": [5, "", ["a"], {}],
        "model_type": ["gpt", 5, None, "sequence_classification"],
        "config": [5, [], None, "x"],
        "metadata": [5, [], None, "x", {"a": "x" * 20_000}],
        "nonsense": [1, None],
    },
    CONFIG: {"state_id": [5, None], "config": [5, [], None, {}], "nonsense": [1]},
    FORK: {
        "state_id": [5, None],
        "version": ["1", 1.5, True],
        "position": [0, -1, 999, 10**30, "1", 1.5],
        "n": [0, -1, 129, 10**30, 1.5, "2", None],
        "config": [5, [], None],
        "metadata": [5, [], {"a": "x" * 20_000}],
        "continuation": [{"version": 1, "index": 0}],
    },
    REWIND: {
        "state_id": [5, None],
        "position": [0, -1, 999, 10**30, "1", 1.5, None],
        "version": ["1", 1.5, True],
    },
    FORWARD: {"state_id": [5, None], "text": [5, "", ["a"], None], "nonsense": [1]},
    GENERATE: {
        "state_id": [5, None],
        "max_tokens": [0, -1, 1025, 10**30, 1.5, "5", None, True],
        "top_logprobs": [-1, 21, 10**30, "1"],
        "stream": ["yes", 1, None],
        "n": [1],
        "num_beams": [1],
        **BAD_SAMPLING,
        **BAD_STOPS,
    },
    MULTI: {"state_id": [5, None], "n": [0, 129, -1, 1.5, "2", None], **BAD_LOGITS},
    BEAM: {"state_id": [5, None], **BAD_LOGITS},
    VERIFY: {
        "state_id": [5, [], None],
        "all": [False, 1, "true"],
        "head": [5, "nonsense", "1", "x:00", "1:0", ":", "-", "1:zz", "9" * 5000 + ":00"],
        "nonsense": [1],
    },
}
GOOD: dict[str, Json] = {
    CREATE: {},
    CONFIG: {"config": {"temperature": 1}},
    FORK: {},
    REWIND: {"position": 1},
    FORWARD: {"text": "a"},
    GENERATE: {},
    MULTI: {"n": 2},
    BEAM: {},
    VERIFY: {},
}
"""What is right of a request besides its ``state_id``; bad fields take the place of good ones."""


@pytest.fixture(scope="module")
def state_id(client: httpx.Client) -> str:
    """A state that every request here fails to change."""
    made: str = create(client)["state_id"]
    return made


@pytest.fixture(scope="module", autouse=True)
def _unchanged(client: httpx.Client, state_id: str) -> Any:
    before = read(client, state_id, include="tokens")
    yield
    assert read(client, state_id, include="tokens") == before


def _request(path: str, state_id: str, bad: Json | None = None) -> Json:
    given = {} if path == CREATE else {"state_id": state_id}
    return given | GOOD[path] | (bad or {})


def _each(
    table: dict[str, dict[str, list[Any]]],
) -> list[Any]:
    return [
        pytest.param(path, field, value, id=f"{path}-{field}-{str(value)[:24]}")
        for path, fields in table.items()
        for field, values in fields.items()
        for value in values
    ]


def _is_in(named: str, field: str) -> bool:
    """Whether a field is named, or a part of it."""
    return named == field or named.startswith((f"{field}[", f"{field}."))


def _assert_refused(client: httpx.Client, path: str, body: Json, field: str) -> None:
    with nothing_recorded(client):
        answer = client.post(path, content=json.dumps(body), headers=JSON)
    problem = assert_problem(answer, 400, "invalid-input")
    named = {error["field"] for error in problem["errors"]}
    assert len(named) == 1
    assert _is_in(named.pop(), field)
    assert _is_in(problem["field"], field)


@pytest.mark.parametrize(("path", "field", "value"), _each(BAD_FIELDS))
def test_a_bad_field_is_named(
    client: httpx.Client, state_id: str, path: str, field: str, value: Any
) -> None:
    _assert_refused(client, path, _request(path, state_id, {field: value}), field)


@pytest.mark.parametrize(
    ("path", "field", "value"), _each({CREATE: BAD_CONFIG, CONFIG: BAD_CONFIG, FORK: BAD_CONFIG})
)
def test_a_bad_setting_in_a_config_is_named(
    client: httpx.Client, state_id: str, path: str, field: str, value: Any
) -> None:
    body = _request(path, state_id, {"config": {"top_k": 3, field: value}})
    _assert_refused(client, path, body, f"config.{field}")


@pytest.mark.parametrize(("path", "field", "value"), _each({CREATE: BAD_TOKENS}))
def test_a_token_outside_the_vocabulary_is_named(
    client: httpx.Client, state_id: str, path: str, field: str, value: Any
) -> None:
    _assert_refused(client, path, {field: value}, field)
    body = {"state_id": state_id, field: value}
    _assert_refused(client, FORWARD, body, field)


def test_the_place_of_every_bad_token_is_named(client: httpx.Client, state_id: str) -> None:
    answer = client.post(CREATE, json={"tokens": [1, 2, 1024, 3, -7]})
    assert_problem(answer, 400, "invalid-input", "tokens[2]", "tokens[4]")
    body = {"state_id": state_id, "stop_token_ids": [1, 5000, 2**64]}
    named = ("stop_token_ids[1]", "stop_token_ids[2]")
    assert_problem(client.post(GENERATE, json=body), 400, "invalid-input", *named)


@pytest.mark.parametrize("path", [CREATE, FORWARD])
def test_text_and_tokens_do_not_go_together(client: httpx.Client, state_id: str, path: str) -> None:
    both: Json = {"text": "a", "tokens": [1]}
    neither: Json = {"text": None, "tokens": []}
    for bad in (both, neither):
        _assert_refused(client, path, _request(path, state_id, bad), "tokens")


@pytest.mark.parametrize(
    ("path", "missing"),
    [(CONFIG, "config"), (FORWARD, "text"), (REWIND, "position"), (VERIFY, "state_id")]
    + [(path, "state_id") for path in POSTS if path != CREATE],
)
def test_a_field_that_is_missing_is_named(
    client: httpx.Client, state_id: str, path: str, missing: str
) -> None:
    body = _request(path, state_id)
    del body[missing]
    _assert_refused(client, path, body, missing)


def test_one_of_two_ways_is_wanted_not_both(client: httpx.Client, state_id: str) -> None:
    both = {"state_id": state_id, "position": 1, "version": 1}
    _assert_refused(client, REWIND, both, "position")
    _assert_refused(client, VERIFY, {"state_id": state_id, "all": True}, "state_id")


def test_every_wrong_field_is_named_not_only_the_first(client: httpx.Client) -> None:
    body = {
        "foo": 1,
        "text": 5,
        "metadata": [],
        "model_type": "x",
        "config": {"temperature": -1, "top_p": 2, "bar": 0, "seed": 2**53, "top_k": 4},
    }
    with nothing_recorded(client):
        answer = client.post(CREATE, json=body)
    settings = ("config.temperature", "config.top_p", "config.bar", "config.seed")
    named = ("foo", "text", "metadata", "model_type", *settings)
    assert_problem(answer, 400, "invalid-input", *named)


RANGES: list[tuple[str, Any, str, str]] = [
    ("min_p", 1.1, "min_p", "<= 1"),
    ("min_p", -1, "min_p", ">= 0"),
    ("typical_p", 0, "typical_p", "> 0"),
    ("typical_p", 2, "typical_p", "<= 1"),
    ("repetition_penalty", 0, "repetition_penalty", ">= 0.01"),
    ("repetition_penalty", 101, "repetition_penalty", "<= 100"),
    ("presence_penalty", -101, "presence_penalty", ">= -100"),
    ("frequency_penalty", 101, "frequency_penalty", "<= 100"),
    ("logit_bias", {"300": 101}, "logit_bias.300", "<= 100"),
    ("logit_bias", {"1024": 1}, "logit_bias.1024", "from 0 to 1023"),
    ("logit_bias", {"-1": 1}, "logit_bias.-1", ">= 0"),
    ("logit_bias", {str(token): 0 for token in range(1025)}, "logit_bias", "<= 1024"),
    ("bad_words_ids", [[5], [6, 1024]], "bad_words_ids[1][1]", "from 0 to 1023"),
    ("bad_words_ids", [[1]] * 257, "bad_words_ids", "<= 256"),
    ("stop_token_ids", [5, 1024], "stop_token_ids[1]", "from 0 to 1023"),
    ("stop_sequences", ["x"] * 17, "stop_sequences", "<= 16"),
    ("temperature", 101, "temperature", "<= 100"),
]


@pytest.mark.parametrize(("field", "value", "named", "rule"), RANGES)
def test_a_refusal_says_what_is_allowed(
    client: httpx.Client, state_id: str, field: str, value: Any, named: str, rule: str
) -> None:
    asked = client.post(GENERATE, json={"state_id": state_id, field: value})
    assert rule in assert_problem(asked, 400, "invalid-input", named)["detail"]
    body = {"state_id": state_id, "config": {field: value}}
    changed = client.post(CONFIG, json=body)
    assert rule in assert_problem(changed, 400, "invalid-input", f"config.{named}")["detail"]


def test_every_token_that_is_none_is_named_wherever_it_stands(
    client: httpx.Client, state_id: str
) -> None:
    wish = {
        "logit_bias": {"5": 1, "2000": 1, "3000": 1},
        "bad_words_ids": [[5], [1024]],
        "stop_token_ids": [1024],
    }
    named = ("logit_bias.2000", "logit_bias.3000", "bad_words_ids[1][0]", "stop_token_ids[0]")
    for path in (GENERATE, MULTI, BEAM):
        answer = client.post(path, json=_request(path, state_id, wish))
        assert_problem(answer, 400, "invalid-input", *named)


def test_every_wrong_field_of_a_generation_is_named(client: httpx.Client) -> None:
    body = {"temperature": -1, "top_p": 0, "max_tokens": "x", "x": 1, "stop_sequences": [""]}
    named = ("temperature", "top_p", "max_tokens", "x", "stop_sequences[0]", "state_id")
    answer = client.post(GENERATE, json=body)
    problem = assert_problem(answer, 400, "invalid-input")
    assert {error["field"].replace("[...]", "[0]") for error in problem["errors"]} == set(named)


@pytest.mark.parametrize("depth", [65, 900, 100_000])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_deep_nesting_is_refused(
    client: httpx.Client, opening: str, closing: str, depth: int
) -> None:
    deep = opening * depth + "1" + closing * depth
    with nothing_recorded(client):
        answer = client.post(CREATE, content=f'{{"metadata": {{"a": {deep}}}}}', headers=JSON)
    problem = assert_problem(answer, 400, "invalid-input")
    assert problem["field"] in ("metadata", "body")
    assert "deep" in problem["detail"]


def test_metadata_nested_as_deep_as_allowed_is_kept(client: httpx.Client) -> None:
    metadata: Json = {}
    for _ in range(63):
        metadata = {"a": metadata}
    state = create(client, metadata=metadata)
    assert read(client, state["state_id"], version=1)["metadata"] == metadata
    assert fork(client, state["state_id"])[0]["metadata"] == metadata


BAD_BODIES = {
    "empty": b"",
    "array": b"[]",
    "null": b"null",
    "number": b"5",
    "string": b'"x"',
    "cut off": b"{",
    "trailing": b"{} {}",
    "single quotes": b"{'text': 'a'}",
    "NaN": b'{"config": {"temperature": NaN}}',
    "Infinity": b'{"config": {"temperature": Infinity}}',
    "-Infinity": b'{"metadata": {"a": -Infinity}}',
    "1e999": b'{"config": {"temperature": 1e999}}',
    "-1e999": b'{"metadata": {"a": -1e999}}',
    "lone surrogate": b'{"text": "\\ud800"}',
    "low surrogate": b'{"text": "a\\udc00"}',
    "surrogate in metadata": b'{"metadata": {"\\udfff": 1}}',
    "swapped surrogates": b'{"text": "\\udc00\\ud800"}',
    "not UTF-8": b'{"text": "\xff\xfe"}',
    "surrogate as bytes": b'{"text": "\xed\xa0\x80"}',
    "overlong": b'{"text": "\xc0\xaf"}',
    "not UTF-8 in a key": b'{"te\xffxt": "a"}',
    "UTF-16": '{"text": "a"}'.encode("utf-16"),
    "form": b"text=a",
}


@pytest.mark.parametrize("body", BAD_BODIES.values(), ids=BAD_BODIES.keys())
@pytest.mark.parametrize("path", POSTS)
def test_a_body_that_is_no_json_object_is_refused(
    client: httpx.Client, path: str, body: bytes
) -> None:
    with nothing_recorded(client):
        answer = client.post(path, content=body, headers=JSON)
    assert_problem(answer, 400, "invalid-input", "body")


def test_an_escaped_pair_of_surrogates_is_a_character(client: httpx.Client) -> None:
    answer = client.post(CREATE, content=b'{"text": "\\ud83e\\udd99"}', headers=JSON)
    assert ok(answer)["text"] == "\U0001f999"


@pytest.mark.parametrize(
    "content_type",
    [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x",
     "application/jsonx", "application/x-msgpack"],
)  # fmt: skip
@pytest.mark.parametrize("path", POSTS)
def test_a_body_that_does_not_say_it_is_json_is_refused(
    client: httpx.Client, path: str, content_type: str | None
) -> None:
    headers = {"content-type": content_type} if content_type else {}
    with nothing_recorded(client):
        answer = client.post(path, content=b'{"text": "a"}', headers=headers)
    problem = assert_problem(answer, 415, "unsupported-media-type")
    assert "application/json" in problem["detail"]


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "Application/JSON"])
def test_json_may_say_more_of_itself(client: httpx.Client, content_type: str) -> None:
    headers = {"content-type": content_type}
    assert client.post(CREATE, content=b'{"text": "a"}', headers=headers).status_code == 201


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_above_the_limit_is_too_large(client: httpx.Client, chunked: bool) -> None:
    whole = b'{"text": "' + b"a" * (4 << 20) + b'"}'
    parts = (whole[start : start + 65536] for start in range(0, len(whole), 65536))
    content = parts if chunked else whole
    with nothing_recorded(client):
        answer = client.post(CREATE, content=content, headers=JSON)
    assert_problem(answer, 413, "too-large")


def _facts(problem: Json) -> Json:
    return {key: problem[key] for key in problem.keys() - {"type", "title", "status", "detail"}}


@pytest.mark.parametrize(
    ("content", "facts"),
    [
        ({"text": "a" * (1 << 20)}, {"room": 16}),
        ({"tokens": [1] * 17}, {"tokens": 17, "room": 16}),
        ({"text": "q" * 17}, {"tokens": 17, "head_position": 0, "context_size": 16}),
    ],
    ids=["a text of 1 MB", "tokens", "a text a little too long"],
)
def test_more_than_the_context_holds_is_too_large_with_the_facts(
    client: httpx.Client, content: Json, facts: Json
) -> None:
    with nothing_recorded(client):
        answer = client.post(CREATE, json={**content, "config": {"context_size": 16}})
    problem = assert_problem(answer, 413, "too-large")
    assert _facts(problem) == facts
    assert all(str(value) in problem["detail"] for value in facts.values())


@pytest.mark.parametrize(
    "content",
    [{"text": "q" * 13}, {"tokens": [1] * 13}, {"text": "a" * (1 << 20)}],
    ids=["text", "tokens", "a text of 1 MB"],
)
def test_more_than_a_state_has_room_for_is_too_large_and_the_state_stays(
    client: httpx.Client, content: Json
) -> None:
    state = create(client, config={"context_size": 16})
    body = {"state_id": state["state_id"], **content}
    with nothing_recorded(client):
        problem = assert_problem(client.post(FORWARD, json=body), 413, "too-large")
    assert _facts(problem)
    assert read(client, state["state_id"]) == state
    room = 16 - state["head_position"]
    assert forward(client, state["state_id"], tokens=[300] * room)["head_position"] == 16


def _calls(state_id: str) -> dict[str, Callable[[httpx.Client], httpx.Response]]:
    posts = {
        path: (lambda client, path=path: client.post(path, json=_request(path, state_id)))
        for path in POSTS
        if path not in (CREATE, VERIFY)
    }
    return posts | {
        "get": lambda client: client.get(f"/v1/states/{state_id}"),
        "get version": lambda client: client.get(f"/v1/states/{state_id}?version=2"),
        "delete": lambda client: client.delete(f"/v1/states/{state_id}"),
        "stream": lambda client: client.post(GENERATE, json={"state_id": state_id, "stream": True}),
        "stream of several": lambda client: client.post(
            MULTI, json={"state_id": state_id, "n": 2, "stream": True}
        ),
    }


@pytest.mark.parametrize("what", _calls(NO_STATE))
@pytest.mark.parametrize("unknown", [NO_STATE, "x", "x" * 5000], ids=["id", "x", "long"])
def test_a_state_that_never_was_is_not_found(client: httpx.Client, what: str, unknown: str) -> None:
    with nothing_recorded(client):
        answer = _calls(unknown)[what](client)
    assert assert_problem(answer, 404, "state-not-found")["state_id"] == unknown


@pytest.mark.parametrize("what", _calls(NO_STATE))
def test_a_deleted_state_takes_nothing(client: httpx.Client, what: str) -> None:
    state_id = create(client)["state_id"]
    delete(client, state_id)
    with nothing_recorded(client):
        answer = _calls(state_id)[what](client)
    problem = assert_problem(answer, 404, "state-deleted")
    assert problem["state_id"] == state_id
    assert problem["deleted_at"] in problem["detail"]


@pytest.mark.parametrize("path", [FORK, REWIND])
@pytest.mark.parametrize("version", [0, -1, 2, 10**30])
def test_a_version_that_does_not_exist_is_not_found(
    client: httpx.Client, state_id: str, path: str, version: int
) -> None:
    with nothing_recorded(client):
        answer = client.post(path, json={"state_id": state_id, "version": version})
    problem = assert_problem(answer, 404, "version-not-found")
    assert (problem["version"], problem["current_version"]) == (version, 1)


@pytest.mark.parametrize("model_id", ["nope", "", "a/b", "../cacher-tiny", "/etc", "."])
def test_a_model_that_may_not_be_named_is_not_found(client: httpx.Client, model_id: str) -> None:
    with nothing_recorded(client):
        answer = client.post(CREATE, json={"text": OPENING, "model_id": model_id})
    problem = assert_problem(answer, 404, "model-not-found")
    assert problem["model_id"] == model_id
    assert "cacher-tiny" in problem["allowed"]


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        *((path, "after", value) for path in ("/v1/events", "{state}/events")
          for value in ("-1", "x", "1.5", "", str(2**53), str(10**30))),
        *((path, "limit", value) for path in ("/v1/events", "{state}/events", CREATE)
          for value in ("0", "-1", "x", "1001", "", str(10**30))),
        *((CREATE, "cursor", value) for value in ("x", "-1", "1.5", "", "²", "9" * 19)),
        *(("{state}", "version", value) for value in ("x", "1.5", "")),
        *(("{state}", "include", value) for value in ("x", "tokens,x", "text")),
    ],
)  # fmt: skip
def test_a_bad_parameter_of_a_path_is_named(
    client: httpx.Client, state_id: str, path: str, field: str, value: str
) -> None:
    answer = client.get(path.format(state=f"/v1/states/{state_id}"), params={field: value})
    assert_problem(answer, 400, "invalid-input", field)


@pytest.mark.parametrize("path", [GENERATE, MULTI])
def test_only_sampling_can_be_included_in_a_generation(
    client: httpx.Client, state_id: str, path: str
) -> None:
    with nothing_recorded(client):
        answer = client.post(f"{path}?include=logits", json=_request(path, state_id))
    assert_problem(answer, 400, "invalid-input", "include")


BAD_HEADERS = [
    *(("If-Match", value) for value in ("1", "x", 'W/"1"', '"1", "2"', '"x"', '""', '"-1"', "")),
    ("If-Match", f'"{"9" * 30}"'),
    *(("Idempotency-Key", value) for value in ("", "a b", "x" * 201, "ä".encode())),
]


@pytest.mark.parametrize(("name", "value"), BAD_HEADERS)
@pytest.mark.parametrize("what", [*POSTS[1:-1], "delete", "stream"])
def test_a_bad_header_is_named(
    client: httpx.Client, state_id: str, what: str, name: str, value: Any
) -> None:
    method, path = ("DELETE", f"/v1/states/{state_id}") if what == "delete" else ("POST", what)
    path = GENERATE if what == "stream" else path
    body = None if what == "delete" else _request(path, state_id)
    if what == "stream":
        body = {"state_id": state_id, "stream": True}
    with nothing_recorded(client):
        answer = client.request(method, path, json=body, headers={name: value})
    assert_problem(answer, 400, "invalid-input", name)


@pytest.mark.parametrize(
    "path", ["/", "/nope", "/v1", "/v1/nope", "/v1/states/x/nope", "/v2/states"]
)
def test_a_path_that_no_route_takes_is_a_problem(client: httpx.Client, path: str) -> None:
    assert_problem(client.get(path), 404, "not-found")


@pytest.mark.parametrize(
    ("method", "path"), [("PUT", CREATE), ("PATCH", CREATE), ("GET", FORWARD), ("POST", "/health")]
)
def test_a_method_that_no_route_takes_is_a_problem(
    client: httpx.Client, method: str, path: str
) -> None:
    assert_problem(client.request(method, path), 405, "method-not-allowed")
