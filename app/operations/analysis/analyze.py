"""Answering a question about a state, and recording that it was asked."""

from msgspec import Struct

from app.operations.analysis.compute import compute
from app.operations.analysis.materials import Asking
from app.service import Call, Service
from domain import decide
from domain.analysis.parameters import Parameters
from domain.analysis.result import Result, digest
from domain.events import StateAnalyzed
from domain.ids import StateId, Version
from domain.ports import Append
from domain.state import Live


class Analyzed(Struct, frozen=True):
    """A state as it was looked at, what was asked, and what was found."""

    state: Live
    parameters: Parameters
    result: Result


async def analyze(
    service: Service,
    call: Call,
    state_id: StateId,
    version: Version | None,
    parameters: Parameters,
) -> Analyzed:
    """Look inside a state, as it is or as it was at a version; on disk before this returns.

    The state stays as it is, and does not wait: what happens to it meanwhile is no conflict. A
    retry with the same ``Idempotency-Key`` computes again and records nothing new.

    Raises:
        StateNotFound, StateIsDeleted, StateIsErased, VersionNotFound: there is no such state.
        PreconditionFailed: ``If-Match`` names another version than the state has now.
        InvalidInput, ResultTooLarge: the question has no answer, or too large a one; says why.
        QueueFull: too many requests are waiting.
    """
    async with service.turns.turn(object()):
        decide.check_precondition(await service.live(state_id), call.if_match)
        state = await service.live(state_id, version)
        result, fingerprint = await compute(Asking(service), state, parameters)
        found = StateAnalyzed(parameters=parameters, result_digest=digest(result))
        seen = Append(
            state_id=state_id,
            expected_version=state.version,
            event=found,
            fingerprint=fingerprint,
        )
        await service.append(call, [seen])
    return Analyzed(state, parameters, result)
