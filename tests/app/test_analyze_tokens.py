"""How likely each token of a state was: stored where it was stored, and the same bits if not."""

import io
import json
import math
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from app.operations.analysis import stored
from domain.analysis.exact import perplexity
from infra.engine.engine import Engine
from tests.app.api import (
    LONG_TEXT,
    Json,
    assert_problem,
    beams,
    configure,
    create,
    delete,
    fork,
    forward,
    generate,
    multi,
    nothing_recorded,
    ok,
    read,
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

PROMPT = [400, 401, 402, 403, 404]
NEW = 12
WARM: Json = {"temperature": 1.0, "top_p": 1.0, "seed": 5}
NEAR = 1e-5
LLAMA = "\U0001f999"
Served = tuple[httpx.Client, Engine]


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokens") / "cacher.db"


@pytest.fixture(scope="module")
def served(database: Path) -> Iterator[Served]:
    with serving(database) as (client, engine):
        yield client, engine


@pytest.fixture(scope="module")
def client(served: Served) -> httpx.Client:
    return served[0]


def analyze(client: httpx.Client, state_id: str, **asked: Any) -> Json:
    found: Json = ok(client.get(f"/v1/analyze/tokens/{state_id}", params=asked))
    return found


def with_tokens(client: httpx.Client, tokens: Sequence[int], **config: Any) -> str:
    state = ok(client.post("/v1/states", json={"tokens": list(tokens), "config": config}))
    state_id: str = state["state_id"]
    return state_id


def generated(client: httpx.Client, count: int = NEW, **config: Any) -> str:
    """A state with tokens that were generated after the prompt."""
    state_id = with_tokens(client, PROMPT, **config)
    generate(client, state_id, count, **WARM)
    return state_id


def told(found: Json) -> tuple[Any, Any]:
    """What is recorded of an answer: not where it comes from."""
    return found["tokens"], found["perplexity"]


def recomputed(client: httpx.Client, state_id: str, **asked: Any) -> tuple[Any, Any]:
    """The same of a state that has the same tokens as its prompt, so that nothing is stored."""
    found = analyze(client, with_tokens(client, tokens_of(client, state_id)), **asked)
    assert found["tokens_stored"] == 0
    return told(found)


def sources(found: Json) -> tuple[int, int]:
    return found["tokens_stored"], found["tokens_recomputed"]


def assert_true(
    client: httpx.Client, state_id: str, told_by_log: int, computed: int, **asked: Any
) -> Json:
    """So many tokens came from the log, and all are bit for bit what is computed from nothing."""
    found = analyze(client, state_id, **asked)
    assert sources(found) == (told_by_log, computed)
    assert told(found) == recomputed(client, state_id, **asked)
    report = verify(client, state_id=state_id)
    assert (report["result"], report["tokens_reused"]) == ("equal", 0)
    assert report["analyses"] > 0
    return found


# what is said


def test_the_answer_is_that_of_transformers(client: httpx.Client) -> None:
    state_id = create(client, text=LONG_TEXT[:60])["state_id"]
    generate(client, state_id, NEW, **WARM)
    tokens = tokens_of(client, state_id)
    found = analyze(client, state_id, top_k=3)
    plain = small_models.read(small_models.CACHER_TINY).model
    with torch.inference_mode():
        logits = plain(torch.tensor([tokens]), use_cache=False).logits[0, :-1].double()
    logprobs = logits.log_softmax(-1)
    of_text = logprobs.gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0]
    first, *rest = found["tokens"]
    nothing = ("logprob", "surprisal", "rank", "entropy")
    assert [first[name] for name in nothing] == [None] * 4
    assert first["top"] == []
    assert [each["token_id"] for each in found["tokens"]] == tokens
    assert [each["position"] for each in found["tokens"]] == list(range(len(tokens)))
    assert "".join(each["text"] for each in found["tokens"]) == read(client, state_id)["text"]
    assert [each["logprob"] for each in rest] == pytest.approx(of_text.tolist(), rel=NEAR, abs=NEAR)
    assert [each["surprisal"] for each in rest] == [-each["logprob"] for each in rest]
    entropies = -(logprobs.exp() * logprobs).sum(-1)
    assert [each["entropy"] for each in rest] == pytest.approx(entropies.tolist(), abs=NEAR)
    assert [each["rank"] for each in rest] == (logprobs > of_text[:, None]).sum(-1).tolist()
    values, ids = logprobs.topk(3)
    assert [[top["token_id"] for top in each["top"]] for each in rest] == ids.tolist()
    likeliest = [top["logprob"] for each in rest for top in each["top"]]
    assert likeliest == pytest.approx(values.flatten().tolist(), rel=NEAR, abs=NEAR)
    assert found["perplexity"] == pytest.approx(math.exp(-of_text.mean()), rel=NEAR)


