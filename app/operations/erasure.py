"""Erasing states: what they held can never be read again, and the log still proves itself."""

import hashlib

import msgspec

from app.service import Call, Service
from domain.errors import HasDescendants, NotErasable, PreconditionFailed, StateNotFound
from domain.events import ERASED, Recorded
from domain.ids import StateId


async def erase(
    service: Service, call: Call, state_id: StateId, *, forks: bool
) -> tuple[Recorded, ...]:
    """Destroy what a state held, deleted or not; a generation that runs on it is ended first.

    With ``forks`` also what all states held that began with it, and those that began with them.
    None of it need be readable.

    Raises:
        NotErasable: the log keeps what states hold unsealed.
        StateNotFound, StateIsErased: there is nothing to erase.
        PreconditionFailed: ``If-Match`` names another version.
        HasDescendants: other states hold it too, and ``forks`` is not asked for.
        LogUnavailable: nothing was recorded, or the keys are not destroyed yet.
    """
    call = _of_its_own(call, forks=forks)
    async with service.answering(call) as remembered:
        if remembered:  # but perhaps not acknowledged: what was left then is done now
            return await service.erase(call, [one.state_id for one in remembered])
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
    newest = await service.log.newest(state_id)
    if newest is None or newest.version is None:
        raise StateNotFound(state_id)
    if newest.type != ERASED and call.if_match not in (None, newest.version):
        raise PreconditionFailed(state_id, call.if_match, newest.version)


async def _erase(
    service: Service, call: Call, state_ids: tuple[StateId, ...]
) -> tuple[Recorded, ...]:
    """End what runs on the states, and erase them."""
    with service.ending(state_ids):
        async with service.turns.turn(state_ids[0]):
            await _check(service, call, state_ids[0])
            for state_id in state_ids[1:]:
                await service.turns.idle(state_id)
            return await service.erase(call, state_ids)
