"""``/v1/generate``."""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from litestar import Request, Response, Router
from litestar.background_tasks import BackgroundTask
from litestar.response import Stream
from msgspec import Struct

from app import answers, sse
from app.calls import call_of, etag, last_event_id
from app.leaving import CLIENT_LEFT, ClientLeft, unless_left
from app.operations import beams
from app.operations.generation import (
    Items,
    Made,
    Wish,
    ahead,
    counted,
    generate,
    generate_multi,
)
from app.problems import problem_of
from app.routes.handlers import writing
from app.schemas import (
    GenerateBeams,
    Generated,
    GeneratedBeams,
    GeneratedMulti,
    GenerateMulti,
    GenerateTokens,
    StreamedToken,
)
from app.service import Service
from domain.errors import invalid

AnyRequest = Request[Any, Any, Any]

Answer = Callable[[Made], Generated | GeneratedMulti]
"""Makes the answer of what a call made."""


@writing("/generate/token", GenerateTokens, answer=Generated, streamed=True)
async def generate_tokens(
    data: GenerateTokens, request: AnyRequest, service: Service, include: str | None = None
) -> Response[Any]:
    """Continue a state token by token; with ``stream`` as server-sent events."""
    sampling = _include_sampling(include)
    after = last_event_id(request, streamed=data.stream)
    items = generate(service, await call_of(request), _wish(data, after))

    def answer(made: Made) -> Generated:
        return answers.generated(made, include_sampling=sampling)

    return await _respond(service, request, items, answer, after, streamed=data.stream)


@writing("/generate/multi", GenerateMulti, answer=GeneratedMulti, streamed=True)
async def generate_continuations(
    data: GenerateMulti, request: AnyRequest, service: Service, include: str | None = None
) -> Response[Any]:
    """Continue a state in ``n`` ways, without changing it; with ``stream`` as events."""
    sampling = _include_sampling(include)
    after = last_event_id(request, streamed=data.stream)
    items = generate_multi(service, await call_of(request), _wish(data, after), data.n)

    def answer(made: Made) -> GeneratedMulti:
        return answers.continued(made[0], include_sampling=sampling)

    return await _respond(service, request, items, answer, after, streamed=data.stream)


@writing("/generate/beam", GenerateBeams, answer=GeneratedBeams)
async def generate_beams(
    data: GenerateBeams, request: AnyRequest, service: Service
) -> Response[Any]:
    """Find the likeliest ways in which a state goes on, without changing it."""
    searching = beams.search(service, await call_of(request), data.state_id, data)
    try:
        (recorded,) = await unless_left(request, searching)
    except ClientLeft:
        return Response(None, status_code=CLIENT_LEFT)
    answer = answers.searched(recorded)
    return Response(answer, headers=etag(answer.version))


def _include_sampling(include: str | None) -> bool:
    if include not in (None, "sampling"):
        raise invalid("include", "may name sampling")
    return include is not None


def _wish(data: GenerateTokens | GenerateMulti, after: int | None) -> Wish:
    return Wish(
        state_id=data.state_id,
        generation=data,
        streamed=data.stream,
        resuming=after is not None,
    )


async def _respond(
    service: Service,
    request: AnyRequest,
    items: Items,
    answer: Answer,
    after: int | None,
    *,
    streamed: bool,
) -> Response[Any]:
    """The answer to a generation, as one document or as a stream of events."""
    if streamed:
        items = counted(service.streams, ahead(items))
        return await _stream(request, items, answer, -1 if after is None else after)
    try:
        view = answer(await unless_left(request, _made(items)))
    except ClientLeft:
        return Response(None, status_code=CLIENT_LEFT)
    return Response(view, headers=etag(view.version))


async def _made(items: Items) -> Made:
    """What a generation made, once it is there."""
    async with aclosing(items):
        return [item async for item in items if isinstance(item, tuple)][-1]


async def _stream(request: AnyRequest, items: Items, answer: Answer, after: int) -> Response[Any]:
    """Server-sent events, those after an id; nothing is left behind when the client leaves."""
    try:
        first = await unless_left(request, anext(items))
    except ClientLeft:
        await items.aclose()
        return Response(None, status_code=CLIENT_LEFT)
    events = _events(items, first, answer, after)
    # Whatever ends the response ends the generation, at once and not when memory is swept.
    return Stream(
        events,
        media_type=sse.MEDIA_TYPE,
        headers=sse.HEADERS,
        background=BackgroundTask(_close, events, items),
    )


async def _events(
    items: Items, first: StreamedToken | Made, answer: Answer, after: int
) -> AsyncGenerator[bytes, None]:
    """Each token with its number in the stream as id, then the answer, or the problem."""
    number = -1
    item: StreamedToken | Made | None = first
    try:
        while item is not None:
            if isinstance(item, Struct):
                number += 1
                if number > after:
                    yield sse.event("token", item, number)
            else:
                yield sse.event("done", answer(item))
            item = await anext(items, None)
    except Exception as error:
        yield sse.event("error", problem_of(error))


async def _close(events: AsyncGenerator[bytes, None], items: Items) -> None:
    await events.aclose()
    await items.aclose()


router = Router(
    "/v1",
    tags=["generation"],
    route_handlers=[generate_tokens, generate_continuations, generate_beams],
)
