"""``/v1/generate/beam``: the likeliest ways in which a state goes on, itself unmoved."""

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.app.api import (
    OPENING,
    Json,
    assert_problem,
    assert_verified,
    beams,
    create,
    delete,
    events,
    eventually,
    fork,
    forward,
    generate,
    is_idle,
    metric,
    nothing_recorded,
    ok,
    read,
    tokens_of,
)

BEAM = "/v1/generate/beam"


def test_an_answer_holds_the_best_sequences_and_the_state_stays_as_it_is(
    client: httpx.Client,
) -> None:
    state = create(client)
    held = tokens_of(client, state["state_id"])
    body = {"state_id": state["state_id"], "num_beams": 5, "num_return": 3, "max_length": 6}
    answer = client.post(BEAM, json=body)
    found = ok(answer)
    assert answer.headers["etag"] == '"2"'
    assert set(found) == {"state_id", "version", "beams", "scores", "sequences"}
    assert (found["state_id"], found["version"]) == (state["state_id"], 2)
    assert len(found["sequences"]) == 3
    assert found["beams"] == [one["text"] for one in found["sequences"]]
    assert found["scores"] == [one["score"] for one in found["sequences"]]
    assert found["scores"] == sorted(found["scores"], reverse=True)
    assert len(set(found["beams"])) == 3
    for one in found["sequences"]:
        assert set(one) == {"text", "token_ids", "logprobs", "score", "finished"}
        assert len(one["token_ids"]) == len(one["logprobs"]) == 6
        assert not one["finished"]
        assert math.isclose(sum(one["logprobs"]) / 6, one["score"], rel_tol=1e-5)
    after = read(client, state["state_id"], include="tokens")
    assert (after["text"], after["tokens"], after["version"]) == (OPENING, held, 2)


def test_everything_in_an_answer_is_in_its_event(client: httpx.Client) -> None:
    state = create(client, config={"stop_token_ids": [7]})
    wish = {"num_beams": 4, "num_return": 2, "max_length": 5, "length_penalty": 0.5}
    found = beams(client, state["state_id"], no_repeat_ngram_size=2, **wish)
    event = events(client, state["state_id"])[-1]
    payload = event["payload"]
    assert (event["type"], event["version"]) == ("beams_generated", 2)
    assert event["fingerprint"]
    assert payload["start"] == state["head_position"]
    parameters = payload["parameters"]
    assert {name: parameters[name] for name in wish.keys() - {"max_length"}} == {
        name: wish[name] for name in wish.keys() - {"max_length"}
    }
    assert (parameters["max_tokens"], parameters["no_repeat_ngram_size"]) == (5, 2)
    assert parameters["stop_token_ids"] == [7]
    assert {len(step["tokens"]) for step in payload["steps"]} == {4}
    for recorded, one in zip(payload["beams"], found["sequences"], strict=True):
        assert recorded["content"]["tokens"] == one["token_ids"]
        assert recorded["content"]["text"] == one["text"]
        assert recorded["scores"]["logprobs"] == one["logprobs"]
        assert (recorded["score"], recorded["finished"]) == (one["score"], one["finished"])


def test_a_single_beam_is_the_greedy_text(client: httpx.Client) -> None:
    state_id = create(client)["state_id"]
    (only,) = beams(client, state_id, num_beams=1, max_length=10)["sequences"]
    greedy = generate(client, state_id, 10, temperature=0)
    assert only["token_ids"] == greedy["token_ids"]
    assert only["logprobs"] == greedy["logprobs"]


def test_more_beams_find_a_text_that_is_likelier_than_the_greedy_one(client: httpx.Client) -> None:
    state_id = create(client, text="The cat")["state_id"]
    greedy, best = (beams(client, state_id, num_beams=n, max_length=12) for n in (1, 8))
    assert best["scores"][0] > greedy["scores"][0]


def test_a_state_goes_on_from_where_it_stood(client: httpx.Client) -> None:
    moved, unmoved = (create(client)["state_id"] for _ in range(2))
    beams(client, moved, max_length=5)
    for state_id in (moved, unmoved):
        forward(client, state_id, " there was")
    drawn = [generate(client, one, 6, seed=4, temperature=1) for one in (moved, unmoved)]
    assert drawn[0]["token_ids"] == drawn[1]["token_ids"]


SETTINGS: dict[str, Json] = {
    "plain": {},
    "groups": {"num_beams": 6, "num_beam_groups": 3, "diversity_penalty": 0.7},
    "never early": {"early_stopping": "never", "length_penalty": 2},
    "early": {"early_stopping": True, "length_penalty": -1},
    "penalized": {"repetition_penalty": 1.4, "logit_bias": {"300": 2}, "bad_words_ids": [[261]]},
    "no repeats": {"no_repeat_ngram_size": 1},
}


