"""``/v1/generate/token``, whole and streamed."""

import math
from collections.abc import Iterator
from itertools import accumulate, pairwise

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
    events,
    forward,
    generate,
    is_idle,
    nothing_recorded,
    ok,
    read,
    read_sent,
    sent,
    stream,
    tokens_of,
)

GENERATED_FIELDS = {
    "state_id",
    "text",
    "new_tokens",
    "token_ids",
    "probabilities",
    "logprobs",
    "finished",
    "finish_reason",
    "seed",
    "version",
    "head_position",
}
HOT: Json = {"temperature": 1.0, "top_p": 1.0, "seed": 3}
FILTERED: Json = {"temperature": 2.0, "seed": 3, "min_p": 0.01, "typical_p": 0.95}
PENALIZED: Json = {
    "repetition_penalty": 1.3,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.3,
    "logit_bias": {"300": 3.0, "261": -100},
    "bad_words_ids": [[301], [12, 258]],
}


def test_an_answer_says_what_was_generated_and_the_state_grows_by_it(
    client: httpx.Client,
) -> None:
    state = create(client)
    held = tokens_of(client, state["state_id"])
    body = {"state_id": state["state_id"], "max_tokens": 12, **HOT}
    answer = client.post("/v1/generate/token", json=body)
    generated = answer.json()
    assert answer.status_code == 200
    assert answer.headers["etag"] == '"2"'
    assert set(generated) == GENERATED_FIELDS
    assert len(generated["token_ids"]) == len(generated["new_tokens"]) == 12
    assert "".join(generated["new_tokens"]) == generated["text"]
    assert generated["probabilities"] == [math.exp(value) for value in generated["logprobs"]]
    assert (generated["finished"], generated["finish_reason"]) == (False, None)
    assert (generated["seed"], generated["version"]) == (3, 2)
    assert generated["head_position"] == len(held) + 12
    after = read(client, state["state_id"], include="tokens")
    assert after["text"] == OPENING + generated["text"]
    assert after["tokens"] == held + generated["token_ids"]


def test_everything_in_an_answer_is_in_its_event(client: httpx.Client) -> None:
    state_id = create(client)["state_id"]
    wish = {"stop_sequences": ["zebra"], "stop_token_ids": [7], "top_logprobs": 2, "top_k": 50}
    generated = generate(client, state_id, 6, **wish, **HOT)
    event = events(client, state_id)[-1]
    payload = event["payload"]
    assert (event["type"], event["version"]) == ("tokens_generated", 2)
    assert event["fingerprint"]
    assert payload["content"]["tokens"] == generated["token_ids"]
    assert payload["content"]["text"] == generated["text"]
    assert payload["scores"]["logprobs"] == generated["logprobs"]
    assert payload["alternatives"] == generated["top_logprobs"]
    assert (payload["seed"], payload["finish_reason"]) == (3, None)
    assert payload["start"] == generated["head_position"] - 6
    assert payload["parameters"] == {
        "sampling": {
            "temperature": 1.0,
            "top_k": 50,
            "top_p": 1.0,
            "min_p": 0.0,
            "typical_p": 1.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "logit_bias": {},
            "bad_words_ids": [],
        },
        "max_tokens": 6,
        "stop_sequences": ["zebra"],
        "stop_token_ids": [7],
        "ignore_eos": False,
        "constraint": None,
        "top_logprobs": 2,
    }
    assert all(len(scores) == 6 for scores in payload["scores"].values())


def test_sixteen_tokens_come_where_no_number_is_asked_for(client: httpx.Client) -> None:
    state_id = create(client)["state_id"]
    generated = ok(client.post("/v1/generate/token", json={"state_id": state_id}))
    assert len(generated["token_ids"]) == 16
    assert events(client, state_id)[-1]["payload"]["parameters"]["max_tokens"] == 16


def test_fields_of_a_request_hold_for_its_own_generation_alone(client: httpx.Client) -> None:
    state = create(client)
    generate(client, state["state_id"], temperature=0, top_k=3, top_p=0.5, seed=9)
    assert read(client, state["state_id"])["config"] == state["config"]


