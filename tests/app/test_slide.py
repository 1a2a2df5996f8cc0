"""States that let go of their first tokens when they are full, and go on."""

import httpx
import pytest

from tests.app.api import (
    Json,
    assert_problem,
    assert_verified,
    configure,
    create,
    events,
    fork,
    forward,
    generate,
    nothing_recorded,
    ok,
    read,
    rewind,
    tokens_of,
)

SIZE = 12
SLIDE = SIZE // 2
LLAMA = "\U0001f999"
NEW = [300, 301, 302]
DRAW = {"temperature": 1.0, "top_p": 1.0, "seed": 5}


def full(client: httpx.Client, **config: object) -> tuple[str, list[int]]:
    """A state that slides and is full, and its tokens."""
    tokens = list(range(400, 400 + SIZE))
    settings = {"context_size": SIZE, "on_full": "slide", **config}
    state = ok(client.post("/v1/states", json={"tokens": tokens, "config": settings}))
    return state["state_id"], tokens


def with_tokens(client: httpx.Client, tokens: list[int], **config: object) -> str:
    state = ok(client.post("/v1/states", json={"tokens": tokens, "config": config}))
    state_id: str = state["state_id"]
    return state_id


# forward


def test_a_full_state_makes_room_for_what_is_forwarded_in_an_event_of_its_own(
    client: httpx.Client,
) -> None:
    state_id, tokens = full(client)
    answer = client.post("/v1/forward", json={"state_id": state_id, "tokens": NEW})
    forwarded = ok(answer)
    assert answer.headers["etag"] == '"3"'
    assert (forwarded["version"], forwarded["head_position"]) == (3, SLIDE + len(NEW))
    assert [token["token_id"] for token in forwarded["tokens"]] == NEW
    assert tokens_of(client, state_id) == tokens[SLIDE:] + NEW
    slid, appended = events(client, state_id)[1:]
    assert (slid["type"], slid["payload"]["dropped"], slid["version"]) == ("context_slid", SLIDE, 2)
    assert appended["type"] == "text_forwarded"
    assert (appended["payload"]["start"], appended["payload"]["dropped"]) == (SIZE, SLIDE)
    assert slid["request_id"] == appended["request_id"]
    assert_verified(client, state_id)


def test_a_state_says_how_many_tokens_it_let_go_of_as_it_was_at_each_version(
    client: httpx.Client,
) -> None:
    state_id, tokens = full(client)
    before = read(client, state_id)
    forward(client, state_id, tokens=NEW)
    assert "dropped" not in before
    assert read(client, state_id, version=1) == before
    slid = read(client, state_id, version=2, include="tokens")
    assert (slid["dropped"], slid["tokens"]) == (SLIDE, tokens[SLIDE:])
    assert before["text"].endswith(slid["text"])
    now = read(client, state_id)
    assert (now["dropped"], now["head_position"]) == (SLIDE, SLIDE + len(NEW))
    forward(client, state_id, tokens=[303] * SLIDE)
    assert read(client, state_id)["dropped"] == 2 * SLIDE


def test_what_is_forwarded_after_a_slide_is_scored_after_the_tokens_that_are_left(
    client: httpx.Client,
) -> None:
    state_id, tokens = full(client)
    left, all_of_it = with_tokens(client, tokens[SLIDE:]), with_tokens(client, tokens)
    logprobs = [
        [token["logprob"] for token in forward(client, one, tokens=NEW)["tokens"]]
        for one in (state_id, left, all_of_it)
    ]
    assert logprobs[0] == logprobs[1]
    assert logprobs[0] != logprobs[2]


def test_tokens_that_fit_make_nothing_slide(client: httpx.Client) -> None:
    state = create(client, config={"context_size": SIZE, "on_full": "slide"})
    room = SIZE - state["head_position"]
    forwarded = forward(client, state["state_id"], tokens=[300] * room)
    assert (forwarded["version"], forwarded["head_position"]) == (2, SIZE)
    assert "dropped" not in read(client, state["state_id"])


def test_a_text_slides_as_its_tokens_do(client: httpx.Client) -> None:
    state_id, tokens = full(client)
    kept = read(client, with_tokens(client, tokens[SLIDE:]))["text"]
    text = " a cat"
    forwarded = forward(client, state_id, text)
    assert "".join(token["text"] for token in forwarded["tokens"]) == text
    assert read(client, state_id)["text"] == kept + text


def test_a_slide_inside_a_character_leaves_it_to_the_token_that_completes_it(
    client: httpx.Client,
) -> None:
    llama = tokens_of(client, create(client, text=LLAMA)["state_id"])
    assert len(llama) == 4
    tokens = [300] * (SLIDE - 2) + llama + [301] * (SLIDE - 2)
    state_id = with_tokens(client, tokens, context_size=SIZE, on_full="slide")
    before = read(client, state_id)["text"]
    forward(client, state_id, tokens=NEW)
    assert tokens_of(client, state_id)[:2] == llama[2:]
    state = read(client, state_id)
    assert state["text"].startswith(before[before.index(LLAMA) :])
    (child,) = fork(client, state_id)
    assert child["text"] == state["text"]
    generate(client, child["state_id"], 1)
    assert_verified(client, state_id, child["state_id"])


