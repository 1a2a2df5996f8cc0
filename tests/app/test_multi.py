"""``/v1/generate/multi``: a state continued in several ways at once, itself unmoved."""

from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from typing import Any

import httpx
import pytest

from tests.app.api import (
    LONG_TEXT,
    OPENING,
    Json,
    assert_problem,
    create,
    events,
    fork,
    forward,
    generate,
    is_idle,
    metric,
    multi,
    nothing_recorded,
    ok,
    read,
    stream,
    tokens_of,
)

FIELDS = {
    "text",
    "new_tokens",
    "token_ids",
    "probabilities",
    "logprobs",
    "finished",
    "finish_reason",
}
HOT: Json = {"temperature": 2.0, "top_p": 1.0, "seed": 3}
WISHES: dict[str, Json] = {
    "drawn": HOT,
    "greedy": {"temperature": 0},
    "filtered": {**HOT, "top_k": 40, "min_p": 0.02, "typical_p": 0.9},
    "penalized": {
        **HOT,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.2,
    },
    "biased": {**HOT, "logit_bias": {"300": 4.0, "301": -100}, "bad_words_ids": [[261], [13, 300]]},
    "stopped": {**HOT, "stop_sequences": ["er", "s"]},
    "constrained": {**HOT, "constraint": {"regex": "( [a-z]{2,5}){3}\\."}},
    "with alternatives": {**HOT, "top_logprobs": 3},
}
each_wish = pytest.mark.parametrize("wish", WISHES.values(), ids=WISHES)


def test_an_answer_holds_every_continuation_and_the_state_stays_as_it_is(
    client: httpx.Client,
) -> None:
    state = create(client)
    held = tokens_of(client, state["state_id"])
    body = {"state_id": state["state_id"], "n": 4, "max_tokens": 6, **HOT}
    answer = client.post("/v1/generate/multi", json=body)
    continued = ok(answer)
    assert answer.headers["etag"] == '"2"'
    assert set(continued) == {"state_id", "version", "seed", "continuations"}
    assert (continued["state_id"], continued["version"]) == (state["state_id"], 2)
    assert continued["seed"] == 3
    assert len(continued["continuations"]) == 4
    for one in continued["continuations"]:
        assert set(one) == FIELDS
        assert "".join(one["new_tokens"]) == one["text"]
        assert {len(one[name]) for name in ("new_tokens", "token_ids", "logprobs")} == {6}
    after = read(client, state["state_id"], include="tokens")
    assert (after["text"], after["tokens"], after["version"]) == (OPENING, held, 2)
    assert after["head_position"] == len(held)


def test_everything_in_an_answer_is_in_its_event(client: httpx.Client) -> None:
    state = create(client)
    wish = {"top_logprobs": 2, "stop_token_ids": [7], "min_p": 0.01, **HOT}
    continued = multi(client, state["state_id"], 3, 5, **wish)
    event = events(client, state["state_id"])[-1]
    payload = event["payload"]
    assert (event["type"], event["version"]) == ("continuations_generated", 2)
    assert event["fingerprint"]
    assert (payload["start"], payload["seed"]) == (state["head_position"], 3)
    assert payload["parameters"]["sampling"]["min_p"] == 0.01
    for recorded, one in zip(payload["continuations"], continued["continuations"], strict=True):
        assert recorded["content"]["tokens"] == one["token_ids"]
        assert recorded["content"]["text"] == one["text"]
        assert recorded["scores"]["logprobs"] == one["logprobs"]
        assert recorded["alternatives"] == one["top_logprobs"]
        assert recorded["finish_reason"] == one["finish_reason"]
        assert all(len(scores) == 5 for scores in recorded["scores"].values())


def _with_sampling(client: httpx.Client, path: str, **body: Any) -> Json:
    answer: Json = ok(client.post(f"/v1/generate/{path}?include=sampling", json=body))
    return answer


@each_wish
def test_the_first_continuation_is_what_a_single_generation_draws(
    client: httpx.Client, wish: Json
) -> None:
    state_id = create(client)["state_id"]
    several = _with_sampling(client, "multi", state_id=state_id, max_tokens=10, n=3, **wish)
    single = _with_sampling(client, "token", state_id=state_id, max_tokens=10, **wish)
    first, second, _ = several["continuations"]
    assert first == {name: single[name] for name in first}
    assert (second == first) == (wish["temperature"] == 0)


def test_more_continuations_begin_with_the_fewer_ones_of_the_same_seed(
    client: httpx.Client,
) -> None:
    state_id = create(client)["state_id"]
    fewer, more = (multi(client, state_id, n, 6, **HOT)["continuations"] for n in (8, 16))
    other = multi(client, state_id, 8, 6, **HOT | {"seed": 4})["continuations"]
    assert more[:8] == fewer
    assert len({one["text"] for one in more}) > 12
    assert other != fewer