def test_perplexity_is_over_the_scored_tokens_of_the_range(client: httpx.Client) -> None:
    state_id = with_tokens(client, PROMPT)
    whole = analyze(client, state_id)
    surprisals = [each["surprisal"] for each in whole["tokens"][1:]]
    assert whole["perplexity"] == pytest.approx(math.exp(sum(surprisals) / 4), rel=1e-14)
    part = analyze(client, state_id, start=2, end=4)
    assert part["tokens"] == whole["tokens"][2:4]
    assert part["perplexity"] == pytest.approx(math.exp(sum(surprisals[1:3]) / 2), rel=1e-14)
    first = analyze(client, state_id, end=1, top_k=2)
    assert (len(first["tokens"]), first["perplexity"]) == (1, None)
    assert sources(first) == (0, 0)


@given(st.lists(st.floats(-600, 0), min_size=1, max_size=30))
def test_perplexity_is_the_exponential_of_the_mean_surprisal(logprobs: list[float]) -> None:
    expected = math.exp(-math.fsum(logprobs) / len(logprobs))
    assert perplexity(logprobs) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("logprobs", [[], [-800.0], [-1e12], [-1e308, -1e308]])
def test_there_is_no_perplexity_that_is_no_number(logprobs: list[float]) -> None:
    assert perplexity(logprobs) is None


def test_tokens_inside_a_character_come_with_their_bytes(client: httpx.Client) -> None:
    state_id = create(client, text=LLAMA)["state_id"]
    found = [each for each in analyze(client, state_id)["tokens"] if "bytes" in each]
    assert bytes(byte for each in found for byte in each["bytes"]) == LLAMA.encode()
    assert [each["text"] for each in found] == ["", "", "", LLAMA]
    widest = analyze(client, state_id, top_k=1000)["tokens"][-1]["top"]
    assert any("bytes" in top for top in widest)


def test_the_exact_bits_come_as_tensors(client: httpx.Client) -> None:
    state_id = generated(client)
    found = analyze(client, state_id, start=3, end=9)
    for name, field in (("logprobs", "logprob"), ("ranks", "rank"), ("entropies", "entropy")):
        answer = client.get(
            f"/v1/analyze/tokens/{state_id}",
            params={"start": 3, "end": 9, "tensor": name},
            headers={"Accept": "application/x-npy"},
        )
        assert answer.is_success, answer.text
        array = np.load(io.BytesIO(answer.content))
        assert array.tolist() == [each[field] for each in found["tokens"]]
        assert name not in found


# where it comes from


@pytest.mark.parametrize(
    ("top_k", "config", "wish"),
    [
        (0, {"store_logits": "none"}, {}),
        (3, {"store_logits": "top_k", "top_k_logits": 3}, {}),
        (5, {"store_logits": "full"}, {}),
        (1000, {"store_logits": "full"}, {}),
        (2, {"store_logits": "none"}, {"top_logprobs": 2}),
    ],
)
def test_what_was_stored_is_told_without_a_pass_of_the_model(
    served: Served, top_k: int, config: Json, wish: Json
) -> None:
    client, engine = served
    state_id = with_tokens(client, PROMPT, **config)
    generate(client, state_id, NEW, **WARM, **wish)
    asked = {"start": len(PROMPT), "top_k": top_k}
    with Gate(engine) as gate:  # nothing is computed before it opens
        gate.reach()
        found = analyze(client, state_id, **asked)
    assert found == assert_true(client, state_id, NEW, 0, **asked)


