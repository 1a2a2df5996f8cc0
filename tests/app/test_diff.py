"""Two states, or two versions of one, held against each other; reading states as they were."""

from collections.abc import Callable, Sequence
from typing import Any

import httpx
import pytest
import torch

from tests.app.api import (
    LONG_TEXT,
    OPENING,
    Json,
    assert_problem,
    configure,
    create,
    delete,
    eventually,
    fork,
    forward,
    is_idle,
    nothing_recorded,
    ok,
    read,
    rewind,
    tokens_of,
)
from tests.infra.engine import small_models

TINY = small_models.CACHER_TINY
CONTEXT = 1024
NEAR = 1e-5


Predict = Callable[[Sequence[int]], torch.Tensor]


@pytest.fixture(scope="module")
def predict() -> Predict:
    """What transformers says of each next token: row ``i`` is of the one after ``i`` and before."""
    model: Any = small_models.read(TINY).model

    @torch.inference_mode()
    def logprobs(tokens: Sequence[int]) -> torch.Tensor:
        logits: torch.Tensor = model(torch.tensor([tokens]), use_cache=False).logits[0]
        return logits.double().log_softmax(-1)

    return logprobs


def _diff(client: httpx.Client, a: str, b: str, **parameters: int) -> Json:
    with nothing_recorded(client):
        found: Json = ok(client.get(f"/v1/states/{a}/diff/{b}", params=parameters))
    return found


def _state(client: httpx.Client, text: str = OPENING, **body: Any) -> str:
    state_id: str = create(client, text=text, **body)["state_id"]
    return state_id


def _assert_exact(found: Json, a: torch.Tensor, b: torch.Tensor) -> None:
    """Every KL divergence is that of these distributions, and every likeliest token theirs."""
    assert found["kl"]
    for place in found["kl"]:
        mine, theirs = a[place["position"] - 1], b[place["position"] - 1]
        kl = float((mine.exp() * (mine - theirs)).sum())
        assert place["kl"] == pytest.approx(kl, rel=NEAR, abs=NEAR)
        assert place["top_a"]["token_id"] == int(mine.argmax())
        assert place["top_b"]["token_id"] == int(theirs.argmax())


# two states


def test_two_states_differ_in_their_parts_and_in_what_comes_next(
    client: httpx.Client, predict: Predict
) -> None:
    a = _state(client, f"{OPENING} there was a cat.")
    b = _state(client, f"{OPENING} there was a dog and it ran away.", config={"top_p": 0.5})
    found = _diff(client, a, b)
    tokens = tokens_of(client, a), tokens_of(client, b)
    common = found["common_prefix"]["tokens"]
    assert found["common_prefix"]["text"] == f"{OPENING} there was a"
    assert tokens[0][:common] == tokens[1][:common]
    for part, held in zip((found["a_part"], found["b_part"]), tokens, strict=True):
        assert part["tokens"] == held[common:]
    assert (found["a_part"]["text"], found["b_part"]["text"]) == (" cat.", " dog and it ran away.")
    assert found["config"] == {"top_p": [0.9, 0.5]}
    assert found["same_model"]
    assert found["a"] == {
        "state_id": a,
        "version": 1,
        "model_id": TINY,
        "head_position": len(tokens[0]),
        "dropped": 0,
    }
    positions = [place["position"] for place in found["kl"]]
    assert positions == list(range(common + 1, min(map(len, tokens)) + 1))
    _assert_exact(found, *(predict(held) for held in tokens))
    assert all(place["kl"] > NEAR for place in found["kl"])
    assert found["next_start"] is found["note"] is None


def test_the_divergence_has_a_direction(client: httpx.Client) -> None:
    a, b = _state(client, "The cat sat."), _state(client, "The dog ran.")
    there, back = _diff(client, a, b), _diff(client, b, a)
    assert [p["top_a"] for p in there["kl"]] == [p["top_b"] for p in back["kl"]]
    assert [p["kl"] for p in there["kl"]] != [p["kl"] for p in back["kl"]]


def test_long_texts_are_compared_in_chunks_and_in_pages(
    client: httpx.Client, predict: Predict
) -> None:
    a, b = _state(client, f"A cat.{LONG_TEXT}"), _state(client, f"Some dogs.{LONG_TEXT}")
    whole = _diff(client, a, b, limit=1024)
    assert len(whole["kl"]) > 3 * 45 > 4 * 32
    assert len(_diff(client, a, b)["kl"]) == 128
    _assert_exact(whole, *(predict(tokens_of(client, state)) for state in (a, b)))
    paged, start = [], 0
    while start is not None:
        page = _diff(client, a, b, start=start, limit=45)
        assert len(page["kl"]) <= 45
        paged += page["kl"]
        start = page["next_start"]
    assert [p["position"] for p in paged] == [p["position"] for p in whole["kl"]]
    assert [p["kl"] for p in paged] == pytest.approx([p["kl"] for p in whole["kl"]])


def test_no_model_is_asked_where_nothing_is_to_be_compared(client: httpx.Client) -> None:
    a, b = _state(client, "The cat sat."), _state(client, "The dog ran.")
    assert _diff(client, a, b, limit=0)["kl"] == []
    assert _diff(client, a, b, start=1000)["kl"] == []
    (copy,) = fork(client, a)
    same = _diff(client, a, copy["state_id"])
    assert (same["kl"], same["config"], same["a_part"]["tokens"]) == ([], {}, [])


