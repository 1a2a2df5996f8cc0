"""Hidden states, the cache, the lens and interventions over HTTP: answers, records, refusals."""

from typing import Any

import httpx
import numpy as np
import pytest
import torch

from tests.app.api import (
    Json,
    assert_problem,
    create,
    fork,
    forward,
    generate,
    nothing_recorded,
    ok,
    read,
    tokens_of,
    verify,
)
from tests.infra.engine import inside, small_models
from tests.infra.engine.inside import NEAR

TEXT = "Once upon a time there was a little bear. He had a red coat."
LAYERS, HEADS, WIDTH, VOCABULARY = 6, 4, 128, 1024
KV_HEADS, HEAD_DIM = 4, 32
HIDDEN, EMBEDDING, LENS = "hidden", "embedding", "lens"
CACHE, INTERVENE = "cache/inspect", "intervene"
KEYS = {"layer": 0, "key_name": "k"}
FAR = 10_000


def analyze(client: httpx.Client, kind: str, state_id: str, **asked: Any) -> Json:
    found: Json = ok(client.post(f"/v1/analyze/{kind}", json={"state_id": state_id, **asked}))
    return found


def of_transformers(client: httpx.Client, state_id: str) -> Any:
    return inside.computed(small_models.CACHER_TINY, tuple(tokens_of(client, state_id)))


def near(ours: Any, theirs: torch.Tensor) -> bool:
    return inside.distance(torch.tensor(ours), theirs) < NEAR


@pytest.fixture(scope="module")
def state_id(client: httpx.Client) -> str:
    """A state that was told and made, so that its K/V came to be in several ways."""
    state: str = create(client, text=TEXT[:20])["state_id"]
    forward(client, state, TEXT[20:])
    generate(client, state, 30, temperature=1.0, seed=3)
    return state


def test_hidden_states_and_embeddings_are_those_of_transformers(
    client: httpx.Client, state_id: str
) -> None:
    states = of_transformers(client, state_id).hidden_states
    held = len(tokens_of(client, state_id))
    last = analyze(client, HIDDEN, state_id)
    assert near(last["hidden_states"], states[LAYERS])
    assert (last["layers"], last["start"], last["end"]) == ([LAYERS], 0, held)
    assert (last["pooling"], last["dtype"]) == ("none", "float32")
    some = analyze(client, HIDDEN, state_id, layers=[4, 0], start=3, end=9)
    assert near(some["hidden_states"], torch.cat([states[4], states[0]])[:, 3:9])
    assert some["shape"] == [2, 6, WIDTH]
    pooled = analyze(client, HIDDEN, state_id, layers=[2], pooling="mean")
    assert near(pooled["hidden_states"], states[2].mean(1))
    final = analyze(client, HIDDEN, state_id, end=9, pooling="last")
    assert near(final["hidden_states"], states[LAYERS][:, 8])
    one = analyze(client, EMBEDDING, state_id, token_index=8)
    assert one["embedding"] == final["hidden_states"][0]
    assert (one["token_index"], one["layer"]) == (8, LAYERS)
    first = analyze(client, EMBEDDING, state_id, token_index=held - 1, layer=0)
    assert near(first["embedding"], states[0][0, -1])


def test_keys_and_values_are_those_of_transformers(client: httpx.Client, state_id: str) -> None:
    stored = of_transformers(client, state_id).past_key_values.layers[3]
    whole = analyze(client, CACHE, state_id, layer=3, key_name="v")
    assert near(whole["cache_data"], stored.values[0])
    assert (whole["dtype"], whole["shape"][::2]) == ("float32", [KV_HEADS, HEAD_DIM])
    part = analyze(client, CACHE, state_id, layer=3, key_name="k", head=1, start=5, end=40)
    assert near(part["cache_data"], stored.keys[0, 1, 5:40])
    elements = np.array(part["cache_data"], np.float32).astype(np.float64)
    found = part["statistics"]
    assert found["mean"] == pytest.approx(elements.mean())
    assert found["standard_deviation"] == pytest.approx(elements.std())
    assert found["norm"] == pytest.approx(np.linalg.norm(elements))
    norms = np.linalg.norm(elements, axis=1)
    assert found["min_vector_norm"] == pytest.approx(norms.min())
    assert (found["min"], found["max"]) == (elements.min(), elements.max())


