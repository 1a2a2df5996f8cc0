"""Which class a text belongs to: scores of classes from their logits, or from their likelihood."""

import math
import struct
from collections.abc import Sequence
from typing import Final, Literal

from msgspec import UNSET, Struct, UnsetType

from domain.analysis.exact import sigmoid, softmax
from domain.analysis.result import Result, Tensor
from domain.ids import TokenId

Problem = Literal["single_label_classification", "multi_label_classification", "regression"]
"""What logits mean: those of one class out of several, of classes each by itself, or values."""

ABOVE: Final = 0.5
"""The score above which a class by itself is said to apply."""


class LabelScore(Struct, frozen=True, kw_only=True):
    """What a classifier says of one class; null if its logit is not a finite number."""

    label: str
    score: float | None


class Classified(Struct, frozen=True, kw_only=True):
    """What a classifier says of a text: the best class, and ``scores`` of all, best first.

    ``score`` is the softmax over the logits; where classes do not exclude each other the sigmoid
    of each, with ``labels_above`` 0.5; the value itself in a regression. Ties are in the model's
    order.
    """

    problem_type: Problem
    label: str | None
    score: float | None
    scores: tuple[LabelScore, ...]
    labels_above: tuple[str, ...] | UnsetType = UNSET


class LabelLikelihood(Struct, frozen=True, kw_only=True):
    """How likely a label comes next, with tokens ``token_ids``.

    ``logprob`` is the sum over its tokens (nats), ``mean_logprob`` that by their number. ``score``
    is the softmax over the means of all labels, ``score_by_sum`` over the sums.
    """

    label: str
    score: float
    score_by_sum: float
    logprob: float
    mean_logprob: float
    token_ids: tuple[TokenId, ...]


class LikeliestLabel(Struct, frozen=True, kw_only=True):
    """The label whose tokens come next likeliest, in the mean; ``scores`` of all, best first.

    Of labels that are as likely the one that was named first.
    """

    label: str
    score: float
    scores: tuple[LabelLikelihood, ...]


def classified(logits: Sequence[float], labels: Sequence[str], problem: Problem) -> Result:
    """What the ``logits`` (float32) of classes say, and the logits themselves, in their order."""
    scores = _scores(logits, problem)
    pairs = zip(labels, scores, strict=True)
    ranked = sorted(
        (LabelScore(label=label, score=score) for label, score in pairs),
        key=lambda one: -math.inf if one.score is None else one.score,
        reverse=True,  # stable all the same
    )
    best = ranked[0]
    above: tuple[str, ...] | UnsetType = UNSET
    if problem == "multi_label_classification":
        above = tuple(one.label for one in ranked if one.score is not None and one.score > ABOVE)
    facts = Classified(
        problem_type=problem,
        label=None if best.score is None else best.label,
        score=best.score,
        scores=tuple(ranked),
        labels_above=above,
    )
    data = struct.pack(f"<{len(logits)}f", *logits)
    tensor = Tensor(name="logits", shape=(len(logits),), dtype="float32", data=data)
    return Result(facts=facts, tensors=(tensor,))


def likeliest_label(
    labels: Sequence[str],
    tokens: Sequence[tuple[TokenId, ...]],
    logprobs: Sequence[Sequence[float]],
) -> Result:
    """Which of ``labels`` comes next likeliest, by the log-probability of each of its tokens."""
    sums = [math.fsum(own) for own in logprobs]
    means = [total / len(own) for total, own in zip(sums, tokens, strict=True)]
    ranked = sorted(
        (
            LabelLikelihood(
                label=label,
                score=score,
                score_by_sum=by_sum,
                logprob=total,
                mean_logprob=mean,
                token_ids=own,
            )
            for label, own, total, mean, score, by_sum in zip(
                labels, tokens, sums, means, softmax(means), softmax(sums), strict=True
            )
        ),
        key=lambda one: one.mean_logprob,
        reverse=True,
    )
    best = ranked[0]
    return Result(facts=LikeliestLabel(label=best.label, score=best.score, scores=tuple(ranked)))


def _scores(logits: Sequence[float], problem: Problem) -> list[float | None]:
    if not all(map(math.isfinite, logits)):
        return [None] * len(logits)
    match problem:
        case "single_label_classification":
            return [*softmax(logits)]
        case "multi_label_classification":
            return [*map(sigmoid, logits)]
        case "regression":
            return [*logits]