def test_full_contexts_are_compared_to_their_end(client: httpx.Client, predict: Predict) -> None:
    tokens = (tokens_of(client, _state(client, LONG_TEXT)) * 9)[:CONTEXT]
    assert len(tokens) == CONTEXT
    held = [tokens, [*tokens[:-9], *reversed(tokens[-9:])]]
    a, b = (create(client, text=None, tokens=each)["state_id"] for each in held)
    found = _diff(client, a, b, start=CONTEXT - 2)
    assert [place["position"] for place in found["kl"]] == [CONTEXT - 2, CONTEXT - 1]
    _assert_exact(found, *(predict(each) for each in held))


# versions


def test_two_versions_of_one_state(client: httpx.Client, predict: Predict) -> None:
    state_id = _state(client, "The cat sat.")
    forward(client, state_id, " It was happy.")
    rewind(client, state_id, version=1)
    configure(client, state_id, temperature=0.25)
    forward(client, state_id, " The dog ran away.")
    found = _diff(client, state_id, state_id, version_a=2)
    assert (found["a"]["version"], found["b"]["version"]) == (2, 5)
    assert found["common_prefix"]["text"] == "The cat sat."
    assert found["a_part"]["text"] == " It was happy."
    assert found["b_part"]["text"] == " The dog ran away."
    assert found["config"] == {"temperature": [0.7, 0.25]}
    held = [read(client, state_id, include="tokens", version=v)["tokens"] for v in (2, 5)]
    _assert_exact(found, *(predict(tokens) for tokens in held))
    assert _diff(client, state_id, state_id, version_a=2, version_b=5) == found


def test_a_state_that_slid_is_compared_by_the_tokens_it_holds(
    client: httpx.Client, predict: Predict
) -> None:
    created = create(client, text=f"{OPENING} there was a little cat. It ran")
    state_id = created["state_id"]
    configure(client, state_id, on_full="slide", context_size=created["head_position"] + 1)
    forward(client, state_id, " away.")
    latest = read(client, state_id)
    assert latest["dropped"] > 0
    found = _diff(client, state_id, state_id, version_a=1)
    assert (found["a"]["dropped"], found["b"]["dropped"]) == (0, latest["dropped"])
    held = [
        read(client, state_id, include="tokens", version=version)["tokens"]
        for version in (1, latest["version"])
    ]
    common = found["common_prefix"]["tokens"]
    assert found["b_part"]["tokens"] == held[1][common:]
    _assert_exact(found, *(predict(tokens) for tokens in held))


def test_a_deleted_state_is_read_as_it_was_before(client: httpx.Client) -> None:
    state_id = _state(client, "The cat sat.")
    forward(client, state_id, " It was happy.")
    before = read(client, state_id, version=2, include="tokens")
    delete(client, state_id)
    path = f"/v1/states/{state_id}"
    assert read(client, state_id, version=2, include="tokens") == before
    assert read(client, state_id, version=1)["text"] == "The cat sat."
    found = _diff(client, state_id, state_id, version_a=1, version_b=2)
    assert found["b_part"]["text"] == " It was happy."
    for now in (path, f"{path}?version=3", f"{path}/diff/{state_id}?version_a=1"):
        assert_problem(client.get(now), 404, "state-deleted")


@pytest.mark.parametrize("version", [0, -1, 3, 2**53])
def test_a_version_that_is_not_there_names_those_that_are(
    client: httpx.Client, version: int
) -> None:
    state_id, path = _state(client), "/v1/states"
    configure(client, state_id, top_k=3)
    for read_as_it_was in (
        f"{path}/{state_id}?version={version}",
        f"{path}/{state_id}/events?version={version}",
        f"{path}/{state_id}/diff/{state_id}?version_a={version}",
        f"{path}/{state_id}/diff/{state_id}?version_b={version}",
    ):
        problem = assert_problem(client.get(read_as_it_was), 404, "version-not-found")
        assert problem["current_version"] == 2
        assert "versions 1 to 2" in problem["detail"]


def test_the_events_of_a_state_are_read_as_they_were(client: httpx.Client) -> None:
    state_id = _state(client)
    configure(client, state_id, top_k=3)
    configure(client, state_id, top_k=4)
    page = ok(client.get(f"/v1/states/{state_id}/events", params={"version": 2, "limit": 1}))
    assert ([event["version"] for event in page["events"]], page["next_after"]) == ([1], 1)
    page = ok(client.get(f"/v1/states/{state_id}/events", params={"version": 2, "after": 1}))
    assert ([event["version"] for event in page["events"]], page["next_after"]) == ([2], None)


def test_what_cannot_be_compared_is_refused(client: httpx.Client) -> None:
    state_id = _state(client)
    path = f"/v1/states/{state_id}/diff"
    for other in (f"{path}/state-0", f"/v1/states/state-0/diff/{state_id}"):
        assert_problem(client.get(other), 404, "state-not-found")
    for wrong in ("limit=1025", "limit=-1", "limit=x"):
        assert_problem(client.get(f"{path}/{state_id}?{wrong}"), 400, "invalid-input", "limit")
    assert_problem(client.get(f"{path}/{state_id}?start=-1"), 400, "invalid-input", "start")
    eventually(lambda: is_idle(client))
