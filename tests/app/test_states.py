"""States over HTTP: create, read, list, delete, config, fork, rewind, forward."""

import math
import re
from collections.abc import Callable
from typing import Any, cast

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.app.api import (
    LONG_TEXT,
    OPENING,
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
    metric,
    nothing_recorded,
    ok,
    read,
    rewind,
    tokens_of,
)

UTC = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")
LLAMA = "\U0001f999"
STATE_FIELDS = {
    "state_id",
    "model_id",
    "model_type",
    "head_position",
    "version",
    "text",
    "config",
    "metadata",
    "origin",
    "created_at",
    "modified_at",
}


def test_a_new_state_is_given_with_its_location_and_its_version_as_etag(
    client: httpx.Client,
) -> None:
    answer = client.post("/v1/states", json={"text": OPENING, "metadata": {"who": ["me", 1]}})
    state = answer.json()
    assert answer.status_code == 201
    assert answer.headers["etag"] == '"1"'
    assert answer.headers["location"] == f"/v1/states/{state['state_id']}"
    assert client.get(answer.headers["location"]).json() == state
    assert set(state) == STATE_FIELDS
    assert re.fullmatch(r"state-[0-9a-f]{32}", state["state_id"])
    assert (state["version"], state["text"]) == (1, OPENING)
    assert (state["model_id"], state["model_type"]) == ("cacher-tiny", "causal_lm")
    assert state["metadata"] == {"who": ["me", 1]}
    assert state["origin"] == {"kind": "new"}
    assert UTC.fullmatch(state["created_at"])
    assert state["created_at"] == state["modified_at"]


def test_a_new_state_has_the_default_settings_with_the_context_of_its_model(
    client: httpx.Client,
) -> None:
    model = ok(client.get("/v1/models/cacher-tiny"))
    assert create(client)["config"] == {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 0,
        "min_p": 0,
        "typical_p": 1,
        "repetition_penalty": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "logit_bias": {},
        "bad_words_ids": [],
        "stop_sequences": [],
        "stop_token_ids": [],
        "ignore_eos": False,
        "seed": 42,
        "context_size": model["config"]["n_positions"],
        "on_full": "stop",
        "store_logits": "top_k",
        "top_k_logits": 20,
    }


def test_settings_given_at_creation_stand_over_the_defaults_and_no_others(
    client: httpx.Client,
) -> None:
    changes = {"temperature": 0, "seed": None, "context_size": 64, "store_logits": "none"}
    assert create(client, config=changes)["config"] == create(client)["config"] | changes


