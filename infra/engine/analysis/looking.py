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
            raise NotImplementedError
        case CacheParameters():
            raise NotImplementedError
        case HiddenParameters() | EmbeddingParameters():
            raise NotImplementedError
        case LensParameters():
            raise NotImplementedError
        case NextParameters():
            raise NotImplementedError
        case InterveneParameters():
            raise NotImplementedError
