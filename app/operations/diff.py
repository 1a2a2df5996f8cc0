"""How two states differ, down to the distribution of the next token. Records nothing."""

from typing import Final

from msgspec.structs import replace

from app.service import Service
from domain.content import ToldToken
from domain.diff import Diff, NextToken, diff, places
from domain.errors import ModelUnavailable, NotFound, NotRunnable
from domain.ids import StateId, TokenId, Version
from domain.models import LanguageModel
from domain.state import Live
from domain.work import Comparison, Reference, Scored, ScoreRequest

CHUNK: Final = 32
"""Positions that are compared at once: so many rows of logits are held."""

PRIVATE_BYTES: Final = 64 << 20
"""Logits that are held where each chunk is computed from the first token on: fewer chunks."""


async def compare(
    service: Service,
    first: tuple[StateId, Version | None],
    second: tuple[StateId, Version | None],
    *,
    start: int,
    limit: int,
) -> Diff:
    """How two states differ, each as it is or as it was at a version.

    What could come next is compared at ``limit`` positions at most, from ``start`` on.

    Raises:
        StateNotFound, StateIsDeleted, StateIsErased, VersionNotFound: there is no such state.
        QueueFull: too many requests are waiting.
    """
    a, b = await service.as_it_was(*first), await service.as_it_was(*second)
    found = diff(a, b)
    every = places(found)
    here = range(max(every.start, start), every.stop)
    if not here[:limit]:
        return replace(found, kl=())
    if "sequence_classification" in (a.model_type, b.model_type):
        return replace(found, note="a classifier says nothing of what could come next")
    try:
        models = await service.model(a), await service.model(b)
    except (ModelUnavailable, NotFound, NotRunnable) as error:
        return replace(found, note=str(error))
    if not speak_alike(*models):
        return replace(found, note="the models have different vocabularies")
    # Nothing comes after a full context.
    here = range(here.start, min(here.stop, *(model.context_size for model in models)))
    asked, rest = here[:limit], here[limit:]
    async with service.turns.turn(object()):
        compared = await next_tokens((a, b), models, asked)
    return replace(found, kl=tuple(compared), next_start=rest.start if rest else None)


def speak_alike(first: LanguageModel, second: LanguageModel) -> bool:
    """Whether the same number means the same token to both."""
    names = [model.fingerprint.facts()["tokenizer"] for model in (first, second)]
    return names[0] == names[1] and first.vocabulary_size == second.vocabulary_size


async def next_tokens(
    states: tuple[Live, Live],
    models: tuple[LanguageModel, LanguageModel],
    asked: range,
    *,
    private: bool = False,
) -> list[NextToken]:
    """What could come next at some positions of two states, held against each other.

    ``private`` is as for :meth:`domain.models.LanguageModel.score`.
    """
    chunk = CHUNK
    if private:  # each time from the beginning
        chunk = max(chunk, PRIVATE_BYTES // (4 * models[0].vocabulary_size))
    compared: list[NextToken] = []
    for at in range(0, len(asked), chunk):
        compared += await _compare(states, models, asked[at : at + chunk], private=private)
    return compared


async def _compare(
    states: tuple[Live, Live],
    models: tuple[LanguageModel, LanguageModel],
    chunk: range,
    *,
    private: bool,
) -> list[NextToken]:
    here, there = (_until(state, chunk.stop) for state in states)
    asked = ScoreRequest(tokens=here, start=chunk.start, keep="raw")
    (scored,) = await models[0].score([asked], private=private)
    references = _references(here[chunk.start :], scored)
    asked = ScoreRequest(tokens=there, start=chunk.start, references=references)
    (scored,) = await models[1].score([asked], private=private)
    return [
        _next_token(place, comparison, models, (here[:place], there[:place]))
        for place, comparison in zip(chunk, scored.comparisons, strict=True)
    ]


def _until(state: Live, stop: int) -> tuple[TokenId, ...]:
    """Tokens up to a position; after the last one comes another, whichever, to ask what could."""
    tokens = state.content.tokens
    return (*tokens, tokens[-1])[:stop]


def _references(tokens: tuple[TokenId, ...], scored: Scored) -> tuple[Reference, ...]:
    scores = scored.scores
    return tuple(
        Reference(token_id=token, logprob=logprob, logsumexp=logsumexp, kind="raw", row=row)
        for token, logprob, logsumexp, row in zip(
            tokens, scores.logprobs, scores.logsumexps, scored.rows, strict=True
        )
    )


def _next_token(
    place: int,
    comparison: Comparison,
    models: tuple[LanguageModel, LanguageModel],
    before: tuple[tuple[TokenId, ...], tuple[TokenId, ...]],
) -> NextToken:
    likeliest = []
    for model, tokens, token in zip(models, before, comparison.greedy, strict=True):
        assert token is not None  # the whole row is known of both
        likeliest.append(ToldToken.of(model.fragment(tokens, (token,))))
    return NextToken(position=place, kl=comparison.kl, top_a=likeliest[0], top_b=likeliest[1])
