"""Answering with a live feed: ``Accept: text/event-stream`` on a list of events."""

import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any, Final

from litestar import MediaType, Request, Response
from litestar.datastructures.headers import Accept
from litestar.params import Parameter

from app import sse
from app.problems import problem_of
from app.service import Service
from app.streams import EventStream
from domain.errors import invalid
from domain.ids import Position, StateId

AnyRequest = Request[Any, Any, Any]
Limit = Annotated[int | None, Parameter(ge=1, le=1000)]
After = Annotated[str, Parameter(schema_extra={"pattern": r"^(head|\d{1,15})$"})]
"""The event to begin after, or ``head``: the newest there is."""

DEFAULT_LIMIT: Final = 100

_REFUSED: Final = re.compile(r";\s*q=0(\.0*)?\s*(;|$)", re.IGNORECASE)
"""A kind of answer that is not acceptable (RFC 9110, section 12.4.2)."""


def is_wanted(request: AnyRequest) -> bool:
    """Whether a client wants to follow events, rather than one page of them.

    Raises:
        InvalidInput: it does not, but resumes a feed.
    """
    kinds: list[str] = [MediaType.JSON, sse.MEDIA_TYPE]
    accept = Accept(",".join(kind for kind in request.accept if not _REFUSED.search(kind)))
    if accept.best_match(kinds, MediaType.JSON) == sse.MEDIA_TYPE:
        return True
    if "last-event-id" in request.headers:
        raise invalid("Last-Event-ID", f"resumes a feed: send it with Accept: {sse.MEDIA_TYPE}")
    return False


def number(after: str, newest: int) -> int:
    """The position or version that ``after`` means.

    Raises:
        InvalidInput: it means none.
    """
    if after == "head":
        return newest
    if not re.fullmatch(r"\d{1,15}", after, re.ASCII):
        raise invalid("after", "must be a whole number from 0 on, or head")
    return int(after)


async def respond(
    service: Service,
    request: AnyRequest,
    after: Position,
    *,
    state_id: StateId | None = None,
    **paging: int | None,
) -> Response[Any]:
    """The feed of a state or of the whole log, from the event after a position.

    A ``Last-Event-ID`` stands over the position. 204, at which a client does not come back, if
    nothing more can come.

    Raises:
        InvalidInput: a position that is not of this log, or parameters of a page.
        QueueFull: too many feeds are open.
    """
    for name, value in paging.items():
        if value is not None:
            raise invalid(name, "is for one page of events: a feed goes on")
    resumed = _last_event_id(request)
    field, after = ("after", after) if resumed is None else ("Last-Event-ID", resumed)
    newest = (await service.log.head()).position
    if after > newest:
        raise invalid(field, f"must be at most {newest}, the newest position of this log")
    if state_id is not None and await service.feeds.is_over(state_id, after):
        return Response(None, status_code=204)
    chunks = _counted(service, service.feeds.follow(after, state_id))
    await anext(chunks)
    return EventStream(chunks)


def _last_event_id(request: AnyRequest) -> Position | None:
    given = request.headers.get("last-event-id")
    if not given:
        return None
    if not re.fullmatch(r"\d{1,15}", given, re.ASCII):
        raise invalid("Last-Event-ID", "must be the id of an event of the feed, or empty")
    return Position(int(given))


async def _counted(
    service: Service, chunks: AsyncGenerator[bytes, None]
) -> AsyncGenerator[bytes, None]:
    """Nothing, once there is a place among the feeds; then the chunks, or the problem."""
    async with service.followers.turn(object()), aclosing(chunks):
        yield b""
        try:
            async for chunk in chunks:
                yield chunk
        except Exception as error:
            yield sse.event("error", problem_of(error))