def test_temperature_zero_draws_the_likeliest_token_each_time(client: httpx.Client) -> None:
    state_id = create(client)["state_id"]
    greedy = generate(client, state_id, 12, temperature=0, top_logprobs=3)
    assert set(events(client, state_id)[-1]["payload"]["scores"]["ranks"]) == {0}
    likeliest = [alternatives[0] for alternatives in greedy["top_logprobs"]]
    assert [token["token_id"] for token in likeliest] == greedy["token_ids"]
    assert [token["logprob"] for token in likeliest] == greedy["logprobs"]


def test_drawing_among_one_token_is_greedy_and_drawing_among_all_is_not(
    client: httpx.Client,
) -> None:
    greedy, one, all_ = (
        generate(client, create(client)["state_id"], 12, **wish)["token_ids"]
        for wish in ({"temperature": 0}, {**HOT, "top_k": 1}, HOT | {"temperature": 2.0})
    )
    assert one == greedy
    assert all_ != greedy


def test_alternatives_are_the_likeliest_tokens_in_order(client: httpx.Client) -> None:
    generated = generate(client, create(client)["state_id"], 6, top_logprobs=5, **HOT)
    assert set(generated) == GENERATED_FIELDS | {"top_logprobs"}
    for token, logprob, alternatives in zip(
        generated["token_ids"], generated["logprobs"], generated["top_logprobs"], strict=True
    ):
        values = [alternative["logprob"] for alternative in alternatives]
        assert len({alternative["token_id"] for alternative in alternatives}) == 5
        assert values == sorted(values, reverse=True)
        among = {alternative["token_id"]: alternative["logprob"] for alternative in alternatives}
        assert among.get(token, logprob) == logprob
        assert token in among or logprob <= values[-1]


def test_the_probabilities_tokens_were_drawn_with_come_only_when_asked_for(
    client: httpx.Client,
) -> None:
    state_ids = [create(client)["state_id"] for _ in range(2)]
    answers = [
        ok(
            client.post(
                "/v1/generate/token?include=sampling",
                json={"state_id": state_id, "max_tokens": 10, **HOT, **wish},
            )
        )
        for state_id, wish in zip(state_ids, ({"top_k": 2}, {"temperature": 0}), strict=True)
    ]
    assert set(answers[0]) == GENERATED_FIELDS | {"sampling_probabilities"}
    pairs = zip(answers[0]["sampling_probabilities"], answers[0]["probabilities"], strict=True)
    assert any(sampling != model for sampling, model in pairs)
    assert all(0 < value <= 1 for value in answers[0]["sampling_probabilities"])
    assert set(answers[1]["sampling_probabilities"]) == {1.0}


def test_parameters_that_change_scores_hold_for_every_token(client: httpx.Client) -> None:
    plain, forced, banned, few = (
        generate(client, create(client)["state_id"], 8, temperature=0, **wish)["token_ids"]
        for wish in (
            {},
            {"logit_bias": {"300": 100}},
            {"logit_bias": {"300": 100}, "bad_words_ids": [[300, 300]]},
            {"logit_bias": {"300": 100}, "frequency_penalty": 50, "presence_penalty": 10},
        )
    )
    assert 300 not in plain
    assert forced == [300] * 8
    assert banned == [300, *banned[1:]]
    assert (300, 300) not in pairwise(banned)
    assert 0 < few.count(300) < 4


def test_parameters_of_the_state_hold_where_a_request_gives_none(client: httpx.Client) -> None:
    config = FILTERED | PENALIZED | {"stop_sequences": ["er"], "ignore_eos": True}
    configured = create(client, config=config)
    assert configured["config"] | config == configured["config"]
    asked = create(client)["state_id"]
    drawn = [
        generate(client, configured["state_id"], 30),
        generate(client, asked, 30, **config),
        generate(client, create(client)["state_id"], 30, **FILTERED),
    ]
    assert drawn[0]["token_ids"] == drawn[1]["token_ids"]
    assert drawn[0]["token_ids"] != drawn[2]["token_ids"]
    recorded = [events(client, one)[-1]["payload"] for one in (configured["state_id"], asked)]
    assert recorded[0]["parameters"] == recorded[1]["parameters"]