@pytest.mark.parametrize(
    "content",
    [{"tokens": [300] * (SLIDE + 1)}, {"text": "q" * (SLIDE + 1)}],
    ids=["tokens", "text"],
)
def test_what_does_not_fit_even_after_a_slide_is_too_large_and_nothing_slides(
    client: httpx.Client, content: Json
) -> None:
    state_id, _ = full(client)
    with nothing_recorded(client):
        answer = client.post("/v1/forward", json={"state_id": state_id, **content})
    problem = assert_problem(answer, 413, "too-large")
    assert (problem["tokens"], problem["room"]) == (SLIDE + 1, SLIDE)
    assert forward(client, state_id, tokens=[300] * SLIDE)["head_position"] == SIZE


def test_a_full_state_that_does_not_slide_takes_no_more(client: httpx.Client) -> None:
    state_id, _ = full(client, on_full="stop")
    with nothing_recorded(client):
        answer = client.post("/v1/forward", json={"state_id": state_id, "tokens": NEW})
    assert_problem(answer, 413, "too-large")
    configure(client, state_id, on_full="slide")
    assert forward(client, state_id, tokens=NEW)["head_position"] == SLIDE + len(NEW)


def test_a_repeated_forward_gets_the_same_answer_and_slides_no_second_time(
    client: httpx.Client,
) -> None:
    state_id, _ = full(client)
    request: Json = {
        "json": {"state_id": state_id, "tokens": NEW},
        "headers": {"Idempotency-Key": f"slide-{state_id}"},
    }
    first = client.post("/v1/forward", **request)
    with nothing_recorded(client):
        again = client.post("/v1/forward", **request)
    assert first.is_success
    assert (again.content, again.headers["etag"]) == (first.content, first.headers["etag"])


# what can be done to a state that has slid


def test_a_rewind_goes_no_further_back_than_the_last_slide(client: httpx.Client) -> None:
    state_id, tokens = full(client)
    forward(client, state_id, tokens=NEW)
    with nothing_recorded(client):
        body = {"state_id": state_id, "version": 1}
        answer = client.post("/v1/states/rewind", json=body)
    assert_problem(answer, 409, "not-a-prefix")
    state = rewind(client, state_id, version=2)
    assert (state["head_position"], state["dropped"]) == (SLIDE, SLIDE)
    state = rewind(client, state_id, position=2)
    assert (state["head_position"], state["dropped"]) == (2, SLIDE)
    assert tokens_of(client, state_id) == tokens[SLIDE : SLIDE + 2]


def test_equal_tokens_from_before_a_slide_are_no_prefix(client: httpx.Client) -> None:
    state_id = with_tokens(client, [300] * SIZE, context_size=SIZE, on_full="slide")
    forward(client, state_id, tokens=[300] * SLIDE)
    assert tokens_of(client, state_id) == [300] * SIZE
    answer = client.post("/v1/states/rewind", json={"state_id": state_id, "version": 1})
    assert_problem(answer, 409, "not-a-prefix")


def test_a_fork_of_a_slid_state_draws_on_as_the_state_itself_does(client: httpx.Client) -> None:
    state_id, _ = full(client)
    forward(client, state_id, tokens=NEW)
    (child,) = fork(client, state_id)
    (shorter,) = fork(client, state_id, position=2)
    assert (child["dropped"], shorter["dropped"]) == (SLIDE, SLIDE)
    new = with_tokens(client, tokens_of(client, state_id))
    states = (state_id, child["state_id"], new)
    drawn = [generate(client, one, 3, **DRAW)["token_ids"] for one in states]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2], "random numbers are drawn by the absolute position"
    assert_verified(client, state_id, child["state_id"])


def test_a_fork_at_a_version_before_the_slide_has_let_go_of_nothing(client: httpx.Client) -> None:
    state_id, tokens = full(client)
    forward(client, state_id, tokens=NEW)
    (child,) = fork(client, state_id, version=1)
    assert "dropped" not in child
    assert tokens_of(client, child["state_id"]) == tokens


# settings


def test_a_context_of_one_token_cannot_slide(client: httpx.Client) -> None:
    bad = {"on_full": "slide", "context_size": 1}
    one = ok(client.post("/v1/states", json={"tokens": [300], "config": {"context_size": 1}}))
    state_id = one["state_id"]
    requests: dict[str, Json] = {
        "/v1/states": {"tokens": [300], "config": bad},
        "/v1/states/config": {"state_id": state_id, "config": {"on_full": "slide"}},
        "/v1/states/fork": {"state_id": state_id, "config": {"on_full": "slide"}},
    }
    for path, body in requests.items():
        with nothing_recorded(client):
            answer = client.post(path, json=body)
        assert_problem(answer, 400, "invalid-input", "config.on_full")
