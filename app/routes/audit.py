"""``/v1/events``, ``/v1/audit`` and ``/v1/replay``: the history, and its proof."""

from typing import Annotated

from litestar import Router
from litestar.params import Parameter

from app.operations.verify import Request, Verifier, remembered_head
from app.routes.handlers import reading, writing
from app.schemas import After, EventList, EventView, HeadView, Verify
from app.service import Service
from domain.errors import invalid
from domain.ids import Position
from domain.replay import Report


@reading("/events")
async def list_events(
    service: Service,
    after: After = 0,
    limit: Annotated[int, Parameter(ge=1, le=1000)] = 100,
) -> EventList:
    """Events of the whole log in order; ``after`` is a position."""
    rows = await service.log.rows(after=Position(after), limit=limit + 1)
    page = rows[:limit]
    return EventList(
        events=[EventView.of(row) for row in page],
        next_after=page[-1].position if len(rows) > limit else None,
    )


@reading("/audit/head")
async def get_head(service: Service) -> HeadView:
    """The newest position of the log and its hash."""
    head = await service.log.head()
    return HeadView(position=head.position, hash=head.hash.hex())


@writing("/replay/verify", Verify)
async def verify(data: Verify, service: Service) -> Report:
    """Re-execute one state or the whole log and hold it against what is recorded."""
    if (data.state_id is None) == (data.all is None):
        raise invalid("state_id", "either state_id or all: true is required, not both")
    try:
        head = None if data.head is None else remembered_head(data.head)
    except ValueError as error:
        raise invalid("head", "must be position:hash, as /v1/audit/head gives them") from error
    state_ids = None if data.state_id is None else (data.state_id,)
    verifier = Verifier(service.log, service.models)
    async with service.verifications.turn(verify):  # one at a time: it works through a whole log
        return await verifier.run(Request(state_ids=state_ids, head=head))


router = Router("/v1", tags=["audit"], route_handlers=[list_events, get_head, verify])