@pytest.mark.parametrize(
    "setting",
    [
        {"logit_bias": {"5": -1.5, "7": 100}},
        {"bad_words_ids": [[5], [6, 7]]},
        {"stop_token_ids": [5], "stop_sequences": ["\n"], "ignore_eos": True},
        {"repetition_penalty": 1.5, "presence_penalty": -1, "frequency_penalty": 0.25},
        {"min_p": 0.125, "typical_p": 0.5, "on_full": "slide"},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_every_setting_is_kept_and_goes_on_to_a_fork(client: httpx.Client, setting: Json) -> None:
    state = create(client, config=setting)
    assert {name: state["config"][name] for name in setting} == setting
    changed = configure(client, create(client)["state_id"], **setting)
    assert changed["config"] == state["config"]
    assert read(client, state["state_id"]) == state
    (child,) = fork(client, state["state_id"])
    assert child["config"] == state["config"]


BAD_IDS: list[tuple[Json, list[str]]] = [
    ({"logit_bias": {"3": 1, "50300": 1}}, ["logit_bias.50300"]),
    ({"stop_token_ids": [3, 1024]}, ["stop_token_ids[1]"]),
    ({"bad_words_ids": [[1], [2, 5000]]}, ["bad_words_ids[1][1]"]),
    (
        {"logit_bias": {"2000": 1}, "stop_token_ids": [3000]},
        ["logit_bias.2000", "stop_token_ids[0]"],
    ),
]


@pytest.mark.parametrize(("setting", "named"), BAD_IDS, ids=lambda value: str(value)[:24])
def test_ids_in_a_config_that_are_no_tokens_are_named(
    client: httpx.Client, setting: Json, named: list[str]
) -> None:
    state_id = create(client)["state_id"]
    bodies: dict[str, Json] = {
        "/v1/states": {"text": OPENING},
        "/v1/states/config": {"state_id": state_id},
        "/v1/states/fork": {"state_id": state_id},
        "/v1/states/merge": {"state_ids": [state_id, create(client)["state_id"]]},
    }
    for path, body in bodies.items():
        with nothing_recorded(client):
            answer = client.post(path, json={**body, "config": setting})
        fields = [f"config.{name}" for name in named]
        problem = assert_problem(answer, 400, "invalid-input", *fields)
        assert "must be from 0 to 1023" in problem["detail"]


def test_tokens_make_the_same_state_as_the_text_they_are_of(client: httpx.Client) -> None:
    tokens = tokens_of(client, create(client)["state_id"])
    state = ok(client.post("/v1/states", json={"tokens": tokens}))
    assert state["text"] == OPENING
    assert state["head_position"] == len(tokens)
    assert tokens_of(client, state["state_id"]) == tokens


def test_a_state_made_of_nothing_holds_the_models_first_token_and_can_go_on(
    client: httpx.Client,
) -> None:
    state = ok(client.post("/v1/states", json={}))
    model = ok(client.get("/v1/models/cacher-tiny"))
    assert tokens_of(client, state["state_id"]) == [model["config"]["bos_token_id"]]
    assert state["text"] == ""
    assert generate(client, state["state_id"])["text"]


@pytest.mark.parametrize("model_type", ["auto", "causal_lm"])
@pytest.mark.parametrize("model", [{}, {"model_id": "cacher-tiny"}, {"model_id": None}])
def test_the_model_and_its_type_may_be_named(
    client: httpx.Client, model: Json, model_type: str
) -> None:
    state = create(client, model_type=model_type, **model)
    assert (state["model_id"], state["model_type"]) == ("cacher-tiny", "causal_lm")


@settings(max_examples=25, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40))
def test_any_text_comes_back_as_it_was_given(client: httpx.Client, text: str) -> None:
    state_id = create(client, text=text)["state_id"]
    assert read(client, state_id)["text"] == text
    assert tokens_of(client, state_id)


def test_the_name_of_a_special_token_is_text_like_any_other(client: httpx.Client) -> None:
    state = create(client, text="<|endoftext|>")
    assert state["text"] == "<|endoftext|>"
    assert len(tokens_of(client, state["state_id"])) > 1


def test_a_state_can_be_read_as_it_was_at_each_of_its_versions(client: httpx.Client) -> None:
    seen = [create(client)]
    state_id = seen[0]["state_id"]
    changes: tuple[Callable[[], object], ...] = (
        lambda: forward(client, state_id),
        lambda: generate(client, state_id),
        lambda: configure(client, state_id, temperature=0.1),
        lambda: rewind(client, state_id, position=3),
    )
    for change in changes:
        change()
        seen.append(read(client, state_id))
    assert [state["version"] for state in seen] == [1, 2, 3, 4, 5]
    assert len({str(state) for state in seen}) == 5
    for state in seen:
        answer = client.get(f"/v1/states/{state_id}?version={state['version']}")
        assert answer.json() == state
        assert answer.headers["etag"] == f'"{state["version"]}"'


@pytest.mark.parametrize("version", [0, -1, 3, 10**20])
def test_a_version_that_does_not_exist_is_not_found(client: httpx.Client, version: int) -> None:
    state_id = create(client)["state_id"]
    forward(client, state_id)
    answer = client.get(f"/v1/states/{state_id}", params={"version": version})
    problem = assert_problem(answer, 404, "version-not-found")
    assert problem["state_id"] == state_id
    assert (problem["version"], problem["current_version"]) == (version, 2)


def test_tokens_and_cache_come_only_when_asked_for(client: httpx.Client) -> None:
    state_id = create(client)["state_id"]
    assert set(read(client, state_id)) == STATE_FIELDS
    both = read(client, state_id, include="tokens,cache")
    assert set(both) == STATE_FIELDS | {"tokens", "cache"}
    assert len(both["tokens"]) == both["head_position"]
    assert both["cache"] == {"tier": "none", "tokens_hot": 0}
    forward(client, state_id, LONG_TEXT)
    grown = read(client, state_id, include="cache")
    assert set(grown) == STATE_FIELDS | {"cache"}
    assert grown["cache"]["tier"] == "device"
    assert 0 < grown["cache"]["tokens_hot"] <= grown["head_position"]


def test_states_are_listed_newest_first_in_pages_that_a_new_state_does_not_shift(
    client: httpx.Client,
) -> None:
    made = [create(client)["state_id"] for _ in range(5)]
    first = ok(client.get("/v1/states", params={"limit": 2}))
    create(client)
    parameters = {"limit": 2, "cursor": first["next_cursor"]}
    second = ok(client.get("/v1/states", params=parameters))
    listed = [state["state_id"] for state in first["states"] + second["states"]]
    assert listed == made[:0:-1]
    assert first["states"][0] == read(client, made[-1])


def test_the_last_page_of_states_has_no_cursor_and_no_state_comes_twice(
    client: httpx.Client,
) -> None:
    made = {create(client)["state_id"] for _ in range(3)}
    listed: list[str] = []
    cursor: str | None = None
    while True:
        parameters = {"limit": 100} | ({"cursor": cursor} if cursor else {})
        page = ok(client.get("/v1/states", params=parameters))
        listed += [state["state_id"] for state in page["states"]]
        assert len(page["states"]) <= 100
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert made <= set(listed)
    assert len(listed) == len(set(listed))


def test_the_list_can_be_of_one_model(client: httpx.Client) -> None:
    state_id = create(client)["state_id"]
    ours = ok(client.get("/v1/states", params={"model_id": "cacher-tiny", "limit": 1}))
    others = ok(client.get("/v1/states", params={"model_id": "gpt2"}))
    assert [state["state_id"] for state in ours["states"]] == [state_id]
    assert others == {"states": [], "next_cursor": None}


def test_a_deleted_state_says_so_is_not_listed_and_keeps_its_events(client: httpx.Client) -> None:
    state_id = create(client)["state_id"]
    history = events(client, state_id)
    answer = client.delete(f"/v1/states/{state_id}")
    assert answer.status_code == 200
    assert set(answer.json()) == {"state_id", "message"}
    assert answer.json()["state_id"] == state_id
    problem = assert_problem(client.get(f"/v1/states/{state_id}"), 404, "state-deleted")
    assert problem["state_id"] == state_id
    assert UTC.fullmatch(problem["deleted_at"])
    assert f"/v1/states/{state_id}/events" in problem["detail"]
    listed = ok(client.get("/v1/states", params={"limit": 100}))["states"]
    assert state_id not in [state["state_id"] for state in listed]
    after = events(client, state_id)
    assert after[:-1] == history
    assert after[-1]["type"] == "state_deleted"


def test_only_what_is_named_changes_in_a_config(client: httpx.Client) -> None:
    state = create(client)
    body = {"state_id": state["state_id"], "config": {"temperature": 0.25, "seed": None}}
    answer = client.post("/v1/states/config", json=body)
    assert answer.headers["etag"] == '"2"'
    view = answer.json()
    assert set(view) == {"state_id", "config", "version"}
    assert view["config"] == state["config"] | {"temperature": 0.25, "seed": None}
    assert (view["state_id"], view["version"]) == (state["state_id"], 2)
    changed = read(client, state["state_id"])
    assert changed["config"] == view["config"]
    assert changed["text"] == state["text"]
    recorded = events(client, state["state_id"])[-1]
    assert recorded["payload"]["changes"] == {"temperature": 0.25, "seed": None}


def test_a_changed_config_decides_the_next_generation(client: httpx.Client) -> None:
    greedy, drawn = (create(client)["state_id"] for _ in range(2))
    configure(client, greedy, temperature=0)
    configure(client, drawn, temperature=100, top_p=1)
    expected = generate(client, create(client)["state_id"], temperature=0)
    assert generate(client, greedy)["token_ids"] == expected["token_ids"]
    assert generate(client, drawn)["token_ids"] != expected["token_ids"]


def test_a_fork_is_a_state_of_its_own_and_leaves_its_parent_alone(client: httpx.Client) -> None:
    parent = create(client, metadata={"a": 1}, config={"temperature": 0.3})
    state_id = parent["state_id"]
    before = (read(client, state_id), events(client, state_id))
    answer = client.post("/v1/states/fork", json={"state_id": state_id})
    (child,) = answer.json()["states"]
    assert answer.status_code == 201
    assert child["state_id"] != state_id
    assert child["origin"] == {
        "kind": "fork",
        "state_id": state_id,
        "version": 1,
        "head_position": parent["head_position"],
        "continuation": None,
    }
    inherited = ("text", "config", "metadata", "model_id", "model_type", "head_position")
    assert {k: child[k] for k in inherited} == {k: parent[k] for k in inherited}
    generate(client, child["state_id"])
    assert (read(client, state_id), events(client, state_id)) == before


def test_a_fork_may_begin_at_an_earlier_version_or_position(client: httpx.Client) -> None:
    state_id = create(client)["state_id"]
    tokens = tokens_of(client, state_id)
    forward(client, state_id)
    rewind(client, state_id, position=1)
    (at_version,) = fork(client, state_id, version=2)
    (at_position,) = fork(client, state_id, position=1)
    (at_both,) = fork(client, state_id, version=2, position=3)
    assert at_version["text"] == f"{OPENING} there was"
    assert tokens_of(client, at_position["state_id"]) == tokens[:1]
    assert tokens_of(client, at_both["state_id"]) == tokens[:3]
    assert [state["origin"]["version"] for state in (at_version, at_position)] == [2, 3]
    assert at_both["origin"]["head_position"] == 3


def test_one_fork_makes_as_many_states_as_asked_each_on_its_own(client: httpx.Client) -> None:
    state_id = create(client)["state_id"]
    children = fork(client, state_id, n=3, config={"seed": None}, metadata={"b": 2})
    assert len({child["state_id"] for child in children}) == 3
    assert all(child["metadata"] == {"b": 2} for child in children)
    assert all(child["config"]["seed"] is None for child in children)
    texts = {
        generate(client, child["state_id"], temperature=100, top_p=1)["text"] for child in children
    }
    assert len(texts) == 3


def test_a_fork_outlives_its_parent(client: httpx.Client) -> None:
    parent = create(client)["state_id"]
    (child,) = fork(client, parent)
    delete(client, parent)
    assert read(client, child["state_id"]) == child
    generate(client, child["state_id"])
    assert_verified(client, child["state_id"])


CONTINUE = {"n": 3, "max_tokens": 5, "temperature": 1.0, "top_p": 1.0, "seed": 3}


def continued(client: httpx.Client, state_id: str, **wish: Any) -> Json:
    body = {"state_id": state_id, **CONTINUE, **wish}
    return cast(Json, ok(client.post("/v1/generate/multi", json=body)))


def test_a_fork_with_a_continuation_holds_what_the_state_held_and_the_continuation(
    client: httpx.Client,
) -> None:
    state = create(client)
    state_id = state["state_id"]
    held = tokens_of(client, state_id)
    continuations = continued(client, state_id)["continuations"]
    assert len({one["text"] for one in continuations}) == 3
    for index, one in enumerate(continuations):
        (child,) = fork(client, state_id, continuation={"version": 2, "index": index})
        assert child["text"] == OPENING + one["text"]
        assert tokens_of(client, child["state_id"]) == held + one["token_ids"]
        assert child["origin"] == {
            "kind": "fork",
            "state_id": state_id,
            "version": 2,
            "head_position": len(held),
            "continuation": {"version": 2, "index": index},
        }
    generate(client, child["state_id"], 2)
    assert_verified(client, child["state_id"])


def test_a_fork_with_the_first_continuation_goes_on_as_the_state_itself_does(
    client: httpx.Client,
) -> None:
    state_id, same = (create(client)["state_id"] for _ in range(2))
    generate(client, same, **{name: CONTINUE[name] for name in CONTINUE if name != "n"})
    continued(client, state_id)
    (child,) = fork(client, state_id, continuation={"version": 2, "index": 0})
    assert child["text"] == read(client, same)["text"]
    wish = {"temperature": 1.0, "seed": 5}
    assert [
        generate(client, child["state_id"], **wish)[field] for field in ("token_ids", "logprobs")
    ] == [generate(client, same, **wish)[field] for field in ("token_ids", "logprobs")]


def test_a_fork_adopts_a_continuation_of_an_earlier_version_as_often_as_asked(
    client: httpx.Client,
) -> None:
    state_id = create(client)["state_id"]
    continuations = continued(client, state_id)["continuations"]
    forward(client, state_id, " in a house")
    chosen = {"version": 2, "index": 2}
    body = {"continuation": chosen, "n": 2, "metadata": {"b": 2}, "config": {"top_k": 3}}
    children = fork(client, state_id, **body)
    assert {child["text"] for child in children} == {OPENING + continuations[2]["text"]}
    assert len({child["state_id"] for child in children}) == 2
    assert [child["metadata"] for child in children] == [{"b": 2}] * 2
    assert [child["config"]["top_k"] for child in children] == [3] * 2
    assert read(client, state_id)["text"] == f"{OPENING} in a house"


def test_a_fork_with_a_beam_holds_its_tokens(client: httpx.Client) -> None:
    state_id = create(client)["state_id"]
    held = tokens_of(client, state_id)
    body = {"state_id": state_id, "num_beams": 3, "num_return": 2, "max_length": 4}
    found = ok(client.post("/v1/generate/beam", json=body))
    (child,) = fork(client, state_id, continuation={"version": 2, "index": 1})
    assert child["text"] == OPENING + found["beams"][1]
    assert tokens_of(client, child["state_id"]) == held + found["sequences"][1]["token_ids"]


@pytest.mark.parametrize(
    ("body", "field", "detail"),
    [
        ({"continuation": {"version": 2, "index": 3}}, "continuation.index", "from 0 to 2"),
        ({"continuation": {"version": 2, "index": -1}}, "continuation.index", "from 0 to 2"),
        ({"continuation": {"version": 1, "index": 0}}, "continuation.version", "state_created"),
        ({"continuation": {"version": 2, "index": 0}, "version": 2}, "continuation", "together"),
        ({"continuation": {"version": 2, "index": 0}, "position": 1}, "continuation", "together"),
        ({"continuation": {"version": 2}}, "continuation.index", "is required"),
        ({"continuation": {"version": 2, "index": 0, "n": 1}}, "continuation.n", "not a field"),
        ({"continuation": 2}, "continuation", "expected"),
    ],
)
def test_a_continuation_that_cannot_be_adopted_is_refused_by_name(
    client: httpx.Client, body: Json, field: str, detail: str
) -> None:
    state_id = create(client)["state_id"]
    continued(client, state_id, max_tokens=1)
    with nothing_recorded(client):
        answer = client.post("/v1/states/fork", json={"state_id": state_id, **body})
    assert detail in assert_problem(answer, 400, "invalid-input", field)["detail"]


def test_a_continuation_of_a_version_that_does_not_exist_is_not_found(
    client: httpx.Client,
) -> None:
    body = {"state_id": create(client)["state_id"], "continuation": {"version": 2, "index": 0}}
    answer = client.post("/v1/states/fork", json=body)
    assert assert_problem(answer, 404, "version-not-found")["current_version"] == 1


def test_a_continuation_that_does_not_fit_is_too_large(client: httpx.Client) -> None:
    state = create(client)
    continued(client, state["state_id"])
    body = {
        "state_id": state["state_id"],
        "continuation": {"version": 2, "index": 0},
        "config": {"context_size": state["head_position"] + 4},
    }
    with nothing_recorded(client):
        answer = client.post("/v1/states/fork", json=body)
    assert assert_problem(answer, 413, "too-large")["tokens"] == state["head_position"] + 5


def test_a_fork_copies_no_kv_and_uses_that_of_its_parent(client: httpx.Client) -> None:
    parent = create(client)["state_id"]
    forward(client, parent, LONG_TEXT)
    cached, hits = metric(client, "kv_blocks_cached"), metric(client, "kv_hits_total")
    (child,) = fork(client, parent)
    assert metric(client, "kv_blocks_cached") == cached
    generate(client, child["state_id"], 1)
    assert metric(client, "kv_hits_total") > hits


def test_a_rewind_cuts_the_text_back_and_the_same_tokens_can_come_again(
    client: httpx.Client,
) -> None:
    state = create(client, config={"temperature": 1.0})
    state_id = state["state_id"]
    first = generate(client, state_id)
    answer = client.post("/v1/states/rewind", json={"state_id": state_id, "version": 1})
    assert answer.headers["etag"] == '"3"'
    assert answer.json()["text"] == OPENING
    assert answer.json() == read(client, state_id)
    again = generate(client, state_id)
    assert again["token_ids"] == first["token_ids"]
    assert again["logprobs"] == first["logprobs"]
    shorter = rewind(client, state_id, position=2)
    assert shorter["head_position"] == 2
    assert OPENING.startswith(shorter["text"])
    assert_verified(client, state_id)


def test_a_rewind_leaves_the_config_as_it_is(client: httpx.Client) -> None:
    state_id = create(client)["state_id"]
    changed = configure(client, state_id, temperature=0.125)["config"]
    assert rewind(client, state_id, version=1)["config"] == changed


def test_a_rewind_to_tokens_that_do_not_begin_the_text_is_a_conflict(
    client: httpx.Client,
) -> None:
    state_id = create(client)["state_id"]
    forward(client, state_id, " there was")
    rewind(client, state_id, version=1)
    forward(client, state_id, " in a house")
    with nothing_recorded(client):
        body = {"state_id": state_id, "version": 2}
        answer = client.post("/v1/states/rewind", json=body)
    problem = assert_problem(answer, 409, "not-a-prefix")
    assert (problem["state_id"], problem["version"]) == (state_id, 2)
    assert "fork" in problem["detail"]
    assert answer.headers["x-should-retry"] == "false"
    (forked,) = fork(client, state_id, version=2)
    assert forked["text"] == f"{OPENING} there was"


def test_forwarded_text_is_appended_and_scored(client: httpx.Client) -> None:
    state_id = create(client)["state_id"]
    held = tokens_of(client, state_id)
    body = {"state_id": state_id, "text": " there was a cat"}
    answer = client.post("/v1/forward", json=body)
    assert answer.status_code == 200
    assert answer.headers["etag"] == '"2"'
    forwarded = answer.json()
    assert set(forwarded) == {"state_id", "head_position", "version", "tokens"}
    assert "".join(token["text"] for token in forwarded["tokens"]) == " there was a cat"
    assert all(set(token) == {"token_id", "text", "logprob"} for token in forwarded["tokens"])
    assert all(-100 < token["logprob"] <= 0 for token in forwarded["tokens"])
    ids = [token["token_id"] for token in forwarded["tokens"]]
    assert tokens_of(client, state_id) == held + ids
    assert (forwarded["head_position"], forwarded["version"]) == (len(held) + len(ids), 2)
    assert read(client, state_id)["text"] == f"{OPENING} there was a cat"


def test_forwarding_tokens_scores_them_to_the_bit_as_generating_them_did(
    client: httpx.Client,
) -> None:
    drawn, given_ = (create(client)["state_id"] for _ in range(2))
    generated = generate(client, drawn, 12, temperature=1.0, seed=5)
    forwarded = forward(client, given_, tokens=generated["token_ids"])
    assert [token["logprob"] for token in forwarded["tokens"]] == generated["logprobs"]
    assert [token["text"] for token in forwarded["tokens"]] == generated["new_tokens"]
    assert any(logprob < math.log(0.9) for logprob in generated["logprobs"])


def test_a_character_of_several_tokens_belongs_to_the_token_that_completes_it(
    client: httpx.Client,
) -> None:
    tokens = tokens_of(client, create(client, text=LLAMA)["state_id"])
    assert len(tokens) > 1
    state_id = create(client)["state_id"]
    texts = [forward(client, state_id, tokens=[token])["tokens"][0]["text"] for token in tokens]
    assert texts == [""] * (len(tokens) - 1) + [LLAMA]
    assert read(client, state_id)["text"] == f"{OPENING}{LLAMA}"


def test_a_token_that_is_not_whole_characters_is_given_with_its_bytes(
    client: httpx.Client,
) -> None:
    state_id = create(client)["state_id"]
    forwarded = forward(client, state_id, f" a{LLAMA} b")["tokens"]
    inside = [token for token in forwarded if "bytes" in token]
    assert len(inside) > 1
    assert bytes(byte for token in inside for byte in token["bytes"]) == LLAMA.encode()
    whole = [token for token in forwarded if "bytes" not in token]
    assert "".join(token["text"] for token in whole) == " a b"
    assert_verified(client, state_id)
