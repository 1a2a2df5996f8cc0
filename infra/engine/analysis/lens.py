"""The logit lens: hidden states of all layers through the last normalisation and the head."""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from domain.analysis.lens import LensFacts, Reading, asked_lens
from domain.analysis.parameters import LensParameters
from domain.analysis.result import Result
from domain.analysis.tokens import Likely
from domain.content import Fragment
from domain.ids import TokenId
from infra.engine.analysis.tensors import packed
from infra.engine.observing import Look
from infra.engine.sampling import sampler
from infra.engine.sampling.sampler import Measures, Row
from infra.engine.waiting import worked_out

if TYPE_CHECKING:
    from infra.engine.language_model import TransformersModel

_LOGITS_BYTES: Final = 16 << 20
"""Logits that are held at a time."""


class Kept(NamedTuple):
    """What is kept of a row of logits.

    Its likeliest tokens and their logprobs, and measures of the token that follows.
    """

    token_ids: NDArray[np.int64]
    logprobs: NDArray[np.float64]
    measures: Measures


async def lens(
    model: "TransformersModel",
    tokens: tuple[TokenId, ...],
    parameters: LensParameters,
    *,
    private: bool,
) -> Result:
    """What the hidden states of each layer are read as, at each position."""
    layers, span = asked_lens(parameters, model.dimensions, len(tokens), model.max_result_bytes)
    look = Look(tokens=tokens[: span.stop], start=span.start, residual=frozenset(layers))
    seen = await model.observe(look, private=private)
    states = await worked_out(torch.cat, [seen.residual[layer] for layer in layers])
    following = tokens[span.start + 1 : span.stop + 1]
    followers = [*following, *[None] * (len(span) - len(following))] * len(layers)
    top_k = min(parameters.top_k, model.vocabulary_size)
    at_once = max(1, _LOGITS_BYTES // (4 * model.vocabulary_size))
    found: list[Kept] = []
    for begin in range(0, len(states), at_once):
        logits = await model.project(states[begin : begin + at_once])
        those = followers[begin : begin + at_once]
        found += await worked_out(_kept, logits.numpy(), those, top_k)
    return await worked_out(_result, model, tokens, layers, span, followers, found)


def _result(
    model: "TransformersModel",
    tokens: tuple[TokenId, ...],
    layers: tuple[int, ...],
    span: range,
    followers: Sequence[TokenId | None],
    found: Sequence[Kept],
) -> Result:
    """What is found in hidden states, layer by layer, of which each position has one."""
    before, here = tokens[: span.start], tokens[span.start : span.stop]
    facts = LensFacts(
        start=span.start,
        end=span.stop,
        token_ids=here,
        tokens=model.fragment(before, here).pieces(),
        layers=layers,
        readings=_readings(model, tokens, span, followers, found),
    )
    ids = torch.from_numpy(np.stack([each.token_ids for each in found]))
    logprobs = torch.from_numpy(np.stack([each.logprobs for each in found])).float()
    tensors = tuple(
        packed(
            name,
            values.view(len(layers), len(span), -1),
            layers=layers,
            start=span.start,
            end=span.stop,
            inline=False,
        )
        for name, values in (("top_token_ids", ids), ("top_logprobs", logprobs))
    )
    return Result(facts=facts, tensors=tensors)


def _kept(logits: Row, followers: Sequence[TokenId | None], top_k: int) -> list[Kept]:
    """What is kept of rows of logits, each with the token that follows if one does."""
    found = []
    for row, follower in zip(logits, followers, strict=True):
        top = sampler.largest(row, top_k)
        measures = sampler.measure(row, TokenId(int(top[0])) if follower is None else follower)
        found.append(Kept(top, row[top].astype(np.float64) - measures.logsumexp, measures))
    return found


def _readings(
    model: "TransformersModel",
    tokens: tuple[TokenId, ...],
    span: range,
    followers: Sequence[TokenId | None],
    found: Sequence[Kept],
) -> tuple[tuple[Reading, ...], ...]:
    """What the hidden states are read as, by layer and position."""
    columns = []
    for column, position in enumerate(span):
        before = tokens[: position + 1]
        told = functools.cache(functools.partial(_told, model, before))
        columns.append(
            [
                _reading(position, followers[column], kept, told)
                for kept in found[column :: len(span)]
            ]
        )
    return tuple(zip(*columns, strict=True))


def _told(model: "TransformersModel", before: Sequence[TokenId], token: TokenId) -> Fragment:
    return model.fragment(before, (token,))


def _reading(
    position: int, follower: TokenId | None, kept: Kept, told: Callable[[TokenId], Fragment]
) -> Reading:
    measures = kept.measures
    return Reading(
        position=position,
        top=tuple(
            Likely.of(told(token), logprob=logprob)
            for token, logprob in zip(kept.token_ids.tolist(), kept.logprobs.tolist(), strict=True)
        ),
        entropy=measures.entropy,
        logprob=None if follower is None else measures.logprob,
        rank=None if follower is None else measures.rank,
    )