def test_a_request_goes_before_the_state_also_where_it_gives_nothing(client: httpx.Client) -> None:
    config = {"stop_sequences": ["a"], "stop_token_ids": [5], "logit_bias": {"300": 100}}
    state_id = create(client, config=config)["state_id"]
    generate(client, state_id, 2, stop_sequences=[], stop_token_ids=[], logit_bias={})
    parameters = events(client, state_id)[-1]["payload"]["parameters"]
    assert (parameters["stop_sequences"], parameters["stop_token_ids"]) == ([], [])
    assert parameters["sampling"]["logit_bias"] == {}


@pytest.mark.parametrize("parts", [(4, 6), (1,) * 10, (9, 1)])
def test_a_generation_with_every_parameter_is_the_same_in_one_call_and_in_several(
    client: httpx.Client, parts: tuple[int, ...]
) -> None:
    whole, split, other = (create(client)["state_id"] for _ in range(3))
    generate(client, whole, 10, **FILTERED, **PENALIZED)
    for count in parts:
        generate(client, split, count, **FILTERED, **PENALIZED)
    generate(client, other, 10, **FILTERED)
    drawn = [_drawn(client, state_id) for state_id in (whole, split, other)]
    assert len(drawn[0]) == 10
    assert drawn[0] == drawn[1] != drawn[2]


def _drawn(client: httpx.Client, state_id: str) -> list[tuple[object, ...]]:
    """What was recorded of each token that a state has drawn."""
    return [
        of_token
        for event in events(client, state_id)[1:]
        for of_token in zip(
            event["payload"]["content"]["tokens"],
            event["payload"]["sampling_probabilities"],
            *event["payload"]["scores"].values(),
            strict=True,
        )
    ]


# text


SAID = "caf\u00e9 e\u0301 日本語 \U0001f468\u200d\U0001f469 \U0001f999!"


def test_pieces_are_whole_characters_and_bytes_are_given_where_a_token_is_none(
    client: httpx.Client,
) -> None:
    wish: Json = {"constraint": {"regex": SAID}, "temperature": 0}
    *tokens, done = stream(client, create(client)["state_id"], 90, **wish)
    answer = done.data
    assert answer["text"] == "".join(answer["new_tokens"]) == SAID
    assert len(answer["bytes"]) == len(answer["token_ids"])
    raw = b""
    for one, piece, own in zip(tokens, answer["new_tokens"], answer["bytes"], strict=True):
        assert one.data["text"] == piece
        assert one.data.get("bytes") == own
        assert own is None or not _is_text(bytes(own))
        raw += piece.encode() if own is None else bytes(own)
    assert raw.decode() == SAID
    assert sum(own is not None for own in answer["bytes"]) > 10
    assert "bytes" not in generate(client, create(client)["state_id"], 4, temperature=0)


def _is_text(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_streamed_text_ends_with_the_token_that_completes_a_stop_of_any_text(
    client: httpx.Client, said_tokens: list[str], data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, len(SAID) - 1))
    stop = SAID[start : start + data.draw(st.integers(1, 6))]
    end = SAID.index(stop) + len(stop)
    kept = next(
        count
        for count, length in enumerate(accumulate(map(len, said_tokens)), start=1)
        if length >= end
    )
    wish: Json = {"constraint": {"regex": SAID}, "temperature": 0, "stop_sequences": ["?", stop]}
    *tokens, done = stream(client, create(client)["state_id"], 90, **wish)
    assert done.data["finish_reason"] == "stop_sequence"
    assert [one.data["text"] for one in tokens] == said_tokens[:kept]
    assert done.data["text"] == "".join(said_tokens[:kept])