def test_it_tells_which_blocks_are_hot_and_with_how_many_states_they_are_shared(
    client: httpx.Client,
) -> None:
    text = TEXT + " The end of this bear is told nowhere else." * 3
    state = create(client, text=text)["state_id"]
    blocks = analyze(client, CACHE, state, **KEYS)["blocks"]
    assert len(blocks) >= 2
    assert [block["start"] for block in blocks] == [32 * at for at in range(len(blocks))]
    assert {block["other_states"] for block in blocks} == {0}
    fork(client, state)
    create(client, text=None, tokens=[*tokens_of(client, state)[:40], 3])
    analyze(client, CACHE, state, **{**KEYS, "layer": LAYERS - 1})  # computes all layers
    shared = analyze(client, CACHE, state, **KEYS)["blocks"]
    assert [block["other_states"] for block in shared[:2]] == [2, 1]
    assert all(block["tier"] == "device" and block["bytes"] > 0 for block in shared)
    assert all(block["sequences"] == 0 for block in shared)
    assert len(analyze(client, CACHE, state, **KEYS, end=40)["blocks"]) == 1


def test_the_lens_ends_with_what_the_model_says(client: httpx.Client, state_id: str) -> None:
    tokens = tokens_of(client, state_id)
    logits = of_transformers(client, state_id).logits[0].double().log_softmax(-1)
    found = analyze(client, LENS, state_id, start=5, end=len(tokens), top_k=3)
    assert found["token_ids"] == tokens[5:]
    assert "".join(found["tokens"]) in read(client, state_id)["text"]
    assert found["layers"] == list(range(LAYERS + 1))
    last = found["readings"][-1]
    for reading, row in zip(last, logits[5:], strict=True):
        expected, ids = row.topk(3)
        assert [each["token_id"] for each in reading["top"]] == ids.tolist()
        assert near([each["logprob"] for each in reading["top"]], expected)
    told = ok(client.get(f"/v1/analyze/tokens/{state_id}", params={"start": 6}))["tokens"]
    for reading, token in zip(last[:-1], told, strict=True):
        for field in ("logprob", "rank", "entropy"):
            assert reading[field] == token[field]
    assert last[-1]["logprob"] is last[-1]["rank"] is None
    one = analyze(client, LENS, state_id, position=9, layers=[2], top_k=3)
    assert one["readings"] == [[found["readings"][2][4]]]


def test_an_intervention_tells_what_would_come_and_changes_nothing(
    client: httpx.Client, state_id: str
) -> None:
    before = read(client, state_id, include="tokens")
    coming = ok(client.get(f"/v1/analyze/next/{state_id}"))
    replaced = [*before["tokens"]]
    replaced[3] = 7
    told = create(client, text=None, tokens=replaced, config={"temperature": 1.0})["state_id"]
    found = analyze(client, INTERVENE, state_id, replace={"3": 7})
    assert found["original"]["top"] == coming["top"]
    instead = ok(client.get(f"/v1/analyze/next/{told}"))
    pairs = zip(found["edited"]["top"], instead["top"], strict=True)
    assert all(ours["logprob"] == theirs["logprob"] for ours, theirs in pairs)
    assert found["kl"] > 0
    assert found["position"] == len(replaced)
    for edit in (
        {"zero_heads": [{"layer": 2, "head": 3}, {"layer": 0, "head": 1}]},
        {"add": [{"layer": 4, "vector": [0.3] * WIDTH, "start": 2, "end": 30}]},
    ):
        edited = analyze(client, INTERVENE, state_id, **edit, top_k=2)
        assert edited["kl"] > 0
        assert edited["edited"]["top"] != edited["original"]["top"]
    assert read(client, state_id, include="tokens") == before


def test_each_is_an_event_that_verifies(client: httpx.Client) -> None:
    state = create(client, text=TEXT)["state_id"]
    asked: list[tuple[str, Json]] = [
        (HIDDEN, {"layers": [1, 6], "pooling": "mean"}),
        (EMBEDDING, {"token_index": 4}),
        (CACHE, {"layer": 5, "key_name": "v"}),
        (LENS, {"position": 6}),
        (INTERVENE, {"replace": {"2": 5}, "zero_heads": [{"layer": 1, "head": 1}]}),
    ]
    for kind, parameters in asked:
        body = {"state_id": state, **parameters}
        answer = client.post(f"/v1/analyze/{kind}", json=body)
        assert answer.headers["etag"] == '"1"'
        assert ok(answer)["version"] == 1
    recorded = ok(client.get(f"/v1/states/{state}/analyses"))["events"]
    kinds = [event["payload"]["parameters"]["kind"] for event in recorded]
    assert kinds == ["hidden", "embedding", "cache", "lens", "intervene"]
    report = verify(client, state_id=state)
    assert (report["result"], report["analyses"]) == ("equal", len(asked))