def test_as_many_continuations_as_may_be_are_drawn_though_fewer_run_together(
    client: httpx.Client,
) -> None:
    state_id = create(client)["state_id"]
    wish = {**HOT, "temperature": 5.0, "ignore_eos": True}
    continuations = multi(client, state_id, 128, 2, **wish)["continuations"]
    assert len(continuations) == 128
    assert {len(one["token_ids"]) for one in continuations} == {2}
    assert len({tuple(one["token_ids"]) for one in continuations}) > 64
    assert continuations[:3] == multi(client, state_id, 3, 2, **wish)["continuations"]
    assert is_idle(client)


@each_wish
def test_continuations_are_the_same_again_also_among_other_work(
    client: httpx.Client, wish: Json
) -> None:
    state_id = create(client)["state_id"]
    alone = multi(client, state_id, 4, 10, **wish)["continuations"]
    others = [create(client)["state_id"] for _ in range(3)]
    with ThreadPoolExecutor(5) as pool:
        for number, other in enumerate(others):
            pool.submit(generate, client, other, 40, seed=number, temperature=1.5)
        pool.submit(multi, client, state_id, 12, 30, seed=9, temperature=1.5)
        among = pool.submit(multi, client, state_id, 4, 10, **wish).result()["continuations"]
    assert among == alone


def test_a_single_continuation_can_be_asked_for(client: httpx.Client) -> None:
    (only,) = multi(client, create(client)["state_id"], 1, 4, **HOT)["continuations"]
    assert only["token_ids"] == generate(client, create(client)["state_id"], 4, **HOT)["token_ids"]


def test_greedy_continuations_are_all_the_same(client: httpx.Client) -> None:
    continuations = multi(client, create(client)["state_id"], 5, 6, temperature=0)["continuations"]
    assert continuations == [continuations[0]] * 5
    assert len(continuations[0]["token_ids"]) == 6


def test_each_continuation_ends_at_a_stop_of_its_own(client: httpx.Client) -> None:
    state_id = create(client)["state_id"]
    whole = multi(client, state_id, 8, 12, **HOT)["continuations"]
    stops = ["er", "s"]
    ended = multi(client, state_id, 8, 12, stop_sequences=stops, **HOT)["continuations"]
    for one, before in zip(ended, whole, strict=True):
        count = len(one["token_ids"])
        assert one["token_ids"] == before["token_ids"][:count]
        stopped = any(stop in one["text"] for stop in stops)
        assert stopped == one["finished"] == (one["finish_reason"] == "stop_sequence")
        assert not any(stop in "".join(one["new_tokens"][:-1]) for stop in stops)
        assert stopped or count == 12
    assert len({len(one["token_ids"]) for one in ended}) > 2


def test_a_seed_left_open_is_drawn_once_for_all_of_them_and_recorded(client: httpx.Client) -> None:
    state_id = create(client, config={"seed": None})["state_id"]
    wish = {"temperature": 1.0, "top_p": 1.0}
    first, second = (multi(client, state_id, 2, 6, **wish) for _ in range(2))
    assert first["seed"] != second["seed"]
    assert events(client, state_id)[1]["payload"]["seed"] == first["seed"]
    again = multi(client, state_id, 2, 6, seed=first["seed"], **wish)
    assert again["continuations"] == first["continuations"]


def test_a_full_state_has_only_empty_continuations(client: httpx.Client) -> None:
    state = create(client, config={"context_size": 8})
    room = 8 - state["head_position"]
    filled = multi(client, state["state_id"], 2, 8, **HOT)["continuations"]
    assert [len(one["token_ids"]) for one in filled] == [room, room]
    generate(client, state["state_id"], 8, **HOT)
    empty = multi(client, state["state_id"], 2, 8, **HOT)["continuations"]
    assert [(one["text"], one["finish_reason"]) for one in empty] == [("", "context_full")] * 2


# streamed


@each_wish
def test_a_stream_and_a_whole_answer_are_the_same(client: httpx.Client, wish: Json) -> None:
    streamed, whole = (create(client)["state_id"] for _ in range(2))
    *tokens, done = stream(client, streamed, 10, n=4, **wish)
    answer = multi(client, whole, 4, 10, **wish)
    assert done.name == "done"
    assert done.data | {"state_id": whole} == answer
    payloads = [events(client, state_id)[-1]["payload"] for state_id in (streamed, whole)]
    assert payloads[0] == payloads[1]
    for branch, one in enumerate(answer["continuations"]):
        own = [each.data for each in tokens if each.data["branch"] == branch]
        assert [each["token_id"] for each in own] == one["token_ids"]
        assert [each["text"] for each in own] == one["new_tokens"]
        assert [each["logprob"] for each in own] == one["logprobs"]
        assert [each["probability"] for each in own] == one["probabilities"]
        assert [each["index"] for each in own] == list(range(len(own)))


