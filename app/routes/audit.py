"""``/v1/events`` and ``/v1/audit``: the history, and its proof."""

from typing import Any

import msgspec
from litestar import Response, Router, get

from app.operations.proofs import Proofs, note
from app.problems import RESPONSES
from app.routes import feed
from app.routes.handlers import following, reading
from app.schemas import (
    ConsistencyView,
    EventList,
    EventView,
    HeadView,
    InclusionView,
    Size,
)
from app.service import Service
from domain.errors import NoSigningKey, invalid
from domain.ids import Position


@following("/events", answer=EventList)
async def list_events(
    request: feed.AnyRequest, service: Service, after: feed.After = "0", limit: feed.Limit = None
) -> Response[Any]:
    """Events of the whole log in order; ``after`` is a position, or ``head``.

    With ``Accept: text/event-stream`` as server-sent events: those there are, then each one as it
    comes.
    """
    newest = (await service.log.head()).position
    begin = Position(feed.number(after, newest))
    if feed.is_wanted(request):
        return await feed.respond(service, request, begin, limit=limit)
    limit = feed.DEFAULT_LIMIT if limit is None else limit
    rows = await service.log.rows(after=begin, limit=limit + 1)
    page = rows[:limit]
    return Response(
        EventList(
            events=[EventView.of(row) for row in page],
            next_after=page[-1].position if len(rows) > limit else None,
        )
    )


@reading("/audit/head")
async def get_head(service: Service, size: Size | None = None) -> HeadView:
    """A checkpoint of the log as it stands, or as it stood when it had ``size`` events."""
    checkpoint = await Proofs(service.log).checkpoint(size)
    return HeadView(
        **msgspec.structs.asdict(checkpoint),
        checkpoint=note(checkpoint, service.signer),
        public_key=service.signer.public_key if service.signer else None,
    )


@reading("/audit/proof")
async def get_proof(
    service: Service,
    position: Size | None = None,
    size: Size | None = None,
    first: Size | None = None,
    second: Size | None = None,
) -> InclusionView | ConsistencyView:
    """Prove that an event is in the log, or that the log has only grown.

    That the event at ``position`` is among the first ``size``, or that the log of ``second``
    events begins with its ``first``. ``size`` and ``second`` are all events if they are absent.
    """
    proofs = Proofs(service.log)
    await proofs.size("size", size)
    await proofs.size("second", second)
    match position, first:
        case int(), None if second is None:
            return await _inclusion(service, proofs, Position(position), size)
        case None, int() if size is None:
            return await _consistency(service, proofs, first, second)
        case None, None if second is None:
            raise invalid("position", "is required, or first")
        case None, None:
            raise invalid("first", "is required: second goes with it")
        case None, _:
            raise invalid("size", "goes with position; with first it is second")
        case _, None:
            raise invalid("second", "goes with first; with position it is size")
        case _:
            raise invalid("first", "cannot go with position: ask for one proof at a time")


async def _inclusion(
    service: Service, proofs: Proofs, position: Position, size: int | None
) -> InclusionView:
    checkpoint = await proofs.checkpoint(size)
    (inclusion,) = await proofs.inclusions([position], checkpoint.size)
    ((_, digest),) = await service.log.hashes(after=Position(position - 1), limit=1)
    return InclusionView(
        inclusion=inclusion,
        hash=digest.hex(),
        root=checkpoint.root,
        checkpoint=note(checkpoint, service.signer),
    )


async def _consistency(
    service: Service, proofs: Proofs, first: int, second: int | None
) -> ConsistencyView:
    consistency = await proofs.consistency(first, second)
    now = await proofs.checkpoint(consistency.second)
    return ConsistencyView(
        consistency=consistency,
        first_root=(await proofs.checkpoint(first)).root,
        second_root=now.root,
        checkpoint=note(now, service.signer),
    )


@get("/audit/key", media_type="application/x-pem-file", responses=RESPONSES)
async def get_key(service: Service) -> str:
    """The public key that checkpoints are signed with, in PEM."""
    if service.signer is None:
        raise NoSigningKey
    return service.signer.public_key


router = Router("/v1", tags=["audit"], route_handlers=[list_events, get_head, get_proof, get_key])
