"""Scores of classes: sums, order and portable exponentials."""

import math
from decimal import Decimal
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from domain.analysis.classify import Problem, classified, likeliest_label
from domain.analysis.exact import exp, sigmoid, softmax
from domain.analysis.result import digest

logits = st.floats(-1e4, 1e4)


def facts(values: list[float], problem: Problem) -> dict[str, Any]:
    labels = [f"class {index}" for index in range(len(values))]
    found: dict[str, Any] = msgspec.to_builtins(classified(values, labels, problem).facts)
    return found


@settings(deadline=None)
@given(st.lists(logits, min_size=1, max_size=8))
def test_softmax_is_a_distribution_in_the_order_of_its_logits(values: list[float]) -> None:
    found = softmax(values)
    assert math.fsum(found) == pytest.approx(1, abs=1e-12)
    highest = max(values)
    weights = [math.exp(value - highest) for value in values]
    assert found == pytest.approx([weight / sum(weights) for weight in weights], rel=1e-12)
    pairs = sorted(zip(values, found, strict=True))
    assert [score for _, score in pairs] == sorted(found)


@settings(deadline=None)
@given(logits)
def test_sigmoid_is_that_of_the_logit(value: float) -> None:
    assert sigmoid(value) + sigmoid(-value) == pytest.approx(1, abs=1e-15)
    assert sigmoid(value) == pytest.approx((1 + math.tanh(value / 2)) / 2, abs=1e-12)


def test_the_exponential_is_fixed_to_the_last_bit() -> None:
    found = [exp(Decimal(value)).hex() for value in (0.0, -0.5, -20.125, -1e5)]
    assert found == [
        "0x1.0000000000000p+0",
        "0x1.368b2fc6f960ap-1",
        "0x1.f3fe0cb68b20cp-30",
        "0x0.0p+0",
    ]


def test_the_best_class_comes_first_and_of_equals_the_one_the_model_names_first() -> None:
    found = facts([1.0, 3.0, 2.0, 3.0], "single_label_classification")
    assert [one["label"] for one in found["scores"]] == ["class 1", "class 3", "class 2", "class 0"]
    assert (found["label"], found["score"]) == ("class 1", found["scores"][0]["score"])
    assert "labels_above" not in found


def test_classes_that_do_not_exclude_each_other_are_scored_each_by_itself() -> None:
    found = facts([0.5, -2.0, 3.0, 0.0], "multi_label_classification")
    assert found["labels_above"] == ("class 2", "class 0")
    assert found["scores"][-2] == {"label": "class 3", "score": 0.5}


def test_a_regression_gives_the_value() -> None:
    found = facts([2.5], "regression")
    assert (found["label"], found["score"]) == ("class 0", 2.5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_null(value: float) -> None:
    found = facts([1.0, value], "single_label_classification")
    assert (found["label"], found["score"]) == (None, None)
    assert [one["score"] for one in found["scores"]] == [None, None]


def test_labels_are_ranked_by_the_mean_over_their_tokens() -> None:
    result = likeliest_label(
        ["short", "long", "again"], [(1,), (2, 3, 4), (5,)], [[-2.0], [-1.0, -0.5, -0.75], [-2.0]]
    )
    found = msgspec.to_builtins(result.facts)
    assert [one["label"] for one in found["scores"]] == ["long", "short", "again"]
    assert found["label"] == "long"
    long, short, again = found["scores"]
    assert (long["logprob"], long["mean_logprob"], short["mean_logprob"]) == (-2.25, -0.75, -2.0)
    assert long["score"] > short["score"] == again["score"]
    assert long["score_by_sum"] < short["score_by_sum"]
    assert len(digest(result)) == 64
