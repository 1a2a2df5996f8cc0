"""Continuing a state by beam search."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from app.service import Call, Service
from domain import decide, plan
from domain.errors import StateIsDeleted, TooLarge
from domain.events import BeamsGenerated, Recorded
from domain.ids import StateId
from domain.plan import BeamWish
from domain.ports import Append
from domain.work import BeamRequest, BeamsFound


async def search(
    service: Service, call: Call, state_id: StateId, wish: BeamWish
) -> tuple[Recorded, ...]:
    """Find the likeliest ways in which a state goes on; it stays as it is.

    Raises:
        TooLarge: the state is full.
        StateIsDeleted: the state was deleted while it was searched.
    """
    turn = service.turns.turn(state_id, count=wish.num_beams)
    async with service.answering(call) as remembered, turn:
        if remembered:
            return remembered
        state = await service.live(state_id)
        decide.check_precondition(state, call.if_match)
        model = await service.model(state)
        plan.check_tokens(wish, model.vocabulary_size)
        parameters = plan.plan_beams(state, wish, model.max_beams)
        if not state.room:
            raise TooLarge(
                f"the state holds {state.head_position} tokens, as many as it may (context_size)",
                head_position=state.head_position,
                context_size=state.config.context_size,
            )
        request = BeamRequest(
            tokens=state.content.tokens,
            parameters=parameters,
            max_new=min(parameters.max_tokens, state.room),
        )
        found = await _unless_deleted(service, state_id, model.search(request))
        append = Append(
            state_id=state.state_id,
            expected_version=state.version,
            event=BeamsGenerated(
                parameters=parameters,
                start=state.absolute_position,
                dropped=state.dropped,
                steps=found.steps,
                beams=found.beams,
            ),
            fingerprint=model.fingerprint,
        )
        return await service.append(call, [append])


async def _unless_deleted(
    service: Service, state_id: StateId, search: Coroutine[Any, Any, BeamsFound]
) -> BeamsFound:
    """What a search finds; whoever deletes the state cancels it."""
    service.searches[state_id] = searching = asyncio.ensure_future(search)
    try:
        return await searching
    except asyncio.CancelledError:
        if state_id not in service.stopping:
            raise
        raise StateIsDeleted(state_id, service.surroundings.now()) from None
    finally:
        del service.searches[state_id]
