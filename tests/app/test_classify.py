"""Classifying texts: states of classifiers, and labels by likelihood on states that write."""

import math
import struct
from typing import Any, Final

import httpx
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from infra.models.catalogue import source_of
from tests.app.api import (
    Json,
    assert_problem,
    configure,
    create,
    delete,
    fork,
    forward,
    generate,
    nothing_recorded,
    ok,
    read,
    read_sent,
    rewind,
    tokens_of,
    verify,
)

SENTIMENT: Final = "cacher-tiny-sentiment"
GLAD: Final = "Mia was so happy. She laughed and hugged her friend."
SAD: Final = "Tom lost his toy. He was very sad and began to cry."
LABELS: Final = [" happy", " sad", " a big red ball"]


def sentiment(client: httpx.Client, text: str = GLAD, **body: Any) -> str:
    """A state of the classifier."""
    state_id: str = create(client, model_id=SENTIMENT, text=text, **body)["state_id"]
    return state_id


def classify(client: httpx.Client, state_id: str, **body: Any) -> Json:
    asked = {"state_id": state_id, **body}
    found: Json = ok(client.post("/v1/analyze/classify", json=asked))
    return found


def forked(client: httpx.Client, state_id: str) -> str:
    (made,) = fork(client, state_id)
    made_id: str = made["state_id"]
    return made_id


def refused(client: httpx.Client, state_id: str, *fields: str, **body: Any) -> Json:
    with nothing_recorded(client):
        answer = client.post("/v1/analyze/classify", json={"state_id": state_id, **body})
    return assert_problem(answer, 400, "invalid-input", *fields)