def test_a_stream_sends_the_first_tokens_of_all_before_the_second_ones(
    client: httpx.Client,
) -> None:
    state = create(client)
    wish = {"stop_sequences": ["er", "s"], **HOT}
    *tokens, done = stream(client, state["state_id"], 12, n=6, **wish)
    lengths = [len(one["token_ids"]) for one in done.data["continuations"]]
    places = [[(index, branch) for index in range(n)] for branch, n in enumerate(lengths)]
    in_order = [place for of_index in zip_longest(*places) for place in of_index if place]
    assert len(set(lengths)) > 2
    assert [(one.data["index"], one.data["branch"]) for one in tokens] == in_order
    assert [one.id for one in tokens] == [str(number) for number in range(len(tokens))]
    assert all(one.data["position"] == state["head_position"] + one.data["index"] for one in tokens)


def test_a_stream_of_a_single_generation_names_no_branch(client: httpx.Client) -> None:
    *tokens, _ = stream(client, create(client)["state_id"], 3)
    assert not any("branch" in one.data for one in tokens)


# limits


@pytest.mark.parametrize(
    ("body", "field", "rule"),
    [
        ({"n": 0}, "n", ">= 1"),
        ({"n": 129}, "n", "<= 128"),
        ({"n": -1}, "n", ">= 1"),
        ({"n": None}, "n", "int"),
        ({}, "n", "required"),
        ({"n": 128, "max_tokens": 257}, "max_tokens", "256"),
        ({"n": 33, "max_tokens": 993}, "max_tokens", "992"),
        ({"n": 1, "max_tokens": 1025}, "max_tokens", "1024"),
        ({"n": 2, "position": 3}, "position", "not a field"),
    ],
)
def test_more_than_may_be_recorded_together_is_refused_by_name(
    client: httpx.Client, body: Json, field: str, rule: str
) -> None:
    state_id = create(client)["state_id"]
    with nothing_recorded(client):
        answer = client.post("/v1/generate/multi", json={"state_id": state_id, **body})
    assert rule in assert_problem(answer, 400, "invalid-input", field)["detail"]


# what it costs


def test_what_the_continuations_have_in_common_is_computed_once(client: httpx.Client) -> None:
    blocks = 10
    tokens = [2 + (7 * number) % 900 for number in range(32 * blocks + 1)]
    state_id = ok(client.post("/v1/states", json={"tokens": tokens}))["state_id"]
    before = metric(client, "kv_misses_total")
    assert read(client, state_id, include="cache")["cache"]["tokens_hot"] == 0
    multi(client, state_id, 16, 3, **HOT)
    assert metric(client, "kv_misses_total") == before + blocks
    hits = metric(client, "kv_hits_total")
    multi(client, state_id, 16, 3, **HOT)
    assert metric(client, "kv_misses_total") == before + blocks
    assert metric(client, "kv_hits_total") == hits + 16 * blocks


def test_a_fork_with_a_continuation_goes_on_as_if_it_had_been_drawn_there(
    client: httpx.Client,
) -> None:
    state_id = create(client, text=OPENING + LONG_TEXT[:100])["state_id"]
    continued = multi(client, state_id, 3, 5, **HOT)
    longer = multi(client, state_id, 3, 9, **HOT)["continuations"]
    (child,) = fork(client, state_id, continuation={"version": continued["version"], "index": 0})
    went_on = generate(client, child["state_id"], 4, **HOT)
    assert child["text"] == OPENING + LONG_TEXT[:100] + continued["continuations"][0]["text"]
    assert went_on["token_ids"] == longer[0]["token_ids"][5:]
    assert went_on["logprobs"] == longer[0]["logprobs"][5:]


def test_a_state_goes_on_from_where_it_stood_after_it_was_continued(client: httpx.Client) -> None:
    moved, unmoved = (create(client)["state_id"] for _ in range(2))
    multi(client, moved, 3, 5, **HOT)
    for state_id in (moved, unmoved):
        forward(client, state_id, " there was")
    drawn = [generate(client, state_id, 6, **HOT)["token_ids"] for state_id in (moved, unmoved)]
    assert drawn[0] == drawn[1]


# conditions


def test_a_condition_and_a_key_hold_as_for_every_operation(client: httpx.Client) -> None:
    state_id = create(client)["state_id"]
    body = {"state_id": state_id, "n": 2, "max_tokens": 3, "seed": None}
    with nothing_recorded(client):
        failed = client.post("/v1/generate/multi", json=body, headers={"If-Match": '"2"'})
    assert_problem(failed, 412, "precondition-failed")
    headers = {"If-Match": '"1"', "Idempotency-Key": f"multi-{state_id}"}
    first = client.post("/v1/generate/multi", json=body, headers=headers)
    with nothing_recorded(client):
        again = client.post("/v1/generate/multi", json=body, headers=headers)
    assert ok(first)["version"] == 2
    assert (again.content, again.headers["etag"]) == (first.content, first.headers["etag"])
