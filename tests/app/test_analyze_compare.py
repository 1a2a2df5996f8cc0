"""Two states, or two versions of one, compared token by token, and recorded."""

import io
import json
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from infra.engine.engine import Engine
from infra.models.catalogue import source_of
from tests.app.api import (
    LONG_TEXT,
    OPENING,
    Json,
    assert_problem,
    create,
    delete,
    fork,
    forward,
    nothing_recorded,
    ok,
    rewind,
    tokens_of,
    verify,
)
from tests.app.held import serving
from tests.infra.engine import small_models
from tests.infra.engine.bench import Gate

pytestmark = pytest.mark.filterwarnings(
    "ignore::litestar.utils.deprecation.LitestarDeprecationWarning"
)

TINY = small_models.CACHER_TINY
NEAR = 1e-5
CONTEXT = 1024
Predict = Callable[[str, Sequence[int]], torch.Tensor]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Models of the embedded one's vocabulary, and one with less of it."""
    parent, make = tmp_path_factory.mktemp("models"), small_models.FAMILIES["gpt2"]
    sizes = {"other": 1024, "short": 1000}
    return {
        name: str(small_models.write(parent / name, make(), vocabulary=size))
        for name, size in sizes.items()
    } | {TINY: source_of(TINY).location}


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compare") / "cacher.db"


@pytest.fixture(scope="module")
def served(folders: dict[str, str], database: Path) -> Iterator[tuple[httpx.Client, Engine]]:
    allowed = (folders["other"], folders["short"])
    with serving(database, allowed_models=allowed, max_models=4) as both:
        yield both


@pytest.fixture(scope="module")
def client(served: tuple[httpx.Client, Engine]) -> httpx.Client:
    return served[0]


@pytest.fixture(scope="module")
def predict(folders: dict[str, str]) -> Predict:
    """What transformers says of each next token: row ``i`` is of the one after ``i`` and before."""
    plain = {name: small_models.read(folders[name]).model for name in (TINY, "other")}

    @torch.inference_mode()
    def logprobs(name: str, tokens: Sequence[int]) -> torch.Tensor:
        logits: torch.Tensor = plain[name](torch.tensor([tokens]), use_cache=False).logits[0]
        return logits.double().log_softmax(-1)

    return logprobs


def compare(client: httpx.Client, a: str, b: str, **asked: Any) -> Json:
    body = {"state_id": a, "other_state_id": b, **asked}
    found: Json = ok(client.post("/v1/analyze/compare", json=body))
    return found


def state_with(client: httpx.Client, text: str, **body: Any) -> str:
    state_id: str = create(client, text=text, **body)["state_id"]
    return state_id


def assert_exact(positions: list[Json], a: torch.Tensor, b: torch.Tensor) -> None:
    """Every divergence is that of these distributions, and every likeliest token theirs."""
    assert positions
    for place in positions:
        mine, theirs = a[place["position"] - 1], b[place["position"] - 1]
        kl = float((mine.exp() * (mine - theirs)).sum())
        assert place["kl"] == pytest.approx(kl, rel=NEAR, abs=NEAR)
        assert place["top_a"]["token_id"] == int(mine.argmax())
        assert place["top_b"]["token_id"] == int(theirs.argmax())


def assert_compared(found: Json, a: torch.Tensor, b: torch.Tensor) -> None:
    """The positions of a comparison are exact, and those whose likeliest token changed counted."""
    assert_exact(found["positions"], a, b)
    for place in found["positions"]:
        tops = place["top_a"]["token_id"], place["top_b"]["token_id"]
        assert place["changed"] == (tops[0] != tops[1])
    assert found["changed"] == sum(place["changed"] for place in found["positions"])


def assert_equal(client: httpx.Client, state_id: str, analyses: int) -> None:
    report = verify(client, state_id=state_id)
    assert (report["result"], report["analyses"]) == ("equal", analyses), report
    assert report["tokens_reused"] == 0


def test_two_states_are_compared_after_what_they_have_in_common(
    client: httpx.Client, predict: Predict
) -> None:
    a = state_with(client, f"{OPENING} there was a cat.")
    b = state_with(client, f"{OPENING} there was a dog and it ran away.")
    found = compare(client, a, b)
    tokens = tokens_of(client, a), tokens_of(client, b)
    common = found["common_prefix"]["tokens"]
    assert found["common_prefix"]["text"] == f"{OPENING} there was a"
    assert (found["start"], found["end"]) == (common + 1, min(map(len, tokens)) + 1)
    positions = [place["position"] for place in found["positions"]]
    assert positions == list(range(found["start"], found["end"]))
    assert_compared(found, *(predict(TINY, held) for held in tokens))
    assert (found["a"]["state_id"], found["b"]["state_id"]) == (a, b)
    assert found["same_model"]
    assert_equal(client, a, 1)