def plain_logits(text: str) -> list[float]:
    folder = source_of(SENTIMENT).location
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        logits = model(**AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")).logits
    found: list[float] = logits[0].tolist()
    return found


# by a classifier


@pytest.mark.parametrize(("text", "label"), [(GLAD, "positive"), (SAD, "negative")])
def test_the_classifier_that_ships_tells_glad_stories_from_sad_ones(
    client: httpx.Client, text: str, label: str
) -> None:
    found = classify(client, sentiment(client, text))
    assert found["label"] == label
    assert found["problem_type"] == "single_label_classification"
    assert found["scores"][0]["label"] == label
    assert {one["label"] for one in found["scores"]} == {"negative", "positive"}
    assert found["score"] == found["scores"][0]["score"] > 0.9
    assert sum(one["score"] for one in found["scores"]) == pytest.approx(1, abs=1e-12)
    expected = plain_logits(text)
    assert found["logits"] == pytest.approx(expected, abs=1e-5)
    softmax = torch.tensor(expected, dtype=torch.float64).softmax(0).tolist()
    by_label = {one["label"]: one["score"] for one in found["scores"]}
    assert [by_label["negative"], by_label["positive"]] == pytest.approx(softmax, abs=1e-5)


def test_another_text_is_classified_without_being_appended(client: httpx.Client) -> None:
    state_id = sentiment(client, GLAD)
    before = read(client, state_id, include="tokens")
    found = classify(client, state_id, text=SAD)
    own = classify(client, sentiment(client, SAD))
    assert {**found, "state_id": None} == {**own, "state_id": None}
    assert read(client, state_id, include="tokens") == before
    (event,) = ok(client.get(f"/v1/states/{state_id}/analyses"))["events"]
    assert event["payload"]["parameters"] == {"kind": "classify", "text": SAD, "labels": None}
    assert (event["version"], event["at_version"]) == (None, 1)


def test_logits_come_with_their_exact_bits(client: httpx.Client) -> None:
    body = {"state_id": sentiment(client)}
    answer = client.post("/v1/analyze/classify", json=body, headers={"Accept": "application/x-npy"})
    assert answer.status_code == 200, answer.text
    logits = np.frombuffer(answer.content[-8:], "<f4")
    told = classify(client, body["state_id"])["logits"]
    assert [struct.unpack("<f", struct.pack("<f", one))[0] for one in told] == logits.tolist()


@pytest.mark.parametrize("model_type", ["auto", "sequence_classification"])
def test_the_type_of_a_model_is_found_out_or_named(client: httpx.Client, model_type: str) -> None:
    state_id = sentiment(client, model_type=model_type)
    assert read(client, state_id)["model_type"] == "sequence_classification"
    assert read(client, state_id)["text"] == GLAD


@pytest.mark.parametrize(
    ("model_id", "model_type"),
    [(SENTIMENT, "causal_lm"), ("cacher-tiny", "sequence_classification")],
)
def test_a_type_that_the_model_is_not_of_is_refused(
    client: httpx.Client, model_id: str, model_type: str
) -> None:
    body = {"model_id": model_id, "model_type": model_type, "text": GLAD}
    with nothing_recorded(client):
        answer = client.post("/v1/states", json=body)
    assert_problem(answer, 400, "invalid-input", "model_type")


def test_states_of_a_classifier_live_like_others_and_verify(client: httpx.Client) -> None:
    state_id = sentiment(client, "Mia was")
    appended = forward(client, state_id, " so happy")
    assert [token["logprob"] for token in appended["tokens"]] == [None] * len(appended["tokens"])
    happy = classify(client, state_id)
    assert happy["logits"] == pytest.approx(plain_logits("Mia was so happy"), abs=1e-5)
    forward(client, state_id, " to see her")
    assert classify(client, state_id, version=appended["version"]) == {
        **happy,
        "version": appended["version"],
    }
    rewind(client, state_id, position=appended["head_position"])
    configure(client, state_id, context_size=100)
    assert classify(client, state_id)["logits"] == happy["logits"]
    branch = forked(client, state_id)
    other = sentiment(client, "Mia was sad")
    body = {"state_ids": [state_id, other], "strategy": "concatenate"}
    merged = ok(client.post("/v1/states/merge", json=body))
    assert merged["model_type"] == "sequence_classification"
    assert merged["text"] == "Mia was so happy sad"
    empty = ok(client.post("/v1/states", json={"model_id": SENTIMENT}))
    given = ok(
        client.post("/v1/states", json={"model_id": SENTIMENT, "tokens": tokens_of(client, other)})
    )
    assert classify(client, given["state_id"])["logits"] == classify(client, other)["logits"]
    assert read(client, state_id, include="cache")["cache"] == {"tier": "none", "tokens_hot": 0}
    assert SENTIMENT not in client.get("/metrics").text
    compared = ok(client.get(f"/v1/states/{state_id}/diff/{other}"))
    assert "classifier" in compared["note"]
    created = (merged, empty, given)
    for each in (state_id, other, branch, *(one["state_id"] for one in created)):
        report = verify(client, state_id=each)
        assert report["result"] == "equal", report
        assert report["tokens_recomputed"] == 0
    delete(client, state_id)


def test_nothing_else_can_be_asked_of_a_classifier(client: httpx.Client) -> None:
    state_id = sentiment(client)
    body = {"state_id": state_id}
    asked: dict[str, Json] = {
        "/v1/generate/token": {},
        "/v1/generate/multi": {"n": 2},
        "/v1/generate/beam": {},
        "/v1/analyze/attention": {"layer": 0},
        "/v1/analyze/hidden": {},
        "/v1/analyze/lens": {},
    }
    with nothing_recorded(client):
        for path, wish in asked.items():
            problem = assert_problem(
                client.post(path, json=body | wish), 400, "invalid-input", "state_id"
            )
            assert "is a state of a classifier (sequence_classification)" in problem["detail"]
        wish = body | {"stream": True}
        assert_problem(
            client.post("/v1/generate/token", json=wish), 400, "invalid-input", "state_id"
        )
        for path in ("tokens", "next"):
            answer = client.get(f"/v1/analyze/{path}/{state_id}")
            assert_problem(answer, 400, "invalid-input", "state_id")


def test_labels_are_for_states_that_write_and_needed_there(client: httpx.Client) -> None:
    problem = refused(client, sentiment(client), "labels", labels=LABELS)
    assert "'negative', 'positive'" in problem["detail"]
    writer = create(client)["state_id"]
    assert "required" in refused(client, writer, "labels")["detail"]
    assert "text" in refused(client, sentiment(client), "text", text="")["detail"]


def test_a_text_that_does_not_fit_is_too_large(client: httpx.Client) -> None:
    state_id = sentiment(client)
    for text in ("happy " * 1500, "x" * 200_000):
        body = {"state_id": state_id, "text": text}
        with nothing_recorded(client):
            answer = client.post("/v1/analyze/classify", json=body)
        assert_problem(answer, 413, "too-large")


def test_streams_are_not_changed_by_texts_that_are_classified_meanwhile(
    client: httpx.Client,
) -> None:
    state_id, writer = sentiment(client), create(client)["state_id"]
    alone, expected = (
        generate(client, forked(client, writer), 40, seed=3),
        classify(client, state_id),
    )
    body = {"state_id": forked(client, writer), "max_tokens": 40, "seed": 3, "stream": True}
    with client.stream("POST", "/v1/generate/token", json=body) as answer:
        sending = read_sent(answer)
        sent = [next(sending)]
        found = [classify(client, state_id) for _ in range(5)]
        sent += sending
    assert found == [expected] * 5
    assert sent[-1].data["token_ids"] == alone["token_ids"]
    assert sent[-1].data["logprobs"] == alone["logprobs"]


# by the likelihood of labels


def label_logprobs(tokens: list[int], labels: list[str]) -> list[list[float]]:
    """Log-probabilities of each label's tokens after a text, by transformers alone."""
    folder = source_of("cacher-tiny").location
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    found = []
    for label in labels:
        own = tokenizer.encode(label, add_special_tokens=False)
        with torch.inference_mode():
            logits = model(torch.tensor([tokens + own])).logits[0].double()
        logprobs = logits.log_softmax(-1)
        places = range(len(tokens), len(tokens) + len(own))
        found.append(
            [logprobs[place - 1, token].item() for place, token in zip(places, own, strict=True)]
        )
    return found


@pytest.mark.parametrize("text", [None, " He was"])
def test_labels_are_weighed_by_how_likely_they_come_next(
    client: httpx.Client, text: str | None
) -> None:
    state = create(client, text="Tom lost his toy and cried.")
    found = classify(client, state["state_id"], labels=LABELS, text=text)
    tokens = tokens_of(client, state["state_id"])
    if text is not None:
        longer = forked(client, state["state_id"])
        forward(client, longer, text)
        tokens = tokens_of(client, longer)
    expected = dict(zip(LABELS, label_logprobs(tokens, LABELS), strict=True))
    assert {one["label"] for one in found["scores"]} == set(LABELS)
    for one in found["scores"]:
        logprobs = expected[one["label"]]
        assert len(one["token_ids"]) == len(logprobs)
        assert one["logprob"] == pytest.approx(sum(logprobs), abs=1e-4)
        assert one["mean_logprob"] == pytest.approx(sum(logprobs) / len(logprobs), abs=1e-4)
    for score, value in (("score", "mean_logprob"), ("score_by_sum", "logprob")):
        weights = [math.exp(one[value]) for one in found["scores"]]
        assert [one[score] for one in found["scores"]] == pytest.approx(
            [weight / sum(weights) for weight in weights], abs=1e-12
        )
    best = max(expected, key=lambda label: sum(expected[label]) / len(expected[label]))
    assert (found["label"], found["scores"][0]["label"]) == (best, best)
    assert found["score"] == max(one["score"] for one in found["scores"])
    assert read(client, state["state_id"])["version"] == state["version"]
    report = verify(client, state_id=state["state_id"])
    assert (report["result"], report["analyses"]) == ("equal", 1)


def test_labels_that_do_not_fit_are_all_named(client: httpx.Client) -> None:
    full = create(client, text=None, tokens=[300] * 1022)["state_id"]
    labels = [" dog", " a big red ball", "x" * 900, " sad"]
    problem = refused(client, full, "labels[1]", "labels[2]", labels=labels)
    assert "leaves room for 2" in problem["detail"]
    found = classify(client, full, labels=[" a", " sad"])
    assert len(found["scores"]) == 2


def test_a_label_that_is_named_twice_is_refused(client: httpx.Client) -> None:
    state_id = create(client)["state_id"]
    problem = refused(client, state_id, "labels[2]", labels=[" glad", " sad", " glad"])
    assert "names ' glad' twice" in problem["detail"]
