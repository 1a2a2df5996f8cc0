"""How the event loop waits for what the engine's threads find."""

import asyncio
import contextlib
import functools
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

from domain.ids import TokenId
from infra.engine.engine import Engine
from infra.models.tokenizer import Tokenizer

Item = TypeVar("Item")

Parts = Generator[None, None, Item]
"""Work that comes to its result in parts: it yields between them."""

SHORT_TEXT_LENGTH: Final = 4096
"""Texts up to this size are encoded at once; a thread is not worth its while."""

_THREADS: Final = ThreadPoolExecutor(4, thread_name_prefix="analysis")
"""Their own, so that no file and no other text waits for long work."""


class NobodyWaits(Exception):
    """Work was ended between two parts of it: its result is not wanted any more."""


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


async def encoded(
    tokenizer: Tokenizer, text: str, *, beginning: bool, room: int
) -> tuple[TokenId, ...]:
    """Tokens of a text that may have so many; a long one is encoded off the event loop.

    Raises:
        TooLarge: it has more than that, as far as its size tells.
    """
    tokenizer.check_fits(text, room)
    encode = functools.partial(tokenizer.encode, text, beginning=beginning)
    return encode() if len(text) < SHORT_TEXT_LENGTH else await asyncio.to_thread(encode)


async def worked_out(work: Callable[..., Item], *arguments: Any) -> Item:
    """What ``work`` gives, off the event loop; see :func:`worked_through`."""
    return await worked_through(_whole(work, *arguments))


async def worked_through(parts: Parts[Item]) -> Item:
    """What work in ``parts`` comes to, off the event loop.

    Who is cancelled meanwhile ends only when the work does, since that is how long it takes memory:
    at the end of the part that it is at.
    """
    left = threading.Event()
    begun = _THREADS.submit(_go_through, parts, left)
    working = asyncio.wrap_future(begun)
    try:
        await asyncio.wait((working,))
    except asyncio.CancelledError:
        left.set()
        if not begun.cancel():
            await asyncio.wait((working,))
            working.exception()  # nobody is told of it
        raise
    return working.result()


def _whole(work: Callable[..., Item], *arguments: Any) -> Parts[Item]:
    yield
    return work(*arguments)


def _go_through(parts: Parts[Item], left: threading.Event) -> Item:
    with contextlib.closing(parts):
        while not left.is_set():
            try:
                next(parts)
            except StopIteration as end:
                result: Item = end.value
                return result
    raise NobodyWaits
