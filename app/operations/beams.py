"""Continuing a state by beam search."""

from app.service import Call, Service
from domain import decide, plan
from domain.errors import TooLarge
from domain.events import BeamsGenerated, Recorded
from domain.ids import StateId
from domain.plan import BeamWish
from domain.ports import Append
from domain.work import BeamRequest


async def search(
    service: Service, call: Call, state_id: StateId, wish: BeamWish
) -> tuple[Recorded, ...]:
    """Find the likeliest ways in which a state goes on; it stays as it is.

    Raises:
        TooLarge: the state is full.
    """
    turn = service.turns.turn(state_id, count=wish.num_beams)
    async with service.answering(call) as remembered, turn:
        if remembered:
            return remembered
        state = await service.live(state_id)
        decide.check_precondition(state, call.if_match)
        model = await service.models.get(state.model_id)
        plan.check_tokens(wish, model.vocabulary_size)
        parameters = plan.plan_beams(state, wish, model.max_beams)
        if not state.room:
            raise TooLarge(
                f"the state holds {state.head_position} tokens, as many as it may (context_size)",
                head_position=state.head_position,
                context_size=state.config.context_size,
            )
        found = await model.search(
            BeamRequest(
                tokens=state.content.tokens,
                parameters=parameters,
                max_new=min(parameters.max_tokens, state.room),
            )
        )
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
