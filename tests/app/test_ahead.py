"""A stream is produced at its own pace, however it is read."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from app.operations.generation import ahead, counted
from app.turns import Turns
from domain.errors import QueueFull


async def numbers(produced: list[Any], count: int) -> AsyncGenerator[Any, None]:
    """Stands for a generation: notes what it has produced, and how it ended."""
    try:
        for number in range(count):
            await asyncio.sleep(0)
            produced.append(number)
            yield number
        produced.append("end")
    except asyncio.CancelledError:
        produced.append("cancelled")
        raise


async def test_a_reader_that_stalls_holds_nothing_up() -> None:
    produced: list[Any] = []
    items = ahead(numbers(produced, 3))
    assert await anext(items) == 0
    for _ in range(20):
        await asyncio.sleep(0)
    assert produced == [0, 1, 2, "end"]
    assert [item async for item in items] == [1, 2]


async def test_a_reader_that_leaves_ends_the_work() -> None:
    produced: list[Any] = []
    items = ahead(numbers(produced, 1_000_000))
    assert await anext(items) == 0
    await items.aclose()
    for _ in range(5):
        await asyncio.sleep(0)
    assert produced[-1] == "cancelled"


async def test_a_reader_that_leaves_in_the_middle_has_what_it_missed_put_away() -> None:
    put_away: list[str] = []

    async def recording() -> AsyncGenerator[Any, None]:
        try:
            yield 1
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)  # what is recorded takes a while
            put_away.append("recorded")

    items = ahead(recording())
    assert await anext(items) == 1
    await items.aclose()
    for _ in range(5):
        await asyncio.sleep(0)
    assert put_away == ["recorded"]


async def test_nothing_begins_before_it_is_read() -> None:
    produced: list[Any] = []
    items = ahead(numbers(produced, 3))
    for _ in range(5):
        await asyncio.sleep(0)
    await items.aclose()
    assert produced == []


async def test_an_error_reaches_the_reader_after_what_came_before() -> None:
    async def failing() -> AsyncGenerator[Any, None]:
        yield 1
        raise ValueError("no more")

    items = ahead(failing())
    assert await anext(items) == 1
    with pytest.raises(ValueError, match="no more"):
        await anext(items)


async def test_no_more_streams_are_open_than_may_be_until_one_is_closed() -> None:
    streams = Turns(1)
    first, second = (counted(streams, ahead(numbers([], 3))) for _ in range(2))
    assert [item async for item in first] == [0, 1, 2]
    third = counted(streams, ahead(numbers([], 3)))
    assert await anext(third) == 0
    with pytest.raises(QueueFull):
        await anext(second)
    await third.aclose()
    assert streams.held == 0
