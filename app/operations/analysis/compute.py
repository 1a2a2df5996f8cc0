"""From a question about a state to what is found: the same for whoever asks and who verifies."""

from app.operations.analysis.materials import Materials
from domain.analysis.parameters import (
    ClassifyParameters,
    CompareParameters,
    Parameters,
    TokensParameters,
)
from domain.analysis.result import Result
from domain.fingerprint import Fingerprint
from domain.state import Live


async def compute(
    materials: Materials, state: Live, parameters: Parameters
) -> tuple[Result, Fingerprint]:
    """What is found in a state, and the numerics it was computed under.

    Raises:
        Refusal: the question has no answer; says why.
    """
    model = await materials.model(state)
    match parameters:
        case TokensParameters() | ClassifyParameters() | CompareParameters():
            raise NotImplementedError
        case _:
            result = await model.look(
                state.content.tokens, state.config, parameters, private=materials.private
            )
    return result, model.fingerprint
