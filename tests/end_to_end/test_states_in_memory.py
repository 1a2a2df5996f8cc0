"""States kept in memory are a cache: they never stand behind the log."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from app import service as service_module
from app.bootstrap import SURROUNDINGS, default_config, open_models
from app.operations import states
from app.operations.generation import Wish, generate
from app.operations.states import Content
from app.service import Call, Service
from app.settings import Settings
from domain.chain import Row
from domain.config import ConfigChanges
from domain.ids import StateId
from domain.plan import GenerationWish
from infra.log.sqlite_log import SqliteLog

SETTINGS = Settings(model_name="cacher-tiny", threads=1, hot_cache_bytes=32 << 20)
CALL = Call(actor="tester", request_id="request")


class SlowLog(SqliteLog):
    """A log whose reads of a state can be held up after they have read."""

    held: asyncio.Event | None = None
    reading: asyncio.Event

    async def state_rows(self, *arguments: Any, **options: Any) -> list[Row]:
        rows = await super().state_rows(*arguments, **options)
        if self.held is not None:
            self.reading.set()
            await self.held.wait()
        return rows


@pytest.fixture
async def service(models_kept: None, tmp_path: Path) -> AsyncIterator[Service]:
    """A service on a slow log."""
    log = await SlowLog.open(tmp_path / "cacher.db")
    try:
        async with open_models(SETTINGS) as models:
            yield Service(
                log,
                models,
                SURROUNDINGS,
                default_model=models.default,
                default_config=default_config(SETTINGS),
                max_queue=16,
            )
    finally:
        await log.close()


async def create(service: Service) -> StateId:
    (recorded,) = await states.create(
        service,
        CALL,
        model_id=service.default_model,
        content=Content("Once upon a time", None),
        changes=ConfigChanges(),
        metadata={},
    )
    return recorded.state_id


async def test_a_slow_reader_does_not_bring_back_a_state_that_has_moved_on(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: Any = service.log
    monkeypatch.setattr(service_module, "MAX_FOLDS", 1)
    state_id = await create(service)
    wish = Wish(
        state_id=state_id,
        generation=GenerationWish(max_tokens=2),
        streamed=False,
        resuming=False,
    )
    items = generate(service, CALL, wish)
    await anext(items)
    await create(service)  # the state that generates is no longer in memory
    log.reading, log.held = asyncio.Event(), asyncio.Event()
    reader = asyncio.create_task(service.state(state_id))
    await log.reading.wait()
    released, log.held = log.held, None
    assert len([item async for item in items]) == 2
    released.set()
    await reader
    assert (await service.live(state_id)).version == 2
    deleted = await states.delete(service, CALL, state_id)
    assert deleted[0].version == 3


async def test_a_state_read_from_the_log_is_the_one_kept_in_memory(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    state_id = await create(service)
    kept = await service.live(state_id)
    monkeypatch.setattr(service_module, "MAX_FOLDS", 1)
    await create(service)
    read = await service.live(state_id)
    assert read is not kept
    assert msgspec.json.encode(read) == msgspec.json.encode(kept)