REFUSED: list[tuple[str, Json, str, str]] = [
    (HIDDEN, {"layers": [0, LAYERS + 1]}, "layers[1]", "0 to 6"),
    (HIDDEN, {"layers": [2, 2]}, "layers[1]", "twice"),
    (HIDDEN, {"layers": [-1]}, "layers[0]", ">= 0"),
    (HIDDEN, {"layers": []}, "layers", ">= 1"),
    (HIDDEN, {"start": FAR}, "start", "0 to "),
    (HIDDEN, {"end": FAR}, "end", "1 to "),
    (HIDDEN, {"start": 5, "end": 5}, "end", "6 to "),
    (HIDDEN, {"pooling": "max"}, "pooling", "max"),
    (HIDDEN, {"layer": 3}, "layer", "not a field"),
    (EMBEDDING, {"token_index": FAR}, "token_index", "0 to "),
    (EMBEDDING, {"token_index": -1}, "token_index", ">= 0"),
    (EMBEDDING, {"token_index": 0, "layer": LAYERS + 1}, "layer", "0 to 6"),
    (EMBEDDING, {}, "token_index", "is required"),
    (CACHE, {**KEYS, "layer": LAYERS}, "layer", "0 to 5"),
    (CACHE, {**KEYS, "head": KV_HEADS}, "head", "0 to 3: the model has 4 K/V heads"),
    (CACHE, {**KEYS, "key_name": "q"}, "key_name", "q"),
    (CACHE, {**KEYS, "start": FAR}, "start", "0 to "),
    (CACHE, {**KEYS, "end": FAR}, "end", "1 to "),
    (LENS, {"layers": [LAYERS + 1]}, "layers[0]", "0 to 6"),
    (LENS, {"position": FAR}, "position", "0 to "),
    (LENS, {"position": 2, "end": 4}, "position", "start and end"),
    (LENS, {"start": FAR}, "start", "0 to "),
    (LENS, {"start": 1, "end": 1}, "end", "2 to "),
    (LENS, {"top_k": 101}, "top_k", "<= 100"),
    (INTERVENE, {}, "replace", "nothing is edited"),
    (INTERVENE, {"replace": {str(FAR): 1}}, f"replace.{FAR}", "0 to "),
    (INTERVENE, {"replace": {"1": VOCABULARY}}, "replace.1", "0 to 1023"),
    (INTERVENE, {"replace": {"1": -1}}, "replace.1", "0 to 1023"),
    (INTERVENE, {"replace": {"1": 10**30}}, "replace.1", "0 to 1023"),
    (INTERVENE, {"zero_heads": [{"layer": LAYERS, "head": 0}]}, "zero_heads[0].layer", "0 to 5"),
    (INTERVENE, {"zero_heads": [{"layer": 0, "head": HEADS}]}, "zero_heads[0].head", "0 to 3"),
    (INTERVENE, {"zero_heads": [{"layer": 0, "head": 0}] * 2}, "zero_heads[1]", "twice"),
    (INTERVENE, {"add": [{"layer": LAYERS, "vector": [0.0] * WIDTH}]}, "add[0].layer", "0 to 5"),
    (INTERVENE, {"add": [{"layer": 0, "vector": [0.0]}]}, "add[0].vector", "128 numbers"),
    (
        INTERVENE,
        {"add": [{"layer": 0, "vector": [0.0] * (WIDTH - 1) + [1e39]}]},
        f"add[0].vector[{WIDTH - 1}]",
        "float32",
    ),
    (
        INTERVENE,
        {"add": [{"layer": 0, "vector": [0.0] * WIDTH, "start": FAR}]},
        "add[0].start",
        "0 to ",
    ),
    (
        INTERVENE,
        {"add": [{"layer": 0, "vector": [0.0] * WIDTH, "start": 2, "end": 2}]},
        "add[0].end",
        "3 to ",
    ),
]


@pytest.mark.parametrize(("kind", "asked", "field", "allowed"), REFUSED)
def test_what_there_is_not_is_refused_by_name(
    client: httpx.Client, state_id: str, kind: str, asked: Json, field: str, allowed: str
) -> None:
    with nothing_recorded(client):
        answer = client.post(f"/v1/analyze/{kind}", json={"state_id": state_id, **asked})
        problem = assert_problem(answer, 400, "invalid-input", field)
    assert allowed in problem["detail"]


def test_too_large_an_answer_says_how_to_ask_for_less(client: httpx.Client) -> None:
    state = create(client, text=None, tokens=[1 + at % 1000 for at in range(1000)])["state_id"]
    with nothing_recorded(client):
        answer = client.post("/v1/analyze/lens", json={"state_id": state, "top_k": 100})
        problem = assert_problem(answer, 413, "result-too-large")
    assert problem["size"] > problem["limit"]
    assert "lower top_k" in problem["detail"]
