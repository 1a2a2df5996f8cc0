"""Merging states over HTTP: what they have in common, then what each of them has of its own."""

from collections.abc import Iterator
from typing import Any, cast

import httpx
import pytest
from litestar.testing import TestClient

from app import bootstrap
from app.main import create_app
from app.settings import Settings
from tests.app.api import (
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
    nothing_recorded,
    ok,
    read,
    tokens_of,
)
from tests.infra.engine import small_models

MERGE = "/v1/states/merge"
LLAMA = "\U0001f999"


def merge(client: httpx.Client, *state_ids: str, **body: Any) -> Json:
    return cast(Json, ok(client.post(MERGE, json={"state_ids": state_ids, **body})))


def with_tokens(client: httpx.Client, *tokens: int) -> str:
    return cast(str, ok(client.post("/v1/states", json={"tokens": tokens}))["state_id"])


@pytest.fixture(scope="module")
def parts(client: httpx.Client) -> list[str]:
    """A state, and two forks of it that went on in ways of their own."""
    first = create(client, config={"temperature": 0.25}, metadata={"a": 1})["state_id"]
    children = [child["state_id"] for child in fork(client, first, n=2, metadata={"b": 2})]
    for child, text in zip(children, (" there was a cat", " there was a dog"), strict=True):
        forward(client, child, text)
    return [first, *children]


def test_a_merged_state_begins_with_what_all_have_in_common_and_goes_on_with_each_ones_own(
    client: httpx.Client, parts: list[str]
) -> None:
    before = [(read(client, one), events(client, one)) for one in parts]
    answer = client.post(MERGE, json={"state_ids": parts[1:], "strategy": "concatenate"})
    merged = answer.json()
    assert answer.status_code == 201
    assert answer.headers["etag"] == '"1"'
    assert answer.headers["location"] == f"/v1/states/{merged['state_id']}"
    assert client.get(answer.headers["location"]).json() == merged
    assert merged["text"] == f"{OPENING} there was a cat dog"
    assert merged["origin"] == {
        "kind": "merge",
        "parents": [
            {"state_id": one["state_id"], "version": 2, "head_position": one["head_position"]}
            for one, _ in before[1:]
        ],
        "strategy": "concatenate",
    }
    assert [(read(client, one), events(client, one)) for one in parts] == before
    assert_verified_after_going_on(client, merged["state_id"])


def assert_verified_after_going_on(client: httpx.Client, state_id: str) -> None:
    generate(client, state_id, 2)
    assert_verified(client, state_id)


def test_the_order_of_the_states_is_that_of_their_parts(
    client: httpx.Client, parts: list[str]
) -> None:
    first, cat, dog = parts
    assert merge(client, dog, cat)["text"] == f"{OPENING} there was a dog cat"
    every = merge(client, cat, first, dog)
    assert every["text"] == f"{OPENING} there was a cat there was a dog"
    assert [one["state_id"] for one in every["origin"]["parents"]] == [cat, first, dog]
    assert merge(client, first, cat)["text"] == read(client, cat)["text"]


def test_settings_and_metadata_are_those_of_the_first_state_but_for_what_is_given(
    client: httpx.Client, parts: list[str]
) -> None:
    first, cat, _ = parts
    same, other = merge(client, first, cat), merge(client, cat, first, metadata={"c": 3})
    assert (same["config"], same["metadata"]) == (read(client, first)["config"], {"a": 1})
    assert other["metadata"] == {"c": 3}
    changed = merge(client, first, cat, config={"top_k": 7, "seed": None})
    assert changed["config"] == same["config"] | {"top_k": 7, "seed": None}


def test_a_merged_state_generates_what_a_new_state_with_its_tokens_generates(
    client: httpx.Client, parts: list[str]
) -> None:
    merged = merge(client, *parts[1:])["state_id"]
    new = with_tokens(client, *tokens_of(client, merged))
    wish = {"temperature": 1.0, "seed": 5}
    results = [generate(client, state_id, **wish) for state_id in (merged, new, parts[1])]
    drawn = [(one["token_ids"], one["logprobs"]) for one in results]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


def test_the_text_of_a_merged_state_is_that_of_its_tokens(client: httpx.Client) -> None:
    tokens = tokens_of(client, create(client)["state_id"])
    llama = tokens_of(client, create(client, text=LLAMA)["state_id"])
    halves = [with_tokens(client, *tokens, *half) for half in (llama[:2], llama[2:])]
    assert LLAMA not in "".join(read(client, half)["text"] for half in halves)
    merged = merge(client, *halves)
    assert merged["text"] == f"{OPENING}{LLAMA}"
    assert tokens_of(client, merged["state_id"]) == tokens + llama


def test_a_merged_state_outlives_its_parents(client: httpx.Client) -> None:
    parents = [create(client, text=text)["state_id"] for text in (OPENING, "The end")]
    merged = merge(client, *parents)
    for parent in parents:
        delete(client, parent)
    assert read(client, merged["state_id"]) == merged
    assert_verified_after_going_on(client, merged["state_id"])


def test_a_merge_that_slid_states_take_part_in_begins_at_position_0(client: httpx.Client) -> None:
    slid, other = with_tokens(client, *range(400, 408)), with_tokens(client, *range(500, 503))
    configure(client, slid, context_size=8, on_full="slide")
    forward(client, slid, tokens=[300])
    assert read(client, slid)["dropped"] == 4
    merged = merge(client, slid, other)
    assert "dropped" not in merged
    tokens = [404, 405, 406, 407, 300, 500, 501, 502]
    assert tokens_of(client, merged["state_id"]) == tokens