@pytest.mark.parametrize(
    ("top_k", "config", "wish"),
    [
        (1, {"store_logits": "none"}, {}),
        (4, {"store_logits": "top_k", "top_k_logits": 3}, {}),
        (3, {"store_logits": "none"}, {"top_logprobs": 2}),
    ],
)
def test_what_was_not_stored_is_computed(
    client: httpx.Client, top_k: int, config: Json, wish: Json
) -> None:
    state_id = with_tokens(client, PROMPT, **config)
    generate(client, state_id, NEW, **WARM, **wish)
    assert_true(client, state_id, 0, NEW, start=len(PROMPT), top_k=top_k)


def test_a_stored_value_that_was_changed_is_told_and_found_by_verification(
    client: httpx.Client, database: Path
) -> None:
    state_id = generated(client)
    honest = analyze(client, state_id)
    with sqlite3.connect(database) as connection:
        query = "SELECT position, payload FROM events WHERE state_id = ? AND version = 2"
        position, payload = connection.execute(query, (state_id,)).fetchone()
        changed = json.loads(payload)
        changed["scores"]["logprobs"][3] -= 1e-9
        connection.execute(
            "UPDATE events SET payload = ? WHERE position = ?", (json.dumps(changed), position)
        )
    misled = analyze(client, state_id)
    assert sources(misled) == (NEW, len(PROMPT) - 1)
    assert told(misled) != told(honest) == recomputed(client, state_id)
    place = len(PROMPT) + 3
    assert [a == b for a, b in zip(misled["tokens"], honest["tokens"], strict=True)] == [
        at != place for at in range(len(PROMPT) + NEW)
    ]
    with sqlite3.connect(database) as connection:
        connection.execute("UPDATE events SET payload = ? WHERE position = ?", (payload, position))
    report = verify(client, state_id=state_id)
    assert report["result"] == "divergent"
    assert {each["field"] for each in report["divergences"]} == {"result_digest"}


def test_stored_logits_that_were_changed_are_not_believed(
    client: httpx.Client, database: Path
) -> None:
    state_id = generated(client, store_logits="top_k", top_k_logits=2)
    honest = analyze(client, state_id, top_k=2)
    assert sources(honest) == (NEW, len(PROMPT) - 1)
    with sqlite3.connect(database) as connection:
        query = "SELECT position FROM events WHERE state_id = ? AND version = 2"
        (position,) = connection.execute(query, (state_id,)).fetchone()
        connection.execute(
            "UPDATE logits SET data = zeroblob(16) WHERE position = ? AND step = 1", (position,)
        )
    again = analyze(client, state_id, top_k=2)
    assert sources(again) == (0, len(PROMPT) + NEW - 1)
    assert told(again) == told(honest)


# what became of the state


def test_what_was_forwarded_was_stored_too(client: httpx.Client) -> None:
    state_id = generated(client, 4)
    forward(client, state_id, tokens=[300, 301, 302])
    generate(client, state_id, 4, **WARM)
    assert_true(client, state_id, 11, 4)
    assert_true(client, state_id, 8, 7, top_k=2)


def test_after_a_rewind_only_what_is_still_held_is_told(client: httpx.Client) -> None:
    state_id = generated(client)
    rewind(client, state_id, position=len(PROMPT) + 4)
    forward(client, state_id, tokens=[300, 301])
    rewind(client, state_id, position=len(PROMPT) + 5)
    generate(client, state_id, 3, temperature=0.0)
    assert_true(client, state_id, 8, 4)
    at_first = analyze(client, state_id, version=2)
    assert len(at_first["tokens"]) == len(PROMPT) + NEW


def test_after_a_slide_what_came_before_it_is_computed(client: httpx.Client) -> None:
    state_id = with_tokens(client, PROMPT, context_size=12, on_full="slide")
    generate(client, state_id, 7, **WARM)
    forward(client, state_id, tokens=[300, 301])
    assert read(client, state_id)["dropped"] == 6
    found = assert_true(client, state_id, 2, 5)
    before = analyze(client, state_id, version=2)
    assert before["tokens"][6:12] != found["tokens"][:6]


def test_a_fork_is_told_what_its_ancestors_know(client: httpx.Client) -> None:
    state_id = generated(client)
    (child,) = fork(client, state_id, position=len(PROMPT) + 6)
    rewind(client, state_id, position=1)
    generate(client, child["state_id"], 3, **WARM)
    (grandchild,) = fork(client, child["state_id"], config={"temperature": 0.1})
    delete(client, state_id)
    assert_true(client, grandchild["state_id"], 9, 4)


