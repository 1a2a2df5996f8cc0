"""What could come next in a state, raw and as the state would sample it."""

import io
from typing import Any

import httpx
import numpy as np
import pytest

from tests.app.api import (
    Json,
    assert_problem,
    configure,
    create,
    events,
    generate,
    nothing_recorded,
    ok,
    read,
    rewind,
    tokens_of,
    verify,
)

LLAMA = "\U0001f999"
CONFIG: Json = {"temperature": 2.5, "top_p": 0.95, "repetition_penalty": 1.5, "seed": None}


def analyze(client: httpx.Client, state_id: str, **asked: Any) -> Json:
    found: Json = ok(client.get(f"/v1/analyze/next/{state_id}", params=asked))
    return found


def test_a_state_samples_as_it_says(client: httpx.Client) -> None:
    state_id = create(client, text="The", config=CONFIG)["state_id"]
    found = analyze(client, state_id, top_k=1000)
    listed = {each["token_id"]: each for each in (*found["top"], *found["sampled"])}
    body = {"state_id": state_id, "n": 16, "max_tokens": 1}
    made = ok(client.post("/v1/generate/multi?include=sampling", json=body))["continuations"]
    assert len({each["text"] for each in made}) > 1
    for each in made:
        ((token,), (chance,)) = each["token_ids"], each["sampling_probabilities"]
        assert listed[token]["sampling_probability"] == chance
        assert [listed[token]["logprob"]] == each["logprobs"]
        assert [listed[token]["text"]] == each["new_tokens"]
    assert found["position"] == read(client, state_id)["head_position"]


def test_the_settings_are_those_of_the_version(client: httpx.Client) -> None:
    state_id = create(client, config=CONFIG)["state_id"]
    warm = analyze(client, state_id)
    configure(client, state_id, temperature=0)
    (chosen,) = analyze(client, state_id)["sampled"]
    assert (chosen["rank"], chosen["sampling_probability"]) != (0, 0)
    assert chosen["sampling_probability"] == 1
    assert generate(client, state_id, 1)["token_ids"] == [chosen["token_id"]]
    assert analyze(client, state_id, version=1) == warm
    rewind(client, state_id, version=1)
    configure(client, state_id, temperature=CONFIG["temperature"])
    now = analyze(client, state_id)
    assert {**now, "version": 1} == warm


def test_it_is_an_event_that_changes_nothing_and_verifies(client: httpx.Client) -> None:
    state_id = create(client)["state_id"]
    answer = client.get(f"/v1/analyze/next/{state_id}")
    assert (ok(answer)["version"], answer.headers["etag"]) == (1, '"1"')
    assert len(answer.json()["top"]) == 10
    assert [event["type"] for event in events(client, state_id)] == ["state_created"]
    (recorded,) = ok(client.get(f"/v1/states/{state_id}/analyses"))["events"]
    assert recorded["type"] == "state_analyzed"
    assert recorded["payload"]["parameters"] == {"kind": "next", "top_k": 10}
    report = verify(client, state_id=state_id)
    assert (report["result"], report["analyses"]) == ("equal", 1)


def test_all_logits_come_as_a_tensor(client: httpx.Client) -> None:
    state_id = create(client)["state_id"]
    found = analyze(client, state_id, top_k=1000)
    assert "logits" not in found
    answer = client.get(f"/v1/analyze/next/{state_id}", headers={"Accept": "application/x-npy"})
    logits = np.load(io.BytesIO(ok_bytes(answer)))
    assert (logits.shape, logits.dtype) == ((1024,), np.float32)
    for each in found["top"]:
        assert float(logits[each["token_id"]]) - found["logsumexp"] == each["logprob"]


def ok_bytes(answer: httpx.Response) -> bytes:
    assert answer.is_success, answer.text
    return answer.content


def test_a_state_that_is_full_could_go_on(client: httpx.Client) -> None:
    tokens = tokens_of(client, create(client)["state_id"])
    room = create(client, text=None, tokens=tokens)["state_id"]
    config = {"context_size": len(tokens)}
    full = create(client, text=None, tokens=tokens, config=config)["state_id"]
    assert generate(client, full, 1)["finish_reason"] == "context_full"
    assert analyze(client, full)["top"] == analyze(client, room)["top"]
    whole = (tokens * 1024)[:1024]
    largest = create(client, text=None, tokens=whole)["state_id"]
    assert analyze(client, largest)["position"] == 1024


def test_what_would_end_inside_a_character_comes_with_its_bytes(client: httpx.Client) -> None:
    tokens = tokens_of(client, create(client, text=LLAMA)["state_id"])
    state_id = create(client, text=None, tokens=tokens[:-1])["state_id"]
    top = analyze(client, state_id, top_k=1000)["top"]
    (last,) = [each for each in top if each["token_id"] == tokens[-1]]
    assert (last["text"], last["bytes"]) == (LLAMA, list(LLAMA.encode()[-1:]))


@pytest.mark.parametrize("top_k", [0, 1001, "x"])
def test_what_there_is_not_is_refused_by_name(client: httpx.Client, top_k: Any) -> None:
    state_id = create(client)["state_id"]
    with nothing_recorded(client):
        answer = client.get(f"/v1/analyze/next/{state_id}", params={"top_k": top_k})
        assert_problem(answer, 400, "invalid-input", "top_k")
