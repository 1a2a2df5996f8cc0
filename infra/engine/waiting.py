"""How the event loop waits for what the engine's threads find."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

from infra.engine.engine import Engine

Item = TypeVar("Item")


def deliver_to(inbox: asyncio.Queue[Item]) -> Callable[[Item], None]:
    """Puts items into ``inbox`` from another thread; it holds one text's steps at most."""
    loop = asyncio.get_running_loop()

    def deliver(item: Item) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(inbox.put_nowait, item)

    return deliver


async def taken_from(inbox: asyncio.Queue[Item | Exception]) -> Item:
    """The result that comes into ``inbox``; an error is raised."""
    result = await inbox.get()
    if isinstance(result, Exception):
        raise result
    return result


async def done_by(engine: Engine, work: Callable[[], Item]) -> Item:
    """What ``work`` gives, or raises, on the engine's thread; see :meth:`Engine.submit_chore`."""
    inbox: asyncio.Queue[Item | Exception] = asyncio.Queue()
    deliver = deliver_to(inbox)

    def run() -> None:
        try:
            deliver(work())
        except Exception as error:
            deliver(error)

    engine.submit_chore(run)
    return await taken_from(inbox)


async def worked_out(work: Callable[..., Item], *arguments: Any) -> Item:
    """What ``work`` gives, off the event loop.

    Who is cancelled meanwhile ends only when the work does, since that is how long it takes memory.
    """
    working = asyncio.ensure_future(asyncio.to_thread(work, *arguments))
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        await asyncio.wait((working,))
        raise