def test_the_divergence_has_a_direction_and_comes_as_a_tensor(client: httpx.Client) -> None:
    a, b = state_with(client, "The cat sat."), state_with(client, "The dog ran.")
    there, back = compare(client, a, b), compare(client, b, a)
    divergences = [place["kl"] for place in there["positions"]]
    assert divergences != [place["kl"] for place in back["positions"]]
    assert there["changed"] == back["changed"]
    answer = client.post(
        "/v1/analyze/compare",
        json={"state_id": a, "other_state_id": b},
        headers={"Accept": "application/x-npy"},
    )
    assert answer.is_success, answer.text
    assert np.load(io.BytesIO(answer.content)).tolist() == divergences


def test_the_other_version_is_recorded_as_it_was_then(
    client: httpx.Client, predict: Predict
) -> None:
    state_id = state_with(client, "The cat sat.")
    forward(client, state_id, " It was happy.")
    rewind(client, state_id, version=1)
    forward(client, state_id, " The dog ran away.")
    found = compare(client, state_id, state_id, version=2)
    assert (found["a"]["version"], found["b"]["version"]) == (2, 4)
    held = [
        ok(client.get(f"/v1/states/{state_id}", params={"version": v, "include": "tokens"}))
        for v in (2, 4)
    ]
    assert_compared(found, *(predict(TINY, each["tokens"]) for each in held))
    forward(client, state_id, " Again.")
    again = compare(client, state_id, state_id, version=2, other_version=4)
    assert again["positions"] == found["positions"]
    assert compare(client, state_id, state_id, version=2)["b"]["version"] == 5
    assert_equal(client, state_id, 3)


def test_equal_states_have_nothing_to_compare(client: httpx.Client) -> None:
    state_id = state_with(client, "The cat sat.")
    (copy,) = fork(client, state_id)
    found = compare(client, state_id, copy["state_id"])
    assert (found["positions"], found["changed"]) == ([], 0)
    assert found["common_prefix"]["text"] == "The cat sat."
    assert_equal(client, state_id, 1)


def test_long_texts_are_compared_in_chunks_of_any_size(
    client: httpx.Client, predict: Predict
) -> None:
    a, b = state_with(client, f"A cat.{LONG_TEXT}"), state_with(client, f"Some dogs.{LONG_TEXT}")
    whole = compare(client, a, b)
    assert len(whole["positions"]) > 3 * 45
    assert_compared(whole, *(predict(TINY, tokens_of(client, state)) for state in (a, b)))
    part = compare(client, a, b, start=40, end=101)
    assert part["positions"] == [
        place for place in whole["positions"] if 40 <= place["position"] < 101
    ]
    assert_equal(client, a, 2)  # in one chunk


def test_full_contexts_are_compared_to_their_end(client: httpx.Client) -> None:
    tokens = (tokens_of(client, state_with(client, LONG_TEXT)) * 9)[:CONTEXT]
    held = [tokens, [*tokens[:-9], *reversed(tokens[-9:])]]
    a, b = (create(client, text=None, tokens=each)["state_id"] for each in held)
    found = compare(client, a, b, start=CONTEXT - 2)
    assert [place["position"] for place in found["positions"]] == [CONTEXT - 2, CONTEXT - 1]


def test_models_of_one_vocabulary_are_compared_from_the_first_token_on(
    client: httpx.Client, predict: Predict
) -> None:
    a, b = state_with(client, OPENING), state_with(client, OPENING, model_id="other")
    found = compare(client, a, b)
    tokens = tokens_of(client, a)
    assert not found["same_model"]
    assert [each["position"] for each in found["positions"]] == list(range(1, len(tokens) + 1))
    assert_compared(found, predict(TINY, tokens), predict("other", tokens))
    assert_equal(client, a, 1)


