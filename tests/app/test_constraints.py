"""Texts that are held to a constraint: whatever is drawn, they belong to its language."""

import json
import re
from typing import Any

import httpx
import pytest

from tests.app.api import (
    Json,
    assert_problem,
    assert_verified,
    create,
    events,
    generate,
    is_idle,
    multi,
    nothing_recorded,
    stream,
    tokens_of,
)

HOT: Json = {"temperature": 1.3, "top_p": 1.0}
REGEX = "( [a-z]{1,6}){2,4}\\."
SCHEMA: Json = {
    "type": "object",
    "properties": {
        "name": {"enum": ["Tom", "Lily"]},
        "age": {"type": "integer", "minimum": 1, "maximum": 9},
        "happy": {"type": "boolean"},
    },
    "required": ["name", "age", "happy"],
    "additionalProperties": False,
}
LARK = 'start: sum\nsum: NUMBER ("+" NUMBER)+ ";"\nNUMBER: /[1-9][0-9]?/'


def _is_person(text: str) -> bool:
    person = json.loads(text)
    assert list(person) == ["name", "age", "happy"], "properties come in the order of the schema"
    return (
        person["name"] in ("Tom", "Lily")
        and 1 <= person["age"] <= 9
        and isinstance(person["happy"], bool)
    )


def _is_sum(text: str) -> bool:
    return re.fullmatch(r"[1-9][0-9]?(\+[1-9][0-9]?)+;", text) is not None


LANGUAGES: dict[str, tuple[Json, Any]] = {
    "regex": ({"regex": REGEX}, lambda text: re.fullmatch(REGEX, text) is not None),
    "json_schema": ({"json_schema": SCHEMA}, _is_person),
    "lark": ({"lark": LARK}, _is_sum),
}
each_language = pytest.mark.parametrize(
    ("constraint", "belongs"), LANGUAGES.values(), ids=LANGUAGES
)


@each_language
def test_every_text_that_is_finished_belongs_to_the_language(
    client: httpx.Client, constraint: Json, belongs: Any
) -> None:
    state_id = create(client)["state_id"]
    drawn = multi(client, state_id, 12, 60, seed=1, constraint=constraint, **HOT)["continuations"]
    finished = [one for one in drawn if one["finished"]]
    assert len(finished) > 4
    assert all(belongs(one["text"]) for one in finished)
    assert {one["finish_reason"] for one in finished} <= {"constraint", "eos"}
    assert len({one["text"] for one in drawn}) > 4
    assert is_idle(client)


@each_language
def test_a_single_text_and_a_stream_are_held_to_it_as_well(
    client: httpx.Client, constraint: Json, belongs: Any
) -> None:
    whole, streamed = (create(client)["state_id"] for _ in range(2))
    wish = {"seed": 5, "constraint": constraint, **HOT, "temperature": 0.7}
    answer = generate(client, whole, 90, **wish)
    *tokens, done = stream(client, streamed, 90, **wish)
    assert answer["finish_reason"] in ("constraint", "eos")
    assert belongs(answer["text"])
    assert done.data | {"state_id": whole} == answer
    assert "".join(one.data["text"] for one in tokens) == answer["text"]
    free = generate(client, create(client)["state_id"], 90, **wish | {"constraint": None})
    assert free["token_ids"] != answer["token_ids"]
    assert_verified(client, whole)


def test_the_constraint_is_recorded_as_it_was_written(client: httpx.Client) -> None:
    state_id = create(client)["state_id"]
    generate(client, state_id, 4, constraint={"json_schema": SCHEMA})
    recorded = events(client, state_id)[-1]["payload"]["parameters"]["constraint"]
    assert recorded["kind"] == "json_schema"
    assert json.loads(recorded["text"]) == SCHEMA
    assert list(json.loads(recorded["text"])["properties"]) == list(SCHEMA["properties"])


def test_a_text_with_one_way_to_go_on_is_written_in_full_however_unlikely(
    client: httpx.Client,
) -> None:
    said = "🙂日本 e\u0301\n\u00ff"
    answer = generate(client, create(client)["state_id"], 60, constraint={"regex": said})
    assert (answer["text"], answer["finish_reason"]) == (said, "constraint")
    assert "".join(answer["new_tokens"]) == said


def test_a_text_ends_where_nothing_may_follow_and_may_end_where_something_may(
    client: httpx.Client,
) -> None:
    wish: Json = {"seed": 1, "temperature": 3, "constraint": {"regex": "(ab?){1,2}"}}
    drawn = multi(client, create(client)["state_id"], 32, 12, **wish)["continuations"]
    texts = {
        reason: {one["text"] for one in drawn if one["finish_reason"] == reason}
        for reason in ("constraint", "eos", None)
    }
    assert texts["constraint"]
    assert texts["constraint"] <= {"aab", "abab"}
    assert texts["eos"]
    assert texts["eos"] <= {"a", "ab", "aa", "aba"}
    assert not texts[None]


def test_a_text_that_has_not_come_to_its_end_says_so(client: httpx.Client) -> None:
    answer = generate(client, create(client)["state_id"], 2, constraint={"regex": "a{40}"})
    assert (answer["finished"], answer["finish_reason"]) == (False, None)


