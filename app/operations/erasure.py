"""Erasing states: what they held can never be read again, and the log still proves itself."""

import hashlib
from collections.abc import Sequence

import msgspec

from app.service import Call, Service
from domain.errors import HasDescendants, NotErasable, PreconditionFailed, StateIsErased
from domain.events import Recorded
from domain.ids import StateId
from domain.state import Erased


async def erase(
    service: Service, call: Call, state_id: StateId, *, forks: bool
) -> tuple[Recorded, ...]:
    """Destroy what a state held, deleted or not; a generation that runs on it is ended first.

    With ``forks`` also what all states held that began with it, and those that began with them.

    Raises:
        NotErasable: the log keeps what states hold unsealed.
        StateNotFound, StateIsErased: there is nothing to erase.
        PreconditionFailed: ``If-Match`` names another version.
        HasDescendants: other states hold it too, and ``forks`` is not asked for.
    """
    call = _of_its_own(call, forks=forks)
    async with service.answering(call) as remembered:
        if remembered:
            return remembered
        if not service.log.erasable:
            raise NotErasable
        await _check(service, call, state_id)
        doomed: tuple[StateId, ...] = (state_id,)
        while True:
            try:
                return await _erase(service, call, doomed)
            except HasDescendants as found:
                if not forks:
                    raise
                doomed += found.facts["descendants"]


def _of_its_own(call: Call, *, forks: bool) -> Call:
    """The call, with a digest that tells it from a deletion: the path and body are the same."""
    key = call.idempotency
    if key is None:
        return call
    what = b"erase with forks" if forks else b"erase"
    digest = hashlib.sha256(key.request_digest + what).digest()
    return msgspec.structs.replace(
        call, idempotency=msgspec.structs.replace(key, request_digest=digest)
    )


async def _check(service: Service, call: Call, state_id: StateId) -> None:
    state = await service.state(state_id)
    if isinstance(state, Erased):
        raise StateIsErased(state_id, state.erased_at)
    if call.if_match not in (None, state.version):
        raise PreconditionFailed(state_id, call.if_match, state.version)


async def _erase(
    service: Service, call: Call, state_ids: tuple[StateId, ...]
) -> tuple[Recorded, ...]:
    """End what runs on the states, erase them, and drop what was computed from them."""
    with service.ending(state_ids):
        async with service.turns.turn(state_ids[0]):
            await _check(service, call, state_ids[0])
            await _ended(service, state_ids[1:])
            recorded = await service.erase(call, state_ids)
            await _ended(service, state_ids[1:])  # what had begun on a state since
    await service.models.forget()
    return recorded


async def _ended(service: Service, state_ids: Sequence[StateId]) -> None:
    for state_id in state_ids:
        await service.turns.idle(state_id)
