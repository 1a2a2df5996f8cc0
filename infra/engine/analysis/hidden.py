"""Hidden states, as they are and pooled."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from domain.analysis.hidden import (
    EmbeddingFacts,
    HiddenFacts,
    Pooling,
    asked_embedding,
    asked_hidden,
)
from domain.analysis.parameters import EmbeddingParameters, HiddenParameters
from domain.analysis.result import Result
from domain.ids import TokenId
from infra.engine.analysis.tensors import packed
from infra.engine.observing import Look
from infra.engine.waiting import worked_out

if TYPE_CHECKING:
    from infra.engine.language_model import TransformersModel


async def hidden(
    model: "TransformersModel",
    tokens: tuple[TokenId, ...],
    parameters: HiddenParameters,
    *,
    private: bool,
) -> Result:
    """The hidden states of a range of tokens, or one vector for it."""
    layers, span = asked_hidden(parameters, model.dimensions, len(tokens), model.max_result_bytes)
    read = span[-1:] if parameters.pooling == "last" else span
    states = await _states(model, tokens, layers, read, private=private)
    return await worked_out(_found, states, layers, span, parameters.pooling)


def _found(states: list[Tensor], layers: tuple[int, ...], span: range, pooling: Pooling) -> Result:
    """What is found in hidden states of layers, each ``(positions, width)``."""
    match pooling:
        case "mean":
            states = list(map(mean, states))
        case "last":
            states = [each[-1] for each in states]
    whole = torch.stack(states)
    found = packed("hidden_states", whole, layers=layers, start=span.start, end=span.stop)
    facts = HiddenFacts(
        layers=layers,
        start=span.start,
        end=span.stop,
        pooling=pooling,
        shape=found.shape,
        dtype=found.dtype,
    )
    return Result(facts=facts, tensors=(found,))


async def embedding(
    model: "TransformersModel",
    tokens: tuple[TokenId, ...],
    parameters: EmbeddingParameters,
    *,
    private: bool,
) -> Result:
    """The hidden state of one token."""
    layer = asked_embedding(parameters, model.dimensions, len(tokens))
    index = parameters.token_index
    (states,) = await _states(model, tokens, (layer,), range(index, index + 1), private=private)
    found = packed("embedding", states[0], layers=(layer,), start=index, end=index + 1)
    facts = EmbeddingFacts(token_index=index, layer=layer, shape=found.shape, dtype=found.dtype)
    return Result(facts=facts, tensors=(found,))


async def _states(
    model: "TransformersModel",
    tokens: tuple[TokenId, ...],
    layers: tuple[int, ...],
    span: range,
    *,
    private: bool,
) -> list[Tensor]:
    """Hidden states, each ``(positions, width)``, of one dtype; the text ends with the range."""
    last = model.dimensions.layers
    look = Look(
        tokens=tokens[: span.stop],
        start=span.start,
        residual=frozenset(layers) - {last},
        normalised=last in layers,
    )
    seen = await model.observe(look, private=private)
    states = dict(seen.residual)
    if seen.normalised is not None:
        states[last] = seen.normalised
    return [states[layer] for layer in layers]


def mean(states: Tensor) -> Tensor:
    """The mean ``(width,)`` in float32 of hidden states ``(positions, width)``.

    They are added up in float64 one after the other, and what comes out is rounded once.
    """
    total = np.zeros(states.shape[-1])
    for state in states.float().numpy():
        total += state
    return torch.from_numpy((total / len(states)).astype(np.float32))