def test_a_fork_that_adopts_a_continuation_is_told_what_is_known_of_it(
    client: httpx.Client,
) -> None:
    state_id = generated(client, store_logits="top_k", top_k_logits=2)
    made = multi(client, state_id, 3, 4, **WARM | {"temperature": 2.0})
    assert len({tuple(each["token_ids"]) for each in made["continuations"]}) == 3
    for index in range(3):
        chosen = {"version": made["version"], "index": index}
        (child,) = fork(client, state_id, continuation=chosen)
        assert_true(client, child["state_id"], NEW + 4, 4, top_k=2)
    found = beams(client, state_id, num_beams=3, max_length=4, num_return=2)
    (child,) = fork(client, state_id, continuation={"version": found["version"], "index": 1})
    assert_true(client, child["state_id"], NEW + len(found["sequences"][1]["token_ids"]), 4)


def test_a_merge_has_other_tokens_before_it_and_is_computed(client: httpx.Client) -> None:
    first, second = generated(client), with_tokens(client, [7, 8, 9])
    body = {"state_ids": [first, second], "strategy": "concatenate"}
    merged = ok(client.post("/v1/states/merge", json=body))
    assert_true(client, merged["state_id"], 0, len(PROMPT) + NEW + 2)


def test_events_are_read_page_by_page_and_not_too_many(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    state_id = generated(client, 3, store_logits="full")
    for temperature in range(70):
        configure(client, state_id, temperature=temperature / 70)
    generate(client, state_id, 2, **WARM)
    assert_true(client, state_id, 5, 4, top_k=1)
    monkeypatch.setattr(stored, "MAX_PAGES", 1)
    assert_true(client, state_id, 2, 7, top_k=1)
    monkeypatch.setattr(stored, "MAX_ROW_BYTES", 2 * 4 * 1024 - 1)  # of two whole rows
    assert_true(client, state_id, 0, 9, top_k=1)
    assert_true(client, state_id, 2, 7)


def test_what_other_numerics_found_is_computed_again(
    client: httpx.Client, database: Path, tmp_path: Path
) -> None:
    state_id = generated(client)
    exact = analyze(client, state_id)
    assert sources(exact) == (NEW, len(PROMPT) - 1)
    copy = tmp_path / "copy.db"
    with sqlite3.connect(database) as source, sqlite3.connect(copy) as target:
        source.backup(target)
    with serving(copy, dtype="bfloat16") as (other, _):
        coarse = analyze(other, state_id)
        assert sources(coarse) == (0, len(PROMPT) + NEW - 1)
        assert told(coarse) == recomputed(other, state_id)
        assert told(coarse) != told(exact)
        assert coarse["perplexity"] == pytest.approx(exact["perplexity"], rel=0.1)


# what there is not


@pytest.mark.parametrize(
    ("asked", "field", "allowed"),
    [
        ({"start": 5}, "start", "0 to 4"),
        ({"start": -1}, "start", ">= 0"),
        ({"end": 6}, "end", "1 to 5"),
        ({"start": 3, "end": 3}, "end", "4 to 5"),
        ({"top_k": 1001}, "top_k", "<= 1000"),
    ],
)
def test_what_there_is_not_is_refused_by_name(
    client: httpx.Client, asked: Json, field: str, allowed: str
) -> None:
    state_id = with_tokens(client, PROMPT)
    with nothing_recorded(client):
        answer = client.get(f"/v1/analyze/tokens/{state_id}", params=asked)
        problem = assert_problem(answer, 400, "invalid-input", field)
    assert allowed in problem["detail"]


def test_too_large_an_answer_is_refused_before_it_is_computed(served: Served) -> None:
    client, engine = served
    state_id = with_tokens(client, [1 + at % 1000 for at in range(1000)])
    with Gate(engine), nothing_recorded(client):
        answer = client.get(f"/v1/analyze/tokens/{state_id}", params={"top_k": 1000})
        problem = assert_problem(answer, 413, "result-too-large")
    assert "fewer alternatives" in problem["detail"]
