"""Which question is answered where."""

from typing import TYPE_CHECKING

from domain.analysis.parameters import (
    AttentionParameters,
    CacheParameters,
    EmbeddingParameters,
    HiddenParameters,
    Inside,
    InterveneParameters,
    LensParameters,
    NextParameters,
)
from domain.analysis.result import Result
from domain.config import StateConfig
from domain.ids import TokenId
from infra.engine.analysis.attention import attention
from infra.engine.analysis.cache import cached
from infra.engine.analysis.hidden import embedding, hidden
from infra.engine.analysis.intervene import intervene
from infra.engine.analysis.lens import lens
from infra.engine.analysis.next import look_next

if TYPE_CHECKING:
    from infra.engine.language_model import TransformersModel


async def look(
    model: "TransformersModel",
    tokens: tuple[TokenId, ...],
    config: StateConfig,
    parameters: Inside,
    *,
    private: bool,
) -> Result:
    """What a model finds in a text that a state with ``config`` holds."""
    match parameters:
        case AttentionParameters():
            return await attention(model, tokens, parameters, private=private)
        case CacheParameters():
            return await cached(model, tokens, parameters, private=private)
        case HiddenParameters():
            return await hidden(model, tokens, parameters, private=private)
        case EmbeddingParameters():
            return await embedding(model, tokens, parameters, private=private)
        case LensParameters():
            return await lens(model, tokens, parameters, private=private)
        case NextParameters():
            return await look_next(model, tokens, config, parameters, private=private)
        case InterveneParameters():
            return await intervene(model, tokens, config, parameters, private=private)
