"""Waiting for other threads."""

import asyncio
import threading

import pytest

from infra.engine.waiting import Parts, worked_out, worked_through


async def test_who_is_cancelled_ends_when_the_work_does_that_was_begun() -> None:
    begun, enough = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        enough.wait(60)

    waiting = asyncio.ensure_future(worked_out(work))
    await asyncio.to_thread(begun.wait, 60)
    waiting.cancel()
    done, _ = await asyncio.wait((waiting,), timeout=0.05)
    assert not done
    enough.set()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_work_that_nobody_waits_for_ends_with_the_part_that_it_is_at() -> None:
    begun, enough = threading.Event(), threading.Event()
    done = []

    def work() -> Parts[None]:
        for part in range(3):
            begun.set()
            enough.wait(60)
            done.append(part)
            yield

    waiting = asyncio.ensure_future(worked_through(work()))
    await asyncio.to_thread(begun.wait, 60)
    waiting.cancel()
    await asyncio.wait((waiting,), timeout=0.05)
    assert not waiting.done()
    enough.set()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert done == [0]
    await worked_through(work())
    assert done == [0, 0, 1, 2]


async def test_long_work_has_few_threads_and_takes_none_from_others() -> None:
    begun, enough = threading.Semaphore(0), threading.Event()

    def work() -> str:
        begun.release()
        enough.wait(60)
        return threading.current_thread().name

    working = [asyncio.ensure_future(worked_out(work)) for _ in range(4)]
    for _ in working:
        await asyncio.to_thread(begun.acquire)
    late, never = (asyncio.ensure_future(worked_out(work)) for _ in range(2))
    await asyncio.wait((never,), timeout=0.05)
    never.cancel()
    with pytest.raises(asyncio.CancelledError):
        await never
    assert not late.done()
    enough.set()
    names = await asyncio.gather(*working, late)
    assert len(set(names)) == 4
    assert all(name.startswith("analysis") for name in names)
    assert begun.acquire(blocking=False), "the late one"
    assert not begun.acquire(blocking=False), "the other had left before it was begun"


async def test_what_goes_wrong_with_the_work_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        await worked_out(divmod, 1, 0)
    with pytest.raises(RuntimeError):
        await worked_out(next, iter(()))
    assert await worked_out(divmod, 7, 2) == (3, 1)