@pytest.mark.parametrize("wish", SETTINGS.values(), ids=SETTINGS)
def test_a_search_finds_the_same_again_also_among_other_work(
    client: httpx.Client, wish: Json
) -> None:
    state_id = create(client)["state_id"]
    wish = {"num_beams": 4, "num_return": 4, "max_length": 10, **wish}
    alone = beams(client, state_id, **wish)
    others = [create(client)["state_id"] for _ in range(3)]
    with ThreadPoolExecutor(4) as pool:
        for number, other in enumerate(others):
            pool.submit(generate, client, other, 30, seed=number, temperature=1.5)
        among = pool.submit(beams, client, state_id, **wish).result()
    assert among["version"] == alone["version"] + 1
    assert among["sequences"] == alone["sequences"]


def test_settings_change_what_is_found(client: httpx.Client) -> None:
    state_id = create(client)["state_id"]
    found = [
        beams(client, state_id, **{"num_beams": 4, "num_return": 4, "max_length": 10, **wish})
        for wish in SETTINGS.values()
    ]
    assert len({str(one["sequences"]) for one in found}) == len(SETTINGS)


def test_no_text_repeats_what_it_must_not(client: httpx.Client) -> None:
    state_id = create(client)["state_id"]
    held = tokens_of(client, state_id)
    for one in beams(client, state_id, no_repeat_ngram_size=1, num_return=4)["sequences"]:
        tokens = held + one["token_ids"]
        assert len(set(tokens)) == len(tokens)


def test_a_sequence_is_finished_by_a_stop_token(client: httpx.Client) -> None:
    state_id = create(client)["state_id"]
    first = beams(client, state_id, num_beams=1, max_length=4)["sequences"][0]["token_ids"]
    wish: Json = {"num_beams": 1, "max_length": 9, "stop_token_ids": first[3:]}
    (only,) = beams(client, state_id, **wish)["sequences"]
    assert only["token_ids"] == first[: first.index(first[3]) + 1]
    assert only["finished"]


def test_settings_of_the_state_hold_where_the_request_gives_none(client: httpx.Client) -> None:
    config = {"repetition_penalty": 1.5, "logit_bias": {"261": -100}, "bad_words_ids": [[300]]}
    configured, asked = create(client, config=config)["state_id"], create(client)["state_id"]
    plain = beams(client, asked, max_length=8)
    found = [beams(client, configured, max_length=8), beams(client, asked, max_length=8, **config)]
    assert found[0]["sequences"] == found[1]["sequences"] != plain["sequences"]


def test_fewer_tokens_come_where_no_more_fit_and_none_into_a_full_state(
    client: httpx.Client,
) -> None:
    state = create(client, config={"context_size": 8})
    (only,) = beams(client, state["state_id"], max_length=8)["sequences"]
    assert len(only["token_ids"]) == 8 - state["head_position"]
    generate(client, state["state_id"], 8)
    with nothing_recorded(client):
        answer = client.post(BEAM, json={"state_id": state["state_id"], "max_length": 8})
    problem = assert_problem(answer, 413, "too-large")
    assert (problem["head_position"], problem["context_size"]) == (8, 8)


def test_a_beam_can_be_adopted_and_drawn_on_from(client: httpx.Client) -> None:
    state_id = create(client)["state_id"]
    held = tokens_of(client, state_id)
    found = beams(client, state_id, num_return=3, max_length=5)
    (child,) = fork(client, state_id, continuation={"version": 2, "index": 2})
    assert tokens_of(client, child["state_id"]) == held + found["sequences"][2]["token_ids"]
    assert generate(client, child["state_id"], 3)["version"] == 2
    assert_verified(client, state_id, child["state_id"])


def test_the_place_and_the_memory_of_a_search_are_free_after_it(client: httpx.Client) -> None:
    beams(client, create(client)["state_id"], num_beams=32, max_length=4)
    assert is_idle(client)


def test_a_condition_and_a_key_hold_as_for_every_operation(client: httpx.Client) -> None:
    state_id = create(client)["state_id"]
    body = {"state_id": state_id, "max_length": 3}
    with nothing_recorded(client):
        failed = client.post(BEAM, json=body, headers={"If-Match": '"2"'})
    assert_problem(failed, 412, "precondition-failed")
    headers = {"If-Match": '"1"', "Idempotency-Key": f"beams-{state_id}"}
    first = client.post(BEAM, json=body, headers=headers)
    with nothing_recorded(client):
        again = client.post(BEAM, json=body, headers=headers)
    assert ok(first)["version"] == 2
    assert (again.content, again.headers["etag"]) == (first.content, first.headers["etag"])