def test_what_was_said_of_another_model_holds_under_its_numerics_only(
    client: httpx.Client, database: Path
) -> None:
    a, b = state_with(client, OPENING), state_with(client, OPENING, model_id="other")
    request: dict[str, Any] = {
        "url": "/v1/analyze/compare",
        "json": {"state_id": a, "other_state_id": b},
        "headers": {"Idempotency-Key": f"compare-{a}"},
    }
    first = ok(client.post(**request))
    assert ok(client.post(**request)) == first
    with sqlite3.connect(database) as connection:  # as if the other model had been another one
        where = "WHERE state_id = ? AND type = 'state_analyzed'"
        (payload,) = connection.execute(f"SELECT payload FROM events {where}", (a,)).fetchone()
        changed = json.loads(payload)
        changed["parameters"]["other_fingerprint"] = "x"
        connection.execute(f"UPDATE events SET payload = ? {where}", (json.dumps(changed), a))
    problem = assert_problem(client.post(**request), 409, "fingerprint-changed")
    assert problem["begun_fingerprint"] == "x"
    report = verify(client, state_id=a)
    with sqlite3.connect(database) as connection:
        connection.execute(f"UPDATE events SET payload = ? {where}", (payload, a))
    assert {each["field"] for each in report["divergences"]} == {"hash"}  # of the row alone
    assert any("not re-executed" in note for note in report["notes"])
    assert_equal(client, a, 1)


def test_models_of_two_vocabularies_are_refused(client: httpx.Client) -> None:
    a, b = state_with(client, OPENING), state_with(client, OPENING, model_id="short")
    with nothing_recorded(client):
        answer = client.post("/v1/analyze/compare", json={"state_id": a, "other_state_id": b})
        problem = assert_problem(answer, 400, "invalid-input", "other_state_id")
    assert "vocabulary" in problem["detail"]


@pytest.mark.parametrize("other", ["other", "short"])
def test_a_diff_of_two_models_is_made_where_they_have_one_vocabulary(
    client: httpx.Client, predict: Predict, other: str
) -> None:
    a, b = state_with(client, OPENING), state_with(client, OPENING, model_id=other)
    tokens = tokens_of(client, a)
    with nothing_recorded(client):
        found = ok(client.get(f"/v1/states/{a}/diff/{b}"))
    assert found["common_prefix"]["text"] == OPENING
    assert not found["same_model"]
    if other == "short":
        assert found["kl"] is None
        assert "vocabular" in found["note"]
    else:
        assert found["common_prefix"]["tokens"] == len(tokens)
        assert [place["position"] for place in found["kl"]] == list(range(1, len(tokens) + 1))
        assert_exact(found["kl"], predict(TINY, tokens), predict(other, tokens))


def test_an_other_state_that_is_gone_is_compared_as_it_was(client: httpx.Client) -> None:
    a, b = state_with(client, "The cat sat."), state_with(client, "The dog ran.")
    before = compare(client, a, b)
    delete(client, b)
    assert compare(client, a, b, other_version=1) == before
    answer = client.post("/v1/analyze/compare", json={"state_id": a, "other_state_id": b})
    assert_problem(answer, 404, "state-deleted")
    assert_equal(client, a, 2)


@pytest.mark.parametrize(
    ("asked", "field", "allowed"),
    [
        ({"start": 6}, "start", "0 to 5"),
        ({"end": 7}, "end", "1 to 6"),
        ({"start": 3, "end": 3}, "end", "4 to 6"),
        ({"start": -1}, "start", ">= 0"),
    ],
)
def test_what_there_is_not_is_refused_by_name(
    client: httpx.Client, asked: Json, field: str, allowed: str
) -> None:
    a, b = (
        create(client, text=None, tokens=tokens)["state_id"]
        for tokens in ([1, 2, 3, 4, 5], [1, 2, 9, 4, 5, 6])
    )
    with nothing_recorded(client):
        body = {"state_id": a, "other_state_id": b, **asked}
        answer = client.post("/v1/analyze/compare", json=body)
        problem = assert_problem(answer, 400, "invalid-input", field)
    assert allowed in problem["detail"]


def test_states_and_versions_that_are_not_there_are_not_found(client: httpx.Client) -> None:
    a, b = state_with(client, "The cat sat."), state_with(client, "The dog ran.")
    for body, slug in (
        ({"other_state_id": "state-0"}, "state-not-found"),
        ({"other_state_id": b, "other_version": 2}, "version-not-found"),
        ({"other_state_id": b, "version": 2}, "version-not-found"),
    ):
        with nothing_recorded(client):
            answer = client.post("/v1/analyze/compare", json={"state_id": a, **body})
            assert_problem(answer, 404, slug)


def test_a_refused_comparison_computes_nothing(served: tuple[httpx.Client, Engine]) -> None:
    client, engine = served
    a, b = state_with(client, OPENING), state_with(client, OPENING, model_id="short")
    with Gate(engine) as gate:
        gate.reach()
        for asked in ({"other_state_id": b}, {"other_state_id": a, "start": 99}):
            answer = client.post("/v1/analyze/compare", json={"state_id": a, **asked})
            assert_problem(answer, 400, "invalid-input")