def test_a_merge_that_does_not_fit_is_too_large_unless_it_is_given_more_room(
    client: httpx.Client,
) -> None:
    state_ids = [with_tokens(client, *tokens) for tokens in ([300] * 9, [301] * 9)]
    configure(client, state_ids[0], context_size=16)
    with nothing_recorded(client):
        answer = client.post(MERGE, json={"state_ids": state_ids})
    problem = assert_problem(answer, 413, "too-large")
    assert (problem["tokens"], problem["context_size"]) == (18, 16)
    assert merge(client, *state_ids, config={"context_size": 18})["head_position"] == 18


@pytest.mark.parametrize("number", [0, 1, 65])
def test_two_to_sixty_four_states_are_merged(
    client: httpx.Client, parts: list[str], number: int
) -> None:
    with nothing_recorded(client):
        answer = client.post(MERGE, json={"state_ids": (parts * 22)[:number]})
    assert_problem(answer, 400, "invalid-input", "state_ids")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"strategy": "interleave"}, "strategy"),
        ({"state_ids": 5}, "state_ids"),
        ({"state_id": "state-1"}, "state_id"),
        ({"config": {"context_size": 1025}}, "config.context_size"),
        ({"config": {"on_full": "wrap"}}, "config.on_full"),
        ({"config": {"nonsense": 1}}, "config.nonsense"),
        ({"metadata": {"a": "x" * 20_000}}, "metadata"),
        ({"metadata": 5}, "metadata"),
    ],
)
def test_a_bad_field_of_a_merge_is_named(
    client: httpx.Client, parts: list[str], body: Json, field: str
) -> None:
    with nothing_recorded(client):
        answer = client.post(MERGE, json={"state_ids": parts, **body})
    assert_problem(answer, 400, "invalid-input", field)


def test_a_state_that_comes_twice_is_refused_and_named(
    client: httpx.Client, parts: list[str]
) -> None:
    first, cat, _ = parts
    with nothing_recorded(client):
        answer = client.post(MERGE, json={"state_ids": [first, cat, cat, first]})
    problem = assert_problem(answer, 400, "invalid-input", "state_ids[2]", "state_ids[3]")
    assert "state_ids[1] again" in problem["detail"]


def test_states_that_do_not_exist_are_not_found(client: httpx.Client, parts: list[str]) -> None:
    gone = create(client)["state_id"]
    delete(client, gone)
    with nothing_recorded(client):
        unknown = client.post(MERGE, json={"state_ids": [parts[0], "state-1"]})
        deleted = client.post(MERGE, json={"state_ids": [gone, parts[0]]})
    assert assert_problem(unknown, 404, "state-not-found")["state_id"] == "state-1"
    assert assert_problem(deleted, 404, "state-deleted")["state_id"] == gone


def test_one_version_is_no_condition_on_several_states(
    client: httpx.Client, parts: list[str]
) -> None:
    body = {"state_ids": parts}
    with nothing_recorded(client):
        answer = client.post(MERGE, json=body, headers={"If-Match": '"1"'})
    assert_problem(answer, 400, "invalid-input", "If-Match")
    assert client.post(MERGE, json=body, headers={"If-Match": "*"}).status_code == 201


def test_a_repeated_merge_gets_the_same_state_also_when_its_parents_have_moved_on(
    client: httpx.Client,
) -> None:
    parents = [create(client, text=text)["state_id"] for text in (OPENING, "The end")]
    request: Json = {"json": {"state_ids": parents}, "headers": {"Idempotency-Key": "merge-1"}}
    first = client.post(MERGE, **request)
    forward(client, parents[0])
    with nothing_recorded(client):
        again = client.post(MERGE, **request)
        other = client.post(MERGE, **request | {"json": {"state_ids": parents[::-1]}})
    assert first.is_success
    assert (again.status_code, again.content) == (201, first.content)
    assert again.headers["location"] == first.headers["location"]
    assert_problem(other, 409, "idempotency-key-reused")


@pytest.fixture(scope="module")
def two_models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A server of two small models, in this process: it starts at once."""
    folder = tmp_path_factory.mktemp("models")
    one, two = (
        small_models.write(folder / name, small_models.smallest(), seed=seed)
        for seed, name in enumerate(("one", "two"))
    )
    settings = Settings(
        model_name=str(one),
        allowed_models=(str(two),),
        database=str(folder / "cacher.db"),
        hot_cache_bytes=1 << 26,
        threads=1,
    )
    bootstrap.migrate(settings)
    with TestClient(create_app(settings)) as client:
        yield client


def test_states_of_different_models_are_refused_and_both_models_named(
    two_models: httpx.Client,
) -> None:
    client = two_models
    states = [create(client, model_id=model) for model in ("one", "two", "one")]
    with nothing_recorded(client):
        answer = client.post(MERGE, json={"state_ids": [state["state_id"] for state in states]})
    problem = assert_problem(answer, 400, "invalid-input", "state_ids[1]")
    assert "a state of two, the first one is of one" in problem["detail"]
    assert merge(client, states[0]["state_id"], states[2]["state_id"])["model_id"] == "one"
