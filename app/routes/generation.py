"""``/v1/generate``."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Final

from litestar import Request, Response, Router
from litestar.background_tasks import BackgroundTask
from litestar.response import Stream

from app import answers, sse
from app.calls import call_of, etag
from app.operations.generation import ahead, generate
from app.problems import problem_of
from app.routes.handlers import writing
from app.schemas import Generated, GenerateTokens
from app.service import Service
from domain.errors import invalid
from domain.events import Recorded
from domain.ports import Step

Items = AsyncGenerator[Step | Recorded, None]

CLIENT_LEFT: Final = 499
"""What logs show for a client that did not wait for its answer."""


@writing("/generate/token", GenerateTokens, answer=Generated)
async def generate_tokens(
    data: GenerateTokens,
    request: Request[Any, Any, Any],
    service: Service,
    include: str | None = None,
) -> Response[Any]:
    """Continue a state token by token; with ``stream`` as server-sent events."""
    if include not in (None, "sampling"):
        raise invalid("include", "may name sampling")
    call = await call_of(request)
    items = generate(service, call, data.state_id, data, streamed=data.stream)
    if data.stream:
        items = ahead(items)
        first = await _first(items, request)
        if first is None:
            return Response(None, status_code=CLIENT_LEFT)
        events = _events(items, first, include_sampling=include is not None)
        # Whatever ends the response ends the generation, at once and not when memory is swept.
        return Stream(
            events,
            media_type=sse.MEDIA_TYPE,
            headers=sse.HEADERS,
            background=BackgroundTask(_close, events, items),
        )
    async with aclosing(items):
        recorded = [item async for item in items if isinstance(item, Recorded)]
    answer = answers.generated(recorded[0], include_sampling=include is not None)
    return Response(answer, headers=etag(answer.version))


async def _first(items: Items, request: Request[Any, Any, Any]) -> Step | Recorded | None:
    """The first item; none if the client leaves before, and then nothing is generated for it."""
    arriving = asyncio.ensure_future(anext(items))
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((arriving, leaving), return_when=asyncio.FIRST_COMPLETED)
        if arriving.done():
            return arriving.result()
        arriving.cancel()
        await asyncio.wait((arriving,))
        await items.aclose()
        return None
    finally:
        leaving.cancel()


async def _disconnected(request: Request[Any, Any, Any]) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(
    items: Items, first: Step | Recorded, *, include_sampling: bool
) -> AsyncGenerator[bytes, None]:
    """Server-sent events: each token, then the whole answer, or the problem that came up.

    A generation that was recorded by an earlier request is sent again from its event.
    """
    sent = 0
    item: Step | Recorded | None = first
    try:
        while item is not None:
            match item:
                case Step():
                    tokens = [answers.streamed_step(item, sent)]
                case Recorded():
                    tokens = answers.streamed(item) if sent == 0 else []
            for token in tokens:
                yield sse.event("token", token, token.index)
                sent += 1
            if isinstance(item, Recorded):
                yield sse.event("done", answers.generated(item, include_sampling=include_sampling))
            item = await anext(items, None)
    except Exception as error:
        yield sse.event("error", problem_of(error))


async def _close(events: AsyncGenerator[bytes, None], items: Items) -> None:
    await events.aclose()
    await items.aclose()


router = Router("/v1", tags=["generation"], route_handlers=[generate_tokens])
