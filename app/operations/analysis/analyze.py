"""Answering a question about a state, and recording that it was asked."""

import asyncio
from typing import Protocol

from msgspec import Struct

from app.operations.analysis.compare import settled
from app.operations.analysis.compute import compute, extent_of
from app.operations.analysis.materials import Asking
from app.operations.analysis.sharing import with_sharers
from app.service import Call, Service
from domain import decide
from domain.analysis.extent import Extent
from domain.analysis.parameters import Parameters, Question
from domain.analysis.result import FORM, Result, ResultChanged, digest
from domain.errors import FingerprintChanged
from domain.events import Recorded, StateAnalyzed
from domain.fingerprint import Fingerprint
from domain.ids import StateId, Version
from domain.ports import Append
from domain.state import Live


class Analyzed(Struct, frozen=True):
    """A state as it was looked at, what was asked, and what was found under which numerics."""

    state: Live
    parameters: Parameters
    result: Result
    fingerprint: str


class Form(Protocol):
    """The form that a client wants an answer in."""

    def check_extent(self, extent: Extent) -> None:
        """Refuse, before the work, more than the form holds.

        Raises:
            ResultTooLarge: says how to ask for less.
        """

    def check(self, result: Result) -> None:
        """Refuse what cannot be given in the form.

        Raises:
            NotAcceptable, InvalidInput: it cannot; says what can.
        """


async def analyze(
    service: Service,
    call: Call,
    state_id: StateId,
    version: Version | None,
    question: Question,
    *,
    form: Form,
) -> Analyzed:
    """Look inside a state, as it is or as it was at a version; on disk before this returns.

    The state stays as it is, and does not wait: what happens to it meanwhile is no conflict, unless
    it ends. A retry with the same ``Idempotency-Key`` looks at what was looked at then, computes
    again and records nothing new. What has no place in the ``form`` is not recorded.

    Raises:
        StateNotFound, StateIsDeleted, StateIsErased, VersionNotFound: there is no such state.
        PreconditionFailed: ``If-Match`` names another version than the state has now.
        InvalidInput, ResultTooLarge: the question has no answer, or too large a one; says why.
        TooLarge: a text does not fit into the model's context.
        NotAcceptable: the answer cannot be had in the ``form``.
        ModelNotFound, ModelUnavailable, NotRunnable: the model cannot be asked.
        IdempotencyKeyReused: the key belongs to a request with another body.
        FingerprintChanged: a retry could be told something else than what was found at first.
        ResultChanged: it would be, say because results have another form now.
        QueueFull: too many questions are waiting.
    """
    turn = service.questions.turn(object())
    async with service.answering(call) as earlier, turn, service.looks:
        if earlier is not None:
            return await _again(service, *earlier, form=form)
        decide.check_precondition(await service.live(state_id), call.if_match)
        state = await service.live(state_id, version)
        parameters = await settled(service, question)
        result, fingerprint = await _found(service, state, parameters, form)
        result_digest = await asyncio.to_thread(digest, result)
        found = StateAnalyzed(parameters=parameters, form=FORM, result_digest=result_digest)
        seen = Append(
            state_id=state_id,
            expected_version=state.version,
            event=found,
            fingerprint=fingerprint,
        )
        await service.append(call, [seen])
    result = with_sharers(service, state, result)
    return Analyzed(state, parameters, result, fingerprint.id)


async def _again(service: Service, first: Recorded, *, form: Form) -> Analyzed:
    """What was found at first, computed again."""
    assert isinstance(first.event, StateAnalyzed)
    parameters = first.event.parameters
    state = await service.as_it_was(first.state_id, first.version)
    result, fingerprint = await _found(service, state, parameters, form)
    if fingerprint.id != first.row.fingerprint:
        raise FingerprintChanged(state.state_id, first.row.fingerprint or "", fingerprint.id)
    if await asyncio.to_thread(digest, result) != first.event.result_digest:
        raise ResultChanged(state.state_id)
    result = with_sharers(service, state, result)
    return Analyzed(state, parameters, result, fingerprint.id)


async def _found(
    service: Service, state: Live, parameters: Parameters, form: Form
) -> tuple[Result, Fingerprint]:
    """What is found, if it has a place in the form."""
    materials = Asking(service)
    form.check_extent(await extent_of(materials, state, parameters))
    result, fingerprint = await compute(materials, state, parameters)
    form.check(result)
    return result, fingerprint