def test_a_constraint_reads_the_text_of_its_own_call_alone(client: httpx.Client) -> None:
    state_id = create(client, text="abc abc")["state_id"]
    wish: Json = {"constraint": {"regex": "xyz"}}
    assert [generate(client, state_id, 9, **wish)["text"] for _ in range(2)] == ["xyz", "xyz"]


def test_stops_end_a_constrained_text_as_any_other(client: httpx.Client) -> None:
    answer = generate(
        client,
        create(client)["state_id"],
        20,
        constraint={"regex": "a{3}b{3}"},
        stop_sequences=["ab"],
    )
    assert answer["finish_reason"] == "stop_sequence"
    assert re.fullmatch("a{3}b{1,3}", answer["text"])


def test_among_the_tokens_that_are_left_sampling_chooses_as_ever(client: httpx.Client) -> None:
    state_id = create(client)["state_id"]
    body = {"state_id": state_id, "max_tokens": 8, "seed": 3, **HOT}
    body |= {"constraint": {"regex": "[ab]{8}"}, "top_logprobs": 1}
    answer = client.post("/v1/generate/token?include=sampling", json=body).json()
    probabilities = zip(answer["sampling_probabilities"], answer["probabilities"], strict=True)
    assert all(0 < model < drawn <= 1 for drawn, model in probabilities)


# refusals


UNUSABLE: list[tuple[Json, str, str]] = [
    ({"regex": "("}, "constraint.regex", "unclosed group"),
    ({"regex": "a(?=b)"}, "constraint.regex", "look-around"),
    ({"regex": ""}, "constraint.regex", ""),
    ({"regex": "[a&&b]"}, "constraint.regex", ""),
    ({"json_schema": {"type": "nothing"}}, "constraint.json_schema", ""),
    ({"json_schema": False}, "constraint.json_schema", ""),
    ({"json_schema": {"type": "string", "minLength": 3, "maxLength": 2}}, "constraint.json_schema",
     ""),
    ({"lark": "start: "}, "constraint.lark", ""),
    ({"lark": "start: nothing"}, "constraint.lark", "nothing"),
    ({"lark": "rule: 'a'"}, "constraint.lark", ""),
    ({"lark": "a b c ]["}, "constraint.lark", ""),
]  # fmt: skip
MISPLACED: list[tuple[Any, str]] = [
    ({}, "constraint"),
    ({"regex": "a", "lark": 'start: "a"'}, "constraint"),
    ({"regex": "a", "json_schema": {}}, "constraint"),
    ({"regex": 5}, "constraint.regex"),
    ({"regex": None}, "constraint.regex"),
    ({"json_schema": "{}"}, "constraint.json_schema"),
    ({"json_schema": []}, "constraint.json_schema"),
    ({"lark": {}}, "constraint.lark"),
    ({"grammar": "a"}, "constraint.grammar"),
    ("a", "constraint"),
    ([], "constraint"),
]
BAD = [*UNUSABLE, *((bad, field, "") for bad, field in MISPLACED)]


@pytest.mark.parametrize(("bad", "field", "rule"), BAD, ids=[str(bad) for bad, *_ in BAD])
def test_a_constraint_that_cannot_be_used_is_refused_and_says_where(
    client: httpx.Client, bad: Any, field: str, rule: str
) -> None:
    state_id = create(client)["state_id"]
    with nothing_recorded(client):
        answer = client.post(
            "/v1/generate/token", json={"state_id": state_id, "constraint": bad, "stream": True}
        )
    problem = assert_problem(answer, 400, "invalid-input", field)
    assert rule in problem["detail"]


def test_a_refused_constraint_is_refused_for_continuations_too(client: httpx.Client) -> None:
    body = {"state_id": create(client)["state_id"], "n": 2, "constraint": {"regex": "("}}
    answer = client.post("/v1/generate/multi", json=body)
    assert_problem(answer, 400, "invalid-input", "constraint.regex")


def test_no_constraint_is_the_same_as_none_given(client: httpx.Client) -> None:
    answers = []
    for wish in ({}, {"constraint": None}):
        state_id = create(client)["state_id"]
        answers.append(generate(client, state_id, 6, **wish)["token_ids"])
    assert answers[0] == answers[1]


def test_settings_that_leave_no_token_are_refused(client: httpx.Client) -> None:
    state_id = create(client)["state_id"]
    token = tokens_of(client, create(client, text="日")["state_id"])[-1]
    wish: Json = {"constraint": {"regex": "日"}, "bad_words_ids": [[token]]}
    body = {"state_id": state_id, "max_tokens": 9, **wish}
    with nothing_recorded(client):
        answer = client.post("/v1/generate/token", json=body)
        *tokens, error = stream(client, state_id, 9, **wish)
    problem = assert_problem(answer, 400, "invalid-input", "constraint.regex")
    assert "no token" in problem["detail"]
    assert {one.name for one in tokens} == {"token"}
    assert (error.name, error.data) == ("error", problem)
    assert is_idle(client)
