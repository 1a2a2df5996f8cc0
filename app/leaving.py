"""Clients that go away before they are answered: nobody works on for them."""

import asyncio
from collections.abc import Awaitable
from typing import Any, Final, TypeVar

from litestar import Request

from app.calls import disconnected

T = TypeVar("T")

CLIENT_LEFT: Final = 499
"""What logs show for a client that did not wait for its answer."""


class ClientLeft(Exception):
    """Nobody waits for the answer any more."""


async def unless_left(request: Request[Any, Any, Any], work: Awaitable[T]) -> T:
    """What ``work`` gives; it is cancelled if the client leaves before.

    Raises:
        ClientLeft: it did.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientLeft
    finally:
        leaving.cancel()
        if not working.done():
            working.cancel()
            await asyncio.wait((working,))
        del working  # it holds the error, the error this frame: nothing would be freed


async def _left(request: Request[Any, Any, Any]) -> None:
    await request.body()  # comes first, whether it is wanted or not
    await disconnected(request)
