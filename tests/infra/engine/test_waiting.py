"""Waiting for other threads."""

import asyncio
import threading

import pytest

from infra.engine.waiting import worked_out


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


async def test_what_goes_wrong_with_the_work_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        await worked_out(divmod, 1, 0)
    assert await worked_out(divmod, 7, 2) == (3, 1)
