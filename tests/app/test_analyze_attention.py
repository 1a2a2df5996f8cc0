"""Attention of a state over HTTP: the answer, its record, and what is refused."""

from collections.abc import Sequence
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from tests.app.api import (
    Json,
    assert_problem,
    create,
    forward,
    generate,
    nothing_recorded,
    ok,
    tokens_of,
    verify,
)
from tests.infra.engine import small_models

PATH = "/v1/analyze/attention"
TEXT = "Once upon a time there was a little bear. He had a red coat."
LAYERS, HEADS = 6, 4
NEAR = 1e-5


def analyze(client: httpx.Client, state_id: str, **asked: Any) -> Json:
    found: Json = ok(client.post(PATH, json={"state_id": state_id, **asked}))
    return found


@torch.inference_mode()
def of_transformers(tokens: Sequence[int]) -> torch.Tensor:
    """``(layers, heads, queries, keys)`` by eager attention."""
    plain = small_models.read(small_models.CACHER_TINY).model
    plain.set_attn_implementation("eager")
    found = plain(torch.tensor([tokens]), output_attentions=True, use_cache=False)
    return torch.cat(found.attentions)


@pytest.fixture(scope="module")
def state_id(client: httpx.Client) -> str:
    """A state that was told and made, so that its K/V came to be in several ways."""
    state: str = create(client, text=TEXT[:20])["state_id"]
    forward(client, state, TEXT[20:])
    generate(client, state, 30, temperature=1.0, seed=3)
    return state


def test_attention_of_a_state_is_that_of_transformers(client: httpx.Client, state_id: str) -> None:
    tokens = tokens_of(client, state_id)
    theirs = of_transformers(tokens)
    found = analyze(client, state_id, layer=3)
    assert found["state_id"] == state_id
    assert (found["layer"], found["head"], found["start"]) == (3, None, 0)
    assert found["token_ids"] == tokens
    assert len(found["tokens"]) == found["end"] == len(tokens)
    assert "".join(found["tokens"]).startswith(TEXT)
    assert np.allclose(found["attention_pattern"], theirs[3].mean(0), rtol=0, atol=NEAR)
    one = analyze(client, state_id, layer=5, head=2, start=4, end=9, threshold=0.2)
    pattern = torch.tensor(one["attention_pattern"])
    assert pattern.shape == (5, 9)
    expected = theirs[5, 2, 4:9, :9]
    assert ((pattern == 0) == (expected < 0.2)).all()
    assert (pattern - torch.where(expected < 0.2, 0, expected)).abs().max() < NEAR


def test_every_method_and_format_has_its_shape(client: httpx.Client, state_id: str) -> None:
    rows = {"start": 3, "end": 8}
    several = analyze(client, state_id, layers=[4, 1], heads=[0, 3], **rows)
    assert np.shape(several["attention_pattern"]) == (2, 2, 5, 8)
    sparse = analyze(client, state_id, layers=[4, 1], format="sparse", top_k=3, **rows)
    assert np.shape(sparse["indices"]) == np.shape(sparse["values"]) == (2, 5, 3)
    assert "attention_pattern" not in sparse
    rollout = analyze(client, state_id, method="rollout", **rows)
    assert np.shape(rollout["attention_pattern"]) == (5, 8)
    assert rollout["layer"] == LAYERS - 1
    summary = analyze(client, state_id, method="summary", **rows)
    for figure in ("entropy", "distance", "first_token"):
        assert np.shape(summary[figure]) == (LAYERS, HEADS)
    assert (summary["layers"], summary["layer"]) == (list(range(LAYERS)), None)


def test_an_analysis_is_an_event_that_changes_nothing_and_verifies(client: httpx.Client) -> None:
    state_id = create(client, text=TEXT)["state_id"]
    answer = client.post(PATH, json={"state_id": state_id, "layer": 2, "head": 1})
    assert answer.headers["etag"] == '"1"'
    again = client.post(PATH, json={"state_id": state_id, "layer": 2, "head": 1})
    assert again.json() == answer.json()
    first, second = ok(client.get(f"/v1/states/{state_id}/analyses"))["events"]
    for event in (first, second):
        assert event["type"] == "state_analyzed"
        assert (event["version"], event["at_version"]) == (None, 1)
    recorded = first["payload"]
    assert recorded["parameters"]["kind"] == "attention"
    assert (recorded["parameters"]["layer"], recorded["parameters"]["head"]) == (2, 1)
    assert recorded["result_digest"] == second["payload"]["result_digest"]
    report = verify(client, state_id=state_id)
    assert (report["result"], report["analyses"]) == ("equal", 2)


@pytest.mark.parametrize(
    ("asked", "field", "allowed"),
    [
        ({"layer": LAYERS}, "layer", "0 to 5"),
        ({"layer": -1}, "layer", ">= 0"),
        ({"layers": [0, LAYERS]}, "layers[1]", "0 to 5"),
        ({"layer": 0, "head": HEADS}, "head", "0 to 3"),
        ({"layer": 0, "heads": [0, HEADS]}, "heads[1]", "0 to 3"),
        ({"layer": 0, "start": 10_000}, "start", "0 to "),
        ({"layer": 0, "end": 10_000}, "end", "1 to "),
        ({"layer": 0, "start": 5, "end": 5}, "end", "6 to "),
        ({"layer": 0, "threshold": 1.5}, "threshold", "<= 1"),
        ({"layer": 0, "format": "sparse", "top_k": 0}, "top_k", ">= 1"),
        ({"layer": 0, "format": "csr"}, "format", "csr"),
        ({"layer": 0, "method": "gradient"}, "method", "gradient"),
        ({}, "layer", "name one layer"),
    ],
)
def test_what_there_is_not_is_refused_by_name(
    client: httpx.Client, state_id: str, asked: Json, field: str, allowed: str
) -> None:
    with nothing_recorded(client):
        answer = client.post(PATH, json={"state_id": state_id, **asked})
        problem = assert_problem(answer, 400, "invalid-input", field)
    assert allowed in problem["detail"]


def test_too_large_an_answer_says_how_to_ask_for_less(client: httpx.Client) -> None:
    state = create(client, text=None, tokens=[1 + at % 1000 for at in range(1000)])
    asked = {"layers": list(range(LAYERS)), "heads": list(range(HEADS))}
    with nothing_recorded(client):
        answer = client.post(PATH, json={"state_id": state["state_id"], **asked})
        problem = assert_problem(answer, 413, "result-too-large")
    assert problem["size"] > problem["limit"]
    assert "fewer layers or heads" in problem["detail"]