BAD: list[tuple[Json, str, str]] = [
    ({"num_beams": 0}, "num_beams", ">= 1"),
    ({"num_beams": 65}, "num_beams", "<= 64"),
    ({"num_beams": 33}, "num_beams", "at most 32"),
    ({"num_beams": "4"}, "num_beams", "int"),
    ({"num_beams": 2.5}, "num_beams", "int"),
    ({"num_beams": 4, "num_beam_groups": 3}, "num_beam_groups", "divide num_beams, which is 4"),
    ({"num_beams": 4, "num_beam_groups": 8}, "num_beam_groups", "divide num_beams, which is 4"),
    ({"num_beam_groups": 0}, "num_beam_groups", ">= 1"),
    ({"num_beams": 2, "num_return": 3}, "num_return", "at most 2"),
    ({"num_return": 0}, "num_return", ">= 1"),
    ({"diversity_penalty": 0.5}, "diversity_penalty", "must be 0"),
    ({"num_beam_groups": 2, "diversity_penalty": -0.1}, "diversity_penalty", ">= 0"),
    ({"num_beam_groups": 2, "diversity_penalty": 101}, "diversity_penalty", "<= 100"),
    ({"max_length": 0}, "max_length", ">= 1"),
    ({"max_length": 1025}, "max_length", "at most 1024"),
    ({"num_beams": 32, "max_length": 1025}, "max_length", "at most 1024"),
    ({"max_length": None}, "max_length", "int"),
    ({"early_stopping": "x"}, "early_stopping", "never"),
    ({"early_stopping": 1}, "early_stopping", "bool"),
    ({"early_stopping": None}, "early_stopping", "bool"),
    ({"length_penalty": 1000}, "length_penalty", "<= 10"),
    ({"length_penalty": -11}, "length_penalty", ">= -10"),
    ({"length_penalty": "1"}, "length_penalty", "float"),
    ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size", ">= 0"),
    ({"logit_bias": {"1024": 1}}, "logit_bias.1024", "from 0 to 1023"),
    ({"bad_words_ids": [[1], [2, 1024]]}, "bad_words_ids[1][1]", "from 0 to 1023"),
    ({"stop_token_ids": [1024]}, "stop_token_ids[0]", "from 0 to 1023"),
    ({"stream": True}, "stream", "not a field"),
    ({"temperature": 1}, "temperature", "not a field"),
    ({"seed": 1}, "seed", "not a field"),
    ({"stop_sequences": ["."]}, "stop_sequences", "not a field"),
    ({"constraint": {"regex": "a"}}, "constraint", "not a field"),
    ({"max_tokens": 5}, "max_tokens", "not a field"),
]


@pytest.mark.parametrize(("bad", "field", "rule"), BAD, ids=[str(bad) for bad, *_ in BAD])
def test_a_bad_parameter_is_refused_by_name_with_its_range(
    client: httpx.Client, unmoved: str, bad: Json, field: str, rule: str
) -> None:
    with nothing_recorded(client):
        answer = client.post(BEAM, json={"state_id": unmoved, **bad})
    assert rule in assert_problem(answer, 400, "invalid-input", field)["detail"]


def test_every_bad_parameter_is_named_not_only_the_first(
    client: httpx.Client, unmoved: str
) -> None:
    bad: dict[str, Any] = {"num_return": 5, "diversity_penalty": 1, "max_length": 2000}
    answer = client.post(BEAM, json={"state_id": unmoved, **bad})
    assert_problem(answer, 400, "invalid-input", *bad)


@pytest.fixture(scope="module")
def unmoved(client: httpx.Client) -> str:
    state_id: str = create(client)["state_id"]
    return state_id


def test_deleting_a_state_ends_the_search_that_runs_on_it(client: httpx.Client) -> None:
    state_id = create(client)["state_id"]
    body = {"state_id": state_id, "num_beams": 16, "max_length": 900, "ignore_eos": True}
    with ThreadPoolExecutor(1) as pool:
        searching = pool.submit(client.post, BEAM, json=body)
        eventually(lambda: metric(client, "kv_sequences") >= 16)
        delete(client, state_id)
        assert_problem(searching.result(), 404, "state-deleted")
    eventually(lambda: is_idle(client))
    assert [event["type"] for event in events(client, state_id)] == [
        "state_created",
        "state_deleted",
    ]
