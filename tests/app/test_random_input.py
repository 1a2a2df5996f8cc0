"""Whatever JSON is sent to whichever route: an answer or a problem document, never a failure."""

import json
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.app.api import PROBLEM_JSON, Json, create, fork, head, read
from tests.app.test_audit import BODIES

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
NUMBERS = st.one_of(
    st.integers(-2, 20),
    st.integers(),
    st.sampled_from([2**31, 2**53 - 1, 2**53, 2**63, 2**64, 10**40]),
    st.floats(allow_nan=False, allow_infinity=False),
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
TOKENS = st.integers(-1, 1030)
STOPS: dict[str, st.SearchStrategy[Any]] = {
    "stop_sequences": st.lists(TEXTS, max_size=3),
    "stop_token_ids": st.lists(TOKENS, max_size=3),
    "ignore_eos": st.booleans(),
}
LOGITS: dict[str, st.SearchStrategy[Any]] = {
    "logit_bias": st.dictionaries(TOKENS.map(str) | TEXTS, st.floats(-120, 120), max_size=3),
    "repetition_penalty": st.floats(0, 3) | NUMBERS,
    "presence_penalty": st.floats(-3, 3) | NUMBERS,
    "frequency_penalty": st.floats(-3, 3) | NUMBERS,
    "bad_words_ids": st.lists(st.lists(TOKENS, max_size=3), max_size=3),
}
SAMPLING: dict[str, st.SearchStrategy[Any]] = LOGITS | {
    "temperature": st.floats(0, 3) | st.just(-1),
    "top_p": st.floats(0, 1.2),
    "top_k": st.integers(0, 20) | NUMBERS,
    "min_p": st.floats(0, 1.2),
    "typical_p": st.floats(0, 1.2),
    "seed": st.none() | st.integers(0, 9) | NUMBERS,
}
SETTINGS = st.fixed_dictionaries(
    {},
    optional=SAMPLING
    | STOPS
    | {
        "on_full": st.sampled_from(["stop", "slide", "grow"]),
        "context_size": st.integers(6, 32) | NUMBERS,
        "store_logits": st.sampled_from(["none", "top_k", "full", "all"]),
        "top_k_logits": st.integers(0, 30),
    },
)
SEARCHES: dict[str, st.SearchStrategy[Any]] = {
    "max_length": st.integers(-1, 9),
    "num_beams": st.integers(-1, 6) | NUMBERS,
    "num_return": st.integers(-1, 4),
    "num_beam_groups": st.integers(-1, 3),
    "diversity_penalty": st.floats(-1, 2),
    "length_penalty": st.floats(-12, 12),
    "early_stopping": st.booleans() | st.sampled_from(["never", "ever"]),
    "no_repeat_ngram_size": st.integers(-1, 4) | NUMBERS,
}
CONSTRAINTS = st.fixed_dictionaries(
    {},
    optional={
        "regex": st.sampled_from(["[a-z]+", "(", ""]),
        "json_schema": st.sampled_from([{"type": "integer"}, {"type": "number", "enum": []}, True]),
        "lark": st.sampled_from(['start: "a" start | "b"', "start: nothing", "?"]),
    },
)
LIKELY: dict[str, st.SearchStrategy[Any]] = {
    **SAMPLING,
    **STOPS,
    **SEARCHES,
    "constraint": st.none() | CONSTRAINTS,
    "after": st.integers(-1, 50) | NUMBERS,
    "until": st.integers(-1, 50) | NUMBERS,
    "since_verified": st.booleans(),
    "continuation": st.fixed_dictionaries(
        {"version": st.integers(-1, 3), "index": st.integers(-1, 3)}
    ),
    "state_ids": st.lists(TEXTS, max_size=3),
    "strategy": st.sampled_from(["concatenate", "interleave"]),
    "model_id": st.sampled_from(["cacher-tiny", "cacher-tiny-sentiment", "gpt2", None]),
    "text": TEXTS,
    "tokens": st.lists(st.integers(-2, 1030), max_size=6),
    "model_type": st.sampled_from(["auto", "causal_lm", "sequence_classification"]),
    "config": SETTINGS,
    "metadata": st.dictionaries(TEXTS, ANYTHING, max_size=3),
    "version": st.integers(-1, 3),
    "position": st.integers(-1, 6),
    "n": st.integers(-1, 3),
    "max_tokens": st.integers(-1, 9),
    "top_logprobs": st.integers(-1, 21),
    "stream": st.booleans(),
    "head": st.just(f"0:{'0' * 64}") | TEXTS,
    "all": st.just(False) | TEXTS,
}


REQUIRED = {"n", "position", "state_ids"}


def _seldom(draw: st.DrawFn) -> bool:
    return draw(st.sampled_from([False, False, False, False, True]))


@st.composite
def _bodies(draw: st.DrawFn, path: str, state_id: str, other: str) -> Any:
    """Mostly what the route takes, with anything here and there; sometimes anything at all."""
    if _seldom(draw):
        return draw(ANYTHING)
    fields = draw(st.sets(st.sampled_from(sorted(BODIES[path] - {"state_id"})), max_size=6))
    if not _seldom(draw):
        fields |= REQUIRED & BODIES[path]
    for either in (("position", "version"), ("text", "tokens")):
        if fields.issuperset(either) and not _seldom(draw):
            fields.remove(draw(st.sampled_from(either)))
    body = {field: draw(ANYTHING if _seldom(draw) else LIKELY[field]) for field in sorted(fields)}
    if "state_ids" in body and not _seldom(draw):
        body["state_ids"] = [state_id, other]
    if "state_id" in BODIES[path]:
        body["state_id"] = draw(TEXTS) if _seldom(draw) else state_id
    if _seldom(draw):
        body |= draw(st.dictionaries(TEXTS, ANYTHING, max_size=2))
    return body


@pytest.fixture(scope="module")
def state_id(client: httpx.Client) -> str:
    """A state with room for few tokens, so that whatever is asked of it is soon done."""
    made: str = create(client, config={"context_size": 32})["state_id"]
    return made


def _post(client: httpx.Client, path: str, body: Any) -> bool:
    """Whether a request was carried out; one that was not is a problem and recorded nothing."""
    before = head(client)
    content = body if isinstance(body, bytes) else json.dumps(body)
    answer = client.post(path, content=content, headers={"content-type": "application/json"})
    if answer.is_success:
        assert answer.headers["content-type"].startswith(("application/json", "text/event-stream"))
        assert "event: error" not in answer.text
    else:
        assert answer.status_code in (400, 404, 409, 413, 503), answer.text
        assert answer.headers["content-type"] == PROBLEM_JSON
        assert answer.json()["status"] == answer.status_code
        assert head(client) == before
    return answer.is_success


@pytest.mark.parametrize("path", BODIES)
def test_no_json_makes_the_server_fail(client: httpx.Client, state_id: str, path: str) -> None:
    outcomes = set()

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        (mine,) = fork(client, state_id)
        outcomes.add(_post(client, path, data.draw(_bodies(path, mine["state_id"], state_id))))
        assert read(client, mine["state_id"], version=1) == mine

    check()
    assert outcomes == {True, False}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(metadata=st.dictionaries(TEXTS, ANYTHING, max_size=4))
def test_any_metadata_comes_back_as_it_was_given(client: httpx.Client, metadata: Json) -> None:
    state_id = create(client, metadata=metadata)["state_id"]
    assert read(client, state_id)["metadata"] == metadata


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    path=st.sampled_from(sorted(BODIES)),
    content=st.binary(max_size=40) | st.sampled_from([b'{"text": ', b"[[", b'{"a": "\\u12"}']),
)
def test_no_bytes_make_the_server_fail(client: httpx.Client, path: str, content: bytes) -> None:
    assert not _post(client, path, content)
