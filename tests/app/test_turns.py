"""Turns: one at a time per key, first come first served, never too many, nothing left behind."""

import asyncio
from collections.abc import AsyncGenerator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.turns import Turns
from domain.errors import QueueFull


class Busy:
    """Work that takes its turn, notes when it ran, and ends when told."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self.began: list[str] = []
        self.ended: list[str] = []
        self.going_on: dict[str, asyncio.Event] = {}

    async def work(self, key: str, name: str) -> None:
        self.going_on[name] = asyncio.Event()
        async with self._turns.turn(key):
            self.began.append(name)
            await self.going_on[name].wait()
            self.ended.append(name)

    async def start(self, key: str, *names: str) -> dict[str, asyncio.Task[None]]:
        tasks = {name: asyncio.create_task(self.work(key, name)) for name in names}
        await _settle()
        return tasks


async def _settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_one_at_a_time_in_the_order_they_came() -> None:
    turns = Turns(10)
    busy = Busy(turns)
    tasks = await busy.start("a", "1", "2", "3")
    assert busy.began == ["1"]
    for name in ("1", "2", "3"):
        assert busy.began[-1] == name
        busy.going_on[name].set()
        await tasks[name]
        await _settle()
    assert busy.began == ["1", "2", "3"]
    assert turns.held == 0


async def test_keys_do_not_wait_for_each_other() -> None:
    busy = Busy(Turns(10))
    first, second = await busy.start("a", "1"), await busy.start("b", "2")
    assert busy.began == ["1", "2"]
    for name, task in (first | second).items():
        busy.going_on[name].set()
        await task


async def test_no_more_than_the_limit_hold_or_wait_whatever_their_key() -> None:
    turns = Turns(3)
    busy = Busy(turns)
    tasks = await busy.start("a", "1", "2") | await busy.start("b", "3")
    assert turns.held == 3
    for key in ("a", "b", "c"):
        with pytest.raises(QueueFull) as refused:
            async with turns.turn(key):
                pytest.fail("was let in")
        assert refused.value.facts == {"limit": 3}
    assert turns.held == 3
    busy.going_on["3"].set()
    await tasks["3"]
    async with turns.turn("c"):
        assert turns.held == 3
    for name in ("1", "2"):
        busy.going_on[name].set()
        await tasks[name]
    assert turns.held == 0


async def test_a_turn_may_count_for_several() -> None:
    turns = Turns(5)
    async with turns.turn("a", count=3):
        assert turns.held == 3
        with pytest.raises(QueueFull):
            async with turns.turn("b", count=3):
                pytest.fail("was let in")
        async with turns.turn("b", count=2):
            assert turns.held == 5
        assert turns.held == 3
    assert turns.held == 0


async def test_a_turn_that_counts_for_more_than_the_limit_is_held_alone() -> None:
    turns = Turns(3)
    async with turns.turn("a", count=9):
        assert turns.held == 9
        with pytest.raises(QueueFull):
            async with turns.turn("a"):
                pytest.fail("was let in")
    async with turns.turn("b"):
        with pytest.raises(QueueFull):
            async with turns.turn("a", count=9):
                pytest.fail("was let in")
    assert turns.held == 0


async def test_turns_of_one_key_that_count_differently_are_given_back_as_they_were_taken() -> None:
    turns = Turns(9)
    ends = {count: asyncio.Event() for count in (2, 4, 1)}

    async def work(count: int) -> None:
        async with turns.turn("a", count=count):
            await ends[count].wait()

    tasks = {count: asyncio.create_task(work(count)) for count in ends}
    await _settle()
    assert turns.held == 7
    tasks[4].cancel()
    await _settle()
    assert turns.held == 3
    for end in ends.values():
        end.set()
    await asyncio.gather(*tasks.values(), return_exceptions=True)
    assert turns.held == 0


async def test_an_error_within_ends_the_turn_and_goes_on_to_the_caller() -> None:
    turns = Turns(2)
    with pytest.raises(ZeroDivisionError):
        async with turns.turn("a"):
            raise ZeroDivisionError
    assert turns.held == 0
    async with turns.turn("a"):
        assert turns.held == 1


async def test_one_who_waits_and_is_cancelled_leaves_the_line() -> None:
    turns = Turns(10)
    busy = Busy(turns)
    tasks = await busy.start("a", "1", "2", "3")
    tasks["2"].cancel()
    await _settle()
    assert turns.held == 2
    for name in ("1", "3"):
        busy.going_on[name].set()
        await tasks[name]
    assert busy.began == busy.ended == ["1", "3"]
    assert turns.held == 0


async def test_one_who_holds_a_turn_and_is_cancelled_gives_it_up() -> None:
    turns = Turns(10)
    busy = Busy(turns)
    tasks = await busy.start("a", "1", "2")
    tasks["1"].cancel()
    await _settle()
    assert busy.began == ["1", "2"]
    busy.going_on["2"].set()
    await tasks["2"]
    assert busy.ended == ["2"]
    assert turns.held == 0


async def test_one_who_is_cancelled_as_the_turn_is_handed_over_passes_it_on() -> None:
    turns = Turns(10)
    busy = Busy(turns)
    tasks = await busy.start("a", "1", "2", "3")
    busy.going_on["1"].set()
    await tasks["1"]
    tasks["2"].cancel()
    await _settle()
    assert busy.began[-1] == "3"
    busy.going_on["3"].set()
    await tasks["3"]
    assert turns.held == 0


async def test_another_task_may_end_a_turn() -> None:
    turns = Turns(1)

    async def stream() -> AsyncGenerator[int, None]:
        async with turns.turn("a"):
            yield 1
            yield 2

    items = stream()
    assert await asyncio.create_task(anext(items)) == 1
    assert turns.held == 1
    await asyncio.create_task(items.aclose())
    assert turns.held == 0


STEPS = st.lists(
    st.tuples(st.sampled_from("sec"), st.integers(0, 7), st.sampled_from("ab")), max_size=30
)
"""Start (for as many as 1 + the number), end, or cancel (the one with the number); the key."""


@settings(deadline=None)
@given(steps=STEPS)
def test_whatever_begins_ends_or_is_cancelled_turns_stay_exclusive_and_bounded(
    steps: list[tuple[str, int, str]],
) -> None:
    asyncio.run(_play(steps))


async def _play(steps: list[tuple[str, int, str]]) -> None:
    turns = Turns(4)
    within: dict[str, int] = {"a": 0, "b": 0}
    tasks: list[tuple[asyncio.Task[None], asyncio.Event]] = []

    async def work(key: str, count: int, end: asyncio.Event) -> None:
        async with turns.turn(key, count=count):
            within[key] += 1
            assert within[key] == 1
            try:
                await end.wait()
            finally:
                within[key] -= 1

    for what, index, key in steps:
        if what == "s":
            end = asyncio.Event()
            count = 1 + index % 3
            tasks.append((asyncio.create_task(work(key, count, end)), end))
        elif tasks:
            task, end = tasks[index % len(tasks)]
            end.set() if what == "e" else task.cancel()
        await _settle()
        assert 0 <= turns.held <= 4
    for _, end in tasks:
        end.set()
    results = await asyncio.gather(*(task for task, _ in tasks), return_exceptions=True)
    assert all(isinstance(r, QueueFull | asyncio.CancelledError | None) for r in results)
    assert turns.held == 0