@pytest.fixture(scope="module")
def said_tokens(client: httpx.Client) -> list[str]:
    """What the tokens add in which the model writes a text that it is held to."""
    wish: Json = {"constraint": {"regex": SAID}, "temperature": 0}
    pieces: list[str] = generate(client, create(client)["state_id"], 90, **wish)["new_tokens"]
    return pieces


@pytest.fixture(scope="module")
def known(client: httpx.Client) -> Json:
    """A generation from the opening with the defaults; the same comes again each time."""
    return generate(client, create(client)["state_id"], 24)


def test_a_stop_sequence_may_span_tokens_and_the_token_that_ends_it_stays_whole(
    client: httpx.Client, known: Json
) -> None:
    pieces = known["new_tokens"]
    last, stop = next(
        (index + 1, stop)
        for index in range(2, len(pieces) - 1)
        if (stop := pieces[index][-1:] + pieces[index + 1][:2])
        and len(pieces[index + 1]) > 2
        and stop not in "".join(pieces[: index + 1])
    )
    generated = generate(client, create(client)["state_id"], 24, stop_sequences=["zebra", stop])
    assert (generated["finished"], generated["finish_reason"]) == (True, "stop_sequence")
    assert generated["token_ids"] == known["token_ids"][: last + 1]
    assert stop in generated["text"]
    assert stop not in "".join(generated["new_tokens"][:-1])
    assert not generated["text"].endswith(stop)


def test_stop_sequences_look_at_the_text_of_their_own_call(
    client: httpx.Client, known: Json
) -> None:
    first = known["new_tokens"][0]
    state_id = create(client)["state_id"]
    generate(client, state_id, 1)
    stop = first[-1] + known["new_tokens"][1]
    generated = generate(client, state_id, 1, stop_sequences=[stop])
    assert generated["new_tokens"] == known["new_tokens"][1:2]
    assert generated["finish_reason"] is None
    whole = generate(client, create(client)["state_id"], 2, stop_sequences=[stop])
    assert whole["finish_reason"] == "stop_sequence"


def test_a_stop_token_ends_the_text_and_is_part_of_it(client: httpx.Client, known: Json) -> None:
    stop = known["token_ids"][5]
    first = known["token_ids"].index(stop)
    generated = generate(client, create(client)["state_id"], 24, stop_token_ids=[stop])
    assert (generated["finished"], generated["finish_reason"]) == (True, "stop_token")
    assert generated["token_ids"] == known["token_ids"][: first + 1]


def test_the_models_end_of_text_ends_the_generation_and_is_a_token_without_text(
    client: httpx.Client,
) -> None:
    state_id = create(client)["state_id"]
    generated = generate(client, state_id, 500)
    eos = ok(client.get("/v1/models/cacher-tiny"))["config"]["eos_token_id"]
    assert (generated["finished"], generated["finish_reason"]) == (True, "eos")
    assert generated["token_ids"].index(eos) == len(generated["token_ids"]) - 1 < 499
    assert generated["new_tokens"][-1] == ""
    assert tokens_of(client, state_id)[-1] == eos


def test_a_full_context_ends_the_generation_and_leaves_nothing_to_generate(
    client: httpx.Client,
) -> None:
    state = create(client, config={"context_size": 12})
    state_id, held = state["state_id"], state["head_position"]
    generated = generate(client, state_id, 12)
    assert (generated["finished"], generated["finish_reason"]) == (True, "context_full")
    assert len(generated["token_ids"]) == 12 - held
    assert generated["head_position"] == 12
    again = generate(client, state_id, 12)
    assert (again["text"], again["token_ids"]) == ("", [])
    assert (again["finished"], again["finish_reason"]) == (True, "context_full")
    configure(client, state_id, context_size=14)
    assert len(generate(client, state_id, 12)["token_ids"]) == 2
    assert_verified(client, state_id)


