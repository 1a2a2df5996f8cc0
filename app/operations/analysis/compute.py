"""From a question about a state to what is found: the same for whoever asks and who verifies."""

from app.operations.analysis.classify import classify
from app.operations.analysis.compare import compare_states
from app.operations.analysis.materials import Materials
from app.operations.analysis.tokens import look_at_tokens
from domain.analysis.extent import Extent, extent
from domain.analysis.parameters import (
    ClassifyParameters,
    CompareParameters,
    Parameters,
    TokensParameters,
)
from domain.analysis.result import Result
from domain.fingerprint import Fingerprint
from domain.state import Live


async def extent_of(materials: Materials, state: Live, parameters: Parameters) -> Extent:
    """How much will be found, before anything is computed.

    Raises:
        Refusal: the question has no answer; says why.
    """
    if isinstance(parameters, ClassifyParameters):
        return Extent()
    model = await materials.model(state)
    return extent(parameters, model.dimensions, state.head_position, model.max_result_bytes)


async def compute(
    materials: Materials, state: Live, parameters: Parameters
) -> tuple[Result, Fingerprint]:
    """What is found in a state, and the numerics it was computed under.

    Raises:
        Refusal: the question has no answer; says why.
    """
    if isinstance(parameters, ClassifyParameters):
        return await classify(materials, state, parameters)
    model = await materials.model(state)
    match parameters:
        case TokensParameters():
            result = await look_at_tokens(materials, model, state, parameters)
        case CompareParameters():
            result = await compare_states(materials, model, state, parameters)
        case _:
            result = await model.look(
                state.content.tokens, state.config, parameters, private=materials.private
            )
    return result, model.fingerprint