def test_a_stream_sends_each_token_and_then_the_whole_answer(client: httpx.Client) -> None:
    state = create(client)
    *tokens, done = stream(client, state["state_id"], 10, **HOT)
    assert [one.name for one in tokens] == ["token"] * 10
    assert [one.id for one in tokens] == [str(index) for index in range(10)]
    assert [one.data["index"] for one in tokens] == list(range(10))
    start = state["head_position"]
    assert [one.data["position"] for one in tokens] == list(range(start, start + 10))
    assert (done.name, set(done.data)) == ("done", GENERATED_FIELDS)
    answer = done.data
    assert "".join(one.data["text"] for one in tokens) == answer["text"]
    for field, whole in (
        ("token_id", "token_ids"),
        ("text", "new_tokens"),
        ("probability", "probabilities"),
        ("logprob", "logprobs"),
    ):
        assert [one.data[field] for one in tokens] == answer[whole]
    recorded = events(client, state["state_id"])[-1]
    assert recorded["payload"]["content"]["tokens"] == answer["token_ids"]
    assert recorded["payload"]["content"]["text"] == answer["text"]
    assert read(client, state["state_id"])["text"] == OPENING + answer["text"]


@pytest.mark.parametrize(
    "wish",
    [HOT, {"temperature": 0}, {"stop_sequences": ["."]}, {"top_logprobs": 2}, FILTERED | PENALIZED],
    ids=["drawn", "greedy", "stopped", "alternatives", "filtered"],
)
def test_a_stream_and_a_whole_answer_are_the_same(client: httpx.Client, wish: Json) -> None:
    streamed, whole = (create(client)["state_id"] for _ in range(2))
    done = stream(client, streamed, 30, **wish)[-1].data
    answer = generate(client, whole, 30, **wish)
    assert done | {"state_id": whole} == answer
    payloads = [events(client, state_id)[-1]["payload"] for state_id in (streamed, whole)]
    assert payloads[0] == payloads[1]


def test_a_stream_of_a_full_state_is_done_at_once(client: httpx.Client) -> None:
    state = create(client, config={"context_size": 8})
    generate(client, state["state_id"], 8)
    (done,) = stream(client, state["state_id"])
    assert (done.name, done.data["finish_reason"]) == ("done", "context_full")


def test_a_stream_gives_sampling_probabilities_when_asked(client: httpx.Client) -> None:
    body = {"state_id": create(client)["state_id"], "max_tokens": 3, "stream": True}
    answer = client.post("/v1/generate/token?include=sampling", json=body)
    assert len(sent(answer.text)[-1].data["sampling_probabilities"]) == 3


@pytest.mark.parametrize("streamed", [True, False])
def test_a_generation_that_cannot_begin_is_a_problem_and_no_stream(
    client: httpx.Client, streamed: bool
) -> None:
    body = {"state_id": "state-0", "stream": streamed}
    assert_problem(client.post("/v1/generate/token", json=body), 404, "state-not-found")
    state_id = create(client, config={"context_size": 8})["state_id"]
    with nothing_recorded(client):
        body = {"state_id": state_id, "max_tokens": 9, "stream": streamed}
        answer = client.post("/v1/generate/token", json=body)
    assert_problem(answer, 400, "invalid-input", "max_tokens")


@pytest.fixture
def running(client: httpx.Client) -> Iterator[Json]:
    """A long stream that has sent its first token."""
    state = create(client)
    body = {"state_id": state["state_id"], "max_tokens": 900, "stream": True, "seed": 1}
    with client.stream("POST", "/v1/generate/token", json=body) as answer:
        stream = read_sent(answer)
        yield {"state": state, "first": next(stream), "rest": stream}


def test_streamed_tokens_are_provisional_until_done(client: httpx.Client, running: Json) -> None:
    state = running["state"]
    assert running["first"].name == "token"
    assert not is_idle(client)
    assert read(client, state["state_id"]) == state
    assert list(running["rest"])[-1].name == "done"
    assert read(client, state["state_id"])["version"] == 2


def test_states_can_be_used_while_another_streams(client: httpx.Client, running: Json) -> None:
    other = create(client)["state_id"]
    forward(client, other, LONG_TEXT)
    assert generate(client, other, 4)["version"] == 3
    assert read(client, running["state"]["state_id"])["version"] == 1
    assert list(running["rest"])[-1].name == "done"
